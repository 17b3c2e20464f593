"""Comparisons that nobody trained: tickets with plausible masks, scores, curves and pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirl_dist.data import image_strip
from mirl_dist.evaluation.protocols import PROTOCOLS
from mirl_dist.evaluation.score import Score
from mirl_dist.tickets.compare.entry import DENSE, Entry
from mirl_dist.training.ticket import Curve, Ticket

if TYPE_CHECKING:
    from torch import nn

TASKS = {"derain/rain": 29.0, "denoise_25/photos": 30.2, "dehaze/haze": 26.5}
"""'task/set' -> PSNR in dB of a whole network."""
COST = {
    "MIR-L-G": 0.25,
    "MIR-L-LW": 1.0,
    "random layer iterative rewound": 1.9,
    "PIR-OSM 70%": 1.2,
    "control reinit": 0.9,
    "control random_layer": 1.4,
}
"""Method -> dB that it loses per factor ten of weights."""
PARTS = {
    "patch_embed.proj.weight": 432,
    "encoder_level1.0.norm1.body.weight": 8,
    "encoder_level1.0.attn.qkv.weight": 1200,
    "encoder_level1.0.ffn.project_in.weight": 2100,
    "down1_2.body.0.weight": 288,
    "encoder_level2.0.attn.qkv.weight": 3000,
    "output.weight": 432,
}
UNPRUNABLE = 900


def small_promptir(seed: int = 0) -> nn.Module:
    """A small PromptIR."""
    import torch

    from mirl_dist import models

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"dim": 8, "blocks": (1,) * 4, "refinement_blocks": 1, "prompt_heads": 4}
    return models.create("promptir", **sizes, prompt_dims=(8,) * 3, prompt_sizes=(4,) * 3)


def _rng(*key: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


def _hex(*key: object) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()


def _strengths(method: str, seed: int, parts: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
    """What decides which weights stay: magnitudes that seeds share in part, layer by layer of another scale."""
    found = {}
    for at, (name, n) in enumerate(parts.items()):
        shared, own = _rng(name).random(n), _rng(method, seed, name).random(n)
        scale = 1 if "LW" in method or "layer" in method else 0.25 + 1.2 * abs(np.sin(at / 5)) + 1.5 * (n < 300)
        found[name] = scale * (own if "random" in method else 0.55 * shared + 0.45 * own)
    return found


def _masks(method: str, seed: int, parts: Mapping[str, int], density: float) -> dict[str, NDArray[np.bool_]]:
    strengths = _strengths(method, seed, parts)
    if "LW" in method or "layer" in method:
        return {n: s >= np.quantile(s, 1 - density) for n, s in strengths.items()}
    cut = np.quantile(np.concatenate(list(strengths.values())), 1 - density)
    return {n: s >= cut for n, s in strengths.items()}


def _scores(method: str, seed: int, density: float, tasks: Mapping[str, float]) -> dict[str, Score]:
    found = {}
    for name, top in tasks.items():
        lost = COST.get(method, 0.8) * -np.log10(density) * (1.6 if name.startswith("dehaze") else 1)
        psnr = top - lost - 0.15 * lost**2 + 0.12 * _rng(method, seed, density, name).normal()
        ssim = 0.93 - 0.02 * (top - psnr) + 0.002 * _rng("ssim", method, seed, name).normal()
        found[name] = Score(psnr=psnr, ssim=ssim, degraded_psnr=top - 7, degraded_ssim=0.7, images=20)
    return found


def _curve(seed: int, method: str, scores: Mapping[str, Score], began: int, steps: int) -> Curve:
    rise, psnr = 1 - np.exp(-np.arange(1, 9) / 2.2), {}
    for name, score in scores.items():
        noise = 0.15 * _rng(seed, method, name).normal(size=8)
        psnr[name] = tuple((score.degraded_psnr + (score.psnr - score.degraded_psnr) * rise + noise).tolist())
    return Curve(steps=tuple(began + steps * i // 8 for i in range(1, 9)), psnr=psnr)


def _strip(seed: int, psnr: Mapping[str, float], side: int) -> bytes:
    """Pictures of photographs, worse where the score is."""
    from skimage import data

    rows = []
    for name in psnr:
        for key, photograph in (("astronaut", data.astronaut()), ("cat", data.chelsea())):
            clean = image_strip.centre(photograph, side).astype(float)
            damage = _rng("damage", name, key).normal(size=clean.shape) * 25
            left = _rng(name, key, seed).normal(size=clean.shape) * 10 ** (-(psnr[name] - 48) / 20)
            images = tuple(np.clip(x, 0, 255).astype(np.uint8) for x in (clean + damage, clean + left, clean))
            rows.append(image_strip.Row(f"{name} {key}", images))
    return image_strip.strip(rows)


def entry(
    method: str = "MIR-L-G",
    seed: int = 0,
    round_: int = 1,
    density: float = 0.8,
    *,
    run: str | None = None,
    parts: Mapping[str, int] = PARTS,
    tasks: Mapping[str, float] = TASKS,
    masked: bool = True,
    curved: bool = True,
    side: int = 0,
) -> Entry:
    """One ticket. density: about the alive share of its prunable weights; side: pixels of its pictures, 0 without."""
    masks = _masks(method, seed, parts, density)
    alive, prunable = sum(int(m.sum()) for m in masks.values()), sum(parts.values())
    scores = _scores(method, seed, density, tasks)
    first = method.startswith("control") or method == DENSE
    began = 2000 if "step" in method and round_ else 0
    ticket = Ticket(
        round=round_,
        alive=alive,
        prunable=prunable,
        total=prunable + UNPRUNABLE,
        threshold=0.0 if first else 0.01 * round_,
        layer_density={n: float(m.mean()) for n, m in masks.items()},
        mask_digest=_hex("mask", method, seed, round_),
        initial_digest=_hex("initial", seed),
        weights_digest=_hex("weights", method, seed, round_),
        parent=None if first else _hex("ticket", method, seed, round_ - 1),
        fingerprint=_hex("fingerprint", method, seed)[:16],
        manifest_digest=_hex("manifest"),
        protocol=PROTOCOLS["promptir"].text,
        scores=scores,
        updates=8000,
        samples=64000,
        method=method,
        seed=seed,
        began=began,
        collapsed=tuple(n for n, m in masks.items() if not m.any()),
        protocols={"promptir": PROTOCOLS["promptir"].text},
        measured={"precision": "fp32", "compile": "False", "tile": "None"},
        curve=_curve(seed, f"{method}{round_}", scores, began, 8000) if curved else None,
        seconds=3600.0,
        world=2,
        versions={"mirl_dist": "0.5.0", "torch": "2.13.0"},
    )
    packed = {n: np.packbits(m) for n, m in masks.items()} if masked else None
    strip = _strip(seed, {n: s.psnr for n, s in scores.items()}, side) if side else None
    name = run or f"{method.replace(' ', '_')}_s{seed}"
    return Entry(name, method, seed, "training", f"experiment of {method}", ticket, parts, packed, strip)


def comparison(
    methods: Sequence[str] = ("MIR-L-G", "MIR-L-LW"),
    seeds: Sequence[int] = (0, 1),
    rounds: int = 3,
    *,
    parts: Mapping[str, int] = PARTS,
    tasks: Mapping[str, float] = TASKS,
    side: int = 0,
) -> list[Entry]:
    """Runs of methods and seeds: a dense round 0 and `rounds` pruned ones; one-shot methods and controls prune once.

    Controls are of the last ticket of the first method.
    """
    found, make = [], partial(entry, parts=parts, tasks=tasks)
    for method in methods:
        for seed in seeds:
            run = f"{method.lower().replace(' ', '_').replace('%', '')}_s{seed}"
            densities = [0.3] if "OS" in method else [0.8**r for r in range(1, rounds + 1)]
            if method.startswith("control"):
                parent = [s for s in found if s.seed == seed and s.method == methods[0]][-1].ticket.digest()
                control = make(method, seed, 0, densities[-1], run=run, side=side)
                found.append(control._replace(ticket=control.ticket.model_copy(update={"parent": parent})))
                continue
            found.append(make(DENSE, seed, 0, 1.0, run=run, side=side))
            for round_, density in enumerate(densities, 1):
                shown = side if density == densities[-1] else 0
                found.append(make(method, seed, round_, density, run=run, side=shown))
    return found
