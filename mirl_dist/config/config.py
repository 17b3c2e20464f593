"""The config of one run as a typed tree: sections, contradictions between them, method name and fingerprint.

`fingerprint` hashes the non-default keys that affect numerical results. All keys and their defaults: schema.py and
schema_training.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from mirl_dist.config import schema, schema_training, yaml_loader
from mirl_dist.config.canonical_json import digest_of_json
from mirl_dist.config.schema import Local
from mirl_dist.config.yaml_loader import Node


class Config(Node):
    run: schema.RunSection = schema.RunSection()
    store: schema.StoreSection = schema.StoreSection()
    model: schema_training.ModelSection = schema_training.ModelSection()
    data: schema_training.DataSection = schema_training.DataSection()
    batch: schema_training.BatchSection = schema_training.BatchSection()
    optimiser: schema_training.OptimiserSection = schema_training.OptimiserSection()
    schedule: schema_training.ScheduleSection = schema_training.ScheduleSection()
    train: schema_training.TrainSection = schema_training.TrainSection()
    start: schema_training.StartSection = schema_training.StartSection()
    prune: schema_training.PruneSection = schema_training.PruneSection()
    rewind: schema_training.RewindSection = schema_training.RewindSection()
    evaluate: schema_training.EvaluateSection = schema_training.EvaluateSection()
    keep: schema.KeepSection = schema.KeepSection()
    checkpoint: schema.CheckpointSection = schema.CheckpointSection()
    ranks: schema.RanksSection = schema.RanksSection()
    preempt: schema.PreemptSection = schema.PreemptSection()
    guard: schema.GuardSection = schema.GuardSection()
    tracking: schema.TrackingSection = schema.TrackingSection()

    def inconsistencies(self) -> Iterator[str]:
        """Return messages about contradicting keys, first within sections, then between sections."""
        for name in type(self).model_fields:
            yield from getattr(self, name).inconsistencies()
        yield from self._pruning_inconsistencies()
        yield from self._epoch_inconsistencies()
        if "\0" in self.run.folder + self.data.shards:
            yield "run.folder, data.shards: found a NUL character; no folder has one in its name"
        if self.ranks.timeout_seconds <= self.store.patience_seconds:
            yield (
                f"ranks.timeout_seconds: found {self.ranks.timeout_seconds:g}, not more than store.patience_seconds "
                f"{self.store.patience_seconds:g}; ranks would give up rank 0 while it waits for the store: raise it"
            )

    def _pruning_inconsistencies(self) -> Iterator[str]:
        to, ticket = self.rewinds_to(), self.start.ticket
        if to != "finetune" and self.prune.finetune_lr is not None:
            yield f"prune.finetune_lr: found with rewind.to {to}; remove it, or set rewind.to finetune"
        if to in ("rate", "finetune") and self.rewind.what != "all":
            yield f"rewind.what: found 'published' with rewind.to {to}, which moves no weight; remove it"
        if to == "step" and self.rewind.step is None:
            yield "rewind.step: found nothing with rewind.to step; give the step of round 0 to return to"
        if to != "step" and self.rewind.step is not None:
            yield f"rewind.step: found {self.rewind.step} with rewind.to {to}; remove it, or set rewind.to step"
        if to == "step" and ticket is not None:
            yield "rewind.to: found step with start.ticket; a ticket has first values only: use initial"
        if ticket is not None and self.model.weights is not None:
            yield "model.weights: found with start.ticket, which has first values; remove one of them"
        cuts = self.prune.rounds if self.prune.target_sparsity is None and ticket is None else 1
        surviving = (1 - self.prune.fraction) ** max(1, cuts)
        if self.prune.floor > surviving and self.prune.rounds:
            yield (
                f"prune.floor: found {self.prune.floor:g}, but {cuts} cuts of {self.prune.fraction:g} leave "
                f"{surviving:.3g} of all weights: lower it, or cut less"
            )

    def _epoch_inconsistencies(self) -> Iterator[str]:
        epochs, every, horizon = self.train.epochs, self.evaluate.every_epochs, self.schedule.horizon_epochs
        if every is not None and every >= epochs:
            yield (
                f"evaluate.every_epochs: found {every} of {epochs} train.epochs, after "
                "which everything is scored anyway: lower it, or leave it out"
            )
        if self.schedule.warmup_epochs >= epochs:
            yield (
                f"schedule.warmup_epochs: found {self.schedule.warmup_epochs} of {epochs} train.epochs; "
                "the warm-up must be shorter than the round"
            )
        if horizon is not None and horizon < epochs:
            yield (
                f"schedule.horizon_epochs: found {horizon} below train.epochs {epochs}; "
                "the cosine would end before the round: raise it, or leave it out"
            )

    def rewinds_to(self) -> str:
        """Return how surviving weights train on after pruning: 'initial', 'step', 'rate' or 'finetune'."""
        return self.rewind.to or ("finetune" if self.prune.style == "one_shot" else "initial")

    def method(self) -> str:
        """Return the papers' name of the method, 'MIR-L-G' or 'PIR-OSM 70%', or a description; deviations follow."""
        prune, to = self.prune, self.rewinds_to()
        known = {
            ("iterative", "magnitude", "global", "initial"): "MIR-L-G",
            ("iterative", "magnitude", "layer", "initial"): "MIR-L-LW",
            ("one_shot", "magnitude", "global", "finetune"): f"PIR-OSM {prune.fraction:.0%}",
            ("one_shot", "random", "global", "finetune"): f"PIR-OSR {prune.fraction:.0%}",
        }
        usual = known.get((prune.style, prune.criterion, prune.per, to))
        if usual is None:
            words = [prune.criterion, prune.per, prune.style.replace("_", "-")]
            words.append({"initial": "rewound", "step": f"rewound to {self.rewind.step}"}.get(to, to))
            usual = " ".join(words) + (f" {prune.fraction:.0%}" if prune.style == "one_shot" else "")
        started = f" from {self.start.kind}" if self.start.ticket is not None else ""
        return usual + (f" floor {prune.floor:g}" if prune.floor else "") + started

    def round_epochs(self, round_: int) -> int:
        """Return the number of epochs of a round; fine-tuning rounds are shorter."""
        if self.is_finetuning(round_):
            return max(1, round(self.prune.finetune_epochs_fraction * self.train.epochs))
        return self.train.epochs

    def is_finetuning(self, round_: int) -> bool:
        """Whether a round fine-tunes a pruned network."""
        return round_ > 0 and self.rewinds_to() == "finetune"

    def dump(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    def fingerprint(self) -> str:
        """Return a digest (16 hex digits) of the non-default keys that affect results; equal for equal experiments."""
        return digest_of_json(self.experiment_keys())[:16]

    def training_digest(self) -> str:
        """Return a digest like `fingerprint`, but only of training and scoring, without pruning and seed.

        Runs with equal training digest and seed have the same dense network.
        """
        left_out = ("prune", "rewind", "start", "run")
        return digest_of_json({key: value for key, value in self.experiment_keys().items() if key not in left_out})[:16]

    def experiment_digest(self) -> str:
        """Return a digest like `fingerprint`, but without the seed and the path of the initial ticket.

        Runs with equal experiment digest differ only in these, so they are repetitions of one experiment.
        """
        keys = {key: value for key, value in self.experiment_keys().items() if key != "run"}
        return digest_of_json(keys | ({"start": {"kind": self.start.kind}} if "start" in keys else {}))[:16]

    def experiment_keys(self) -> dict[str, Any]:
        """Return, as a tree, the keys that affect results and differ from the published recipe."""
        keys = _selected_keys(self, lambda _, field, value: Local not in field.metadata and value != field.default)
        if self.rewind.to == ("finetune" if self.prune.style == "one_shot" else "initial"):
            del keys["rewind"]["to"]  # the explicit default is equivalent to an omitted key
        return {key: value for key, value in keys.items() if value}


def _selected_keys(node: Node, select: Callable[[str, FieldInfo, Any], bool], above: str = "") -> dict[str, Any]:
    """Return, as a tree without empty sections, the values for which select(dotted key, field, value) is true."""
    tree: dict[str, Any] = {}
    for name, field in type(node).model_fields.items():
        key, value = field.alias or name, getattr(node, name)
        if isinstance(value, Node):
            if section := _selected_keys(value, select, f"{above}{key}."):
                tree[key] = section
        elif select(f"{above}{key}", field, value):
            tree[key] = value
    return tree


_LOCAL_BUT_KEPT = ("prune.rounds", "prune.target_sparsity")
"""Keys marked Local that are published, because they tell how far the experiment pruned."""


def portable(config: Config) -> Config:
    """Return the same experiment for publication: other Local keys (folders, devices, workers) have their defaults.

    Fingerprint and method are unchanged. Keys that affect results are kept, including the paths model.weights and
    start.ticket.
    """
    keys = _selected_keys(config, lambda key, field, _: Local not in field.metadata or key in _LOCAL_BUT_KEPT)
    return Config.model_validate(keys)


def read(path: Path, sets: Sequence[str] = ()) -> Config:
    """Read the config of one run: defaults, then the file, then `--set`. Raise UserError that lists all faults."""
    return yaml_loader.read(Config, path, sets, "configs/demo.yaml", "the config of a run")


def from_dump(tree: dict[str, Any], source: str) -> Config:
    """Return the config that `dump` wrote. Raise UserError if it is invalid for this version."""
    return yaml_loader.build(Config, tree, source)


def differences(config: Config, other: Config) -> list[str]:
    """Return `key: A here, B there` for each key that affects results and differs."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for key, value in tree.items():
            pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return pairs

    a, b = flat(config.experiment_keys()), flat(other.experiment_keys())
    defaults = flat(Config().dump())
    return [
        f"{k}: {a.get(k, defaults.get(k))} here, {b.get(k, defaults.get(k))} there"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]
