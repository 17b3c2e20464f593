"""The door to other processes: who am I, wrap, backward, gather, sum, agree, broadcast.

Alone imports accelerate and torch.distributed. Every collective of the project is a method here, so that a reader sees
in the loop where ranks meet. Each is a numbered meeting, `what` its name in messages; see watch.py.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mirl_dist.distributed.engines.base import Engine, MakeOptimiser, ShardedEngine
from mirl_dist.distributed.engines.ddp import DdpEngine
from mirl_dist.distributed.engines.from_env import engine_from_env
from mirl_dist.distributed.engines.sharding import ShardLayout
from mirl_dist.distributed.flight_recorder import FlightRecorder
from mirl_dist.distributed.hardware import gpus
from mirl_dist.distributed.process_group import connect_store, join_process_group, store_is_the_launchers
from mirl_dist.distributed.rendezvous import check_launch_environment, check_own_gpu
from mirl_dist.distributed.watchdog import LiveStore, Watchdog
from mirl_dist.errors import InvariantError, MirlError, Stopped, UserError
from mirl_dist.pruning.partition import ReplicatedPartition

T = TypeVar("T")

# Groups that were left. Were a wrapped model the last to hold one, freeing it would wait, with Python's lock held, for
# a thread of gloo that may need that lock to free a tensor (torch 2.13): a finished rank that never ends.
_LEFT: list[Any] = []
_DISTRIBUTED: Any = torch.distributed  # what it calls private, or does not describe


class Ranks:
    """One process among `world`. Constructed once per process; joins the process group that the launcher announced."""

    def __init__(
        self, *, device: str = "auto", precision: str = "fp32", seed: int = 0, timeout_seconds: float = 1800
    ) -> None:
        """device: 'auto' (a GPU per rank where there are any) or 'cpu'; precision: 'fp32' or 'bf16'.

        timeout_seconds: how long ranks wait for one another. After that those who have not come are named on standard
        error, and who waited ends with code 1. Raises UserError when the processes that were launched are not the
        processes that found each other.
        """
        check_launch_environment(os.environ)
        self.engine_spec = engine_from_env(os.environ)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; without it matmul varies
        cpu = device == "cpu" or not torch.cuda.is_available()
        if cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where DeepSpeed is installed it says else that it guesses
        else:
            check_own_gpu(os.environ, gpus())
            torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: TF32 would change every convolution
        self._half = precision == "bf16"
        patience = timedelta(seconds=timeout_seconds + 60)  # torch gives up later than the watch, which can tell why
        backend = "gloo" if cpu else "nccl"
        word = join_process_group(backend, patience) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        self.rank: int
        self.world: int
        self.device: torch.device
        if self.engine_spec.name == "ddp":
            self._joined_by_accelerate(cpu, patience)
        else:
            self._joined_alone(backend, patience)
        self._sharded: ShardedEngine | None = None
        self._recorder, self._all_reduces, self._stop_requested = FlightRecorder(), True, False
        self.hosts: list[str] = self.gather_objects(platform.node(), what="gather of hosts")
        self.names = [f"rank {rank} ({host})" for rank, host in enumerate(self.hosts)]
        self._watchdog = self._start_watch(word, timeout_seconds) if word and self.world > 1 else None
        self._prove_that_all_are_here()
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)

    def _joined_by_accelerate(self, cpu: bool, patience: timedelta) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        self._accelerator: Any = Accelerator(
            cpu=cpu, mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)]
        )
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        self.device = self._accelerator.device

    def _joined_alone(self, backend: str, patience: timedelta) -> None:
        """For engines that Accelerate would wrap in its own loop, or, on a CPU, not at all and without a word."""
        self._accelerator = None
        if not _DISTRIBUTED.is_initialized():  # one process
            store = _DISTRIBUTED.HashStore()
            _DISTRIBUTED.init_process_group(backend, store=store, rank=0, world_size=1, timeout=patience)
        self.rank, self.world = _DISTRIBUTED.get_rank(), _DISTRIBUTED.get_world_size()
        self.device = torch.device("cpu")
        if backend == "nccl":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)

    def _start_watch(self, word: str, timeout_seconds: float) -> Watchdog:
        """On a connection of its own, which may block for as long as it likes: the watch minds that."""
        pids = self.gather_objects(os.getpid(), what="gather of process ids")
        names = [f"rank {rank} ({self.hosts[rank]}, pid {pid})" for rank, pid in enumerate(pids)]
        store = connect_store(timedelta(days=1000), master=False)
        home = f"the launcher's process at {store.host}:{store.port}" if store_is_the_launchers() else names[0]
        board = LiveStore(_DISTRIBUTED.PrefixStore(f"{word}/watch", store), store.host, store.port)
        return Watchdog(self._recorder, board, self.rank, names, home, timeout_seconds).start()

    def _prove_that_all_are_here(self) -> None:
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        counted = int(self.sum(torch.ones(1, dtype=torch.int64), what="roll call").item())
        if not announced == self.world == counted:
            raise UserError(
                f"the launcher announced {announced} processes, {self.world} were joined, and {counted} answered: "
                "each would train alone. Launch with `accelerate launch --config_file launch/cpu_two.yaml`, or with "
                "torchrun."
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def phase(self) -> str:
        """What this rank is doing, for messages."""
        return self._recorder.phase

    def in_phase(self, name: str) -> AbstractContextManager[None]:
        """Around a part of the work, named as in 'training'; afterwards the phase around it returns."""
        return self._recorder.in_phase(name)

    def request_stop(self) -> None:
        """Ask all ranks to stop: `stop_told` becomes true on each within about two seconds. Returns at once."""
        self._stop_requested = True
        if self._watchdog is not None:
            self._watchdog.request_stop()

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop; costs nothing, and ranks may hear it a second apart."""
        return self._stop_requested or (self._watchdog is not None and self._watchdog.stop_requested)

    @property
    def partition(self) -> ReplicatedPartition:
        """This rank's slice of replicated tensors, for counting every weight once."""
        return ReplicatedPartition(self.rank, self.world)

    def engine(self, model: nn.Module, make_optimiser: MakeOptimiser, example: Tensor) -> tuple[Engine, nn.Module]:
        """The engine that the launch asked for, around a model that lies on this rank's device; what to call in
        training. Weights become those of rank 0 under DDP; else they must be the same on every rank.

        example: (B, 3, H, W), of any values.
        """
        if self.engine_spec.name == "ddp":
            wrapped = self.wrap(model)
            self.warm_up(wrapped, example)
            return DdpEngine(dict(self.unwrap(wrapped).named_parameters()), make_optimiser, self.partition), wrapped
        if self.engine_spec.name == "fsdp":
            from mirl_dist.distributed.engines.fsdp import FsdpEngine

            example = example.to(self.device)
            dealt: ShardedEngine = FsdpEngine(model, make_optimiser, self.engine_spec, self.rank, self, example)
        else:
            from mirl_dist.distributed.engines.deepspeed import ZeroEngine

            dealt = ZeroEngine(model, make_optimiser, self.engine_spec, self.rank, self.world, self, self._half)
        self._sharded = dealt
        return dealt, dealt.network

    def collective(self, what: str) -> AbstractContextManager[None]:
        """Around a wait for all ranks that somebody else holds."""
        return self._gpu_collective(what)

    @property
    def is_sharded(self) -> bool:
        """Whether a forward pass needs all ranks: weights are gathered in it."""
        return self._sharded is not None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model on this rank's device, its gradients averaged over ranks. Weights become those of rank 0.

        Raises UserError when several ranks would train a model that is not wrapped.
        """
        # Depthwise kernels (C, 1, 3, 3) have two equal layouts, and autograd picks the other one: harmless.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with self._recorder.collective("wrapping of the network"):
            wrapped: nn.Module = self._accelerator.prepare(model)
        parallel = isinstance(wrapped, nn.parallel.DistributedDataParallel)
        if self.world > 1 and not parallel:
            raise UserError(
                f"{self.world} ranks, but the model is a {type(wrapped).__name__}: gradients would not be shared. "
                "Launch with a file from launch/.",
                everywhere=True,
            )
        return wrapped

    def warm_up(self, model: nn.Module, example: Tensor) -> None:
        """One throwaway pass through a wrapped model, so that every step that counts adds gradients in one order.

        DDP sorts its buckets anew after its first backward pass; with three ranks or more, a process's first step
        would otherwise add in another order than the same step of a run that was not interrupted.
        """
        self.backward(model(example.to(self.device)).sum() * 0)
        model.zero_grad()

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The bare network below `wrap`: names and weights as created."""
        bare: nn.Module = self._accelerator.unwrap_model(model)
        return bare

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """The model's output in the precision that was asked for. Weights, gradients and losses stay float32. A meeting
        where weights are gathered for it."""
        meeting = self._gpu_collective("gather of weights") if self._sharded is not None else nullcontext()
        with meeting, torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._half):
            restored: Tensor = model(images)
        return restored

    def backward(self, loss: Tensor) -> None:
        """Gradients, averaged over ranks: a meeting, unless more passes follow in this step."""
        if self._sharded is not None:
            with self._gpu_collective("gradient reduction"):
                self._sharded.backward(loss)
        elif self.world == 1 or not self._all_reduces:
            self._accelerator.backward(loss)
        else:
            with self._gpu_collective("gradient all-reduce"):
                self._accelerator.backward(loss)

    @contextmanager
    def _gpu_collective(self, what: str) -> Iterator[None]:
        """A meeting that the GPU may still be in when the main thread goes on."""
        self._recorder.begin(what)
        try:
            yield
        finally:
            self._recorder.end(*([_when_gpu_is_done()] if self.device.type == "cuda" else []))

    @contextmanager
    def accumulate(self, model: nn.Module, more: bool) -> Iterator[None]:
        """Around a forward and backward pass; `more` passes follow in this step, so ranks need not meet yet."""
        if self._sharded is not None:
            self._sharded.accumulate(more)
            yield
            return
        self._all_reduces = not more
        try:
            with self._accelerator.no_sync(model) if more else nullcontext():
                yield
        finally:
            self._all_reduces = True

    def gather(self, values: Tensor, *, what: str = "gather of numbers") -> Tensor:
        """A tensor of every rank, of one shape and dtype, as (world, *shape) on the CPU, in rank order."""
        with self._recorder.collective(what) if self.world > 1 else nullcontext():
            return self._gathered(values).cpu()

    def gather_here(self, values: Tensor, *, what: str = "gather of numbers") -> Tensor:
        """As `gather`, on this rank's device: for large ones."""
        with self._gpu_collective(what) if self.world > 1 else nullcontext():
            return self._gathered(values)

    def _gathered(self, values: Tensor) -> Tensor:
        mine = values.detach().to(self.device).contiguous()
        if self.world == 1:
            return mine.unsqueeze(0)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        torch.distributed.all_gather(everyone, mine)
        return torch.stack(everyone)

    def sum(self, values: Tensor, *, what: str = "sum of numbers") -> Tensor:
        """The sum over ranks, on the CPU; added in rank order, so the same bits on every rank."""
        return self.gather(values, what=what).sum(dim=0)

    def any(self, flag: bool, *, what: str) -> bool:
        """Whether the flag is true on any rank; the same on all. what: the question, as in 'whether to stop'."""
        return bool(self.gather(torch.tensor(flag), what=f"question {what}").any())

    def gather_objects(self, item: T, *, what: str = "gather of objects") -> list[T]:
        """A small picklable object of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [item]
        found: list[Any] = [None] * self.world
        with self._recorder.collective(what):
            torch.distributed.all_gather_object(found, item)
        return found

    def check_agreement(self, what: str, digest: str) -> None:
        """Raise InvariantError on every rank, naming who differs, unless all ranks hold the same digest."""
        all_digests = self.gather_objects(digest, what=f"agreement on {what}")
        if len(set(all_digests)) > 1:
            usual = max(all_digests, key=all_digests.count)
            odd = [r for r, d in enumerate(all_digests) if d != usual]
            table = ", ".join(f"rank {r} {d[:12]}" for r, d in enumerate(all_digests))
            named = ", ".join(f"{r} ({self.hosts[r]})" for r in odd)
            raise InvariantError(
                f"ranks disagree on {what}: {table}. Rank {named} has drifted: check that "
                "machine's memory and GPU, then start again with --resume auto from the last commit.",
                everywhere=True,
            )

    def on_main(self, work: Callable[[], T], *, what: str = "work") -> T:
        """The result of `work`, done by rank 0 alone. A MirlError or Stopped that it raises is raised on every rank."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]  # the result, or the error
        if self.is_main:
            try:
                outcome[0] = work()
            except MirlError as error:
                kind = InvariantError if isinstance(error, InvariantError) else UserError
                outcome[1] = kind, str(error), error.resumable
            except Stopped as stopped:
                outcome[1] = Stopped, str(stopped), False
        with self._recorder.collective(f"{what} by rank 0"):
            torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            kind, text, resumable = outcome[1]
            raise Stopped(text) if kind is Stopped else kind(text, everywhere=True, resumable=resumable)
        result: T = outcome[0]
        return result

    def broadcast_tensors(
        self, tensors: Mapping[str, Tensor] | None, *, what: str = "tensors", layout: ShardLayout | None = None
    ) -> dict[str, Tensor]:
        """Rank 0's named tensors on the CPU of every rank; other ranks pass None. held: of each, keep this part."""
        if self.world == 1:
            assert tensors is not None
            return {
                name: tensor if layout is None else layout.part_of(name, tensor) for name, tensor in tensors.items()
            }
        described = [(n, tuple(t.shape), t.dtype) for n, t in tensors.items()] if tensors is not None else []
        described = self.on_main(lambda: described, what=what)
        received: dict[str, Tensor] = {}
        for name, shape, dtype in described:
            wire = torch.uint8 if dtype is torch.bool else dtype
            if tensors is not None and self.is_main:
                buffer = tensors[name].to(self.device, wire).contiguous()
            else:
                buffer = torch.empty(shape, dtype=wire, device=self.device)
            with self._recorder.collective(f"{what} by rank 0, {name}"):
                torch.distributed.broadcast(buffer, src=0)
            received[name] = (buffer if layout is None else layout.part_of(name, buffer).clone()).to("cpu", dtype)
        return received

    def barrier(self, *, what: str = "barrier") -> None:
        if self.world > 1:
            with self._recorder.collective(what):
                torch.distributed.barrier()

    def close(self) -> None:
        """Leave the process group, all ranks together; without this, torch warns about leaked resources."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self.barrier(what="end")  # rank 0 may keep what the others' watches read
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _LEFT.append(torch.distributed.group.WORLD)
        if self._accelerator is not None:
            self._accelerator.end_training()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _when_gpu_is_done() -> Callable[[], bool]:
    """Whether all that this thread has asked of its GPU so far is done; may be called by any thread."""
    cuda: Any = torch.cuda
    event = cuda.Event()
    event.record()

    def done() -> bool:
        try:
            return bool(event.query())
        except RuntimeError:  # the GPU has failed, as the main thread will notice
            return True

    return done
