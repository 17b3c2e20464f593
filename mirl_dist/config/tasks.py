"""Task names: the meaning of each key of `data.mix`."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from mirl_dist.errors import UserError

KINDS = ("derain", "dehaze", "desnow", "deraindrop", "deblur", "enlighten")
"""Tasks whose degraded images are stored in the shards, as samples of a kind with the task's name."""
CLEAN, PAIRS = "clean", "pairs"
LEVELS: dict[str, tuple[str, ...]] = {
    "denoise": ("mild", "hard"),
    "deblur": ("easy", "mild", "hard"),
    "superres": ("easy", "mild", "hard"),
    "dejpeg": ("mild", "hard"),
    "enlighten": ("mild", "hard"),
}
"""Families synthesised when samples are read, with levels that draw a strength per image (docs/degradations.md)."""
NUMBERS: dict[str, tuple[str, range]] = {
    "denoise": ("sigma", range(1, 256)),
    "superres": ("factor", range(2, 17)),
    "dejpeg": ("quality", range(1, 101)),
}
"""Families whose level may be a number: its meaning and range."""
BLUR_KERNELS, BLUR_SIGMAS = range(3, 52, 2), range(1, 21)
"""Ranges of deblur_k<kernel>s<sigma>: kernel width and sigma in pixels."""
_EXAMPLES = ("denoise_15", "denoise_25", "denoise_50", "superres_4", "dejpeg_40", "deblur_k19s4")
"""Numbered tasks that are suggested for a mistyped name."""
_WHOLE = "[1-9][0-9]*"  # no leading zeros, so that each task has exactly one name


class Task(NamedTuple):
    """One restoration task.

    name: the task's name. kind: kind of stored samples that it reads, `clean` if the degradation is synthesised.
    family: `pairs` for stored pairs, or a key of LEVELS. level: rest of the name after the family, '' for pairs.
    """

    name: str
    kind: str
    family: str
    level: str

    @classmethod
    def of(cls, name: str) -> Task:
        """Return the task with a name such as 'denoise_25', 'deblur_easy' or 'derain'. Raise UserError if unknown."""
        if name in KINDS:
            return cls(name, name, PAIRS, "")
        family, _, level = name.partition("_")
        if _is_level(family, level):
            return cls(name, CLEAN, family, level)
        # For a number out of range, list the ranges rather than suggest a similar name.
        wrong_number = family in LEVELS and any(c.isdigit() for c in level)
        words = [] if wrong_number else [word for word in (*allowed(), *_EXAMPLES) if "<" not in word]
        near = difflib.get_close_matches(name, words, n=1, cutoff=0.75)
        hint = f"did you mean '{near[0]}'? Allowed" if near else "allowed"
        raise UserError(f"found '{name}', where a task is expected; {hint} are {', '.join(allowed())}")


def blur_of(level: str) -> tuple[int, int] | None:
    """Return kernel width and sigma in pixels of a level such as 'k19s4'; None for other levels."""
    match = re.fullmatch(f"k({_WHOLE})s({_WHOLE})", level)
    return (int(match[1]), int(match[2])) if match else None


def allowed() -> tuple[str, ...]:
    """Return all task names; numbered ones as patterns with their ranges."""
    words = list(KINDS)
    for family, levels in LEVELS.items():
        words += [f"{family}_{level}" for level in levels]
        if family in NUMBERS:
            what, numbers = NUMBERS[family]
            words.append(f"{family}_<{what} {numbers[0]}..{numbers[-1]}>")
        if family == "deblur":
            kernels, sigmas = BLUR_KERNELS, BLUR_SIGMAS
            words.append(f"deblur_k<odd {kernels[0]}..{kernels[-1]}>s<sigma {sigmas[0]}..{sigmas[-1]}>")
    return tuple(words)


def _is_level(family: str, level: str) -> bool:
    if family in NUMBERS and re.fullmatch(_WHOLE, level):
        return int(level) in NUMBERS[family][1]
    if family == "deblur" and (blur := blur_of(level)):
        return blur[0] in BLUR_KERNELS and blur[1] in BLUR_SIGMAS
    return level in LEVELS.get(family, ())
