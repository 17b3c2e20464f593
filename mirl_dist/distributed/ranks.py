"""The ranks of a launch and their collectives: gather, sum, agree, broadcast.

Every collective of the project is a method of Ranks, of its `network` or of the engine, so the training loop shows
where ranks wait for each other. Each collective has a number and a name (`what`) for messages; see flight_recorder.py
and watchdog.py.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from mirl_dist.distributed import environment, hardware
from mirl_dist.distributed.agreement import RankFacts
from mirl_dist.distributed.engines.sharding import ShardLayout, local_part
from mirl_dist.distributed.engines.spec import engine_from_env
from mirl_dist.distributed.flight_recorder import FlightRecorder
from mirl_dist.distributed.parallel_network import ParallelNetwork
from mirl_dist.distributed.process_group import (
    LiveStore,
    find_connection_error,
    join_process_group,
    leave_process_group,
    store_is_the_launchers,
    tells_nccl_errors,
)
from mirl_dist.distributed.watchdog import Watchdog
from mirl_dist.errors import InvariantError, MirlError, Stopped, UserError
from mirl_dist.pruning.partition import Partition

T = TypeVar("T")


class Ranks:
    """This process as one of `world` ranks. Construct it once per process: it joins the launcher's process group."""

    def __init__(
        self, *, device: str = "auto", precision: str = "fp32", seed: int = 0, timeout_seconds: float = 1800
    ) -> None:
        """device: 'auto' (one GPU per rank if CUDA is available), 'cpu' or 'cuda'. precision: 'fp32', 'tf32' or 'bf16'.

        timeout_seconds: how long ranks wait in a collective. After that, missing ranks are named on standard error and
        the waiting ranks exit with code 1. Raise UserError for an environment in which a launch cannot work, and on
        every rank if ranks differ in device or versions; InvariantError if the number of joined processes differs from
        the number launched.
        """
        environment.check_rank(os.environ)
        spec, choice = engine_from_env(os.environ), hardware.with_precision(hardware.choose_device(device), precision)
        environment.check_interfaces(os.environ, nccl=not choice.cpu)
        hardware.use_exact_arithmetic(precision)
        timeout = timedelta(seconds=timeout_seconds + 60)  # longer than the watchdog's, which can name the cause
        facts = RankFacts.of_this_process(choice, spec.name)
        self._membership = join_process_group(facts, timeout=timeout)
        self.device_note = choice.note()
        """A line about processors that are used for want of a GPU, or ''."""
        self.network = ParallelNetwork(spec, self._membership, self, half=precision == "bf16")
        self._recorder, self._stop_requested = FlightRecorder(), False
        self.hosts: list[str] = self.gather_objects(platform.node(), what="gather of hosts")
        self.names = [f"rank {rank} ({host})" for rank, host in enumerate(self.hosts)]
        watched = self._membership.launch_id and self.world > 1
        self._watchdog = self._start_watchdog(timeout_seconds) if watched else None
        self._check_world()
        torch.manual_seed(seed)

    def _start_watchdog(self, timeout_seconds: float) -> Watchdog:
        pids = self.gather_objects(os.getpid(), what="gather of process ids")
        names = [f"rank {rank} ({self.hosts[rank]}, pid {pid})" for rank, pid in enumerate(pids)]
        store = LiveStore.of_launch(self._membership.launch_id)
        store_host = f"the launcher's process at {store.address}" if store_is_the_launchers() else names[0]
        watchdog = Watchdog(self._recorder, store, self.rank, names, store_host, timeout_seconds)
        if self.device.type == "cuda" and tells_nccl_errors():  # gloo raises its errors where a rank waits
            watchdog.find_connection_error = find_connection_error
        return watchdog.start()

    def _check_world(self) -> None:
        """Raise InvariantError unless the announced, joined and responding process counts are equal."""
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        counted = int(self.sum(torch.ones(1, dtype=torch.int64), what="roll call").item())
        if not announced == self.world == counted:
            raise InvariantError(
                f"the launcher announced {announced} processes, {self.world} were joined, and {counted} answered: "
                "each would train alone. Launch with `accelerate launch --config_file launch/cpu_two.yaml`, or with "
                "torchrun."
            )

    @property
    def rank(self) -> int:
        return self._membership.rank

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self._membership.world

    @property
    def device(self) -> torch.device:
        """This rank's compute device."""
        return self._membership.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def phase(self) -> str:
        """This rank's current phase, for messages."""
        return self._recorder.phase

    def in_phase(self, name: str) -> AbstractContextManager[None]:
        """Set the phase, such as 'training', inside the context; restore the enclosing phase on exit."""
        return self._recorder.in_phase(name)

    def request_stop(self) -> None:
        """Request a stop on all ranks without blocking. `stop_requested` becomes true on each within about 2 s."""
        self._stop_requested = True
        if self._watchdog is not None:
            self._watchdog.request_stop()

    def stop_requested(self) -> bool:
        """Whether a stop was requested on any rank. Not a collective: ranks may see it a second apart."""
        return self._stop_requested or (self._watchdog is not None and self._watchdog.stop_requested)

    @property
    def partition(self) -> Partition:
        """This rank's slice of replicated tensors, so that each weight is counted on exactly one rank."""
        return Partition(self.rank, self.world)

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Record a collective that a library runs in this context. The GPU may still execute it on exit."""
        self._recorder.begin(what)
        try:
            yield
        finally:
            self._recorder.end(*([_track_gpu_work()] if self.device.type == "cuda" else []))

    def gather(self, values: Tensor, *, what: str = "gather of numbers") -> Tensor:
        """Gather tensors of equal shape and dtype. Return them in rank order as (world, *shape) on the CPU."""
        with self._recorder.collective(what) if self.world > 1 else nullcontext():
            return self._all_gather(values).cpu()

    def gather_here(self, values: Tensor, *, what: str = "gather of numbers") -> Tensor:
        """Gather like `gather`, but return the result on this rank's device, without waiting for a GPU."""
        with self.collective(what) if self.world > 1 else nullcontext():
            return self._all_gather(values)

    def _all_gather(self, values: Tensor) -> Tensor:
        local = values.detach().to(self.device).contiguous()
        if self.world == 1:
            return local.unsqueeze(0)
        per_rank = [torch.empty_like(local) for _ in range(self.world)]
        torch.distributed.all_gather(per_rank, local)
        return torch.stack(per_rank)

    def sum(self, values: Tensor, *, what: str = "sum of numbers") -> Tensor:
        """Sum values over ranks on the CPU in rank order, so the result is bit-identical on every rank."""
        return self.gather(values, what=what).sum(dim=0)

    def sum_here(self, values: Tensor, *, what: str) -> Tensor:
        """Sum like `sum`, but on this rank's device, without waiting for it."""
        return self.gather_here(values, what=what).sum(dim=0)

    def any(self, flag: bool, *, what: str) -> bool:
        """Return on every rank whether the flag is true on any rank. what: the question, such as 'whether to stop'."""
        return bool(self.gather(torch.tensor(flag), what=f"question {what}").any())

    def gather_objects(self, item: T, *, what: str = "gather of objects") -> list[T]:
        """Gather one small picklable object per rank. Return them in rank order on every rank."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        with self._recorder.collective(what):
            torch.distributed.all_gather_object(items, item)
        return items

    def check_agreement(self, what: str, digest: str) -> None:
        """Raise InvariantError on every rank, naming the ranks that differ, unless all digests are equal."""
        all_digests = self.gather_objects(digest, what=f"agreement on {what}")
        if len(set(all_digests)) > 1:
            usual = max(all_digests, key=all_digests.count)
            drifted = [r for r, d in enumerate(all_digests) if d != usual]
            table = ", ".join(f"rank {r} {d[:12]}" for r, d in enumerate(all_digests))
            named = ", ".join(f"{r} ({self.hosts[r]})" for r in drifted)
            raise InvariantError(
                f"ranks disagree on {what}: {table}. Rank {named} has drifted: check that "
                "machine's memory and GPU, then start again with --resume auto from the last commit.",
                everywhere=True,
            )

    def on_main(self, work: Callable[[], T], *, what: str = "work") -> T:
        """Run `work` on rank 0 only. Return its result, or raise its MirlError or Stopped, on every rank."""
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

    def keep_on_main(self, work: Callable[[], T], *, what: str) -> T | None:
        """Run `work` on rank 0 like `on_main`, but keep its result there, unpickled; the other ranks get None."""
        results: list[T] = []
        self.on_main(lambda: results.append(work()), what=what)
        return results[0] if results else None

    def broadcast_tensors(
        self, tensors: Mapping[str, Tensor] | None, *, what: str = "tensors", layout: ShardLayout | None = None
    ) -> dict[str, Tensor]:
        """Broadcast rank 0's named tensors to the CPU of every rank; other ranks pass None.

        layout: keep only this rank's part of each tensor.
        """
        layout = layout or ShardLayout({})  # keeps whole tensors
        if self.world == 1:
            assert tensors is not None
            return {name: layout.part_of(name, tensor) for name, tensor in tensors.items()}
        described = self.on_main(lambda: [(n, tuple(t.shape), t.dtype) for n, t in (tensors or {}).items()], what=what)
        received: dict[str, Tensor] = {}
        for name, shape, dtype in described:
            wire = torch.uint8 if dtype is torch.bool else dtype
            if tensors is not None and self.is_main:
                buffer = tensors[name].to(self.device, wire).contiguous()
            else:
                buffer = torch.empty(shape, dtype=wire, device=self.device)
            with self._recorder.collective(f"{what} by rank 0, {name}"):
                torch.distributed.broadcast(buffer, src=0)
            received[name] = local_part(layout, {name: buffer})[name].to("cpu", dtype)
        return received

    def barrier(self, *, what: str = "barrier") -> None:
        """Block until all ranks reach this call."""
        if self.world > 1:
            with self._recorder.collective(what):
                torch.distributed.barrier()

    def close(self) -> None:
        """Leave the process group; all ranks must call this together. Otherwise torch warns about leaked resources."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self.barrier(what="end")  # rank 0 may serve the store that the others' watchdogs read
        leave_process_group(self._membership)


def _track_gpu_work() -> Callable[[], bool]:
    """Return a function, callable from any thread, that tells whether the GPU work queued so far has finished."""
    cuda: Any = torch.cuda
    event = cuda.Event()
    event.record()

    def done() -> bool:
        try:
            return bool(event.query())
        except RuntimeError:  # the GPU has failed; the main thread will get the error too
            return True

    return done
