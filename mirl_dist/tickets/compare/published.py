"""The published results in MIR-L's Tables II and III, and their assignment to lines of a comparison.

They come from full-size networks, different training, and the paper's own subsets of the data (published/README.md).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from mirl_dist.tickets.compare.entry import DENSE
from mirl_dist.tickets.compare.statistics import Group

TITLE = "published (full size, other training)"
ALL_IN_ONE, SINGLE = "all-in-one (5)", "single-task"
DENSE_WEIGHTS = 35_592_263
"""Number of weights of the paper's dense network, PromptIR, including six tensors that it never uses."""
_TABLES = ("2a", "2b", "2c", "3a", "3b", "3c")
_METHODS = {
    DENSE: "PromptIR",
    "MIR-L-G": "MIR-L-G",
    "MIR-L-LW": "MIR-L-LW",
    "PIR-OSM 30%": "PIR-OSM I",
    "PIR-OSM 70%": "PIR-OSM II",
    "PIR-OSR 30%": "PIR-OSR I",
    "PIR-OSR 70%": "PIR-OSR II",
}
_DATASETS = {"bsd68": "BSD68", "cbsd68": "BSD68", "urban100": "Urban100", "rain100l": "Rain100L"}
_KINDS = {"BSD68": "denoise", "Urban100": "denoise", "Rain100L": "derain", "SOTS": "dehaze"}
_UNITS = {"M": 1e6, "K": 1e3}


class Published(NamedTuple):
    """One result of the paper. psnr: in dB; params: weights as printed, '4.7M'; setting: as in the CSV files."""

    table: str
    method: str
    dataset: str
    setting: str
    psnr: float
    ssim: float
    params: str

    @property
    def weights(self) -> float:
        """`params` as a number of weights."""
        return float(self.params[:-1]) * _UNITS[self.params[-1]]


class PublishedMatch(NamedTuple):
    """Published results of a method, assigned to a line of the comparison. figures: by our 'task/set'."""

    group: Group
    figures: dict[str, Published]

    @property
    def network(self) -> Published:
        return next(iter(self.figures.values()))


def _read_csv(name: str) -> list[dict[str, str]]:
    text = (files("mirl_dist.tickets.compare") / "published" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@cache
def all_figures() -> tuple[Published, ...]:
    """Return all published results, in the order of the paper's tables."""
    rows = [row for table in _TABLES for row in _read_csv(f"mirl_table{table}.csv")]
    return tuple(
        Published(r["table"], r["method"], r["dataset"], r["setting"], float(r["psnr"]), float(r["ssim"]), r["params"])
        for r in rows
    )


@cache
def round_counts() -> dict[int, int]:
    """Return round -> surviving weights of the paper's network, with global pruning of 20 % per round."""
    return {int(row["round"]): int(row["total_global"]) for row in _read_csv("mirl_round_counts.csv")}


def round_of(figure: Published) -> int | None:
    """Return the round whose surviving weights are closest to those printed; None if not pruned iteratively (MIR-L)."""
    if not figure.method.startswith("MIR-L"):
        return None
    return min(round_counts(), key=lambda r: abs(round_counts()[r] - figure.weights))


def dataset_of(set_: str) -> str | None:
    """Return the paper's name of an evaluation set; None if it has none. Its SOTS is the outdoor half only."""
    word = set_.lower()
    if word.startswith("sots"):
        return None if "indoor" in word else "SOTS"
    return _DATASETS.get(word)


def setting_of(names: Iterable[str]) -> str:
    """Return the closest of the paper's settings: SINGLE if only one kind of task was scored, else ALL_IN_ONE."""
    kinds = {name.partition("/")[0].partition("_")[0] for name in names}
    return SINGLE if len(kinds) == 1 else ALL_IN_ONE


def find_figure(method: str, name: str, setting: str) -> Published | None:
    """Return the published result for a method and 'task/set' in setting ALL_IN_ONE or SINGLE; None without one."""
    task, _, set_ = name.partition("/")
    kind, _, level = task.partition("_")
    wanted = f"{setting} {kind}" if setting == SINGLE else setting
    wanted += f" sigma={level}" if kind == "denoise" else ""
    dataset = dataset_of(set_)
    if dataset is None or _KINDS[dataset] != kind:
        return None
    sought = _METHODS.get(method), dataset, wanted
    return next((r for r in all_figures() if (r.method, r.dataset, r.setting) == sought), None)


def match_groups(groups: Sequence[Group], names: Sequence[str]) -> list[PublishedMatch]:
    """For each method in the paper, assign its results to our line with the closest density."""
    setting, matches = setting_of(names), []
    for method in dict.fromkeys(group.method for group in groups):
        same_method = [group for group in groups if group.method == method]
        matched = {name: find_figure(same_method[0].entries[0].method, name, setting) for name in names}
        figures = {name: figure for name, figure in matched.items() if figure is not None}
        if figures:
            density = next(iter(figures.values())).weights / DENSE_WEIGHTS
            matches.append(PublishedMatch(min(same_method, key=lambda x: abs(x.alive / x.total - density)), figures))
    return matches
