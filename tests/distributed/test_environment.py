"""One place decides which variables of other launchers are obeyed, ignored or refused."""

from __future__ import annotations

import pytest

from mirl_dist.distributed import environment
from mirl_dist.errors import UserError

HOSTILE = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "FSDP_VERSION": "1",
    "PET_NODE_RANK": "1",
    "PET_NNODES": "2",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "elsewhere",
    "MASTER_PORT": "1",
    "OMPI_COMM_WORLD_RANK": "3",
    "PMI_RANK": "3",
}
KEPT = {
    "PATH": "/bin",
    "OMP_NUM_THREADS": "1",
    "MLFLOW_TRACKING_URI": "x",
    "CUDA_VISIBLE_DEVICES": "0",
    "NCCL_DEBUG": "INFO",
}


def test_a_launch_of_our_own_removes_the_variables_of_others_and_names_them() -> None:
    env = HOSTILE | KEPT
    assert environment.clear_for_launch(env) == sorted(HOSTILE)
    assert env == KEPT and environment.foreign_variables(env) == []


def test_a_launch_inside_another_launcher_is_refused() -> None:
    env = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0"}
    with pytest.raises(UserError, match="--launch: found TORCHELASTIC_RUN_ID"):
        environment.clear_for_launch(env)
    assert env == {"TORCHELASTIC_RUN_ID": "none", "RANK": "0"}


@pytest.mark.parametrize(
    "name, value, key",
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "batch.forward"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "optimiser.clip_norm"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train.precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile"),
        ("NVIDIA_TF32_OVERRIDE", "1", "train.precision"),
    ],
)
def test_what_would_change_the_training_under_another_launcher_is_refused(name: str, value: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"found {name}={value} in the environment; the config decides \({key}\)"):
        environment.check_rank({name: value})
    for neutral in ("no", "NO", "none", "1"):
        if (name, neutral) in (
            ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
            ("ACCELERATE_MIXED_PRECISION", "no"),
            ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ):
            environment.check_rank({name: neutral})


@pytest.mark.parametrize(
    "env, text",
    [
        ({"WORLD_SIZE": "2"}, "but not RANK, MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but not RANK, MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: found 'two'"),
        ({"RANK": ""}, "RANK: found ''"),
        ({"RANK": "1"}, "found RANK=1 with WORLD_SIZE=unset"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: found '-1'"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "found RANK=2 with WORLD_SIZE=2",
        ),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 tasks without a launcher"),
    ],
)
def test_an_incomplete_launch_is_refused_by_name(env: dict[str, str], text: str) -> None:
    with pytest.raises(UserError) as refused:
        environment.check_rank(env)
    assert text in str(refused.value)


def test_an_interface_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME: found 'nosuch0'.* Use one of .*\blo\b"):
        environment.check_interfaces({"GLOO_SOCKET_IFNAME": "nosuch0"}, nccl=False)
    with pytest.raises(UserError, match="nosuch0"):
        environment.check_interfaces({"GLOO_SOCKET_IFNAME": "lo,nosuch0"}, nccl=False)
    environment.check_interfaces({"GLOO_SOCKET_IFNAME": "lo"}, nccl=False)
    environment.check_interfaces({}, nccl=True)


@pytest.mark.parametrize(
    "value, fits",
    [
        ("eth", True),
        ("=eth0", True),
        ("=eth", False),
        ("nosuch,ib", True),
        ("=nosuch,ib0", True),
        ("nosuch", False),
        ("^lo,eth", True),
        ("^lo,eth,ib", False),
        ("^=lo,eth", True),
        ("", True),
    ],
)
def test_the_interfaces_of_nccl_are_beginnings_of_names(
    value: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.psutil, "net_if_addrs", lambda: {"lo": [], "eth0": [], "ib0": []})
    env = {"NCCL_SOCKET_IFNAME": value}
    environment.check_interfaces(env, nccl=False)
    if fits:
        environment.check_interfaces(env, nccl=True)
        return
    with pytest.raises(UserError, match=r"NCCL_SOCKET_IFNAME: found '.*', which is no .* Use one of eth0, ib0, lo"):
        environment.check_interfaces(env, nccl=True)


def test_errors_of_nccl_are_left_to_the_watchdog_unless_the_user_says_otherwise() -> None:
    env: dict[str, str] = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    environment.set_nccl_defaults(env, 1860.0, keep_errors=True)
    assert env == {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "1980",
    }
    for given, found in ({"TORCHELASTIC_RUN_ID": "x"}, "0"), ({}, "1"):
        env = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"} | given
        environment.set_nccl_defaults(env, 60.0, keep_errors=True)
        assert env["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == found
    environment.set_nccl_defaults(env := {}, 60.0, keep_errors=False)
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in env, "torch ends what nobody asks about"
