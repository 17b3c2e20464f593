"""At full size: an official checkpoint comes in, is pruned for a round, and goes out for the official code to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mirl_dist import models
from mirl_dist.tickets.open import network, open_ticket
from tests.models.test_official import official_shapes

ONE_STEP = {
    "model": {},
    "data.mix": {"derain": 1},
    "data.steps_per_epoch": 1,
    "train.epochs": 1,
    "schedule.warmup_epochs": 0,
    "batch.global": 1,
    "prune.rounds": 1,
    "checkpoint.every_steps": None,
}


@pytest.fixture(scope="module")
def run(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one pruned round that began from a checkpoint of random values in the official layout."""
    folder = tmp_path_factory.mktemp("official")
    chance = torch.Generator().manual_seed(0)
    state = {f"net.{name}": 0.02 * torch.randn(shape, generator=chance) for name, shape in official_shapes().items()}
    torch.save({"state_dict": state}, folder / "official.ckpt")
    ended = lab.mirl("import", str(folder / "official.ckpt"), "--out", str(folder / "mine.safetensors"))
    assert ended.rc == 0 and "542 tensors, 35,376,967 weights" in ended.out, ended.said()
    ended = lab.play(folder, ONE_STEP | {"model.weights": str(folder / "mine.safetensors")}, world=1, seconds=300)
    assert ended.rc == 0, ended.said()
    return folder / "run"


@pytest.mark.long
def test_an_official_checkpoint_is_imported_pruned_and_exported_to_its_own_layout(
    lab: Any, run: Path, tmp_path: Path
) -> None:
    ticket = lab.tickets(run)[1]
    assert (ticket["prunable"] - ticket["alive"], ticket["total"]) == (6_596_754, 35_376_967), "a fifth of 32,983,768"
    out = tmp_path / "out.ckpt"
    ended = lab.mirl("tickets", "export", f"{run}/rounds/01", "--out", str(out), "--compact")
    assert ended.rc == 0, ended.said()
    found = torch.load(out, map_location="cpu", weights_only=True)["state_dict"]
    assert {name.removeprefix("net."): tuple(t.shape) for name, t in found.items()} == official_shapes()
    opened = open_ticket(f"{run}/rounds/01")
    mine = network(opened.config, opened.trained_weights())
    theirs = models.create("promptir").eval()
    theirs.load_state_dict(models.from_official("promptir", found).weights)
    image = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(mine(image), theirs(image))
    dead = sum(int((t == 0).sum()) for t in mine.state_dict().values())
    assert dead >= 6_596_754, "the pruned weights are zeros in it"
