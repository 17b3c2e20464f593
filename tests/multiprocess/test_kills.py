"""Runs that are killed and go on: the tickets are those of a run that nobody disturbed, to the last bit."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from tests.services.lab import TASKS

pytestmark = pytest.mark.long


def newest(lab: Any, folder: Path) -> tuple[int, int | None] | None:
    """Round and step of the newest commit, as `mirl-dist status` tells."""
    ended = lab.mirl("status", str(folder / "run"), "--json").ok()
    commit = json.loads(ended.out)["newest_commit"]
    return commit and (commit["round"], commit["step"])


def at(when: str, put: str) -> dict[str, Any]:
    """Rank 0 dies before, during or after the put of that name."""
    return {"rank": 0, "put": put, "when": when}


STAGES: list[tuple[str, dict[str, Any], tuple[int, int | None]]] = [
    ("one rank dies inside a round", {"rank": 1, "step": [0, 3]}, (0, 2)),
    ("right before the commit is whole", at("before", "rounds/00/steps/00000004-*/COMPLETE.json"), (0, 2)),
    ("in the middle of a part", at("during", "*/rounds/00/steps/00000004-*/moments.safetensors"), (0, 2)),
    ("when the ticket lacks only its COMPLETE.json", at("during", "*/rounds/00/ticket-*/COMPLETE.json"), (0, 6)),
    ("after pruning, with the new mask written", at("after", "rounds/01/steps/00000002-*/mask.safetensors"), (0, None)),
    ("all ranks die inside a round", {"rank": "all", "step": [1, 5]}, (1, 4)),
]


def test_a_run_killed_at_every_bad_moment_has_the_tickets_of_one_that_was_not(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    for what, fatal, expected in STAGES:
        ended = lab.play(tmp_path, fatal=fatal)
        assert -9 in ended.codes, f"{what}: nobody was killed\n{ended.said()}"
        if fatal["rank"] != "all":
            assert ended.codes[1 - fatal["rank"]] == 1, f"{what}\n{ended.said()}"
            assert "another rank has exited" in ended.err and "Traceback" not in ended.err
        assert newest(lab, tmp_path) == expected, what
    left = [p.name for p in (tmp_path / "run").rglob(".writing-*")]
    assert not left, "two writers died over a file that they had not named yet, and the next start cleared it away"
    ended = lab.play(tmp_path).ok()
    assert "resuming: round 1, after step 4" in ended.out
    lab.assert_same_run(tmp_path / "run", reference)
    listed = json.loads(lab.mirl("tickets", "list", str(tmp_path / "run"), "--json").out)
    assert [t["round"] for t in listed] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_mlflow_has_each_point_of_a_killed_run_once(lab: Any, reference: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/mlflow.db"
    sets = {"tracking.enabled": True, "tracking.uri": store, "tracking.run_name": "disturbed"}
    MlflowClient(store).search_experiments()  # MLflow makes its tables, which a kill in the midst of it would spoil
    # Right after a commit: what led up to it must be in MLflow already, for nobody will train it again.
    for put in ("rounds/01/ticket-*/COMPLETE.json", "rounds/02/steps/00000004-*/COMPLETE.json"):
        ended = lab.play(tmp_path, sets, fatal=at("after", put))
        assert ended.codes == (-9, 1), ended.said()

    # Loader processes, and no launcher but what srun gives: the numbers are the same.
    ended = lab.play(tmp_path, sets | {"data.workers": 2}).ok()
    assert "Traceback" not in ended.err
    lab.assert_same_run(tmp_path / "run", reference)
    assert_each_point_once(store, lab.tickets(tmp_path / "run"))


def assert_each_point_once(store: str, tickets: list[dict[str, Any]]) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    client = MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments(ViewType.ACTIVE_ONLY) if e.name == "mirl_dist"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    rounds = {r.data.tags["round"]: r for r in runs if r is not parent}
    assert sorted(rounds) == ["0", "1", "2"] and len(runs) == 4
    assert {r.info.status for r in runs} == {"FINISHED"}
    for ticket in tickets:
        run = rounds[str(ticket["round"])]
        for name in ("loss/mean", "lr", "gradient_norm"):
            steps = sorted(m.step for m in client.get_metric_history(run.info.run_id, name))
            assert steps == [1, 2, 3, 4, 5, 6], (name, ticket["round"])
        for name, score in ticket["scores"].items():
            (point,) = client.get_metric_history(run.info.run_id, f"psnr/{name}")
            assert point.value == pytest.approx(score["psnr"])
    for name in tickets[0]["scores"]:
        steps = {
            f"round/psnr/{name}": lambda t: t["round"],
            f"psnr/{name}": lambda t: t["total"] - t["prunable"] + t["alive"],
        }
        for curve, step in steps.items():
            history = client.get_metric_history(parent.info.run_id, curve)
            found = sorted((m.step, m.value) for m in history)
            assert found == sorted((step(t), pytest.approx(t["scores"][name]["psnr"])) for t in tickets), curve


def test_a_dead_rank_ends_the_others_under_a_launcher(lab: Any, tmp_path: Path) -> None:
    arguments = ["--nproc-per-node", "2", lab.fatal, *lab.train(tmp_path, {"checkpoint.every_steps": 3})]
    fatal = {"rank": 1, "step": [0, 3], "signal": 9}
    ended = lab.cold("torchrun", *arguments, cwd=tmp_path, env={"MIRL_FATAL": json.dumps(fatal)}).wait()
    assert ended.rc == 1, ended.said()  # torchrun's own code
    assert f"mirl-dist, rank 0 ({platform.node()}): another rank has exited" in ended.err


def test_a_replica_that_drifts_in_training_stops_the_run_before_its_ticket(lab: Any, tmp_path: Path) -> None:
    sets = {"checkpoint.every_steps": None, "optimiser.weight_decay": 0.0}
    ended = lab.play(tmp_path, sets, fatal={"rank": 1, "step": [0, 5], "do": "drift"})
    assert ended.codes == (2, 2), ended.said()
    assert ended.err.startswith("mirl-dist: ranks disagree on the ticket: rank 0 ")
    assert ended.err.count("\n") == 1, "both ranks know, one says it"
    assert not lab.ended(tmp_path / "run")


def test_a_loss_not_finite_on_one_rank_stops_before_the_step_and_names_samples(lab: Any, tmp_path: Path) -> None:
    ended = lab.play(tmp_path, fatal={"rank": 1, "step": [0, 3], "do": "nan"})
    assert ended.codes == (2, 2), ended.said()
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("mirl-dist: the loss is not finite at round 0, epoch 1, step 0, samples as task:key: ")
    named = ended.err.partition("task:key: ")[2].partition(". ")[0]
    rank, task, _ = named.split(":", 2)
    assert rank == f"rank 1 ({platform.node()})" and task.strip() in TASKS
    assert newest(lab, tmp_path) == (0, 2)


def test_three_ranks_that_resume_add_gradients_in_the_order_of_the_unstopped(lab: Any, tmp_path: Path) -> None:
    # Three is where it shows: DDP's first step in a process would add in another order than its later ones.
    sets = {"batch.global": 6, "prune.rounds": 0}
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    lab.play(tmp_path / "whole", sets, world=3).ok()
    ended = lab.play(tmp_path / "killed", sets, world=3, fatal={"rank": "all", "step": [0, 3]})
    assert ended.codes == (-9, -9, -9), ended.said()
    ended = lab.play(tmp_path / "killed", sets, world=3)
    assert ended.rc == 0 and "resuming: round 0, after step 2" in ended.out, ended.said()
    lab.assert_same_run(tmp_path / "killed/run", tmp_path / "whole/run")
