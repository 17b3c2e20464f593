"""Damages and forges ticket files at random, and counts what reading makes of them.

    python benchmarks/fuzz_tickets.py [--files 100000] [--seed 0]

Only a UserError may come out, or a content that packs to a file again; memory may not grow beyond the stated bound.
Half of the files have their checksums made anew, so that the layers below these are reached. Prints a table in
Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirl_dist.config import config as configs
from mirl_dist.errors import UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.prune import PruneConfig, prune
from mirl_dist.tickets import container, file, verify
from mirl_dist.tickets.file import TicketContent
from mirl_dist.training.ticket import Curve, Score, Ticket

SHAPES: dict[str, tuple[int, ...]] = {
    "encoder.0.attn.qkv.weight": (12, 4, 1, 1),
    "encoder.0.attn.temperature": (2, 1, 1),
    "encoder.0.norm1.body.bias": (5,),
    "encoder.0.norm1.body.weight": (5,),
    "output.weight": (3, 4, 3, 3),
    "prompt.linear_layer.weight": (7, 9),
}
CONFIG: dict[str, Any] = {
    "run": {"folder": "runs/small", "seed": 3},
    "data": {"shards": "shards/small", "mix": {"denoise_25": 3, "derain": 1}},
    "prune": {"rounds": 3},
}


def rounds(count: int, tree: dict[str, Any] = CONFIG, first: dict[str, Tensor] | None = None) -> list[TicketContent]:
    """Consecutive rounds of a run that nobody trained: a fifth goes each time, the rest is rewound.

    tree: the config. first: the first values by name; None for those of a small network.
    """
    config = configs.from_dump(tree, "the small run")
    random_ = torch.Generator().manual_seed(3)
    first = first or {name: torch.randn(shape, generator=random_) for name, shape in SHAPES.items()}
    masks, threshold = masking.dense_masks(first, [n for n in first if n.endswith("weight")]), 0.0
    found: list[TicketContent] = []
    for round_ in range(count):
        if round_:
            masks, threshold = prune(found[-1].trained, masks, PruneConfig(0.2))[:2]
        initial = {n: t.clone() for n, t in first.items()}
        trained = {n: t + 0.1 * torch.randn(t.shape, generator=random_) for n, t in first.items()}
        masking.apply_masks(initial, masks)
        masking.apply_masks(trained, masks)
        scores = {f"{t}/set": Score(psnr=30.5, ssim=0.9, degraded_psnr=20, degraded_ssim=0.5, images=3) for t in "ab"}
        ticket = Ticket(
            round=round_,
            alive=masking.count_surviving(masks),
            prunable=masking.size(masks),
            total=sum(t.numel() for t in first.values()),
            threshold=threshold,
            layer_density=masking.densities(masks),
            mask_digest=masking.digest(masks),
            initial_digest=masking.digest_tensors(first),
            weights_digest=masking.digest_tensors(trained),
            parent=found[-1].ticket.digest() if found else None,
            fingerprint=config.fingerprint(),
            manifest_digest="0" * 64,
            protocol="PSNR over RGB",
            protocols={"promptir": "PSNR over RGB", "basicsr_y": "PSNR over Y"},
            scores=scores,
            also={"basicsr_y": scores},
            curve=Curve(steps=(3, 6), psnr={name: (29.0, 30.5) for name in scores}),
            method=config.method() if round_ else "dense",
            seed=config.run.seed,
            updates=6,
            samples=24,
            seconds=1.5,
            world=2,
            versions={"torch": "2"},
        )
        found.append(TicketContent(ticket, config.dump(), masks, initial, trained))
    return found


# -- mutations --------------------------------------------------------------------------------------------------

Parts = dict[str, bytes]


def parts_of(data: bytes) -> Parts:
    return {name: bytes(part) for name, part in container.unpack(data, "the small ticket").items()}


def repacked(data: bytes, change: Callable[[Parts], None]) -> bytes:
    """The file with changed parts and checksums that fit them."""
    parts = parts_of(data)
    change(parts)
    return container.pack(parts)


def with_text(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """The file with a changed text: `change` gets the tree and returns it, or another, or text as bytes."""

    def in_parts(parts: Parts) -> None:
        said = change(json.loads(zlib.decompress(parts["about"])))
        parts["about"] = zlib.compress(said if isinstance(said, bytes) else json.dumps(said).encode())

    return repacked(data, in_parts)


def with_digest(tree: dict[str, Any], layer_density: dict[str, float]) -> dict[str, Any]:
    """The text's tree, its record with the digest that fits, so that only its meaning is wrong."""
    record = {"layer_density": layer_density} | tree["ticket"]
    record.pop("digest", None)
    with suppress(ValueError, TypeError):
        tree["ticket"]["digest"] = Ticket.model_validate(record).digest()
    return tree


ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**17, -0.0, 1e308, float("nan"), float("inf"), "", "\x1b[2J", "../../etc",
    "a\u202eb", "\ud800", "9" * 5000, [], {}, [[]], {"": {}}, [0] * 40, "nan",
)  # fmt: skip


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        found += _paths(value, (*path, key))
    return found


