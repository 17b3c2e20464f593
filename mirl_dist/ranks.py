"""The door to other processes: who am I, wrap, backward, gather, sum, agree, broadcast.

Alone imports accelerate and torch.distributed. Every collective of the project is a method here, with the phase in
its name, so that a reader sees in the loop where ranks meet.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mirl_dist.faults import Fault, Stopped
from mirl_dist.pruning.prune import Slice

T = TypeVar("T")

# Groups that were left. Were a wrapped model the last to hold one, freeing it would wait, with Python's lock held, for
# a thread of gloo that may need that lock to free a tensor (torch 2.13): a finished rank that never ends.
_LEFT: list[Any] = []


class Ranks:
    """One process among `world`. Constructed once per process; joins the process group that the launcher announced."""

    def __init__(self, *, device: str = "auto", precision: str = "fp32", seed: int = 0) -> None:
        """device: 'auto' (a GPU per rank where there are any) or 'cpu'; precision: 'fp32' or 'bf16'.

        Raises Fault when the processes that were launched are not the processes that found each other.
        """
        from accelerate import Accelerator

        _refuse_a_launch_that_lost_ranks(os.environ)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; without it matmul varies
        cpu = device == "cpu" or not torch.cuda.is_available()
        if not cpu:
            _refuse_shared_gpus(os.environ)
            torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: TF32 would change every convolution
        self._half = precision == "bf16"
        self._accelerator = Accelerator(cpu=cpu, mixed_precision="no")
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        self._prove_that_all_are_here()
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)

    def _prove_that_all_are_here(self) -> None:
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        counted = int(self.sum(torch.ones(1, dtype=torch.int64)).item())
        if not announced == self.world == counted:
            raise Fault(
                f"the launcher announced {announced} processes, accelerate sees {self.world}, and {counted} answered: "
                "each would train alone. Launch with `accelerate launch --config_file launch/cpu_two.yaml`, or with "
                "torchrun."
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def share(self) -> Slice:
        """This rank's slice of replicated tensors, for counting every weight once."""
        return Slice(self.rank, self.world)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model on this rank's device, its gradients averaged over ranks. Weights become those of rank 0.

        Raises Fault when several ranks would train a model that is not wrapped.
        """
        # Depthwise kernels (C, 1, 3, 3) have two equal layouts, and autograd picks the other one: harmless.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        wrapped: nn.Module = self._accelerator.prepare(model)
        parallel = isinstance(wrapped, nn.parallel.DistributedDataParallel)
        if self.world > 1 and not parallel:
            raise Fault(
                f"{self.world} ranks, but the model is a {type(wrapped).__name__}: gradients would not be shared. "
                "Launch with a file from launch/.",
                everywhere=True,
            )
        return wrapped

    def settle(self, model: nn.Module, example: Tensor) -> None:
        """One throwaway pass through a wrapped model, so that every step that counts adds gradients in one order.

        DDP sorts its buckets anew after its first backward pass; with three ranks or more, a process's first step
        would otherwise add in another order than the same step of a run that was not interrupted.
        """
        (model(example.to(self.device)).sum() * 0).backward()
        model.zero_grad()

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The bare network below `wrap`: names and weights as created."""
        bare: nn.Module = self._accelerator.unwrap_model(model)
        return bare

    def autocast(self) -> AbstractContextManager[Any]:
        """Around a forward pass: the precision that was asked for. Weights, gradients and losses stay float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._half)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def accumulate(self, model: nn.Module, more: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward pass; `more` passes follow in this step, so ranks need not meet yet."""
        return self._accelerator.no_sync(model) if more else nullcontext()

    def gather(self, values: Tensor) -> Tensor:
        """A tensor of every rank, of one shape and dtype, as (world, *shape) on the CPU, in rank order."""
        if self.world == 1:
            return values.detach().cpu().unsqueeze(0)
        mine = values.detach().to(self.device).contiguous()
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        torch.distributed.all_gather(everyone, mine)
        return torch.stack(everyone).cpu()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on the CPU; added in rank order, so the same bits on every rank."""
        return self.gather(values).sum(dim=0)

    def gather_objects(self, item: T) -> list[T]:
        """A small picklable object of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [item]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, item)
        return found

    def agree(self, what: str, digest: str) -> None:
        """Raise Fault on every rank, naming who differs, unless all ranks hold the same digest."""
        all_digests = self.gather_objects(digest)
        if len(set(all_digests)) > 1:
            usual = max(all_digests, key=all_digests.count)
            odd = [r for r, d in enumerate(all_digests) if d != usual]
            table = ", ".join(f"rank {r} {d[:12]}" for r, d in enumerate(all_digests))
            raise Fault(
                f"ranks disagree on {what}: {table}. Rank {', '.join(map(str, odd))} has drifted: check that "
                "machine's memory and GPU, then start again with --resume auto from the last commit.",
                everywhere=True,
            )

    def from_main(self, work: Callable[[], T]) -> T:
        """The result of `work`, done by rank 0 alone. A Fault that rank 0 meets is raised on every rank."""
        if self.world == 1:
            return work()
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = work()
            except Fault as fault:
                result[1] = str(fault)
        torch.distributed.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise Fault(result[1], everywhere=True)
        found: T = result[0]
        return found

    def tensors_from_main(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's named tensors on the CPU of every rank; other ranks pass None."""
        if self.world == 1:
            assert tensors is not None
            return dict(tensors)
        described = [(n, tuple(t.shape), t.dtype) for n, t in tensors.items()] if tensors is not None else []
        described = self.from_main(lambda: described)
        received: dict[str, Tensor] = {}
        for name, shape, dtype in described:
            wire = torch.uint8 if dtype is torch.bool else dtype
            if tensors is not None and self.is_main:
                buffer = tensors[name].to(self.device, wire).contiguous()
            else:
                buffer = torch.empty(shape, dtype=wire, device=self.device)
            torch.distributed.broadcast(buffer, src=0)
            received[name] = buffer.to("cpu", dtype)
        return received

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the process group; without this, torch warns about leaked resources."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _LEFT.append(torch.distributed.group.WORLD)
        self._accelerator.end_training()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _refuse_a_launch_that_lost_ranks(env: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes 2` announces a meeting point but starts one process, silently."""
    if int(env.get("WORLD_SIZE", "1")) > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise Fault(
            f"found WORLD_SIZE={env['WORLD_SIZE']} in the environment, but not RANK, MASTER_ADDR and MASTER_PORT: this "
            "process would wait for others that nobody started. Unset it, or launch with a file from launch/."
        )
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "WORLD_SIZE" not in env:
        raise Fault(
            f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks without a launcher: each would train alone in the same "
            "folder. Start one task per node, and in it `accelerate launch` with a file from launch/, or torchrun."
        )
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and "RANK" not in env:
        raise Fault(
            "accelerate launch was asked for several processes but started this one alone (its --cpu launcher does "
            "that without a word). Use `accelerate launch --config_file launch/cpu_two.yaml -m mirl_dist train ...`."
        )


def _refuse_shared_gpus(env: Mapping[str, str]) -> None:
    """Several ranks on one GPU cannot talk to each other: NCCL refuses them without naming the cause."""
    local = int(env.get("LOCAL_RANK", "0"))
    if local >= gpus():
        raise Fault(
            f"rank {local} of this node finds {gpus()} GPUs, so none for itself. Start one rank per GPU, or add "
            "--set train.device=cpu to train on its processors."
        )


def launch(arguments: list[str]) -> int:
    """`accelerate launch ARGUMENTS` in this process; the exit code of the first worker that failed, else 0.

    Raises Stopped when this process was asked to stop: the workers have been asked too, and have ended. Raises Fault
    for a launch file that accelerate refuses.
    """
    import logging

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The workers have said in one line what is wrong; the elastic agent's reports would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        chosen = [code for code in codes if code > 0] or [1]
        return min(chosen, key=lambda code: (code == 1, code))
    except ValueError as error:
        said = str(error).rstrip(".")
        raise Fault(f"accelerate refuses this launch: {said}. Compare with launch/cpu_two.yaml.") from None
    except SignalException as error:
        raise Stopped(f"all ranks were stopped by {error.sigval.name}; a run is kept up to its last commit") from None
    return 0


def gpus() -> int:
    """GPUs that this process could use."""
    return torch.cuda.device_count()


def backends() -> dict[str, bool]:
    """The collectives that this torch was built with."""
    if not torch.distributed.is_available():
        return {}
    return {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}


def lost_a_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process ended."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "remote process exited",
        "Broken pipe",
    )
    return any(sign in str(error) for sign in signs)
