"""Caveats of a comparison: few seeds, missing dense pairs, different data or settings, damaged scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mirl_dist.tickets.compare import statistics
from mirl_dist.tickets.compare.entry import Entry
from mirl_dist.tickets.compare.statistics import Group
from mirl_dist.training.ticket import Ticket

_FEW_IMAGES = 20
_DEFAULT_VALUES = {"", "fp32", "no", "none", "false", "off", "whole image"}


def list_caveats(entries: Sequence[Entry]) -> list[str]:
    """Return the caveats that a reader of the table must know, one sentence each.

    Raises UserError as `statistics.group_entries`.
    """
    table = statistics.group_entries(entries)
    return [
        *_note_other_experiments(entries),
        *_note_seeds(table),
        *_note_missing_pairs(table, entries),
        *_note_differences(table, entries),
        *_note_implausible_scores(entries),
        *_note_evaluation(entries),
        *_note_training(entries),
    ]


def _note_other_experiments(entries: Sequence[Entry]) -> list[str]:
    """Return a sentence for each numbered label: its runs, and that they are a different experiment."""
    runs: dict[tuple[str, str], dict[str, None]] = {}
    for s, key in zip(entries, statistics.group_keys(entries), strict=True):
        if key.label != key.method:
            runs.setdefault((key.label, key.method), {})[s.run] = None
    return [
        f"{label} is another experiment than {method}: the configs differ, so these runs are no seeds of it: "
        + "; ".join(names)
        for (label, method), names in runs.items()
    ]


def _note_seeds(table: Sequence[Group]) -> list[str]:
    words = {1: "one seed only ({}): no spread is known", 2: "two seeds only ({}): the spread itself is uncertain"}
    sentences = []
    for count, text in words.items():
        methods = dict.fromkeys(group.method for group in table if len(group.seeds) == count)
        sentences += [text.format(", ".join(methods))] if methods else []
    repeated = []
    for group in table:
        for seed in group.seeds:
            weights = [s.ticket.weights_digest for s in group.entries if s.seed == seed]
            if len(set(weights)) > 1:
                repeated.append(f"{group.method}, round {group.round_}, seed {seed} ({len(weights)} tickets)")
    text = "different tickets of one seed count once, by their mean"
    return sentences + ([f"{text}: {'; '.join(repeated)}"] if repeated else [])


def _note_missing_pairs(table: Sequence[Group], entries: Sequence[Entry]) -> list[str]:
    dense = [s for s in entries if s.dense]
    lone = [s.name for group in table if not group.dense for s in group.entries if not statistics.find_dense(s, dense)]
    text = "no dense ticket of the same seed, training, data and network, so no difference to it"
    return [f"{text}: {_join_first(lone)}"] if lone else []


_Counter = Callable[[Ticket], int]


def _note_differences(table: Sequence[Group], entries: Sequence[Entry]) -> list[str]:
    sentences = []
    for what, first_runs in (
        ("shards", {s.ticket.manifest_digest[:8]: s.run for s in reversed(entries)}),
        ("networks", {f"{s.ticket.total:,} weights, {s.ticket.prunable:,} prunable": s.run for s in reversed(entries)}),
    ):
        if len(first_runs) > 1:
            named = "; ".join(f"{key} ({run})" for key, run in reversed(first_runs.items()))
            sentences.append(f"different {what}: {named}")
    counted: dict[str, _Counter] = {"steps": lambda t: t.updates, "alive weights": lambda t: t.alive}
    for what, count in counted.items():
        mixed = [f"{x.method}, round {x.round_}" for x in table if len({count(s.ticket) for s in x.entries}) > 1]
        text = f"different numbers of {what} within a line, though its configs are equal"
        sentences += [f"{text}: {'; '.join(mixed)}"] if mixed else []
    return sentences


def _note_implausible_scores(entries: Sequence[Entry]) -> list[str]:
    implausible = dict.fromkeys(
        f"{s.name}, {name}"
        for s in entries
        for scores in (s.ticket.scores, *s.ticket.also.values())
        for name, score in scores.items()
        if not statistics.is_plausible(score)
    )
    text = "scores that are no numbers, or out of range, count as unknown and are in no mean"
    return [f"{text}: {_join_first(implausible)}"] if implausible else []


def _note_evaluation(entries: Sequence[Entry]) -> list[str]:
    runs_by_settings: dict[str, list[str]] = {}
    for s in entries:
        unusual = [f"{key} {value}" for key, value in s.ticket.measured.items() if value.lower() not in _DEFAULT_VALUES]
        runs_by_settings.setdefault(", ".join(unusual), []).append(s.run)
    sentences = [
        f"scored with {settings}: {_join_first(dict.fromkeys(runs))}"
        for settings, runs in runs_by_settings.items()
        if settings
    ]
    few = {n: score.images for s in entries for n, score in s.ticket.scores.items() if score.images < _FEW_IMAGES}
    if few:
        sentences.append(f"few images: {', '.join(f'{name} {count}' for name, count in few.items())}")
    return sentences


def _note_training(entries: Sequence[Entry]) -> list[str]:
    counted: dict[str, _Counter] = {
        "damaged samples were replaced in training": lambda t: t.skipped,
        "batches were left out of training (loss or gradient not finite)": lambda t: t.bad,
        "tensors have no alive weight": lambda t: len(t.collapsed),
    }
    counts = {t: [f"{s.name}: {count(s.ticket):,}" for s in entries if count(s.ticket)] for t, count in counted.items()}
    sentences = [f"{text} ({_join_first(texts)})" for text, texts in counts.items() if texts]
    runs_by_arithmetic: dict[str, list[str]] = {}
    for s in entries:
        words = ", ".join(f"{key} {value}" for key, value in s.ticket.arithmetic.items())
        runs_by_arithmetic.setdefault(words, []).append(s.run)
    unusual = {words: dict.fromkeys(runs) for words, runs in runs_by_arithmetic.items() if words}
    return sentences + [f"trained with {words}: {_join_first(runs)}" for words, runs in unusual.items()]


def _join_first(texts: Iterable[str]) -> str:
    """Join the first five texts and state how many more there are."""
    items = list(texts)
    return "; ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
