"""The stages of gpu_smoke that run commands of the package, as a user would. Each returns 'ok' and its figures."""

from __future__ import annotations

import importlib.util
import re
import signal
import sys
from typing import Any

from commands import Commands, brief, rates

Result = dict[str, Any]
PUBLISHED = {
    "model.dim": "48",
    "model.blocks": "[4, 6, 6, 8]",
    "model.refinement_blocks": "4",
    "model.prompt_dims": "[64, 128, 320]",
    "model.prompt_sizes": "[64, 32, 16]",
}


def shards(c: Commands) -> Result:
    """Build the shards of the demo, which the stages below read."""
    result = c.mirl("shards", "build", "shards/demo.yaml", "--out", str(c.work / "shards"))
    return {"ok": result["code"] == 0} | brief(result)


def plain(c: Commands) -> Result:
    """Train two rounds, and start the finished run again: nothing is left to do."""
    result, again = c.train("plain", launch="auto"), c.train("plain")
    tickets = c.tickets("plain")
    ok = result["code"] == again["code"] == 0 and len(tickets) == 2
    return {"ok": ok, "samples/s": rates(result), "tickets": tickets} | brief(result) | {"again": brief(again)}


def full(c: Commands) -> Result:
    """Train the published network in each precision: samples per second, and the memory that doctor foretells."""
    steps = {"data.steps_per_epoch": "2" if c.cpu else "40", "prune.rounds": "0", "checkpoint.every_steps": "1000"}
    workers = {"data.workers": "1" if c.cpu else "4", "tracking.every_steps": "1" if c.cpu else "10"}
    network = {"data.patch_pixels": "16", "batch.global": "2"} if c.cpu else PUBLISHED
    found: Result = {"ok": True}
    for precision in ("fp32", "bf16"):
        result = c.train(f"full-{precision}", network | steps | workers | {"train.precision": precision})
        found[precision] = {"samples/s": rates(result)} | brief(result)
        found["ok"] = found["ok"] and result["code"] == 0
    words = c.train_words("full-fp32", network | steps)[1:]
    doctor = c.mirl("doctor", *words, "--launch", "launch/one.yaml", "--json")
    plan = re.search(r'"bytes": \{.*?"in all": (\d+)', doctor["text"], re.DOTALL)
    return found | {"doctor GiB, fp32": plan and round(int(plan.group(1)) / 2**30, 2)}


def killed(c: Commands) -> Result:
    """Kill a run in round 0, ask it to stop in round 1, let it end: the bits of a run that nobody disturbed."""
    steps = {"data.steps_per_epoch": "12" if c.cpu else "150", "checkpoint.every_steps": "3" if c.cpu else "20"}
    whole = c.train("whole", steps)

    def reached(round_: str) -> bool:
        return any((c.work / "killed" / "rounds" / round_).glob("steps/*/COMPLETE.json"))

    codes = [
        c.train("killed", steps, send=signal.SIGKILL, when=lambda: reached("00"))["code"],
        c.train("killed", steps, send=signal.SIGTERM, when=lambda: reached("01"))["code"],
        c.train("killed", steps)["code"],
    ]
    is_same = bool(c.tickets("whole")) and c.tickets("whole") == c.tickets("killed")
    return {"ok": codes == [-9, 75, 0] and is_same, "codes": codes, "same bits": is_same, "whole": brief(whole)}


def refusals(c: Commands) -> Result:
    """Provoke what a user will: each must end in one line, with the exit code that is expected."""
    huge = PUBLISHED | {"batch.global": "128", "data.patch_pixels": "128", "data.steps_per_epoch": "1"}
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "loss is not finite": (2, c.train("nan", {"optimiser.lr": "1e30", "train.epochs": "2"})),
        "no GPU is visible": (
            2,
            c.train("blind", {"train.device": "cuda"}, env={"CUDA_VISIBLE_DEVICES": ""}),
        ),
    }
    if not c.cpu:
        cases["two ranks on one GPU"] = (2, c.train("two", launch="launch/cpu_two.yaml"))
        cases["out of memory"] = (2, c.train("huge", huge, launch=c.one_rank("fsdp.yaml")))
    found: Result = {"ok": True}
    for name, (code, result) in cases.items():
        is_clear = result["code"] == code and "Traceback" not in result["text"]
        found["ok"] = found["ok"] and is_clear
        found[name] = {"code": result["code"], "seconds": result["seconds"], "last": result["tail"][-1:]}
    return found


