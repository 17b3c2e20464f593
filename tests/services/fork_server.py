"""A process that has imported the heavy libraries once and forks commands and ranks from itself.

Importing torch and accelerate takes each process seconds; a suite that starts a hundred processes would spend its time
there. What is forked here is as real as any process: its own session, its own standard streams, its own exit code.
Asked by lines of JSON on standard input: `start` answers with process ids, `poll` with the exit codes so far.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # scripts of the suite import the suite


def become(ask: dict[str, Any], rank: int) -> None:
    """Turn this forked process into `python -m mirl_dist ARGUMENTS` or `python SCRIPT ARGUMENTS`, and run it."""
    os.setsid()
    os.chdir(ask["cwd"])
    os.environ.update(ask["env"])
    if ask["world"] is not None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ask["world"]))
    for descriptor, path in ((0, os.devnull), (1, f"{ask['streams']}.{rank}.out"), (2, f"{ask['streams']}.{rank}.err")):
        handle = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, descriptor)
        os.close(handle)
    warnings.resetwarnings()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup, around a suite, has ignored
    sys.argv = [ask["script"] or "mirl_dist", *ask["arguments"]]
    if ask["script"]:
        runpy.run_path(ask["script"], run_name="__main__")
    else:
        runpy.run_module("mirl_dist", run_name="__main__", alter_sys=True)


def leave(code: Any) -> None:
    """End without taking all that was imported apart, which costs about a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def poll(pid: int) -> int | None:
    """The exit code of a child that has ended, minus the signal for a killed one."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def import_deepspeed() -> None:
    """Three seconds of every rank that needs it. It prints, and standard output is for answers."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def main() -> None:
    import accelerate  # noqa: F401
    import skimage.data  # noqa: F401
    import torch._inductor
    import torch.utils.data  # noqa: F401
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # noqa: F401

    import mirl_dist.cli.show
    import mirl_dist.data.building.build
    import mirl_dist.training.run  # noqa: F401

    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a fork would lose {threads - 1} threads"
    codes: dict[int, int | None] = {}
    while line := sys.stdin.readline():
        ask = json.loads(line)
        if "poll" in ask:
            for pid in ask["poll"]:
                codes[pid] = codes.get(pid) if codes.get(pid) is not None else poll(pid)
            print(json.dumps([codes[pid] for pid in ask["poll"]]), flush=True)
            continue
        if "ACCELERATE_USE_DEEPSPEED" in ask["env"]:
            import_deepspeed()
        pids = []
        for rank in range(ask["world"] or 1):
            pid = os.fork()
            if pid == 0:
                try:
                    become(ask, rank)
                except SystemExit as ended:
                    leave(ended.code)
                return
            pids.append(pid)
        print(json.dumps(pids), flush=True)


if __name__ == "__main__":
    main()
