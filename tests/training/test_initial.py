"""Runs that begin from a ticket or from imported weights: controls, and networks trained elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirl_dist.pruning import masks as masking
from tests.services.outcomes import expect

ONE_ROUND = {"prune.rounds": 0}


def masks_of(run: Path, round_: int) -> dict[str, torch.Tensor]:
    (folder,) = run.glob(f"rounds/{round_:02d}/ticket-*")
    return safetensors.torch.load_file(folder / "mask.safetensors")


def first_values(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "initial.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def control(lab: Any, folder: Path, ticket: Path, kind: str, **how: Any) -> Any:
    sets = ONE_ROUND | {"start.ticket": f"{ticket}/rounds/02", "start.kind": kind}
    return lab.play(folder, sets, **{"world": 1} | how)


@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from(["layer", "global"]))
def test_a_random_mask_keeps_the_number_of_alive_weights(seed: int, size: int, per: str) -> None:
    chance = torch.Generator().manual_seed(seed)
    masks = {f"t{i}": torch.rand(size, i + 1, generator=chance) > 0.7 for i in range(3)}
    drawn = masking.random_masks(masks, seed, per)
    assert masking.count_surviving(drawn) == masking.count_surviving(masks)
    assert {n: m.shape for n, m in drawn.items()} == {n: m.shape for n, m in masks.items()}
    if per == "layer":
        assert masking.densities(drawn) == masking.densities(masks)
    assert masking.digest(masking.random_masks(masks, seed, per)) == masking.digest(drawn)


def test_random_masks_of_other_seeds_and_scopes_differ_and_spread_over_all_weights() -> None:
    masks = {"a": torch.arange(20000) < 2000, "b": torch.arange(20000) < 8000}
    layer, over_all, other = (masking.random_masks(masks, s, p) for s, p in ((0, "layer"), (0, "global"), (1, "layer")))
    assert len({masking.digest(m) for m in (layer, over_all, other, masks)}) == 4
    assert 0.22 < float(over_all["a"].float().mean()) < 0.28
    assert 150 < int(layer["a"][:2000].sum()) < 250, "a tenth of every stretch"


@pytest.mark.long
def test_a_ticket_trains_again_from_its_own_first_values_under_its_own_mask(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    expect(0, control(lab, tmp_path, reference, "ticket"))
    (ticket,) = lab.tickets(tmp_path / "run")
    source = lab.tickets(reference)[2]
    assert (ticket["round"], ticket["method"], ticket["parent"]) == (0, "control ticket", source["digest"])
    assert ticket["mask_digest"] == source["mask_digest"]
    mine, theirs = first_values(tmp_path / "run"), first_values(reference)
    masks = masking.unpack(masks_of(reference, 2), {n: tuple(theirs[n].shape) for n in masks_of(reference, 2)})
    masking.apply_masks(theirs, masks)
    assert same(mine, theirs), "the survivors' first values, and zero where dead"


@pytest.mark.parametrize("kind", ["reinit", "random_layer", "random_global"])
@pytest.mark.long
def test_a_control_differs_from_its_ticket_in_one_thing_only(
    lab: Any, reference: Path, tmp_path: Path, kind: str
) -> None:
    expect(0, control(lab, tmp_path, reference, kind))
    (ticket,), source = lab.tickets(tmp_path / "run"), lab.tickets(reference)[2]
    assert ticket["alive"] == source["alive"] and ticket["parent"] == source["digest"]
    assert (ticket["mask_digest"] == source["mask_digest"]) == (kind == "reinit")
    assert (ticket["layer_density"] == source["layer_density"]) == (kind != "random_global")
    assert same(first_values(tmp_path / "run"), first_values(reference)) == (kind != "reinit")


@pytest.mark.long
def test_a_control_that_is_killed_and_lost_its_first_masks_ends_in_the_same_ticket(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    whole, killed, source = (tmp_path / name for name in ("whole", "killed", "source"))
    for folder in (whole, killed):
        folder.mkdir()
    shutil.copytree(reference, source)

    def play(folder: Path, **how: Any) -> Any:
        return control(lab, folder, source, "random_layer", world=2, **how)

    expect(0, play(whole))
    expect((-9, -9), play(killed, fatal={"rank": "all", "step": [0, 1]}))
    (killed / "run" / "start.safetensors").unlink()
    expect(0, play(killed), "made anew")
    shutil.rmtree(source)
    assert lab.digests(killed / "run") == lab.digests(whole / "run")
    expect(0, play(killed), "nothing is left to train")  # the run holds all that it began with


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        ({"start.ticket": "nowhere/rounds/02"}, "nowhere holds no run"),
        ({"start.ticket": "RUN/rounds/07"}, "finished rounds are 0, 1, 2"),
        ({"start.ticket": "RUN", "model.dim": 16}, "is of another network"),
        ({"start.ticket": "RUN", "prune.scope": "all"}, "was pruned in another scope"),
        ({"model.weights": "absent.safetensors"}, "model.weights: found absent.safetensors, which is no file"),
        ({"model.weights": "tiny.yaml"}, "model.weights: tiny.yaml is a JSON text"),
        (
            {"model.weights": "half.safetensors"},
            "'refinement.0.attn.qkv.weight' (1 such) is not float32. Save it as float32",
        ),
        ({"model.weights": "few.safetensors"}, "is of another network"),
        ({"prune.criterion": "snip", "prune.criterion_batches": 7}, "found 7, but a round has 6 steps. Give fewer"),
        ({"rewind.to": "step", "rewind.step": 6}, "rewind.step: found 6, but a round has 6 steps"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_in_one_line_before_a_run_begins(
    lab: Any, reference: Path, tmp_path: Path, sets: dict[str, Any], text: str
) -> None:
    weights = first_values(reference)
    safetensors.torch.save_file(dict(list(weights.items())[1:]), tmp_path / "few.safetensors")
    weights["refinement.0.attn.qkv.weight"] = weights["refinement.0.attn.qkv.weight"].half()
    safetensors.torch.save_file(weights, tmp_path / "half.safetensors")
    if "start.ticket" in sets:
        sets = sets | {"start.ticket": sets["start.ticket"].replace("RUN", str(reference))}
    ended = expect(2, lab.play(tmp_path, sets, world=1))
    assert text in ended.err and len(ended.err.splitlines()) == 1, ended.said()
    assert not list((tmp_path / "run").glob("rounds/*"))


@pytest.mark.long
def test_a_random_mask_over_a_run_that_began_from_survivors_alone_is_refused(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    expect(0, control(lab, tmp_path, reference, "ticket"))
    sets = ONE_ROUND | {
        "start.ticket": f"{tmp_path}/run/rounds/00",
        "start.kind": "random_global",
        "run.folder": "again",
    }
    expect(2, lab.play(tmp_path, sets, world=1), "has only the initial values of its survivors")


def test_imported_weights_are_what_a_run_begins_with(lab: Any, reference: Path, tmp_path: Path) -> None:
    (trained,) = reference.glob("rounds/00/ticket-*/weights.safetensors")
    shutil.copy(trained, tmp_path / "mine.safetensors")
    expect(0, lab.play(tmp_path, {"model.weights": "mine.safetensors", "prune.rounds": 1}, world=1))
    assert same(first_values(tmp_path / "run"), safetensors.torch.load_file(trained))
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["model"]["weights"] == "mine.safetensors"
