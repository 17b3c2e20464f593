"""What surrounds a command: variables of other launchers, defaults of accelerate, homes, credentials."""

from __future__ import annotations

import pwd
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mirl_dist.config import local_paths
from mirl_dist.errors import UserError
from tests.distributed.test_environment import HOSTILE
from tests.services.processes import free_port

DEFAULTS = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 3, gradient_accumulation_steps: 4}
num_machines: 3
num_processes: 6
machine_rank: 2
main_process_ip: 10.255.255.1
main_process_port: 1
rdzv_backend: static
mixed_precision: bf16
"""


def only_line(ended: Any) -> str:
    assert ended.rc == 2 and "Traceback" not in ended.err, ended.said()
    (line,) = ended.err.splitlines()
    return str(line)


@pytest.mark.long
def test_a_launch_in_hostile_surroundings_has_the_tickets_of_one_without(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    home = tmp_path / "hf" / "accelerate"
    home.mkdir(parents=True)
    (home / "default_config.yaml").write_text(DEFAULTS)
    arguments = [*lab.train(tmp_path), "--launch", "auto"]
    env = HOSTILE | {"HF_HOME": str(tmp_path / "hf")}
    ended = lab.cold("python", "-m", "mirl_dist", *arguments, cwd=tmp_path, env=env).wait().ok()
    (line,) = (line for line in ended.err.splitlines() if "--launch ignores" in line)
    assert all(name in line for name in HOSTILE)
    lab.assert_same_run(tmp_path / "run", reference)


@pytest.mark.parametrize(
    "env, text",
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "the config decides (batch.forward)"),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "found ACCELERATE_DYNAMO_BACKEND=inductor"),
        ({"GLOO_SOCKET_IFNAME": "nosuch0"}, "GLOO_SOCKET_IFNAME: found 'nosuch0'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "but not RANK, MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE: found 'many'"),
    ],
)
def test_a_process_of_another_launcher_is_refused_by_variable(
    lab: Any, env: dict[str, str], text: str, tmp_path: Path
) -> None:
    assert text in only_line(lab.start(*lab.train(tmp_path), cwd=tmp_path, env=env).wait())
    assert not (tmp_path / "run").exists()


def test_an_interface_that_is_none_is_refused_before_any_rank_starts(lab: Any, tmp_path: Path) -> None:
    arguments = [*lab.train(tmp_path), "--launch", "auto"]
    ended = lab.start(*arguments, cwd=tmp_path, env={"GLOO_SOCKET_IFNAME": "nosuch0"}).wait()
    assert "GLOO_SOCKET_IFNAME: found 'nosuch0', which is no network interface" in only_line(ended)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_missing_gpu_is_refused_by_every_command_that_is_to_use_one(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    image, out = str(lab.folder / "images" / "evaluate" / "chelsea.png"), str(tmp_path / "out")
    train = lab.train(tmp_path, {"train.device": "cuda"})
    for command in (
        train,
        [*train, "--launch", "auto"],
        ["evaluate", str(reference), "--device", "cuda"],
        ["restore", image, "--ticket", str(reference), "--out", out, "--device", "cuda"],
    ):
        line = only_line(lab.mirl(*command, cwd=tmp_path))
        reason = f"found device cuda where no GPU can be used: torch {torch.__version__} is built without CUDA. Mend"
        assert line.startswith(f"mirl-dist: {reason}"), line
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
    doctor = ["doctor", str(lab.config(tmp_path)), "--launch", "auto", "--set", "train.device=cuda"]
    ended = lab.mirl(*doctor, cwd=tmp_path)
    assert ended.rc == 1 and f"FAULT    devices      {reason}" in ended.out, ended.said()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_the_device_of_a_run_can_be_overruled_where_its_ticket_is_used(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    arguments = ("evaluate", str(reference), "--json", "--device")
    automatic, named = (lab.mirl(*arguments, device).ok() for device in ("auto", "cpu"))
    note = f"computes on processors: torch {torch.__version__} is built without CUDA\n"
    assert automatic.out == named.out
    assert (automatic.err.count(note), named.err.count(note)) == (1, 0)
    assert "--device: found 'gpu'. Use auto, cpu or cuda." in only_line(lab.mirl(*arguments, "gpu"))


@pytest.mark.parametrize("command", [["tickets", "list"], ["status"], ["evaluate"]])
def test_a_home_that_is_none_is_named_and_no_folder_is_made(lab: Any, command: list[str], tmp_path: Path) -> None:
    ended = lab.start(*command, "~nosuchuser/run", cwd=tmp_path).wait()
    assert "~nosuchuser/run" in only_line(ended) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["~", "~/run", "~nosuchuser/run"])
def test_a_user_without_an_entry_or_a_home_gets_an_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_entry(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    with pytest.raises(UserError, match=f"found {path}, but .* Write the whole path, or set HOME"):
        local_paths.expand_home(path)
    assert local_paths.log_folder("s3://bucket/run", None).is_absolute()
    assert local_paths.journal_folder("s3://bucket/run", None).is_absolute()


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"])
@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_a_secret_with_a_line_end_is_refused_and_never_shown(lab: Any, name: str, end: str, tmp_path: Path) -> None:
    secret = "hunter2hunter2"
    if end == " " and name.endswith("PASSWORD"):
        pytest.skip("a password may end in a space")
    env = {name: secret + end, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_TRACKING_USERNAME": "me"}
    sets = ["--set", "tracking.enabled=true"]
    for command in (
        ["tickets", "compare", "mlflow:experiment:x"],
        ["doctor", str(lab.config(tmp_path)), "--launch", "auto", *sets],
    ):
        ended = lab.start(*command, cwd=tmp_path, env=env).wait()
        assert secret not in ended.out + ended.err, command
        assert f"{name}: found " in ended.out + ended.err, ended.said()


def test_one_launcher_for_each_node_of_a_slurm_step_is_no_fault(lab: Any, tmp_path: Path) -> None:
    launch = str(Path(__file__).parents[2] / "launch" / "nodes_static.yaml")
    env = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    ended = lab.start(*lab.train(tmp_path), "--launch", launch, cwd=tmp_path, env=env).wait()
    assert "main_process_ip is missing" in only_line(ended), "the launch file is read"
    assert "srun started 2 tasks" in only_line(lab.start(*lab.train(tmp_path), cwd=tmp_path, env=env).wait())


def build_as_a_rank(lab: Any, tmp_path: Path, address: str, port: int) -> Any:
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    command = ["shards", "build", str(lab.folder / "recipe.yaml"), "--out", str(tmp_path / "shards"), "--workers", "1"]
    return lab.start(*command, cwd=tmp_path, env=env)


@pytest.mark.long
def test_a_rank_whose_master_has_no_address_says_what_it_waits_for(lab: Any, tmp_path: Path) -> None:
    ended = build_as_a_rank(lab, tmp_path, "nowhere.invalid", 1).wait()
    waiting, fault = ended.err.splitlines()
    assert ended.codes == (75,) and "waiting for the other ranks at nowhere.invalid:1" in waiting, ended.said()
    assert "RANK=1, WORLD_SIZE=2, MASTER_ADDR and MASTER_PORT" in waiting and "unset these variables" in waiting
    assert "MASTER_ADDR: found 'nowhere.invalid'" in fault and "unset RANK and WORLD_SIZE" in fault
    assert not (tmp_path / "shards").exists()


def test_a_rank_that_waits_for_a_master_that_is_not_there_ends_when_asked(lab: Any, tmp_path: Path) -> None:
    started = build_as_a_rank(lab, tmp_path, "127.0.0.1", free_port())
    (process,) = (psutil.Process(pid) for pid in started.pids)
    started.until(lambda: signal.SIGTERM in handled(process.pid))
    process.send_signal(signal.SIGTERM)
    ended = started.wait(20)
    assert ended.codes == (75,) and ended.err == "", ended.said()  # rank 0 speaks for all


def handled(pid: int) -> set[int]:
    """The signals for which a process has a handler."""
    (mask,) = (line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line)
    return {number for number in range(1, 65) if int(mask, 16) >> (number - 1) & 1}
