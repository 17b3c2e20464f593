"""Reads launch files, which are accelerate configs: number of ranks, nodes and the engine.

Some settings make accelerate start processes that train alone, or change numerical results; these are errors here. One
file serves every node: values that differ between nodes or jobs may come from environment variables (`NODE_RANK`,
`ADDRESS`, ... below), which take precedence over the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PositiveInt

from mirl_dist.config.yaml_loader import Node, build, check_kind, load_file
from mirl_dist.distributed.engines.spec import ZERO_STAGES, EngineName
from mirl_dist.errors import UserError

NODE_RANK = ("MIRL_NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
"""Variables with this node's rank, from 0; the first one set applies. Includes SLURM's and Kubernetes' variables."""
NODES, RANKS_PER_NODE = "MIRL_NODES", "MIRL_RANKS_PER_NODE"
ADDRESS, PORT = "MIRL_MASTER_ADDR", "MIRL_MASTER_PORT"
"""Variables with the address and port at which the other nodes reach node 0."""
_DEFAULT_PORT = 29500  # accelerate's
_LEAST_RENDEZVOUS_SECONDS = 60


class LaunchFile(NamedTuple):
    """Contents of a launch file, merged with the environment.

    ranks: total over all nodes. node_rank: rank of this node. rendezvous: how the launchers of several nodes find each
    other at `address`:`port` on node 0; 'none' on one node. offload: whether weights or moments are in host memory.
    """

    path: Path
    ranks: int
    nodes: int
    node_rank: int
    ranks_per_node: int
    engine: EngineName
    offload: bool
    rendezvous: Literal["none", "static", "c10d"]
    address: str | None
    port: int | None

    def options(self, timeout_seconds: float) -> list[str]:
        """Return accelerate's options to start this node's ranks, including those that the file leaves out.

        timeout_seconds: how long ranks wait for each other. Launchers of several nodes wait as long (60 s at least), so
        that both survive the same network failures.
        """
        options = ["--config_file", str(self.path), "--num_processes", str(self.ranks)]
        options += ["--num_machines", str(self.nodes)]
        options += ["--machine_rank", str(self.node_rank), "--mixed_precision", "no", "--dynamo_backend", "no"]
        if self.nodes == 1:
            return [*options, "--rdzv_backend", "static", "--main_process_port", str(self.port or 0)]
        options += ["--main_process_ip", str(self.address), "--main_process_port", str(self.port)]
        if self.engine.startswith("zero"):
            options += ["--deepspeed_multinode_launcher", "standard"]
        seconds = max(_LEAST_RENDEZVOUS_SECONDS, int(timeout_seconds))
        wait = f"timeout={seconds}"
        if self.rendezvous == "c10d":
            wait = f"is_host={int(self.node_rank == 0)},join_timeout={seconds},read_timeout={seconds}"
        return [*options, "--rdzv_backend", self.rendezvous, "--rdzv_conf", wait]


_Device = Literal["none", "cpu"]


class _DeepSpeed(Node):
    zero_stage: Literal[1, 2, 3]
    offload_optimizer_device: _Device | None = None
    offload_param_device: _Device | None = None
    zero3_init_flag: Literal[False] = False
    zero3_save_16bit_model: Literal[False] = False
    gradient_accumulation_steps: int | str | None = None
    gradient_clipping: float | str | None = None
    deepspeed_multinode_launcher: str = "standard"
    deepspeed_config_file: str | None = None

    def faults(self) -> Iterator[str]:
        """Yield what contradicts the run's config or starts ranks behind its back, without the section's name."""
        if self.deepspeed_config_file not in (None, "none"):
            yield (
                f"deepspeed_config_file: found {self.deepspeed_config_file}; it would hide what it sets from this "
                "project: write zero_stage and offload_* here, and remove it"
            )
        for key, harmless, instead in (
            ("gradient_accumulation_steps", (None, 1, "1"), "batch.forward"),
            ("gradient_clipping", (None, "none"), "optimiser.clip_norm"),
        ):
            if getattr(self, key) not in harmless:
                yield f"{key}: found {getattr(self, key)}; the run's config decides ({instead}): remove it"
        if self.offload_param_device == "cpu" and self.zero_stage != 3:
            yield (
                f"offload_param_device: found cpu with zero_stage {self.zero_stage}; parameters stay with the host "
                "under ZeRO-3 alone: write none"
            )
        if self.deepspeed_multinode_launcher != "standard":
            yield (
                f"deepspeed_multinode_launcher: found {self.deepspeed_multinode_launcher}, which starts ranks over ssh "
                "and without a word to this project: write standard"
            )