def using(c: Commands) -> Result:
    """Score a ticket in each way, and restore an image."""
    run = str(c.work / "plain")
    if not c.tickets("plain"):
        return {"ok": "skipped: needs the stage plain"}
    ways = {"fp32": [], "bf16": ["--precision", "bf16"]} | ({} if c.cpu else {"compiled": ["--compile"]})
    found: Result = {"ok": True}
    for name, words in ways.items():
        result = c.mirl("evaluate", run, "--json", *words)
        psnr = re.search(r'"psnr": ([\d.]+)', result["text"])
        found[name] = {"psnr": psnr and round(float(psnr.group(1)), 4)} | brief(result)
        found["ok"] = found["ok"] and result["code"] == 0
    image = str(_write_image(c))
    restored = c.mirl("restore", image, "--ticket", run, "--out", str(c.work / "restored"))
    doctor = c.mirl("doctor")
    found["ok"] = found["ok"] and restored["code"] == 0 and doctor["code"] in (0, 1)  # 1: mlflow or boto3 is missing
    gpus = [line for line in doctor["text"].splitlines() if line.startswith("GPUs")]
    return found | {"restore": brief(restored), "doctor": gpus}


def _write_image(c: Commands) -> Any:
    import numpy as np
    from PIL import Image

    path = c.work / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (157, 243, 3), dtype=np.uint8)).save(path)
    return path


def halves(c: Commands) -> Result:
    """Train in bfloat16 with accumulated passes and clipped gradients, twice: the same bits."""
    sets = {"train.precision": "bf16", "evaluate.precision": "bf16", "optimiser.clip_norm": "1", "batch.forward": "2"}
    results = [c.train(name, sets) for name in ("half-a", "half-b")]
    is_same = bool(c.tickets("half-a")) and c.tickets("half-a") == c.tickets("half-b")
    return {"ok": is_same, "same bits": is_same, "runs": [brief(result) for result in results]}


def torchrun(c: Commands) -> Result:
    """One rank that meets itself through NCCL: barrier, collectives of objects, DDP; the bits of a plain process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    result = c.run([*launcher, "-m", "mirl_dist", *c.train_words("torchrun")])
    alone = c.train("alone")
    is_same = bool(c.tickets("torchrun")) and c.tickets("torchrun") == c.tickets("alone")
    return {"ok": is_same, "same bits": is_same, "torchrun": brief(result), "alone": brief(alone)}


def engines(c: Commands) -> Result:
    """Train with every other engine on one rank: the masks of the plain run."""
    found: Result = {"ok": True}
    plain_run = c.tickets("alone") or c.tickets("plain")
    for name in ("fsdp", "zero2", "zero3", "fsdp_offload", "zero1", "zero2_offload", "zero3_offload"):
        if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            found[name] = "skipped: no deepspeed"
            continue
        if c.limit.left() < 10:
            found[name] = "skipped: no time is left"
            continue
        result = c.train(name, launch=c.one_rank(f"{name}.yaml"))
        masks = [mask for mask, _ in c.tickets(name)]
        is_same = bool(masks) and masks == [mask for mask, _ in plain_run]
        found[name] = {"masks of ddp": is_same} | brief(result)
        found["ok"] = found["ok"] and result["code"] == 0 and is_same
    return found


def criteria(c: Commands) -> Result:
    """Prune by every other criterion."""
    found: Result = {"ok": True}
    for criterion in ("synflow", "snip", "gradient", "random"):
        if c.limit.left() < 10:
            found[criterion] = "skipped: no time is left"
            continue
        sets = {"prune.criterion": criterion, "prune.criterion_batches": "1", "prune.synflow_steps": "3"}
        result = c.train(criterion, sets)
        found[criterion] = brief(result)
        found["ok"] = found["ok"] and result["code"] == 0
    return found
