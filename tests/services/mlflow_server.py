"""A real MLflow server as a process group of its own, on SQLite: what it has answered survives its SIGKILL."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from mirl_dist.observability.mlflow.tracker import MlflowTracker
from tests.services.processes import free_port, kill_group, wait_until


class MlflowServer:
    """`url`: its address, the same after `kill` and `start`; `database`: its file. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.database = folder / "m.db"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self, seconds: float = 120) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self._folder / "files")]
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
            )
        ended, said = self._process.poll, (self._folder / "log").read_text
        wait_until(self._is_healthy, seconds=seconds, hopeless=lambda: ended() is not None, said=said)

    def _is_healthy(self) -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
            return True
        return False

    def kill(self) -> None:
        """SIGKILL to its process group."""
        kill_group(self._process)
        self._process = None

    def __enter__(self) -> MlflowServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def curve(uri: str, run: str, name: str) -> list[tuple[int, float]]:
    """Every point of a curve, by step: also those that a chart would hide."""
    return sorted((point.step, point.value) for point in client(uri).get_metric_history(run, name))


def runs_of(uri: str, run: str) -> list[Any]:
    """All runs of the experiment of `run`."""
    look = client(uri)
    return list(look.search_runs([look.get_run(run).info.experiment_id]))


def tracker_of(uri: str | None, experiment: str, journal: Path, ids: dict[str, str], **more: Any) -> MlflowTracker:
    """A tracker of the run 'demo'; `ids` plays the memory that survives a restart."""
    usual: dict[str, Any] = {"run_name": "demo", "remembered": ids, "remember": ids.update}
    return MlflowTracker(uri=uri, experiment=experiment, journal=journal, **(usual | more))