class _Fsdp(Node):
    fsdp_version: int = 1
    fsdp_offload_params: bool = False
    fsdp_reshard_after_forward: Literal[True] = True
    fsdp_cpu_ram_efficient_loading: Literal[False] = False
    fsdp_activation_checkpointing: Literal[False] = False

    def faults(self) -> Iterator[str]:
        """Yield the faults as _DeepSpeed does."""
        if self.fsdp_version != 2:
            yield f"fsdp_version: found {self.fsdp_version} (the default is 1); write 2"


class _AccelerateConfig(Node):
    """The supported keys of accelerate's config file, as `accelerate config` writes them."""

    num_processes: PositiveInt
    num_machines: PositiveInt = 1
    machine_rank: Annotated[int, Field(ge=0)] | None = None
    distributed_type: Literal["NO", "MULTI_GPU", "DEEPSPEED", "FSDP", "MULTI_CPU"] | bool = "NO"
    deepspeed_config: _DeepSpeed | None = None
    fsdp_config: _Fsdp | None = None
    main_process_ip: str | None = None
    main_process_port: Annotated[int, Field(ge=0, lt=65536)] | None = None
    rdzv_backend: Literal["static", "c10d"] = "static"
    same_network: bool = False
    mixed_precision: str | bool = "no"
    dynamo_backend: str | bool = "no"
    use_cpu: bool = False
    debug: bool = False
    gpu_ids: str | int | None = None
    enable_cpu_affinity: bool = False
    compute_environment: Literal["LOCAL_MACHINE"] = "LOCAL_MACHINE"
    main_training_function: str = "main"
    downcast_bf16: Literal["no", False] = False
    tpu_use_cluster: Literal[False] = False
    tpu_use_sudo: Literal[False] = False
    tpu_env: tuple[()] = ()

    def inconsistencies(self) -> list[str]:
        return [*self._numeric_faults(), *self._engine_faults(), *self._node_faults()]

    def _numeric_faults(self) -> Iterator[str]:
        for key in ("distributed_type", "mixed_precision", "dynamo_backend"):
            if getattr(self, key) is False:
                yield f"{key}: found an unquoted no, which YAML reads as false; quote it"
        if str(self.mixed_precision).lower() not in ("no", "false"):
            yield (
                f"mixed_precision: found {self.mixed_precision}; the run's config decides (train.precision): write "
                '"no" in quotes'
            )
        if str(self.dynamo_backend).lower() not in ("no", "false"):
            yield (
                f"dynamo_backend: found {self.dynamo_backend}; the run's config decides (train.compile): write "
                '"no" in quotes'
            )
        if self.debug:
            yield "debug: found true, with which accelerate hides that ranks failed; remove it"
        if self.use_cpu:
            yield (
                "use_cpu: found true, with which accelerate starts ranks that each train alone; remove it, and add "
                "--set train.device=cpu to the command where GPUs are present"
            )

    def _engine_faults(self) -> Iterator[str]:
        kind = self.distributed_type
        if kind == "MULTI_CPU":
            yield "distributed_type: found MULTI_CPU, with which accelerate starts one process; write MULTI_GPU"
        if kind == "NO" and self.num_processes > 1:
            yield (
                f"distributed_type: found NO (the default) with num_processes {self.num_processes}, of "
                "which accelerate starts one; write MULTI_GPU, DEEPSPEED or FSDP"
            )
        for name, section, key in (
            ("DEEPSPEED", self.deepspeed_config, "zero_stage"),
            ("FSDP", self.fsdp_config, "fsdp_version: 2"),
        ):
            if kind == name and section is None:
                yield f"{name.lower()}_config: missing with distributed_type {name}; write {key} below it"
            if kind != name and section is not None:
                yield f"{name.lower()}_config: found with distributed_type {kind}; write {name}, or remove it"
            if section is not None:
                yield from (f"{name.lower()}_config.{fault}" for fault in section.faults())

    def _node_faults(self) -> Iterator[str]:
        if self.num_processes % self.num_machines:
            yield (
                f"num_processes: found {self.num_processes} on num_machines {self.num_machines}; give all nodes "
                "together a multiple of that: equally many ranks on each node"
            )
        if self.machine_rank is not None and self.machine_rank >= self.num_machines:
            yield f"machine_rank: found {self.machine_rank} of num_machines {self.num_machines}; it counts from 0"
        if self.rdzv_backend == "c10d" and self.same_network:
            yield (
                "same_network: found true with rdzv_backend c10d, with which each node would form a group of its own; "
                "write false"
            )

    def engine(self) -> EngineName:
        if self.deepspeed_config is not None:
            return ZERO_STAGES[self.deepspeed_config.zero_stage]
        return "fsdp" if self.fsdp_config is not None else "ddp"

    def offload(self) -> bool:
        """Whether weights or moments are in host memory."""
        zero, fsdp = self.deepspeed_config, self.fsdp_config
        offloads_zero = zero is not None and "cpu" in (zero.offload_optimizer_device, zero.offload_param_device)
        return offloads_zero or (fsdp is not None and fsdp.fsdp_offload_params)


