"""A rank whose last one behaves as `hang.py HOW FOLDER` says; all meet under a watch of five seconds.

stopped, frozen-main: that rank (or rank 0) is stopped by SIGSTOP in its own work. asleep: it sleeps there. slow: it is
late for every meeting. stop: it is asked to stop, and comes to the meeting when all have heard of it. restarted: it is
asked to stop and dies; started again, with rank 0 late, nobody has heard of that.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from mirl_dist.distributed.process_group import is_peer_loss
from mirl_dist.distributed.ranks import Ranks


def work(ranks: Ranks, how: str, folder: Path) -> None:
    last = ranks.rank == ranks.world - 1
    ranks.barrier()
    if how == "stop":
        threading.Thread(target=hear, args=(ranks, folder), daemon=True).start()
        if last:
            ranks.request_stop()
            wait_for(lambda: len(list(folder.glob("heard-*"))) == ranks.world)
    with ranks.in_phase("evaluating"):
        if how == "stopped" and last or how == "frozen-main" and ranks.is_main:
            (folder / "stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "asleep" and last:
            time.sleep(600)
    with ranks.in_phase("training"):
        for _ in range(4):
            if how == "slow" and last:
                time.sleep(1.5)
            ranks.gather(torch.tensor(ranks.rank), what="gather of loss flags")
    if how == "restarted":
        again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
        (folder / f"{'again' if again else 'first'}-{ranks.rank}").write_text(str(ranks.stop_requested()))
        if not again and last:
            ranks.request_stop()
        if not again:
            wait_for(ranks.stop_requested)
            os._exit(3)
        time.sleep(2.5)
        (folder / f"later-{ranks.rank}").write_text(str(ranks.stop_requested()))
    ranks.on_main(lambda: None, what="last word")
    ranks.barrier()
    ranks.close()


def hear(ranks: Ranks, folder: Path) -> None:
    wait_for(ranks.stop_requested)
    (folder / f"heard-{ranks.rank}").touch()


def wait_for(found: object, seconds: float = 120) -> None:
    assert callable(found)
    last = time.monotonic() + seconds
    while not found():
        if time.monotonic() > last:
            os._exit(9)
        time.sleep(0.02)


if __name__ == "__main__":
    if sys.argv[1] == "restarted" and os.environ["RANK"] == "0":
        time.sleep(0.5)
    try:
        work(Ranks(device="cpu", timeout_seconds=5), sys.argv[1], Path(sys.argv[2]))
    except RuntimeError as error:
        if not is_peer_loss(error):
            raise
        print("another rank has exited", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # as the commands do
