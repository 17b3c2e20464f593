"""`mirl-dist sweep`: all runs of a sweep, here or by SLURM; where they stand; one comparison at the end."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from mirl_dist.cli import compare as comparing
from mirl_dist.cli import judge
from mirl_dist.cli.sweep import spec as plans
from mirl_dist.cli.sweep.scheduler import INTERRUPTED, Scheduler
from mirl_dist.cli.sweep.spec import State, SweepPlan, SweepRun
from mirl_dist.cli.sweep.status import StatusTable, look, table
from mirl_dist.distributed import hardware
from mirl_dist.distributed.launch import launch_file
from mirl_dist.distributed.launch.launch_file import LaunchFile
from mirl_dist.errors import UserError
from mirl_dist.observability import progress
from mirl_dist.observability.console import warn
from mirl_dist.storage import Folder, StorageError, output_paths
from mirl_dist.storage.configured import open_configured, options_of
from mirl_dist.storage.lease import Lease
from mirl_dist.tickets.open import open_run_ticket, open_ticket
from mirl_dist.training import preflight

BATCH = Path("launch/slurm/array.sbatch")
_GPUS = "CUDA_VISIBLE_DEVICES"
_ORDER: tuple[State, ...] = ("finished", "running", "stopped", "failed", "waiting")


def run(plan: SweepPlan, where: str, prepared: Callable[[], None]) -> int:
    """Train what has not finished, then compare; the exit code. Raises UserError before any run is started.

    prepared: called when signals are about to be heard here.
    """
    said = _launch_file(plan)
    environments = _environments(plan, said)
    if said is not None:
        _check_here(plan, said, environments)
    check_sweep(plan, where, said)
    board, asked = StatusTable(plan), None
    if any(stand.state != "finished" for stand in board.stands.values()):
        asked = _train(plan, where, board, environments, prepared)
    states = {name: stand.state for name, stand in board.stands.items()}
    try:
        counts = Counter(states.values())
        progress.say(f"{_runs(len(plan.runs))}: {', '.join(f'{counts[s]} {s}' for s in _ORDER if counts[s])}")
        may = asked is None or (asked != INTERRUPTED and len(plan.runs) == counts["finished"])
        if may and "finished" in counts:
            compare(plan, where, states)
    finally:
        for one in plan.runs:
            if states[one.name] == "failed":
                warn(f"mirl-dist: {one.name} failed; its log is {plan.log(one)}{_last_line(plan.log(one))}")
    return INTERRUPTED if asked == INTERRUPTED else plans.exit_code(list(states.values()), asked is not None)


def _train(
    plan: SweepPlan, where: str, board: StatusTable, environments: list[dict[str, str]], prepared: Callable[[], None]
) -> int | None:
    """Work off the queue as the only sweep of its folder: as `Queue.work`. Raises UserError where another one works."""
    try:
        plan.local.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder: {plan.local} cannot be made: {error.strerror}. Choose another place.") from None
    config = plan.runs[0].config
    store = open_configured(config.store, plan.sweep.folder)
    lease = Lease(store, seconds=config.store.lease_seconds, status=dict, launch={"sweep": where})
    try:
        lease.claim()
    except StorageError:
        raise
    except UserError as fault:
        raise UserError(f"another sweep works here, and this one has started nothing. {fault}") from None
    why = "failed"
    try:
        prepared()
        with board:
            asked = Scheduler(plan, board, environments).work(lease.lost)
        why = "finished" if asked is None else "stopped"
    finally:
        lease.release(why)
    return asked


def check_sweep(plan: SweepPlan, where: str, said: LaunchFile | None) -> None:
    """Raise UserError with all that can be refused before any run is started, of all runs. Nothing is written.

    said: the launch file of the runs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep is one process, which starts its runs itself: call it without a launcher.")
    output_paths.check_folder(plan.local, "folder")
    output_paths.check_folder(out_of(plan), "compare.out")
    complaints = dict[str, list[str]]()
    for one in plan.runs:
        try:
            preflight.preflight(one.config, 1 if said is None else said.ranks, "auto", open_ticket)
        except UserError as fault:
            if fault.resumable:
                raise
            complaints.setdefault(str(fault), []).append(one.name)
    every = len(plan.runs)
    lines = [f"{'all' if len(n) == every else ', '.join(n)}: {text}" for text, n in complaints.items()]
    plans.raise_complaints(lines, where)


def _launch_file(plan: SweepPlan) -> LaunchFile | None:
    """The launch file of the runs; None without one. Of several nodes it is read as if on the first one."""
    if plan.sweep.launch in (None, "auto"):
        return None
    here = {launch_file.NODE_RANK[0]: "0", launch_file.ADDRESS: "node 0"}  # the job will know better
    return launch_file.read(Path(str(plan.sweep.launch)), here | os.environ)


def _check_here(plan: SweepPlan, said: LaunchFile, slots: list[dict[str, str]]) -> None:
    """Raise UserError for a launch file that does not fit into a slot of this machine. slots: their environments."""
    if said.nodes > 1:
        raise UserError(f"launch: {said.path} asks for {said.nodes} nodes, a sweep here has one. Use --submit slurm.")
    if len(slots) > 1 and said.ranks > 1 and said.port:
        raise UserError(
            f"launch: {said.path} has main_process_port {said.port}, where {len(slots)} runs meet. Write 0."
        )
    gpus = len([name for name in slots[0].get(_GPUS, "").split(",") if name])
    if 0 < gpus < said.ranks_per_node and any(one.config.train.device != "cpu" for one in plan.runs):
        raise UserError(
            f"launch: {said.path} starts {said.ranks_per_node} ranks, and each of {len(slots)} slots has {gpus} GPUs. "
            "Lower slots, or name a smaller launch file."
        )


