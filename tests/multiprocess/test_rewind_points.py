"""What rounds after a cut begin from, by which criterion the cut is made, and the curve within a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mirl_dist.config.config import from_dump
from mirl_dist.pruning import masks as masking
from mirl_dist.storage import Folder
from mirl_dist.training.checkpointing.checkpoint import Checkpoints, rewind_name
from mirl_dist.training.lottery import names_to_rewind
from mirl_dist.training.state import pack_tensors
from tests.services.outcomes import expect

pytestmark = pytest.mark.long

TO_STEP = {"rewind.to": "step", "rewind.step": 2, "prune.rounds": 1, "evaluate.every_epochs": 1}


def tensors(run: Path, pattern: str) -> dict[str, torch.Tensor]:
    (found,) = run.glob(pattern)
    return safetensors.torch.load_file(found)


def test_rounds_return_to_a_step_of_round_0_and_go_on_from_there_also_after_kills(lab: Any, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    expect(0, lab.play(whole, TO_STEP))
    first, second = lab.tickets(whole / "run")
    assert (first["began"], second["began"], first["updates"], second["updates"]) == (0, 2, 6, 6)
    assert (first["curve"]["steps"], second["curve"]["steps"]) == ([3, 6], [3, 6])
    for step in ([0, 1], [0, 4], [1, 3]):
        expect((-9, -9), lab.play(killed, TO_STEP, fatal={"rank": "all", "step": step}))
    expect(0, lab.play(killed, TO_STEP))
    assert lab.digests(killed / "run") == lab.digests(whole / "run"), "curves and all"
    assert tensors(killed / "run", "rewind-*").keys() == tensors(whole / "run", "rewind-*").keys()


def test_a_rewind_point_that_is_damaged_stops_the_run_in_one_line(lab: Any, tmp_path: Path) -> None:
    expect(0, lab.play(tmp_path, TO_STEP | {"prune.rounds": 0}, world=1))
    (file,) = (tmp_path / "run").glob("rewind-*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    text = "is damaged or missing, and nothing else holds the weights of step 2"
    expect(2, lab.play(tmp_path, TO_STEP, world=1), text)
    assert len(lab.tickets(tmp_path / "run")) == 1


@pytest.mark.parametrize(("to", "moved"), [("initial", True), ("step", True), ("rate", False), ("finetune", False)])
def test_learning_rate_rewinding_and_fine_tuning_move_no_weight(to: str, moved: bool) -> None:
    config = from_dump({"rewind": {"to": to, "step": 2 if to == "step" else None}}, "test")
    assert names_to_rewind(config, ["a.weight"], 1) == (frozenset(["a.weight"]) if moved else frozenset())


def test_learning_rate_rewinding_runs_the_whole_schedule_and_fine_tuning_a_part() -> None:
    said = {"prune": {"finetune_epochs_fraction": 0.25}, "train": {"epochs": 20}}
    found = {
        to: from_dump(said | {"rewind": {"to": to}}, "test").round_epochs(1) for to in ("initial", "rate", "finetune")
    }
    assert found == {"initial": 20, "rate": 20, "finetune": 5}


@pytest.mark.parametrize("criterion", ["snip", "synflow"])
def test_criteria_of_the_first_values_cut_the_same_weights_on_one_and_on_two_ranks(
    lab: Any, tmp_path: Path, criterion: str
) -> None:
    digests = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        sets = {"prune.criterion": criterion, "prune.rounds": 1, "prune.fraction": 0.6}
        sets |= {"prune.criterion_batches": 3, "prune.synflow_steps": 3}
        expect(0, lab.play(folder, sets, world=world))
        digests.append(lab.tickets(folder / "run")[1]["mask_digest"])
    assert digests[0] == digests[1]


def test_gradients_choose_other_weights_and_a_floor_keeps_every_tensor(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    sets = {"prune.criterion": "gradient", "prune.fraction": 0.5, "prune.floor": 0.2, "prune.criterion_batches": 2}
    expect(0, lab.play(tmp_path, sets, world=1))
    last = lab.tickets(tmp_path / "run")[2]
    assert min(last["layer_density"].values()) >= 0.2 and last["collapsed"] == []
    assert last["method"] == "gradient global iterative rewound floor 0.2"


def test_a_collapsed_tensor_is_told_and_kept_in_the_ticket(lab: Any, tmp_path: Path) -> None:
    ended = expect(0, lab.play(tmp_path, {"prune.fraction": 0.97, "prune.rounds": 1}, world=1))
    collapsed = lab.tickets(tmp_path / "run")[1]["collapsed"]
    assert collapsed and f"round 1 leaves nothing of {len(collapsed)} tensors ({collapsed[0]}" in ended.out


def test_a_late_writers_rewind_point_lies_beside_the_one_that_commits_name(tmp_path: Path) -> None:
    mine, late = {"a": torch.zeros(3)}, {"a": torch.ones(3)}
    kept = Checkpoints(Folder(tmp_path))
    for weights in (mine, late):  # the second arrives after its launch has lost the run
        Folder(tmp_path).put(rewind_name(masking.digest_tensors(weights)), pack_tensors(weights))
    found = kept.tensors(rewind_name(masking.digest_tensors(mine)))
    assert found is not None and torch.equal(found["a"], mine["a"])
