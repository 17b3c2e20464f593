"""Whole runs on two ranks, seen through what they leave in their folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mirl_dist.pruning import masks as masking
from tests.services.outcomes import expect

Tensors = dict[str, Tensor]


def weights(folder: Path) -> Tensors:
    return safetensors.torch.load_file(folder / "weights.safetensors")


def ticket_of(run: Path, round_: int) -> Path:
    """The folder of a finished round's ticket."""
    (folder,) = run.glob(f"rounds/{round_:02d}/ticket-*")
    return folder


def masks(run: Path, round_: int, like: Tensors) -> Tensors:
    packed = safetensors.torch.load_file(ticket_of(run, round_) / "mask.safetensors")
    return masking.unpack(packed, {n: tuple(like[n].shape) for n in packed})


def masked(tensors: Tensors, mask: Tensors) -> Tensors:
    return {n: t * mask[n] if n in mask else t for n, t in tensors.items()}


def differing(one: Tensors, other: Tensors) -> set[str]:
    assert one.keys() == other.keys()
    return {n for n in one if not torch.equal(one[n], other[n])}


def assert_laws(run: Path, tickets: list[dict[str, Any]]) -> None:
    """What holds in every run: the chain of parents, the counts, and zeros where weights are dead."""
    initial = safetensors.torch.load_file(run / "initial.safetensors")
    parent, before = None, None
    for round_, ticket in enumerate(tickets):
        assert ticket["round"] == round_
        assert ticket["parent"] == parent
        assert ticket["initial_digest"] == masking.digest_tensors(initial)
        mask = masks(run, round_, initial)
        assert ticket["mask_digest"] == masking.digest(mask)
        assert ticket["alive"] == masking.count_surviving(mask)
        assert ticket["prunable"] == masking.size(mask)
        assert ticket["total"] == sum(t.numel() for t in initial.values())
        if before is not None:
            assert ticket["alive"] < tickets[round_ - 1]["alive"]
            assert all(not bool((mask[n] & ~before[n]).any()) for n in mask), "a dead weight came back"
        if (ticket_of(run, round_) / "weights.safetensors").exists():
            trained = weights(ticket_of(run, round_))
            assert ticket["weights_digest"] == masking.digest_tensors(trained)
            assert masking.find_nonzero_pruned(trained, mask) is None
        parent, before = ticket["digest"], mask


def test_three_rounds_become_three_tickets_each_the_child_of_the_one_before(lab: Any, reference: Path) -> None:
    tickets = lab.tickets(reference)
    assert [t["round"] for t in tickets] == [0, 1, 2]
    assert [t["updates"] for t in tickets] == [6, 6, 6]
    assert [t["samples"] for t in tickets] == [24, 48, 72]
    assert tickets[0]["threshold"] == 0.0 < tickets[1]["threshold"]
    assert set(tickets[0]["scores"]) == {"denoise_25/clean", "derain/rain", "dehaze/haze"}
    assert_laws(reference, tickets)


def test_a_finished_run_keeps_no_commits_of_the_middle_of_its_rounds(reference: Path) -> None:
    left = sorted(str(p.relative_to(reference)) for p in reference.rglob("*") if p.is_file())
    whole = ["COMPLETE.json", "mask.safetensors", "pictures.png", "scores.csv", "state.json", "ticket.json"]
    whole.append("weights.safetensors")
    logs = [f"logs/rank-000{rank}.jsonl" for rank in range(2)]
    launch = ["accepted/00000001.json", *(f"lease/00000001.{end}" for end in ("json", "beat.json", "released.json"))]
    rounds = [f"rounds/0{r}/ticket-0001/{n}" for r in range(3) for n in whole]
    assert left == sorted(["initial.safetensors", "run.json", *logs, *launch, *rounds])


def test_a_finished_run_resumes_to_nothing_and_says_so(lab: Any, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    told = ("lease", "accepted", "logs")
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.parent.name not in told]
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}
    expect(0, lab.play(tmp_path), "resuming: round 2, finished", "nothing is left to train")
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before
    more = {p for p in (tmp_path / "run").rglob("*") if p.is_file()} - before.keys()
    assert {p.parent.name for p in more} == set(told)


