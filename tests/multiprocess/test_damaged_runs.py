"""Whole runs on shards that are damaged, and on shards that come through a cache, seen through their tickets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mirl_dist.data.manifest import CLEAN
from mirl_dist.data.shards import SamplePlace, Shards
from mirl_dist.observability.console import rank_label
from mirl_dist.storage import Folder
from tests.services.outcomes import expect

pytestmark = pytest.mark.long

ALL = {
    "data.mix": {"derain": 3, "dehaze": 1},
    "data.steps_per_epoch": None,
    "data.damage": "skip",
    "prune.rounds": 1,
}  # 24 samples an epoch in 6 steps: every sample of a set as often as the mix says, 2 epochs in each of 2 rounds


def flip(shards: Path, place: SamplePlace) -> None:
    """One bit of the clean image of a sample."""
    found = place.entry.image(CLEAN)
    assert found is not None
    tar = shards / place.shard.name
    data = bytearray(tar.read_bytes())
    data[found.offset + found.size // 2] ^= 1
    tar.write_bytes(data)


class Damaged(NamedTuple):
    shards: Path
    place: SamplePlace


@pytest.fixture(scope="module")
def damaged(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    """The tiny shards with one damaged pair for rain."""
    folder = Path(shutil.copytree(lab.shards, tmp_path_factory.mktemp("damaged") / "shards"))
    place = Shards(Folder(folder)).places("train")["rain"][0]
    flip(folder, place)
    return Damaged(folder, place)


@pytest.fixture(scope="module")
def skipping(lab: Any, damaged: Damaged, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two ranks that skipped the damage, undisturbed, with MLflow. Only to be read."""
    folder = tmp_path_factory.mktemp("skipping")
    store = {"tracking.enabled": True, "tracking.uri": f"sqlite:///{folder}/mlflow.db"}
    ended = expect((0, 0), lab.play(folder, ALL | store | {"data.shards": str(damaged.shards)}))
    told = [line for line in ended.err.splitlines() if "skipped of" in line]
    assert {line.partition(": ")[0] for line in told} <= {f"mirl-dist, {rank_label(rank)}" for rank in range(2)}
    assert len(told) == len(set(told)) > 0, "each rank that meets it tells it once"
    for line in told:
        assert damaged.place.shard.name in line and f"'{damaged.place.entry.key}' is damaged" in line
    assert ended.err.splitlines() == told, "and nothing else"
    return folder


def test_a_ticket_says_what_was_damaged_and_how_many_reads_were_replaced(
    lab: Any, damaged: Damaged, skipping: Path
) -> None:
    tickets = lab.tickets(skipping / "run")
    assert [t["round"] for t in tickets] == [0, 1]
    name = f"{damaged.place.shard.name} {damaged.place.entry.key}"
    for ticket in tickets:
        assert ticket["skipped"] == 6, "three reads an epoch, of this round alone"
        assert list(ticket["damaged"]) == [name]
        assert ticket["damaged"][name].startswith("is damaged (clean.ppm")
        assert ticket["samples"] == 48 * (ticket["round"] + 1), "as many as without damage"
    listed = json.loads(lab.mirl("tickets", "list", str(skipping / "run"), "--json").out)
    assert [(t["skipped"], t["damaged"]) for t in listed] == [(t["skipped"], t["damaged"]) for t in tickets]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_mlflow_has_the_replaced_reads_of_each_round(skipping: Path) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{skipping}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "mirl_dist"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert {r.data.tags["round"]: r.data.metrics["skipped_reads"] for r in runs if r is not parent} == {"0": 6, "1": 6}
    history = client.get_metric_history(parent.info.run_id, "round/skipped_reads")
    assert sorted((m.step, m.value) for m in history) == [(0, 6), (1, 6)]


