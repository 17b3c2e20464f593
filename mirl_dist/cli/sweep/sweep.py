"""`mirl-dist sweep`: trains all runs of a sweep here or with SLURM, shows their status, and compares them."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from mirl_dist.cli import compare
from mirl_dist.cli.sweep import spec
from mirl_dist.cli.sweep.scheduler import Scheduler
from mirl_dist.cli.sweep.spec import SweepPlan
from mirl_dist.cli.sweep.status import State, make_table, read_status
from mirl_dist.config.yaml_loader import raise_complaints
from mirl_dist.distributed import hardware
from mirl_dist.distributed.launch.launch_file import ADDRESS, NODE_RANK, LaunchFile
from mirl_dist.distributed.launch.launch_file import read as read_launch_file
from mirl_dist.distributed.signals import INTERRUPTED, RESUMABLE
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


def run(plan: SweepPlan, source: str, before_signals: Callable[[], None]) -> int:
    """Train the unfinished runs, then compare; return the exit code. Raises UserError before starting any run.

    before_signals: called before this process installs its signal handlers.
    """
    launch_file = _launch_file_of(plan)
    environments = _slot_environments(plan, launch_file)
    if launch_file is not None:
        _check_fits_slots(plan, launch_file, environments)
    check_sweep(plan, source, launch_file)
    scheduler, stop_code = Scheduler(plan, environments), None
    if any(status.state != "finished" for status in scheduler.statuses.values()):
        stop_code = _train_runs(plan, source, scheduler, before_signals)
    states = {name: status.state for name, status in scheduler.statuses.items()}
    try:
        counts = Counter(states.values())
        progress.say(f"{_count_in_words(len(plan.runs))}: {', '.join(f'{counts[s]} {s}' for s in _ORDER if counts[s])}")
        is_due = stop_code is None or (stop_code != INTERRUPTED and len(plan.runs) == counts["finished"])
        if is_due and "finished" in counts:
            compare_runs(plan, source, states)
    finally:
        for one in plan.runs:
            if states[one.name] == "failed":
                warn(f"mirl-dist: {one.name} failed; its log is {plan.log(one)}{_last_line(plan.log(one))}")
    return INTERRUPTED if stop_code == INTERRUPTED else exit_code(list(states.values()), asked=stop_code is not None)


def exit_code(states: Sequence[State], *, asked: bool) -> int:
    """Return 0 if all runs have finished, else 75 if a stop was asked for or no run failed, else 1."""
    if all(state == "finished" for state in states):
        return 0
    return RESUMABLE if asked or "failed" not in states else 1


def _train_runs(plan: SweepPlan, source: str, scheduler: Scheduler, before_signals: Callable[[], None]) -> int | None:
    """Run `Scheduler.work` as the only sweep of its folder. Raises UserError if another sweep uses the folder."""
    try:
        plan.local_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"folder: {plan.local_folder} cannot be made: {error.strerror}. Choose another place."
        ) from None
    config = plan.runs[0].config
    store = open_configured(config.store, plan.sweep.folder)
    lease = Lease(store, seconds=config.store.lease_seconds, status=dict, launch={"sweep": source})
    try:
        lease.claim()
    except StorageError:
        raise
    except UserError as fault:
        raise UserError(f"another sweep works here, and this one has started nothing. {fault}") from None
    ending = "failed"
    try:
        before_signals()
        stop_code = scheduler.work(lease.lost)
        ending = "finished" if stop_code is None else "stopped"
    finally:
        lease.release(ending)
    return stop_code


def check_sweep(plan: SweepPlan, source: str, launch_file: LaunchFile | None) -> None:
    """Raise UserError with all errors, of all runs, that can be detected before starting any. Writes nothing.

    launch_file: of the runs, if any.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep is one process that launches its own runs: start it without a launcher.")
    output_paths.check_folder(plan.local_folder, "folder")
    output_paths.check_folder(plan.report_folder, "compare.out")
    complaints: dict[str, list[str]] = {}
    for one in plan.runs:
        try:
            preflight.preflight(one.config, 1 if launch_file is None else launch_file.ranks, "auto", open_ticket)
        except UserError as fault:
            if fault.resumable:
                raise
            complaints.setdefault(str(fault), []).append(one.name)
    lines = [f"{'all' if len(n) == len(plan.runs) else ', '.join(n)}: {text}" for text, n in complaints.items()]
    raise_complaints(lines, f"in the runs of {source}; nothing was started")


def _launch_file_of(plan: SweepPlan) -> LaunchFile | None:
    """Return the launch file of the runs, if any; one for several nodes is read as on the first node."""
    if plan.sweep.launch in (None, "auto"):
        return None
    first_node = {NODE_RANK[0]: "0", ADDRESS: "node 0"}  # placeholders; the job sets the real values
    return read_launch_file(Path(str(plan.sweep.launch)), first_node | os.environ)