@pytest.mark.long
def test_accumulation_takes_the_same_steps_and_other_ranks_continue_the_run(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    expect(0, lab.play(tmp_path, {"batch.forward": 1, "prune.rounds": 0}), "2 ranks x 2 passes x 1 samples")
    run, (whole,) = tmp_path / "run", lab.tickets(tmp_path / "run")
    first = safetensors.torch.load_file(reference / "initial.safetensors")
    one, other = weights(ticket_of(reference, 0)), weights(ticket_of(run, 0))
    moved = sum(float((one[n] - first[n]).square().sum()) for n in one)
    apart = sum(float((one[n] - other[n]).square().sum()) for n in one)
    assert apart < 1e-4 * moved, "accumulation changed more than the last digits"
    for name, score in lab.tickets(reference)[0]["scores"].items():
        assert score["psnr"] == pytest.approx(whole["scores"][name]["psnr"], abs=0.01)

    expect(0, lab.play(tmp_path, {"prune.rounds": 1}, world=4), "resuming: round 0, finished")
    tickets = lab.tickets(run)
    assert [t["world"] for t in tickets] == [2, 4]
    assert tickets[0] == whole
    assert_laws(run, tickets)


def test_every_round_starts_from_the_first_values_of_its_survivors(lab: Any, tmp_path: Path) -> None:
    # The published schedule runs the whole first epoch at rate 0, so the commit at its end holds the round's start.
    sets = {"schedule.by": "epoch", "checkpoint.every_steps": 3, "train.precision": "bf16"}
    expect(0, lab.play(tmp_path, sets, fatal={"rank": 0, "do": "keep"}))
    run = tmp_path / "run"
    initial = safetensors.torch.load_file(run / "initial.safetensors")
    for round_ in range(3):
        started = weights(run / f"rounds/{round_:02d}/steps/00000003-0001")
        assert differing(started, masked(initial, masks(run, round_, initial))) == set()
        assert differing(weights(ticket_of(run, round_)), started) != set()
        moments = safetensors.torch.load_file(run / f"rounds/{round_:02d}/steps/00000006-0001/moments.safetensors")
        for kind in ("exp_avg", "exp_avg_sq"):
            of = {n.removesuffix(f".{kind}"): t for n, t in moments.items() if n.endswith(f".{kind}")}
            assert masking.find_nonzero_pruned(of, masks(run, round_, initial)) is None
            assert all(t.dtype == torch.float32 for t in of.values())
    assert_laws(run, lab.tickets(run))


@pytest.mark.long
def test_the_published_rewind_carries_prompts_over_and_stops_at_the_target_by_layer(lab: Any, tmp_path: Path) -> None:
    sets = {
        "prune.per": "layer",
        "prune.rounds": 5,
        "prune.target_sparsity": 0.3,
        "rewind.what": "published",
        "schedule.by": "epoch",
        "checkpoint.every_steps": 3,
        "keep.rounds": "best",
        "keep.by": ["psnr/*"],
    }
    expect(0, lab.play(tmp_path, sets, fatal={"rank": 0, "do": "keep"}))
    run = tmp_path / "run"
    tickets = lab.tickets(run)
    initial = safetensors.torch.load_file(run / "initial.safetensors")
    trained = {r: weights(run / f"rounds/0{r}/steps/00000006-0001") for r in range(3)}

    shares = [t["alive"] / t["total"] for t in tickets]
    assert len(tickets) == 3, "the run stops after the first round that reaches the target"
    assert 1 - shares[1] < 0.3 <= 1 - shares[2] + (1 - tickets[0]["prunable"] / tickets[0]["total"])
    layers = tickets[1]["layer_density"]
    assert all(0.75 < d < 0.85 for n, d in layers.items() if n != "output.weight" and initial[n].numel() > 100)
    assert layers["output.weight"] == pytest.approx(0.9, abs=0.02)

    for round_ in (1, 2):
        started = weights(run / f"rounds/0{round_}/steps/00000003-0001")
        mask = masks(run, round_, initial)
        carried = {n for n in initial if "weight" not in n and not (round_ == 1 and "bias" in n)}
        assert any("prompt" in n for n in carried) and any("temperature" in n for n in carried)
        expected = {n: trained[round_ - 1][n] if n in carried else initial[n] for n in initial}
        assert differing(started, masked(expected, mask)) == set()
        assert carried & differing(started, initial), "training had moved none of them"

    means = [sum(s["psnr"] for s in t["scores"].values()) / 3 for t in tickets]
    best = json.loads((run / "best.json").read_text())
    assert best["round"] == max(range(3), key=lambda r: (means[r], r))
    assert best["score"] == pytest.approx(means[best["round"]])
    kept = [(ticket_of(run, r) / "weights.safetensors").exists() for r in range(3)]
    assert kept == [r in (best["round"], 2) for r in range(3)]
    shown = lab.mirl("tickets", "show", str(run), "--json")
    assert json.loads(shown.out)["round"] == best["round"]
    assert_laws(run, tickets)
    dropped = kept.index(False)
    expect(2, lab.mirl("evaluate", str(run / f"rounds/0{dropped}")), "kept its ticket but not its weights")


@pytest.mark.long
def test_a_one_shot_prunes_once_and_fine_tunes_what_it_trained(lab: Any, tmp_path: Path) -> None:
    sets = {
        "prune.style": "one_shot",
        "prune.criterion": "magnitude",
        "prune.rounds": 1,
        "prune.fraction": 0.7,
        "prune.finetune_lr": 1e-30,  # moves nothing: the round ends with the weights that it began with
        "train.epochs": 20,
        "data.steps_per_epoch": 1,
        "checkpoint.every_steps": None,
    }
    expect(0, lab.play(tmp_path, sets))
    run = tmp_path / "run"
    tickets = lab.tickets(run)
    dense, tuned = weights(ticket_of(run, 0)), weights(ticket_of(run, 1))
    mask = masks(run, 1, dense)
    assert [t["updates"] for t in tickets] == [20, 1], "5 % of 20 epochs"
    assert tickets[1]["alive"] / tickets[1]["prunable"] == pytest.approx(0.3, abs=1e-3)
    assert differing(tuned, masked(dense, mask)) == set()
    flat = torch.cat([dense[n].flatten() for n in mask]).abs()
    alive = torch.cat([mask[n].flatten() for n in mask])
    assert bool(flat[alive].min() >= flat[~alive].max())
    assert_laws(run, tickets)
