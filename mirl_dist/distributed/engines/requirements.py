"""Checks an engine's library requirements before any rank is started."""

from __future__ import annotations

import importlib.metadata
import re

from mirl_dist.distributed.engines.base import Name

_TORCH, _DEEPSPEED = (2, 6), (0, 19)
"""Minimum versions. torch.distributed.fsdp exports FSDP2 since 2.6. DeepSpeed 0.16 loses the gradients of all passes
but the last when moments are offloaded, and cannot skip a step."""


def require(name: Name) -> str:
    """Return the engine's name with its library and version. Raise LookupError that tells what to install."""
    library = "deepspeed" if name.startswith("zero") else "torch"
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        raise LookupError(
            f"{name} needs DeepSpeed, which is not installed; pip install 'mirl_dist[deepspeed]', or launch with a "
            "file for DDP or FSDP."
        ) from None
    least = {"deepspeed": _DEEPSPEED, "torch": _TORCH if name == "fsdp" else (0,)}[library]
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < least:
        raise LookupError(
            f"{name} needs {library} {'.'.join(map(str, least))} or newer, and finds {version}; install one, or launch "
            "with a file for DDP."
        )
    return f"{name}, {library} {version}"
