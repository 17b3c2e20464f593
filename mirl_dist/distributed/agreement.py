"""What ranks must have in common before they join: kind of device, and with it backend; engine and versions.

Ranks that differ in these would wait for each other until a timeout, or compute different bits. They compare them
through the launch's store, which needs no collective.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mirl_dist import __version__
from mirl_dist.distributed.hardware import DeviceChoice
from mirl_dist.models import FORMULATION

_MOST_NAMED = 8
_ADVICE = {
    "device": "Start ranks on equal nodes, or set train.device to cpu or cuda, which names the node to mend.",
    "engine": "Give every node the same launch file.",
}
_NAMES = {"device": "device", "engine": "engine", "nccl": "version of NCCL"}
_SAME_PACKAGES = "Install the same packages on every node."


class RankFacts(NamedTuple):
    """What a rank tells the others before it joins. fault: why it cannot train, or ''. why_cpu: as in DeviceChoice."""

    host: str
    fault: str
    why_cpu: str
    device: str
    engine: str
    torch: str
    nccl: str
    mirl_dist: str

    @classmethod
    def of_this_process(cls, choice: DeviceChoice, engine: str) -> RankFacts:
        return cls(
            host=platform.node(),
            fault=choice.fault,
            why_cpu=choice.why_cpu,
            device="cpu" if choice.cpu else "cuda",
            engine=engine,
            torch=torch.__version__,
            nccl="" if choice.cpu else _nccl_version(),
            mirl_dist=f"{__version__} (network formulation {FORMULATION})",
        )

    @property
    def backend(self) -> str:
        """torch's name of the collective backend for this kind of device."""
        return "gloo" if self.device == "cpu" else "nccl"

    def to_json(self) -> bytes:
        return json.dumps(self._asdict()).encode()

    @classmethod
    def from_json(cls, data: bytes) -> RankFacts:
        """Read what `to_json` wrote, here or in another version of this package, which may have other fields."""
        tree = json.loads(data)
        return cls(*(str(tree.get(name, "")) for name in cls._fields))


def _nccl_version() -> str:
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def find_disagreement(everyone: Sequence[RankFacts]) -> str:
    """Return in one line why ranks with these facts, in rank order, cannot train together; '' if they can."""
    names = [f"rank {rank} ({facts.host})" for rank, facts in enumerate(everyone)]
    for name, facts in zip(names, everyone, strict=True):
        if facts.fault:
            return f"{name}: {facts.fault}"
    for key in ("mirl_dist", "torch", "device", "nccl", "engine"):
        values = [str(getattr(facts, key)) for facts in everyone]
        usual = max(values, key=values.count)
        others = [rank for rank, value in enumerate(values) if value != usual]
        if not others:
            continue
        described = [f"{names[rank]} has {_described(everyone[rank], key)}" for rank in others[:_MOST_NAMED]]
        more = f" and {len(others) - _MOST_NAMED} more differ" if len(others) > _MOST_NAMED else ""
        first, name = values.index(usual), _NAMES.get(key, f"version of {key}")
        return (
            f"ranks differ in their {name}: {', '.join(described)}{more}; {names[first]} has "
            f"{_described(everyone[first], key)}. {_ADVICE.get(key, _SAME_PACKAGES)}"
        )
    return ""


def _described(facts: RankFacts, key: str) -> str:
    value = str(getattr(facts, key)) or "none"
    return f"{value} ({facts.why_cpu})" if key == "device" and facts.why_cpu else value
