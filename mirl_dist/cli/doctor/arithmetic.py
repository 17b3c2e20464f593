"""Checks whether the arithmetic that a config asks of training is to be had on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from mirl_dist.cli.doctor.machine import Finding, run_check
from mirl_dist.config.config import Config
from mirl_dist.distributed import hardware
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.models.compiled import check_compiler


def check_arithmetic(config: Config, launch_file: LaunchFile) -> Iterator[Finding]:
    """Check train.precision tf32 and train.compile; nothing for other configs."""
    train = config.train
    if train.precision == "tf32":
        choice = hardware.with_precision(hardware.choose_device(train.device), "tf32")
        if choice.cpu and choice.why_cpu and train.device == "auto":
            text = f"{choice.why_cpu}: tf32 needs a GPU; call this on the node that is to train."
            yield Finding("warning", "precision", text)
        else:
            yield Finding("FAULT" if choice.fault else "ok", "precision", choice.fault or "tf32")
    if train.compile and launch_file.engine != "ddp":
        text = f"train.compile with engine {launch_file.engine}: blocks are compiled with DDP alone"
        yield Finding("FAULT", "compile", f"{text}; take a launch file for DDP, or set train.compile=false.")
    elif train.compile:

        def describe() -> str:
            check_compiler()
            return "a C++ compiler is here; the first step compiles for minutes"

        yield run_check("compile", describe)