def test_a_skipping_run_that_is_killed_and_resumed_has_the_same_tickets(
    lab: Any, damaged: Damaged, skipping: Path, tmp_path: Path
) -> None:
    sets = ALL | {"data.shards": str(damaged.shards)}
    for step in ([0, 11], [1, 3]):
        expect((-9, -9), lab.play(tmp_path, sets, fatal={"rank": "all", "step": step}))
    expect(0, lab.play(tmp_path, sets | {"data.workers": 1}), "resuming: round 1, after step 2")
    assert lab.digests(tmp_path / "run") == lab.digests(skipping / "run")


def test_a_whole_shard_that_is_lost_gives_the_same_ticket_wherever_the_shards_lie(
    lab: Any, damaged: Damaged, tmp_path: Path
) -> None:
    digests, told = [], []
    for name, more in (("here", {}), ("there", {"data.cache.folder": "cache"})):
        folder = tmp_path / name
        shards = Path(shutil.copytree(lab.shards, folder / "shards"))
        (shards / damaged.place.shard.name).unlink()
        expect((0, 0), lab.play(folder, ALL | more | {"data.shards": str(shards), "prune.rounds": 0}))
        (ticket,) = lab.tickets(folder / "run")
        assert ticket["skipped"] == 6 * damaged.place.shard.samples
        assert list(ticket["damaged"]) == [damaged.place.shard.name]
        digests += lab.digests(folder / "run")
        told.append(ticket["damaged"])
    assert str(tmp_path) not in json.dumps(told), "a ticket holds no path of a machine"
    assert digests[0] == digests[1]


def test_refused_damage_ends_ranks_in_one_line_and_the_run_goes_on_by_skipping_it(
    lab: Any, damaged: Damaged, tmp_path: Path
) -> None:
    sets = ALL | {"data.shards": str(damaged.shards), "data.damage": "refuse"}
    ended = expect(2, lab.play(tmp_path, sets))
    assert 0 not in ended.codes and "Traceback" not in ended.err, ended.said()
    (told,) = [line for line in ended.err.splitlines() if damaged.place.shard.name in line]
    assert told.startswith("mirl-dist") and f"sample '{damaged.place.entry.key}' is damaged" in told
    assert "data.damage: skip" in told, "what to do instead"
    assert not list((tmp_path / "run").rglob("ticket.json"))
    assert (tmp_path / "run" / "run.json").exists(), "the run had begun"
    expect(0, lab.play(tmp_path, sets | {"data.damage": "skip"}))
    key = f"{damaged.place.shard.name} {damaged.place.entry.key}"
    assert all(t["skipped"] > 0 and list(t["damaged"]) == [key] for t in lab.tickets(tmp_path / "run"))


def test_damaged_evaluation_shards_are_refused_before_training_even_by_skip(lab: Any, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(lab.shards, tmp_path / "shards"))
    place = Shards(Folder(shards)).places("evaluate")["haze"][0]
    flip(shards, place)
    sets = {"data.shards": str(shards), "data.damage": "skip"}
    ended = expect((2, 2), lab.play(tmp_path, sets))
    (line,) = ended.err.splitlines()
    assert place.shard.name in line and f"sample '{place.entry.key}' is damaged" in line
    assert not (tmp_path / "run").exists(), "nothing was begun"
    expect(0, lab.play(tmp_path, sets | {"data.mix": {"derain": 2}, "prune.rounds": 0}))  # not scored: no matter


def test_a_cache_that_is_too_small_is_no_damage_and_is_refused_first(lab: Any, tmp_path: Path) -> None:
    sets = {"data.cache.folder": "cache", "data.cache.gigabytes": 3e-5, "data.damage": "skip"}
    ended = expect((2, 2), lab.play(tmp_path, sets))
    (line,) = ended.err.splitlines()
    assert line.startswith("mirl-dist: data.cache.gigabytes: found 3e-05, but each of 2 ranks on this node needs"), line
    assert "Set it to" in line
    assert not (tmp_path / "run").exists()
    enough = float(line.partition("Set it to ")[2].split()[0])
    expect(0, lab.play(tmp_path, sets | {"data.cache.gigabytes": enough, "prune.rounds": 0}))  # as the message says
    assert lab.tickets(tmp_path / "run")[0]["skipped"] == 0
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= enough * 1e9