def _check_fits_slots(plan: SweepPlan, launch_file: LaunchFile, slots: list[dict[str, str]]) -> None:
    """Raise UserError if the launch file does not fit into a slot of this machine. slots: environment of each slot."""
    if launch_file.nodes > 1:
        raise UserError(
            f"launch: {launch_file.path} asks for {launch_file.nodes} nodes, a sweep here has one. Use --submit slurm."
        )
    if len(slots) > 1 and launch_file.ranks > 1 and launch_file.port:
        text = f"launch: {launch_file.path} has main_process_port {launch_file.port}"
        raise UserError(f"{text}, which {len(slots)} runs at once would share. Write 0.")
    gpus, ranks = sum(map(bool, slots[0].get(_GPUS, "").split(","))), launch_file.ranks_per_node
    if 0 < gpus < ranks and any(one.config.train.device != "cpu" for one in plan.runs):
        text = f"launch: {launch_file.path} starts {ranks} ranks, and each of {len(slots)} slots has {gpus} GPUs"
        raise UserError(f"{text}. Lower slots, or name a smaller launch file.")


def _slot_environments(plan: SweepPlan, launch_file: LaunchFile | None) -> list[dict[str, str]]:
    """Return the environment variables of each slot: its GPUs, and its share of the processors."""
    count, visible = hardware.gpus(), os.environ.get(_GPUS)
    devices = [str(n) for n in range(count)] if visible is None else visible.split(",")[:count]
    environments = []
    for share in spec.share_devices(devices, plan.sweep.slots):
        processes = 1 if plan.sweep.launch is None else len(share) or 2
        if launch_file is not None:
            processes = launch_file.ranks_per_node
        threads = max(1, (os.cpu_count() or 1) // (plan.sweep.slots * processes))
        own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)}
        environments.append(own | ({_GPUS: ",".join(share)} if share else {}))
    return environments


def _count_in_words(count: int) -> str:
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


def compare_runs(plan: SweepPlan, source: str, states: Mapping[str, State]) -> None:
    """Compare the finished runs, together with their controls trained by `tickets judge --train`."""
    finished = [one for one in plan.runs if states[one.name] == "finished"]
    if not finished:
        text = f"no run of {source} has finished, so there is nothing to compare"
        raise UserError(f"{text}. --status shows their progress.")
    missing = [f"{one.name} ({states[one.name]})" for one in plan.runs if one not in finished]
    if missing:
        progress.say(f"note: not in this comparison: {', '.join(missing)}")
    section, config = plan.sweep.compare, finished[0].config
    if config.store.endpoint is not None:
        os.environ["AWS_ENDPOINT_URL_S3"] = config.store.endpoint  # readers of runs do not see the config
    names = [one.folder for one in finished]
    for one in finished:
        opened = open_run_ticket(one.folder, options_of(one.config.store))
        names += [control.folder for control in compare.controls_of(one.folder, opened) if control.is_finished()]
    title, uri = section.title or plan.name, config.tracking.uri
    report = compare.Report(plan.report_folder, title, section.experiment, uri, section.pictures)
    compare.compare(names, report, overwrite=True, as_json=False)


def compare_finished(plan: SweepPlan, source: str) -> None:
    """Compare the runs that have finished so far (`sweep --compare`)."""
    output_paths.check_folder(plan.report_folder, "compare.out")
    compare_runs(plan, source, {one.name: read_status(one).state for one in plan.runs})


# -- status, SLURM ----------------------------------------------------------------------------------------------------


def print_status(plan: SweepPlan, as_json: bool) -> None:
    """Print a line per run: state, round, step, and sparsity and PSNR of its last ticket."""
    statuses = {one.name: read_status(one) for one in plan.runs}
    if as_json:
        print(json.dumps([statuses[one.name].row(one) for one in plan.runs], indent=1))
    else:
        Console().print(make_table(plan, statuses))


def submit(plan: SweepPlan, source: str) -> None:
    """Submit the unfinished runs to SLURM as one job array, `slots` at a time. Raises UserError."""
    check_sweep(plan, source, _launch_file_of(plan))
    states = {one.name: read_status(one).state for one in plan.runs}
    unfinished = [one for one in plan.runs if states[one.name] not in ("finished", "running")]
    for one in plan.runs:
        if one not in unfinished:
            progress.say(f"{one.name}: {states[one.name]}, not submitted")
    if not unfinished:
        progress.say(f"nothing to submit; the comparison: mirl-dist sweep {shlex.quote(source)} --compare")
        return
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not here. Submit on a machine of the cluster, or print the commands with --print.")
    if not BATCH.is_file():
        raise UserError(f"no file at {BATCH}. Run this in the folder that contains launch/, as for train.")
    text = "".join(f"{spec.command_line(plan, one)}\n" for one in unfinished).encode()
    # The name depends on the content, because queued SLURM tasks read their line of this file later.
    commands = plan.local_folder / f"commands-{hashlib.sha256(text).hexdigest()[:8]}.txt"
    Folder(plan.local_folder).put(commands.name, text)
    array = f"--array=1-{len(unfinished)}%{plan.sweep.slots}"
    command = ["sbatch", "--parsable", f"--job-name=sweep-{plan.name}", array]
    command += [f"--output={plan.local_folder}/slurm-%A_%a.out", *plan.sweep.sbatch, str(BATCH), str(commands)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        why = ended.stderr.strip()
        raise UserError(f"{shlex.join(command)} ended with code {ended.returncode}: {why}. Correct that.")
    progress.say(f"{_count_in_words(len(unfinished))} submitted as job {ended.stdout.strip()}: {shlex.join(command)}")
    progress.say(f"progress: mirl-dist sweep {shlex.quote(source)} --status; at the end: --compare")
