"""Runs on every rank: how much memory selection and rewinding take beyond what is held; FOLDER/RANK.json tells."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mirl_dist.config.config import Config
from mirl_dist.distributed import hardware
from mirl_dist.distributed.engines.sharding import local_part
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.pruning import masks as masking
from mirl_dist.training import lottery
from mirl_dist.training.selection import Pruner
from mirl_dist.training.state import TrainState
from mirl_dist.training.ticket import Ticket

CONSTANT = 48_000_000
"""Bytes of a selection that do not grow with the network: chunks of CHUNK weights and what is computed of them."""
ROWS, COLUMNS, LAYERS = 1024, 1536, 40  # 252 MB of float32


class Tower(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.ModuleList(torch.nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([row(x).sum() for row in self.rows])


def resident(kind: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


@contextlib.contextmanager
def measured(found: dict[str, int], name: str) -> Iterator[None]:
    """The peak inside, beyond what was there before."""
    gc.collect()
    hardware.return_freed_memory()  # else new tensors would fill what earlier ones left
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    yield
    found[name] = resident("VmHWM") - before


def main(folder: Path) -> None:
    ranks = Ranks(device="cpu")
    torch.manual_seed(0)
    model = Tower()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine, _ = ranks.network.engine(model, lambda p: torch.optim.AdamW(p.values()), torch.zeros(1, COLUMNS))
    initial = local_part(engine.layout, first)
    found = {"network": sum(t.nbytes for t in first.values()), "held": sum(t.nbytes for t in engine.weights.values())}
    first.clear()
    state = TrainState(engine, masking.dense_masks(initial, initial), None, ranks.gather_here)
    plan: Any = SimpleNamespace(config=Config())
    ticket = Ticket.model_construct(round=0, protocols={})

    nothing: Any = None  # magnitudes need no network, samples or files
    pruner = Pruner(plan, state, initial, nothing, nothing, nothing, ranks, nothing)
    with measured(found, "extra"):
        pruned = pruner.select()
        ranks.check_agreement("the new masks", masking.digest_of_masks(state.gather_full(pruned.masks)))
        lottery.begin_round(plan.config, state, initial, ranks, pruned, ticket, steps_per_epoch=1)
    assert state.progress.round == 1 and pruned.removed == round(0.2 * (found["network"] // 4 - 1) + 0.5)
    with measured(found, "whole_extra"):
        gathered = dict(state.gather_full(state.weights))
    found |= {"constant": CONSTANT, "gathered": len(gathered)}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.barrier()
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)