def forge_text(data: bytes, chance: random.Random) -> bytes:
    """One to three places of the text hold something else, are gone, stand twice, or have another key."""
    densities = file.read(data, "the small ticket").ticket.layer_density

    def change(tree: Any) -> Any:
        for _ in range(chance.randint(1, 3)):
            path = chance.choice(_paths(tree))
            inside = tree
            for key in path[:-1]:
                inside = inside[key]
            kind, key = chance.randrange(5), path[-1]
            if kind == 0:
                del inside[key]
            elif kind == 1 and isinstance(inside, list):
                inside.insert(key, inside[key])
            elif kind == 2 and isinstance(inside, dict):
                inside[str(chance.choice(ODD_VALUES))] = inside.pop(key)
            elif kind == 3 and isinstance(inside[key], (int, float)):
                inside[key] = inside[key] * chance.choice((0, -1, 2, 1 << 20)) + chance.choice((0, 1, -1))
            else:
                inside[key] = deepcopy(chance.choice(ODD_VALUES))
        return with_digest(tree, densities) if isinstance(tree.get("ticket"), dict) else tree

    return with_text(data, change)


def damage_text(data: bytes, chance: random.Random) -> bytes:
    def change(tree: Any) -> bytes:
        return damage(json.dumps(tree).encode(), chance)

    return with_text(data, change)


def damage_parts(data: bytes, chance: random.Random) -> bytes:
    """Mask, values or the compressed text are damaged under checksums that fit."""

    def change(parts: Parts) -> None:
        name = chance.choice(sorted(parts))
        parts[name] = damage(parts[name], chance)

    return repacked(data, change)


def damage_header(data: bytes, chance: random.Random) -> bytes:
    """The header's JSON is damaged or a number in it changed, its length made to fit or not."""
    end = 8 + int.from_bytes(data[:8], "little")
    text = bytearray(data[8:end])
    if chance.random() < 0.5:
        text = bytearray(damage(bytes(text), chance))
    else:
        digits = [i for i, byte in enumerate(text) if 48 <= byte <= 57]
        text[chance.choice(digits)] = chance.choice(b"0123456789-e")
    length = len(text) if chance.random() < 0.8 else chance.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(data)))
    return length.to_bytes(8, "little") + bytes(text) + data[end:]


def damage(data: bytes, chance: random.Random) -> bytes:
    """Bits flipped, bytes overwritten, cut short, a span doubled, dropped or moved, or something appended."""
    found = bytearray(data)
    kind, at = chance.randrange(7), chance.randrange(max(1, len(found)))
    end = min(len(found), at + chance.choice((1, 2, 8, 64, 512)))
    if kind == 0:
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        found[at:end] = bytes(chance.choice((0, 255, chance.randrange(256))) for _ in range(end - at))
    elif kind == 2:
        del found[at:]
    elif kind == 3:
        found[at:at] = found[at:end]
    elif kind == 4:
        del found[at:end]
    elif kind == 5:
        to = chance.randrange(len(found))
        found[to : to + end - at] = found[at:end]
    else:
        found += bytes(chance.randrange(256) for _ in range(chance.choice((1, 8, 100))))
    return bytes(found)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes of the file": damage,
    "header": damage_header,
    "parts, checksums fit": damage_parts,
    "values of the text, checksums and digest fit": forge_text,
    "bytes of the text, checksums fit": damage_text,
}


def outcome(data: bytes) -> str:
    """What reading made of a file. Lets anything but a UserError through."""
    try:
        content = file.read(data, "the file")
    except UserError as fault:
        text = str(fault)
        assert text.isprintable(), text
        return "UserError"
    checks = list(verify.verify(content))
    file.pack(content)
    return "read, and all checks hold" if all(check.holds for check in checks) else "read, and a check fails"


def play(files: int, seed: int) -> dict[str, Counter[str]]:
    """The outcomes by mutation."""
    whole = [file.pack(content) for content in rounds(4)]
    chance, ways = random.Random(seed), list(MUTATIONS)
    counted: dict[str, Counter[str]] = {way: Counter() for way in ways}
    for number in range(files):
        way, data = ways[number % len(ways)], chance.choice(whole)
        made = MUTATIONS[way](data, chance)
        counted[way]["unchanged" if made == data else outcome(made)] += 1
    return counted


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    play(50, given.seed + 1)  # what Python and torch allocate at first use
    size, before, began = len(file.pack(rounds(1)[0])), _peak(), time.perf_counter()
    counted = play(given.files, given.seed)
    grown, seconds = _peak() - before, time.perf_counter() - began
    outcomes = sorted({name for counts in counted.values() for name in counts})
    print("| changed | files | " + " | ".join(outcomes) + " |")
    print("|---|---|" + "---|" * len(outcomes))
    for way, counts in counted.items():
        print(f"| {way} | {counts.total():,} | " + " | ".join(f"{counts[name]:,}" for name in outcomes) + " |")
    code = hashlib.sha256(Path(file.__file__).read_bytes()).hexdigest()[:12]
    bound = file.MEMORY_EXTRA + file.MEMORY_FACTOR * size
    print(f"\n{given.files:,} files of about {size:,} bytes, seed {given.seed}, {seconds:.0f} s.")
    print(
        f"Nothing but a UserError came out; peak memory grew by {grown / 2**20:.1f} MiB "
        f"(bound {bound / 2**20:.0f} MiB)."
    )
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, {platform.machine()},"
    )
    print(f"{os.cpu_count()} cores; ticket_file.py {code}.")
    if grown > bound:
        sys.exit("peak memory grew beyond the bound")


if __name__ == "__main__":
    main()
