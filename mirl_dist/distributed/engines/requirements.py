"""Checks what an engine needs of this environment, before any rank is started."""

from __future__ import annotations

import importlib.metadata
import re

from mirl_dist.distributed.engines.base import Name

_TORCH, _DEEPSPEED = (2, 6), (0, 19)
"""FSDP2 stands in torch.distributed.fsdp from 2.6 on. DeepSpeed 0.16 left the gradients of all passes but the last out
when moments were offloaded, and has no way to skip a step."""


def require(name: Name) -> str:
    """Return the engine's library with its version. Raises LookupError that says what to install."""
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
