"""A real S3 server that keeps its data (Ceph): monitor, object store and radosgw as plain processes of this machine.

All lies in a folder of its own and goes with it. Nobody but this machine reaches it. `CephServer` is used as `S3Server`
is (tests/services/s3_server.py), but what it holds outlives `kill` and `kill_all`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.services.processes import free_port, kill_group, listens, output_of, wait_until
from tests.services.s3_server import S3Server

NEEDED = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool")
MISSING = "radosgw is not installed: apt-get install radosgw ceph-mon ceph-osd"

_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{v2}/0,v1:127.0.0.1:{v1}/0]
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
keyring = {folder}/keyring
log file =
log to stderr = true
err to stderr = true
crash dir = {folder}
run dir = {folder}
admin socket =
pid file =
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 0
debug rocksdb = 0
# Without these the start takes 14 seconds of waiting instead of 2.
paxos propose interval = 0.02
paxos min wait = 0.01
objecter tick interval = 0.2
osd client watch timeout = 3
bdev aio poll ms = 5
bluestore fsck on mkfs = false
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
osd objectstore = bluestore
osd op queue = wpq
bluestore block size = 10737418240
bluestore block create = true
bluestore cache autotune = false
bluestore cache size = 67108864
[client.rgw.a]
rgw data = {folder}
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw enable ops log = false
rgw enable usage log = false
rgw gc obj min wait = 30
rgw gc processor period = 30
"""

_RIGHTS = {
    "mon.": ['mon = "allow *"'],
    "client.admin": ['mon = "allow *"', 'osd = "allow *"'],
    "osd.0": ['mon = "allow profile osd"', 'osd = "allow *"'],
    "client.rgw.a": ['mon = "allow rw"', 'osd = "allow rwx"'],
}

# The daemon's parent holds the other end of its pipe: when that is gone, however it went, so is the daemon.
_BOUND = 'exec 3<&0; (read -r _ <&3; kill -KILL 0) & exec "$@" </dev/null 3<&-'


class CephServer(S3Server):
    """`url`: the endpoint, on the loopback. Use as a context manager, or call `stop`."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ceph-"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            super().__init__()
        except BaseException:
            self.stop()
            raise

    @staticmethod
    def installed() -> bool:
        return all(shutil.which(name) for name in NEEDED)

    def start(self, seconds: float = 120) -> None:
        """Whatever of it does not run now."""
        if not (self._folder / "conf").exists():
            self._settle()
        self._daemon("mon", "ceph-mon", "-f", "--id", "a")
        if not (self._folder / "osd").exists():
            (self._folder / "osd").mkdir()
            self._run("ceph", "osd", "new", str(identity := uuid.uuid4()))
            self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", str(identity))
        self._daemon("osd", "ceph-osd", "-f", "-i", "0")
        self._until("osd", lambda: "booting -> active" in (self._folder / "osd.out").read_text(), seconds)
        if not (self._folder / "users").exists():
            self.user("testing", "testing-secret")
        self._daemon("radosgw", "radosgw", "-f", "-n", "client.rgw.a")
        self._until("radosgw", lambda: listens(self.port), seconds)

    def kill(self) -> None:
        """SIGKILL to radosgw alone."""
        self._kill("radosgw")

    def kill_all(self) -> None:
        """SIGKILL to radosgw, to the object store below it, and to the monitor."""
        for name in ("radosgw", "osd", "mon"):
            self._kill(name)

    def stop(self) -> None:
        """The end of it, its data included."""
        self.kill_all()
        shutil.rmtree(self._folder, ignore_errors=True)

    def user(self, key: str, secret: str) -> dict[str, str]:
        """Make a user, who owns nothing yet; what its client's environment needs."""
        made = ("user", "create", f"--uid={key}", f"--display-name={key}")
        self._run("radosgw-admin", *made, f"--access-key={key}", f"--secret-key={secret}")
        with (self._folder / "users").open("a") as file:
            print(key, file=file)
        return self.env() | {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}

    # -- processes ----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Ports, keys, and an empty monitor."""
        here, fsid, v1, v2 = self._folder, str(uuid.uuid4()), free_port(), free_port()
        run = self._run
        with (here / "keyring").open("w") as file:
            for name, rights in _RIGHTS.items():
                key = run("ceph-authtool", "--gen-print-key")
                print(f"[{name}]\nkey = {key}", *(f"caps {right}" for right in rights), sep="\n", file=file)
        (here / "conf").write_text(_CONF.format(folder=here, fsid=fsid, v1=v1, v2=v2, port=self.port))
        at = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", at, f"{here}/monmap")
        run("ceph-mon", "--id", "a", "--mkfs", "--monmap", f"{here}/monmap")

    def _env(self) -> dict[str, str]:
        return {"CEPH_CONF": f"{self._folder}/conf"}

    def _run(self, *command: str) -> str:
        return output_of(*command, env=self._env(), timeout=120)

    def _daemon(self, name: str, *command: str) -> None:
        """Start it, if it does not run; it lives no longer than this process."""
        if name in self._daemons and self._daemons[name].poll() is None:
            return
        self._kill(name)
        with (self._folder / f"{name}.out").open("wb") as out:
            self._daemons[name] = subprocess.Popen(
                ["sh", "-c", _BOUND, "sh", *command],
                env=os.environ | self._env(),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _until(self, name: str, is_there: Callable[[], bool], seconds: float) -> None:
        def said() -> str:
            return f"{name}: " + (self._folder / f"{name}.out").read_text(errors="replace")[-3000:]

        ended = self._daemons[name].poll
        wait_until(is_there, seconds=seconds, hopeless=lambda: ended() is not None, said=said)

    def _kill(self, name: str) -> None:
        kill_group(self._daemons.pop(name, None))
