"""`mirl_dist` whose last rank is on a node that differs as the environment variable MIRL_OTHER says.

torch: another version of torch; gpus: it has GPUs; no_gpus: it has none, and train.device is cuda (the other ranks
pretend to have them).
"""

from __future__ import annotations

import os

import torch

from mirl_dist.cli import app
from mirl_dist.distributed import agreement, hardware

if __name__ == "__main__":
    how, is_last = os.environ["MIRL_OTHER"], int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    if how == "torch" and is_last:
        torch.__version__ = "1.13.0"  # type: ignore[assignment]
    if (how == "gpus") == is_last and how != "torch":
        hardware.choose_device = lambda wanted: hardware.DeviceChoice(cpu=False)
        agreement._nccl_version = lambda: "2.29.7"
    app.main()
