"""Lives of a run that only tracks: as processes that can be killed, forked from one that has imported MLflow once.

Asked by lines of JSON on standard input, each with the arguments of `live`; answers with the process id, and with the
exit code of a process when asked for `{"ended": pid}`. The memory of the run is `tracking.json` (MLflow's ids) and
`commit.json` (round, step, backlog), both in `run`, as a run's store would have them.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

STEPS, ROUNDS, COMMIT_EVERY = 30, 2, 10


def put(path: Path, said: object) -> None:
    """Complete or not at all, as a store does it."""
    path.with_suffix(f".{os.getpid()}").write_text(json.dumps(said))
    os.replace(path.with_suffix(f".{os.getpid()}"), path)


def get(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else otherwise


def picture(shade: int) -> bytes:
    """A PNG."""
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (8, 4), (shade, 0, 0)).save(data, "PNG")
    return data.getvalue()


def live(
    uri: str, run: str, journal: str, *, die_at: int = -1, linger: float = 0, hold: bool = False, farewell: float = 60
) -> None:
    """One life, from the last commit to the end, or to the SIGKILL that it gives itself.

    die_at: after how many steps of this life; linger: seconds before dying, in which its other thread goes on; hold:
    to wait to be killed instead.
    """
    from mirl_dist.observability.mlflow import sender
    from mirl_dist.observability.mlflow import tracker as tracking

    sender.FIRST_PAUSE_SECONDS = sender.LONGEST_PAUSE_SECONDS = 0.02
    sender.SECONDS_PER_DELIVERY, sender.STEPS_PER_DELIVERY = 0.02, 3
    tracking.FAREWELL_SECONDS = farewell
    folder = Path(run)
    ids, commit = get(folder / "tracking.json", {}), get(folder / "commit.json", {"round": 0, "step": 0, "backlog": ""})

    def remember(new: dict[str, str]) -> None:
        put(folder / "tracking.json", get(folder / "tracking.json", {}) | new)

    tracker = tracking.MlflowTracker(
        uri=uri,
        experiment=folder.name,
        run_name="demo",
        remembered=ids,
        remember=remember,
        journal=Path(journal),
        inherited=base64.b64decode(commit["backlog"]),
    )

    def keep(round_: int, step: int) -> None:
        backlog = base64.b64encode(tracker.pending()).decode()
        put(folder / "commit.json", {"round": round_, "step": step, "backlog": backlog})

    lived = 0
    tracker.begin_run({"seed": 0}, {})
    tracker.log_file("config.yaml", b"seed: 0", "run")
    for round_ in range(commit["round"], ROUNDS):
        tracker.begin_round(round_, {}, {"round": round_})
        for step in range(commit["step"] + 1 if round_ == commit["round"] else 1, STEPS + 1):
            if lived == die_at:
                time.sleep(linger if not hold else 3600)
                os.kill(os.getpid(), signal.SIGKILL)
            tracker.log_step(step, {"loss": 1 / step, "rate": 0.1, "life": float(os.getpid())})
            lived += 1
            time.sleep(0.002)
            if step % COMMIT_EVERY == 0 and step < STEPS:
                keep(round_, step)
        tracker.log_ticket(round_, {"psnr/BSD68": 27.0 + round_, "alive_weights": 1000 - 100 * round_})
        tracker.log_file(f"tickets/{round_:02d}/ticket.json", b"ticket %d" % round_, "round")
        tracker.log_image("denoise_25/cbsd68 3096", picture(round_), round_)
        tracker.end_round()
        keep(round_ + 1, 0)
    tracker.end_run()


def main() -> None:
    from mirl_dist.observability.mlflow.client import import_quietly

    import_quietly("http://127.0.0.1:9")
    import mlflow.store.tracking.rest_store
    import mlflow.tracking.client  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        if "ended" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["ended"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os.close(0)
            live(**asked)
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
