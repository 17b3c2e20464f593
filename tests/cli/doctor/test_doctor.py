"""Laws of the doctor: it names what is needed, what would stop a launch and what to do, and leaves nothing behind."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirl_dist.cli.doctor import doctor, machine, memory, services
from mirl_dist.cli.doctor.plan import plan_as_dict
from mirl_dist.config import config as configs
from mirl_dist.distributed import hardware
from mirl_dist.distributed.launch import launcher
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.errors import UserError
from mirl_dist.storage import Options, Store, configured, open_store
from mirl_dist.storage.http import HttpStore
from tests.services.ceph_server import MISSING, CephServer

REPOSITORY = Path(__file__).resolve().parents[3]
OTHERS = (
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", *OTHERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What is said of this machine, by the first 16 letters of each line."""
    capsys.readouterr()
    doctor.print_machine()
    return {line[:16].strip(): line[17:] for line in capsys.readouterr().out.splitlines()}


def test_every_library_of_the_package_is_looked_for_and_no_cache_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    said = lines(capsys)
    project = (REPOSITORY / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    needed = re.findall(r'"([A-Za-z0-9-]+)', project)
    assert len(needed) > 10 and set(needed) <= said.keys()
    assert re.fullmatch(rf"{tmp_path}/job/\S+, \d+\.\d GB free .*", said["shard cache"])
    assert not (tmp_path / "job").exists()


def test_credentials_of_s3_are_told_of_and_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = swordfish\n")

    def are_set(**variables: str) -> bool:
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(name, value)
            found = lines(capsys)
        assert "swordfish" not in str(found)
        return found["S3 credentials"].startswith("set")

    assert not are_set() and not are_set(AWS_ACCESS_KEY_ID="swordfish"), "half of a pair opens nothing"
    assert are_set(AWS_ACCESS_KEY_ID="swordfish", AWS_SECRET_ACCESS_KEY="swordfish")
    assert are_set(AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "credentials"))
    assert all(are_set(**{name: "swordfish"}) for name in OTHERS)