def _environments(plan: SweepPlan, said: LaunchFile | None) -> list[dict[str, str]]:
    """What differs in the environment of each slot: its GPUs, and its share of the processors."""
    found, named = hardware.gpus(), os.environ.get(_GPUS)
    devices = [str(n) for n in range(found)] if named is None else named.split(",")[:found]
    made = []
    for share in plans.shared(devices, plan.sweep.slots):
        processes = said.ranks_per_node if said is not None else 1 if plan.sweep.launch is None else len(share) or 2
        threads = max(1, (os.cpu_count() or 1) // (plan.sweep.slots * processes))
        own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)}
        made.append(own | ({_GPUS: ",".join(share)} if share else {}))
    return made


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _last_line(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    shown = "".join(c if c.isprintable() else "?" for c in last[:160])
    return f": {shown}" if shown else ""


# -- comparison -------------------------------------------------------------------------------------------------------


def out_of(plan: SweepPlan) -> Path:
    """The folder of the comparison's files."""
    return plan.local / "report" if plan.sweep.compare.out is None else Path(plan.sweep.compare.out)


def compare(plan: SweepPlan, where: str, states: Mapping[str, State]) -> None:
    """Compare the runs that have finished, with the controls that `tickets judge --train` has trained of them."""
    finished = [one for one in plan.runs if states[one.name] == "finished"]
    if not finished:
        raise UserError(
            f"no run of {where} has finished, so there is nothing to compare. --status shows where they stand."
        )
    missing = [f"{one.name} ({states[one.name]})" for one in plan.runs if one not in finished]
    if missing:
        progress.say(f"note: not in this comparison: {', '.join(missing)}")
    said, config = plan.sweep.compare, finished[0].config
    if config.store.endpoint is not None:
        os.environ["AWS_ENDPOINT_URL_S3"] = config.store.endpoint  # those who read runs know no config
    names = [one.folder for one in finished]
    names += [folder for one in finished for folder in _controls(one)]
    comparing.compare(
        names, out_of(plan), False, said.title or plan.name, said.experiment, config.tracking.uri, said.pictures
    )


def _controls(one: SweepRun) -> list[str]:
    found = open_run_ticket(one.folder, options_of(one.config.store))
    return [control.folder for control in judge.controls_of(one.folder, found) if control.finished()]


def compare_now(plan: SweepPlan, where: str) -> None:
    """`sweep --compare`: what has finished so far."""
    output_paths.check_folder(out_of(plan), "compare.out")
    compare(plan, where, {one.name: look(one).state for one in plan.runs})


# -- status, SLURM ----------------------------------------------------------------------------------------------------


def print_status(plan: SweepPlan, as_json: bool) -> None:
    """A line per run: state, round, step, sparsity and PSNR of its last ticket."""
    stands = {one.name: look(one) for one in plan.runs}
    if as_json:
        print(json.dumps([stands[one.name].row(one) for one in plan.runs], indent=1))
    else:
        Console().print(table(plan, stands))


def submit(plan: SweepPlan, where: str) -> None:
    """Hand the runs that have not finished to SLURM, as one array of `slots` at a time. Raises UserError."""
    check_sweep(plan, where, _launch_file(plan))
    states = {one.name: look(one).state for one in plan.runs}
    todo = [one for one in plan.runs if states[one.name] not in ("finished", "running")]
    for one in plan.runs:
        if one not in todo:
            progress.say(f"{one.name}: {states[one.name]}, not submitted")
    if not todo:
        progress.say(f"nothing to submit; the comparison: mirl-dist sweep {shlex.quote(where)} --compare")
        return
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not here. Submit on a machine of the cluster, or print the commands with --print.")
    if not BATCH.is_file():
        raise UserError(f"no file at {BATCH}. Call this where the repository's launch/ lies, as for train.")
    text = "".join(f"{plans.line(plan, one)}\n" for one in todo).encode()
    commands = (
        plan.local / f"commands-{hashlib.sha256(text).hexdigest()[:8]}.txt"
    )  # one name never changes its content:
    Folder(plan.local).put(commands.name, text)  # tasks that wait in SLURM's queue read their line later
    order = ["sbatch", "--parsable", f"--job-name=sweep-{plan.name}", f"--array=1-{len(todo)}%{plan.sweep.slots}"]
    order += [f"--output={plan.local}/slurm-%A_%a.out", *plan.sweep.sbatch, str(BATCH), str(commands)]
    ran = subprocess.run(order, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise UserError(f"{shlex.join(order)} ended with code {ran.returncode}: {ran.stderr.strip()}. Correct that.")
    progress.say(f"{_runs(len(todo))} submitted as job {ran.stdout.strip()}: {shlex.join(order)}")
    progress.say(f"where they stand: mirl-dist sweep {shlex.quote(where)} --status; at the end: --compare")