def read(path: Path, env: Mapping[str, str] = os.environ) -> LaunchFile:
    """Read a launch file for this node.

    Raise UserError that lists all faults: keys that are unknown, contradict each other, would train ranks alone or
    would change a run's numerical results; several nodes without node 0's address or this node's rank.
    """
    raw = load_file(path, "launch/cpu_two.yaml")
    check_kind(raw, "a launch file", str(path))
    tree = build(_AccelerateConfig, raw, str(path))
    nodes = _int_from_env(env, NODES, 1) or tree.num_machines
    per_node = _int_from_env(env, RANKS_PER_NODE, 1) or tree.num_processes // tree.num_machines
    ranks, engine, offload = nodes * per_node, tree.engine(), tree.offload()
    if tree.distributed_type == "NO" and ranks > 1:
        raise UserError(
            f"{path}: distributed_type: found NO, of which accelerate starts one rank, but {NODES} and "
            f"{RANKS_PER_NODE} ask for {ranks} ranks. Change it."
        )
    if nodes == 1:
        return LaunchFile(path, ranks, 1, 0, per_node, engine, offload, "none", None, tree.main_process_port)
    source = next((name for name in NODE_RANK if env.get(name)), "machine_rank")
    node = tree.machine_rank if source == "machine_rank" else _int_from_env(env, source, 0)
    if node is None:
        raise UserError(
            f"{path}: {nodes} nodes, and the rank of this node is unknown. Set {NODE_RANK[0]} on each, from 0 to "
            f"{nodes - 1} ({' and '.join(NODE_RANK[1:])} count too), or write machine_rank."
        )
    if node >= nodes:
        raise UserError(f"{source}: found {node} of {nodes} nodes; it counts from 0 to {nodes - 1}. Correct it.")
    address = env.get(ADDRESS) or tree.main_process_ip
    if not address:
        raise UserError(
            f"{path}: {nodes} nodes, and main_process_ip is missing, where node 0 is reached by the others. Write it, "
            f"or set {ADDRESS}."
        )
    port = _int_from_env(env, PORT, 1) or (_DEFAULT_PORT if tree.main_process_port is None else tree.main_process_port)
    if port == 0:
        raise UserError(
            f"{path}: main_process_port: found 0 with {nodes} nodes, each of which would choose another. Write a port "
            f"that is free on node 0, or set {PORT}."
        )
    return LaunchFile(path, ranks, nodes, node, per_node, engine, offload, tree.rdzv_backend, address, port)


def _int_from_env(env: Mapping[str, str], name: str, least: int) -> int | None:
    """Return a whole number from the environment, or None if unset. Raise UserError for anything below `least`."""
    text = env.get(name)
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UserError(f"{name}: found '{text}' in the environment; give a whole number from {least}, or unset it.")
    return int(text)