def test_a_plan_for_many_worlds_reads_the_shards_once(
    lab: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(address: str, options: Options) -> Store:
        opened.append(address)
        return open_store(address, options)

    monkeypatch.setattr(configured, "open_store", counted)
    monkeypatch.chdir(tmp_path)
    config = configs.read(lab.config(tmp_path), ["batch.global=12", "batch.forward=4", "data.cache.folder=cache"])
    doctor.print_plan(config)
    assert opened.count(str(lab.shards)) == 1
    said = capsys.readouterr().out
    assert re.search(r"^data\.cache +cache, \d+\.\d GB free$", said, re.MULTILINE) and not (tmp_path / "cache").exists()
    assert "1 rank x 3 passes x 4 samples = global batch 12" in said
    assert "2 ranks: batch.forward: 4 samples per pass do not divide the 6" in said
    assert "4 ranks x 1 pass x 3 samples = global batch 12" in said and "64 ranks: batch.global" in said


# -- a launch -----------------------------------------------------------------------------------------------------

TWO = str(REPOSITORY / "launch" / "cpu_two.yaml")
QUIET = ("tracking.enabled=false", "train.device=cpu")


_PASSES: dict[str, memory.Passes] = {}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, outside any launch; what a pass takes is counted once for all tests."""

    def passes_of(*asked: Any, count: Any = memory.passes_of) -> memory.Passes:
        if repr(asked) not in _PASSES:
            _PASSES[repr(asked)] = count(*asked)
        return _PASSES[repr(asked)]

    monkeypatch.setattr(memory, "passes_of", passes_of)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judged(lab: Any, here: Path, launch: str | Path, *sets: str, **more: Any) -> tuple[list[str], dict[str, Any]]:
    """The lines that are not ok, each a fault or a warning, and the plan."""
    config = configs.read(lab.config(here), [*QUIET, *sets])
    said, _ = launcher.choose(config, str(launch))
    findings, plan = doctor.examine(config, said, more.get("gpu"), more.get("rate"))
    assert all("\n" not in finding.text for finding in findings)
    return [finding.line() for finding in findings if finding.kind != "ok"], plan_as_dict(plan)


def launch_of(folder: Path, **keys: Any) -> Path:
    """A launch file with some keys set otherwise than in launch/cpu_two.yaml."""
    said = {"num_machines": 1, "num_processes": 2, "distributed_type": "MULTI_GPU", "mixed_precision": "no"}
    path = folder / "launch.yaml"
    path.write_text(json.dumps(said | {"machine_rank": 0} | keys))  # JSON is YAML
    return path


def everything(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_sound_setup_is_told_with_its_plan_in_100_columns_and_leaves_nothing(lab: Any, here: Path) -> None:
    config = str(lab.config(here))
    before = everything(here)
    arguments = ["--gpu", "A40", "--rate", "2", "--set", "data.cache.folder=cache"]
    ended = lab.mirl("doctor", config, "--launch", TWO, *arguments, cwd=here)
    assert ended.rc == 0 and ended.err == "", ended.said()
    checked, _, plan = ended.out.partition("\n\n")
    assert all(line.startswith("ok ") for line in checked.splitlines())
    assert {line.split()[1] for line in checked.splitlines()} >= {"world", "port", "devices", "engine", "run.folder"}
    assert max(map(len, plan.splitlines())) <= 100
    assert "2 ranks x 1 forward pass x 2 samples" in plan and "3 steps, 12 samples" in plan
    assert "A40, 44.3 GiB: fits; largest batch.forward that fits: 2" in plan
    assert "2 epochs, 6 steps; 12 s at 2 samples/s (--rate)" in plan
    assert everything(here) == before


def test_all_faults_are_told_at_once_as_text_and_as_json_and_the_command_fails(
    lab: Any, here: Path, tmp_path: Path
) -> None:
    arguments = ["doctor", str(lab.config(here)), "--launch", str(launch_of(tmp_path, num_processes=3))]
    arguments += ["--set", "data.shards=nowhere", "--json"]
    ended = lab.start(*arguments, cwd=here, env={"WORLD_SIZE": "8"}).wait()
    assert ended.rc == 1, ended.said()
    told = json.loads(ended.out)
    faults = {found["about"]: found["text"] for found in told["findings"] if found["kind"] == "FAULT"}
    assert told["faults"] == len(faults) == 2
    assert faults["world"].startswith("batch.global: a global batch of 4 cannot be shared by 3 ranks. Use 1, 2, 4")
    (warning,) = (found["text"] for found in told["findings"] if found["about"] == "environment")
    assert warning == "WORLD_SIZE set, for another launch: --launch ignores them; unset them."
    assert faults["shards"].startswith("data.shards: nowhere holds no manifest.json. Build shards with")
    assert told["plan"]["per_rank"] is None and told["plan"]["bytes"]["weights"] > 0


def test_options_of_a_launch_without_one_are_refused(lab: Any, here: Path) -> None:
    for arguments, said in ((["--gpu", "A40"], "without --launch"), (["--launch", TWO], "--launch without a config")):
        ended = lab.mirl("doctor", *arguments, cwd=here)
        assert ended.rc == 2 and said in ended.err, ended.said()


@pytest.mark.long
def test_auto_is_checked_as_train_would_start_it(lab: Any, here: Path) -> None:
    found, plan = judged(lab, here, "auto")
    assert found == [] and plan["ranks"] == 2 and plan["engine"] == "ddp"


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A socket that listens on this machine."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening


def test_a_port_that_is_in_use_is_a_fault_on_node_0_alone(lab: Any, here: Path, taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    text = f"{port} is in use on this machine; give another main_process_port, or 0: any."
    alone = launch_of(here, main_process_port=port)
    assert judged(lab, here, alone)[0] == [f"FAULT    port         {text}"]
    refused = lab.mirl("train", str(lab.config(here)), "--launch", str(alone), cwd=here)
    assert refused.rc == 2 and refused.err == f"mirl-dist: {alone}: main_process_port: {text}\n", refused.said()
    assert not (here / "run").exists()
    two = {"num_machines": 2, "main_process_ip": "127.0.0.1", "main_process_port": port}
    assert judged(lab, here, launch_of(here, **two, machine_rank=1))[0] == []
    taken.close()
    (silent,) = judged(lab, here, launch_of(here, **two, machine_rank=1))[0]
    assert silent.startswith(f"warning  port         127.0.0.1:{port} does not answer")
    assert judged(lab, here, launch_of(here, **two))[0] == []
    strange = launch_of(here, **two | {"main_process_ip": "nobody.invalid"})
    (line,) = judged(lab, here, strange)[0]
    assert line.startswith("FAULT    address      nobody.invalid has no address") and "correct main_process_ip" in line


@pytest.mark.parametrize("name", ["", " "])
def test_a_launch_needs_a_name(name: str) -> None:
    with pytest.raises(UserError, match="--launch: found an empty name. Give a file from launch/, or auto"):
        launcher.choose(configs.Config(), name)


def test_the_memory_of_a_container_is_what_its_groups_leave(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    for place, limit in (("", "max"), ("pod", "5000"), ("pod/one", "max"), ("other", "1")):
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / "memory.max").write_text(f"{limit}\n")
    groups.write_text("0::/pod/one/not-seen-here\n")
    assert machine.memory_limits(groups, root) == [5000]
    (root / "memory/job").mkdir(parents=True)
    (root / "memory/job/memory.limit_in_bytes").write_text("3000\n")
    groups.write_text("9:cpu,memory:/job/step\n3:cpuset:/other\n1:name=systemd:/other\n0::/\n")
    assert machine.memory_limits(groups, root) == [3000]
    assert machine.memory_limits(tmp_path / "none", root) == []


def test_more_ranks_than_gpus_and_gpus_without_room_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    config, said = configs.Config(), LaunchFile(Path("x"), 2, 1, 0, 2, "ddp", False, "none", None, 0)
    monkeypatch.setattr(hardware, "backends", lambda: {"gloo": True, "nccl": True})
    monkeypatch.setattr(hardware, "gpus", lambda: 1)
    (one,) = machine.check_devices(config, said, None)
    assert one.kind == "FAULT" and one.text.startswith("2 ranks per node, but 1 GPUs here; lower num_processes")
    monkeypatch.setattr(hardware, "gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda n: ((40 - 30 * n) * 2**30, 48 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: "A40")
    (full,) = machine.check_devices(config, said, 20 * 2**30)
    assert full.kind == "FAULT"
    assert full.text.startswith("a rank needs about 20.0 GiB, free are GPU 1 (10.0 GiB); lower batch.forward")
    assert [f.kind for f in machine.check_devices(config, said, 2**30)] == ["ok"]


@pytest.mark.long
def test_a_gpu_that_is_too_small_is_a_fault_with_what_fits(lab: Any, here: Path) -> None:
    sets = ("model={dim: 48}", "batch.global=768", "data.patch_pixels=32", "data.mix={denoise_25: 900}")
    (line,), plan = judged(lab, here, TWO, *sets, gpu="A40")
    assert line.startswith("FAULT    GPU          a rank needs about ") and "A40 has 44.3 GiB" in line
    assert plan["fits"] is False and plan["largest_forward"] == 192


@pytest.mark.parametrize("small_disk", [1], indirect=True)
def test_a_full_disk_is_a_fault_with_how_much_is_needed_where(lab: Any, here: Path, small_disk: Path) -> None:
    run = f"{small_disk}/run"
    (line,) = judged(lab, here, TWO, f"run.folder={run}")[0]
    text = rf"FAULT    disk         the run in {run} needs 1\d\.\d MB, free are 1\.05 MB"
    assert re.fullmatch(rf"{text}: make room for 1\d\.\d MB, or choose another disk\.", line)
    (small_disk / "filling").write_bytes(bytes(2**20 - 4096))
    found = judged(lab, here, TWO, f"run.folder={run}")[0]
    assert any("FAULT    run.folder" in one and "No space left on device" in one for one in found), found
    assert os.listdir(small_disk) == ["filling"]


def test_a_cache_on_a_network_disk_is_warned_of() -> None:
    places = {"/": "ext4", "/home": "nfs4", "/home/local disk": "xfs"}
    mounts = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in places.items()]
    assert machine.file_system_type(Path("/home/me"), mounts) == "nfs4"
    assert machine.file_system_type(Path("/home/local disk/x"), mounts) == "xfs"
    assert machine.file_system_type(Path("/homely"), mounts) == "ext4"
    far = machine.check_cache(Path("/tmp/none"), [SimpleNamespace(mountpoint="/", fstype="nfs")])
    assert far.kind == "warning" and far.text.endswith("set data.cache.folder to a local disk.")


def test_a_shared_memory_that_is_too_small_for_the_loaders_is_a_fault(tmp_path: Path) -> None:
    said = LaunchFile(Path("x"), 1, 1, 0, 1, "ddp", False, "none", None, 0)
    config = configs.Config()
    huge = config.model_copy(update={"data": config.data.model_copy(update={"patch_pixels": 10**6})})
    (line,) = [f for f in machine.check_limits(huge, said, tmp_path) if f.about == "memory"]
    assert line.kind == "FAULT" and "enlarge it (docker: --shm-size), or lower data.workers." in line.text


@pytest.mark.parametrize(("ahead", "kind"), [(0.0, "ok"), (300.0, "warning"), (-2000.0, "FAULT")])
def test_a_clock_that_is_off_is_told_by_how_much_and_which_way(
    lab: Any, here: Path, monkeypatch: pytest.MonkeyPatch, ahead: float, kind: str
) -> None:
    clock = datetime.now(timezone.utc) + timedelta(seconds=ahead)
    monkeypatch.setattr(HttpStore, "now", lambda self: clock)
    config = configs.read(lab.config(here), [*QUIET, "data.shards=https://host/shards"])
    (finding,) = services.check_clocks(config)
    assert finding.kind == kind
    if ahead:
        way = "behind" if ahead > 0 else "ahead of"
        text = rf"this clock is (\d+) s {way} that of https://host/shards; S3 refuses from 900 s"
        match = re.fullmatch(rf"{text}: set it \(chrony, NTP\)\.", finding.text)
        assert match is not None and abs(int(match[1]) - abs(ahead)) < 60


class KnowsNothing(http.server.BaseHTTPRequestHandler):
    """A tracking server without experiments."""

    def do_GET(self) -> None:
        body = b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}'
        self.send_response(404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a tracking server that knows nothing."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), KnowsNothing) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_tracking_server_that_is_away_is_a_fault_which_shows_no_password(
    lab: Any, here: Path, answering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = f"127.0.0.1:{nobody.getsockname()[1]}"
        for address, pieces in (
            (f"me:swordfish@{away}", (f"MLflow       http://{away}: ", "Connection refused", "Check the server")),
            (f"me:hunt/er2swordfish@{away}", ("Write a / in a password as %2F",)),
            ("127.0.0.1:99999", ("found the port 99999, which is out of range",)),
        ):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
            (line,) = judged(lab, here, TWO, "tracking.enabled=true")[0]
            assert line.startswith("FAULT    MLflow") and all(piece in line for piece in pieces), line
            assert not any(word in line for word in ("swordfish", "hunt", "s3://")), line
    monkeypatch.setenv("MLFLOW_TRACKING_URI", answering)
    assert judged(lab, here, TWO, "tracking.enabled=true")[0] == []
    assert os.environ.get("MLFLOW_TRACKING_URI") == answering


def test_a_sqlite_store_is_looked_at_and_not_made(lab: Any, here: Path) -> None:
    assert judged(lab, here, TWO, "tracking.enabled=true")[0] == []
    assert not (here / "mlflow.db").exists() and not (here / "mlruns").exists()
    (here / "mlflow.db").write_text("this is no database, whatever its name says" * 100)
    (line,) = judged(lab, here, TWO, "tracking.enabled=true")[0]
    assert line.startswith("FAULT    MLflow") and "not a database; correct tracking.uri" in line


def test_a_run_of_another_config_in_the_folder_is_a_fault(lab: Any, here: Path, reference: Path) -> None:
    before = everything(reference)
    found, plan = judged(lab, here, TWO, f"run.folder={reference}")
    assert found == [] and plan["seconds_per_round"] > 0, "the rate that the run itself measured"
    config = configs.read(lab.config(here), [*QUIET, f"run.folder={reference}"])
    assert services.check_run(config, None).text.startswith("finished: newest commit ")
    more = config.model_copy(update={"prune": config.prune.model_copy(update={"rounds": 9})})
    assert services.check_run(more, None).text.startswith("goes on: ")
    (line,) = judged(lab, here, TWO, f"run.folder={reference}", "optimiser.lr=0.5")[0]
    assert line.startswith(f"FAULT    run          {reference} belongs to another config")
    assert everything(reference).keys() == before.keys()


@pytest.fixture(scope="module")
def ceph() -> Iterator[CephServer]:
    if not CephServer.installed():
        pytest.skip(MISSING)
    with CephServer() as running:
        assert isinstance(running, CephServer)
        yield running


def test_every_right_that_is_missing_in_a_bucket_is_named_and_no_probe_stays(
    lab: Any, here: Path, ceph: CephServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = ceph.bucket("runs")
    client, place = ceph.client(), f"run.folder={bucket}/a/run"
    guest = ceph.user("guest", "guest-secret")

    def allow(*rights: str) -> None:
        said = {"Effect": "Allow", "Principal": {"AWS": ["arn:aws:iam:::user/guest"]}}
        on = ["arn:aws:s3:::runs", "arn:aws:s3:::runs/*"]
        said |= {"Action": [f"s3:{right}" for right in rights], "Resource": on}
        client.put_bucket_policy(Bucket="runs", Policy=json.dumps({"Version": "2012-10-17", "Statement": [said]}))

    for name, value in ceph.env().items():
        monkeypatch.setenv(name, value)
    assert judged(lab, here, TWO, place)[0] == []
    for name, value in guest.items():
        monkeypatch.setenv(name, value)
    allow("GetObject", "ListBucket", "DeleteObject")
    found = judged(lab, here, TWO, place)[0]
    assert [line.split(": ")[0].split("   ")[-1].strip() for line in found] == ["put", "conditional put"]
    assert all(re.search(r"FAULT .* needs the right s3:PutObject on it\. Grant it", line) for line in found), found
    allow("GetObject", "ListBucket", "PutObject")
    refused, untried = judged(lab, here, TWO, place)[0]
    assert "FAULT    run.folder   delete: s3://runs/a/run" in refused and "s3:DeleteObject" in refused
    assert untried.startswith("warning  run.folder   put: not tried in s3://runs/a/run, for a probe would stay")
    (absent,) = judged(lab, here, TWO, "run.folder=s3://nobody/run")[0]
    assert "the bucket does not exist. Create it" in absent, "said once, not for each right"
    allow("PutObject", "DeleteObject", "GetObject")
    found = judged(lab, here, TWO, place)[0]
    assert any("FAULT    run.folder   list: " in line and "s3:ListBucket on the bucket" in line for line in found)
    assert "Contents" not in client.list_objects_v2(Bucket="runs"), "a probe was left behind"
