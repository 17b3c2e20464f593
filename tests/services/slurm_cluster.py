"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd as plain processes, with ports, keys and
sockets of their own in a temporary folder.

Neither the machine's own munge nor another SLURM is touched. Partition 'debug' (the default) yields to 'urgent', by
requeueing, after GRACE_SECONDS.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from tests.services.processes import PATIENCE, free_port, output_of, wait_until

NEEDED = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
MISSING = "SLURM is not installed, or this is not root: apt-get install slurm-wlm munge, as root"
GRACE_SECONDS = 60

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Job:
    """A job that was submitted. `output`: where its standard streams go."""

    def __init__(self, cluster: SlurmCluster, number: str, output: Path) -> None:
        self._cluster, self.number, self.output = cluster, number, output

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def field(self, name: str) -> str:
        """As `scontrol show job` tells it: 'JobState', 'Restarts', 'ExitCode' ..."""
        words = self._cluster.run("scontrol", "show", "job", "--oneliner", self.number).split()
        return next(word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}="))

    def until(self, reached: Callable[[], object], seconds: float = PATIENCE) -> None:
        said = lambda: self._cluster.run("scontrol", "show", "job", self.number) + self.said()  # noqa: E731
        wait_until(reached, seconds=seconds, said=said, pause=0.1)

    def ended(self) -> bool:
        return self.field("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "PREEMPTED")

    def requeued(self) -> bool:
        return self.field("JobState") == "PENDING" and self.field("Restarts") != "0"

    def start_now(self) -> None:
        """A requeued job waits for two minutes otherwise, and so never meets what is left of its former self: its
        processes, and that its right to run was taken back, which SLURM knows to the second."""
        left = f"slurmstepd: [{self.field('JobId')}."
        self.until(lambda: not any(name.startswith(left) for name in self._cluster.names()))
        self._cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+2")


class SlurmCluster:
    """Use as a context manager. `env`: what a client's environment needs."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path must be short
        self.env = {"SLURM_CONF": f"{self.folder}/slurm.conf"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._settle()
            self._daemon("munged", "--foreground", "--force", *self._munge())
            self._until("munged", lambda: (self.folder / "munge.socket").exists())
            self._daemon("slurmctld", "-D")
            for node in ("n1", "n2"):
                self._daemon(node, "-D", "-N", node, program="slurmd")
            self._until("slurmctld", lambda: self._idle() == 2)
        except BaseException:
            self.stop()
            raise

    @staticmethod
    def runs_here() -> bool:
        return os.geteuid() == 0 and all(shutil.which(name, path=_path()) for name in NEEDED)

    def run(self, *command: str) -> str:
        """A command of SLURM's; what it prints. Raises RuntimeError where it fails."""
        return output_of(*command, env=self.env, timeout=60)

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str]) -> Job:
        """`sbatch ARGUMENTS` in the folder `cwd` and the whole environment `env`."""
        output = cwd / "job.out"
        command = ["sbatch", "--parsable", f"--output={output}", *arguments]
        number = subprocess.check_output(command, cwd=cwd, env=dict(env) | self.env, text=True, timeout=60)
        return Job(self, number.strip(), output)

    def stop(self) -> None:
        """The end of it, its jobs and its folder included."""
        while found := self._everyone():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def names(self) -> list[str]:
        """What the processes of the cluster call themselves."""
        found = []
        for process in self._everyone():
            with contextlib.suppress(psutil.Error):
                found.append(" ".join(process.cmdline()))
        return found

    # -- processes ----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = {name: free_port() for name in ("controller", "n1", "n2")}
        host = socket.gethostname().partition(".")[0]
        text = _CONF.format(folder=self.folder, host=host, user=getpass.getuser(), grace=GRACE_SECONDS, **ports)
        (self.folder / "slurm.conf").write_text(text)

    def _munge(self) -> list[str]:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge.{ending}" for option, ending in files.items()]

    def _daemon(self, name: str, *arguments: str, program: str | None = None) -> None:
        found = shutil.which(program or name, path=_path())
        assert found is not None
        with (self.folder / f"{name}.out").open("wb") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", found, *arguments],  # it lives no longer than this process
                env=os.environ | self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _until(self, name: str, is_there: Callable[[], bool]) -> None:
        wait_until(
            is_there,
            seconds=120,
            hopeless=lambda: any(daemon.poll() is not None for daemon in self._daemons.values()),
            said=lambda: f"{name}: " + (self.folder / f"{name}.out").read_text(errors="replace")[-3000:],
        )

    def _idle(self) -> int:
        with contextlib.suppress(RuntimeError):
            return self.run("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%t").split().count("idle")
        return 0

    def _everyone(self) -> list[psutil.Process]:
        """All processes of this cluster's, those of its jobs included, which leave the daemons' process groups."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ended = process.status() == psutil.STATUS_ZOMBIE
                if not ended and process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]:
                    found.append(process)
        return found

    def __enter__(self) -> SlurmCluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _path() -> str:
    """Debian keeps the daemons where only root's PATH leads."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
