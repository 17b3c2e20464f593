"""Launch files: what each says, what one node's environment adds, and what is refused because it would train alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mirl_dist.distributed.launch.launch_file import LaunchFile, read
from mirl_dist.errors import UserError

LAUNCH = Path(__file__).resolve().parents[3] / "launch"
TWO: dict[str, Any] = {"distributed_type": "MULTI_GPU", "num_processes": 2}
NODES = TWO | {"num_processes": 8, "num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1"}
ZERO: dict[str, Any] = {"distributed_type": "DEEPSPEED", "num_processes": 2}
FSDP: dict[str, Any] = {"distributed_type": "FSDP", "num_processes": 2}


def zero(**section: Any) -> dict[str, Any]:
    """A file for ZeRO-2 with harmless values where nothing else is given."""
    harmless = {"zero_stage": 2, "gradient_accumulation_steps": 1, "gradient_clipping": "none"}
    return ZERO | {"deepspeed_config": harmless | section}


def written(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "launch.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_every_launch_file_says_how_to_use_it_and_can_be_read(path: Path) -> None:
    file = read(path, {"MIRL_NODE_RANK": "1", "MIRL_MASTER_ADDR": "10.0.0.1"})
    assert file.ranks == file.nodes * file.ranks_per_node
    first = re.split(r"^[^#]", path.read_text(), maxsplit=1, flags=re.M)[0]
    assert f"--launch launch/{path.name}" in first
    assert f"accelerate launch --config_file launch/{path.name}" in first


def test_a_file_for_one_node_has_no_meeting_point_between_nodes(tmp_path: Path) -> None:
    path = written(tmp_path, TWO)
    assert read(path, {}) == LaunchFile(path, 2, 1, 0, 2, "ddp", False, "none", None, None)


def test_slurm_and_kubernetes_name_the_node_only_where_there_are_several(tmp_path: Path) -> None:
    several = {key: value for key, value in NODES.items() if key != "machine_rank"}
    path = written(tmp_path, several)
    assert read(path, {"SLURM_NODEID": "1"}).node_rank == 1
    assert read(path, {"JOB_COMPLETION_INDEX": "1"}).node_rank == 1
    assert read(path, {"MIRL_NODE_RANK": "0", "SLURM_NODEID": "1", "JOB_COMPLETION_INDEX": "1"}).node_rank == 0
    assert read(written(tmp_path, NODES), {"MIRL_NODE_RANK": "0"}).node_rank == 0, "before the file"
    assert read(written(tmp_path, TWO), {"SLURM_NODEID": "7"}).node_rank == 0
    with pytest.raises(UserError, match="2 nodes, and the rank of this node is unknown. Set MIRL_NODE_RANK on "):
        read(written(tmp_path, several), {})


def test_one_file_serves_other_numbers_of_nodes_and_another_first_node(tmp_path: Path) -> None:
    env = {"MIRL_NODES": "16", "MIRL_RANKS_PER_NODE": "4", "MIRL_NODE_RANK": "15"}
    env |= {"MIRL_MASTER_ADDR": "node-0", "MIRL_MASTER_PORT": "4000"}
    path = written(tmp_path, TWO | {"rdzv_backend": "c10d"})
    assert read(path, env) == LaunchFile(path, 64, 16, 15, 4, "ddp", False, "c10d", "node-0", 4000)


@pytest.mark.parametrize(
    ("tree", "engine", "offload"),
    [
        (zero(zero_stage=1), "zero1", False),
        (zero(offload_optimizer_device="cpu"), "zero2", True),
        (zero(zero_stage=3, offload_param_device="cpu"), "zero3", True),
        (FSDP | {"fsdp_config": {"fsdp_version": 2}}, "fsdp", False),
        (FSDP | {"fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}}, "fsdp", True),
        ({"num_processes": 1}, "ddp", False),
    ],
)
def test_the_engine_is_the_file_s(tmp_path: Path, tree: dict[str, Any], engine: str, offload: bool) -> None:
    file = read(written(tmp_path, tree), {})
    assert (file.engine, file.offload) == (engine, offload)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (TWO | {"num_machine": 2}, "num_machine: found an unknown key (value 2); the nearest key is 'num_machines'"),
        (TWO | {"num_processes": 0}, "num_processes: found 0; "),
        (NODES | {"num_processes": 3}, "num_processes: found 3 on num_machines 2; give all nodes together a multiple"),
        (NODES | {"machine_rank": 2}, "machine_rank: found 2 of num_machines 2; it counts from 0"),
        (TWO | {"mixed_precision": "bf16"}, "mixed_precision: found bf16; the run's config decides (train.precision)"),
        (TWO | {"mixed_precision": False}, "mixed_precision: found an unquoted no, which YAML reads as false"),
        (TWO | {"dynamo_backend": "inductor"}, "dynamo_backend: found inductor"),
        (TWO | {"debug": True}, "debug: found true, with which accelerate hides that ranks failed"),
        (TWO | {"use_cpu": True}, "use_cpu: found true, with which accelerate starts ranks that each train alone"),
        (TWO | {"distributed_type": "MULTI_CPU"}, "distributed_type: found MULTI_CPU, with which accelerate starts"),
        ({"num_processes": 2}, "distributed_type: found NO (the default) with num_processes 2"),
        (FSDP | {"fsdp_config": {"fsdp_version": 1}}, "fsdp_config.fsdp_version: found 1 (the default is 1)"),
        (FSDP | {"fsdp_config": {}}, "fsdp_config.fsdp_version: found 1 (the default is 1); write 2"),
        (FSDP, "fsdp_config: missing with distributed_type FSDP"),
        (TWO | {"fsdp_config": {"fsdp_version": 2}}, "fsdp_config: found with distributed_type MULTI_GPU"),
        (ZERO, "deepspeed_config: missing with distributed_type DEEPSPEED"),
        (NODES | {"rdzv_backend": "c10d", "same_network": True}, "same_network: found true with rdzv_backend c10d"),
        # DeepSpeed may not decide what the config decides.
        (zero(deepspeed_multinode_launcher="pdsh"), "multinode_launcher: found pdsh, which starts ranks over ssh"),
        (zero(gradient_clipping=1.0), "gradient_clipping: found 1.0; the run's config decides (optimiser.clip_norm)"),
        (zero(gradient_accumulation_steps=4), "_steps: found 4; the run's config decides (batch.forward)"),
        (zero(deepspeed_config_file="ds.json"), "deepspeed_config_file: found ds.json; it would hide what it sets"),
        (zero(offload_param_device="nvme"), "deepspeed_config.offload_param_device: found 'nvme'"),
        (zero(offload_param_device="cpu"), "deepspeed_config.offload_param_device: found cpu with zero_stage 2"),
        (zero(zero_stage=0), "deepspeed_config.zero_stage: found 0"),
        # What a node needs to find the others.
        (NODES | {"main_process_ip": None}, "main_process_ip is missing, where node 0 is reached by the others"),
        (NODES | {"main_process_port": 0}, "main_process_port: found 0 with 2 nodes, each of which would choose"),
    ],
)
def test_what_would_train_alone_or_change_the_numbers_is_refused(
    tmp_path: Path, tree: dict[str, Any], said: str
) -> None:
    path = written(tmp_path, tree)
    with pytest.raises(UserError) as fault:
        read(path, {})
    assert str(path) in str(fault.value) and said in str(fault.value)


@pytest.mark.parametrize(
    ("tree", "env", "said"),
    [
        (NODES, {"MIRL_NODE_RANK": "2"}, "MIRL_NODE_RANK: found 2 of 2 nodes; it counts from 0 to 1"),
        (NODES, {"SLURM_NODEID": "one"}, "SLURM_NODEID: found 'one' in the environment; give a whole number from 0"),
        (TWO, {"MIRL_NODES": "0"}, "MIRL_NODES: found '0' in the environment; give a whole number from 1"),
        ({"num_processes": 1}, {"MIRL_RANKS_PER_NODE": "2"}, "distributed_type: found NO, of which accelerate starts"),
    ],
)
def test_a_wrong_number_in_the_environment_is_refused(
    tmp_path: Path, tree: dict[str, Any], env: dict[str, str], said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        read(written(tmp_path, tree), env)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 faults in") as fault:
        read(written(tmp_path, TWO | {"use_cpu": True, "debug": True, "mixed_precision": "fp16"}), {})
    assert str(fault.value).count("\n") == 3


def test_accelerate_is_told_all_that_it_would_take_from_elsewhere(tmp_path: Path) -> None:
    """It does not heed a file's rdzv_backend, and would ask pdsh to start DeepSpeed's ranks."""
    options = read(written(tmp_path, NODES | zero() | {"num_processes": 8, "rdzv_backend": "c10d"}), {}).options(10)
    said = dict(zip(options[::2], options[1::2], strict=True))
    assert said["--rdzv_backend"] == "c10d" and said["--deepspeed_multinode_launcher"] == "standard"
    assert (said["--num_processes"], said["--num_machines"], said["--machine_rank"]) == ("8", "2", "1")
    assert (said["--main_process_ip"], said["--main_process_port"]) == ("10.0.0.1", "29500")
    assert read(written(tmp_path, TWO), {}).options(10)[-2:] == ["--main_process_port", "0"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "launch.yaml is empty. Start from launch/cpu_two.yaml."),
        ("[1]", "launch.yaml holds a list, not keys with values. Start from launch/cpu_two.yaml."),
        ("prune: {rounds: 1}", "launch.yaml is the config of a run, not a launch file; launch/ has those."),
        ("seeds: [1]", "launch.yaml is a sweep, not a launch file; launch/ has those."),
    ],
)
def test_a_file_of_another_kind_is_told_as_what_it_is(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as fault:
        read(path, {})
    assert str(fault.value) == f"{tmp_path}/{said}"


def test_a_folder_is_refused_with_the_files_in_it(tmp_path: Path) -> None:
    path = written(tmp_path, TWO)
    with pytest.raises(UserError) as fault:
        read(tmp_path, {})
    assert str(fault.value) == f"{tmp_path} is a folder, where a file is needed. There are: {path}."


def test_a_word_that_is_almost_right_is_one_fault_with_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)^a fault in .*the nearest is 'MULTI_GPU'") as fault:
        read(written(tmp_path, TWO | {"distributed_type": "multi_gpu", "fsdp_config": {"fsdp_version": 2}}), {})
    assert "boolean" not in str(fault.value)
    with pytest.raises(UserError, match="^a fault in .*\\n  deepspeed_config.zero_stage: found 4"):
        read(written(tmp_path, zero(zero_stage=4)), {})
