"""The typed tree of one run: its sections, what contradicts in them, its words, its fingerprint.

`fingerprint` hashes the non-default keys that change the numbers; every key and its default: sections.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirl_dist.config import yaml_loader
from mirl_dist.config.schema import (
    BatchSection,
    CheckpointSection,
    DataSection,
    EvaluateSection,
    GuardSection,
    KeepSection,
    Local,
    ModelSection,
    OptimiserSection,
    PreemptSection,
    PruneSection,
    RanksSection,
    RewindSection,
    RunSection,
    ScheduleSection,
    StartSection,
    StoreSection,
    TrackingSection,
    TrainSection,
)
from mirl_dist.config.yaml_loader import Node


class Config(Node):
    run: RunSection = RunSection()
    store: StoreSection = StoreSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    batch: BatchSection = BatchSection()
    optimiser: OptimiserSection = OptimiserSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    start: StartSection = StartSection()
    prune: PruneSection = PruneSection()
    rewind: RewindSection = RewindSection()
    evaluate: EvaluateSection = EvaluateSection()
    keep: KeepSection = KeepSection()
    checkpoint: CheckpointSection = CheckpointSection()
    ranks: RanksSection = RanksSection()
    preempt: PreemptSection = PreemptSection()
    guard: GuardSection = GuardSection()
    tracking: TrackingSection = TrackingSection()

    def inconsistencies(self) -> list[str]:
        found = self.data.inconsistencies()
        if self.prune.style == "one_shot" and self.prune.rounds != 1:
            found.append(
                f"prune.rounds: found {self.prune.rounds} with prune.style one_shot; one-shot prunes once: set it to 1"
            )
        found += self._rewind_inconsistencies()
        cuts = self.prune.rounds if self.prune.target_sparsity is None and self.start.ticket is None else 1
        left = (1 - self.prune.fraction) ** max(1, cuts)
        if self.prune.floor > left and self.prune.rounds:
            found.append(
                f"prune.floor: found {self.prune.floor:g}, but {cuts} cuts of {self.prune.fraction:g} leave {left:.3g} "
                "of all weights: lower it, or cut less"
            )
        if self.evaluate.every_epochs is not None and self.evaluate.every_epochs >= self.train.epochs:
            found.append(
                f"evaluate.every_epochs: found {self.evaluate.every_epochs} of {self.train.epochs} train.epochs, at "
                "whose end all is scored anyway: lower it, or leave it out"
            )
        if self.prune.floor and self.prune.per != "global":
            found.append("prune.floor: found with prune.per layer, which cuts each tensor by itself; remove it")
        if self.evaluate.tile_pixels is not None and self.evaluate.tile_overlap >= self.evaluate.tile_pixels:
            found.append(
                f"evaluate.tile_overlap: found {self.evaluate.tile_overlap} for tiles of {self.evaluate.tile_pixels} "
                "pixels; it must be smaller"
            )
        if not self.evaluate.protocols or len(set(self.evaluate.protocols)) < len(self.evaluate.protocols):
            found.append(f"evaluate.protocols: found {list(self.evaluate.protocols)}; name at least one, and each once")
        if self.start.ticket is None and self.start.kind != "ticket":
            found.append(f"start.kind: found {self.start.kind} without start.ticket; name a ticket, or remove it")
        if self.start.ticket is not None and self.model.weights is not None:
            found.append("model.weights: found with start.ticket, which has first values; remove one of them")
        if self.schedule.warmup_epochs >= self.train.epochs:
            found.append(
                f"schedule.warmup_epochs: found {self.schedule.warmup_epochs} of {self.train.epochs} train.epochs; "
                "the warm-up must be shorter than the round"
            )
        horizon = self.schedule.horizon_epochs
        if horizon is not None and horizon < self.train.epochs:
            found.append(
                f"schedule.horizon_epochs: found {horizon} below train.epochs {self.train.epochs}; "
                "the cosine would end before the round: raise it, or leave it out"
            )
        for key, heads, width in self._head_widths():
            if width % heads:
                found.append(f"model.{key}: found {heads} heads for a width of {width}; heads must divide the width")
        if self.batch.forward is not None and self.batch.global_ % self.batch.forward:
            found.append(
                f"batch.forward: found {self.batch.forward}, which does not divide batch.global {self.batch.global_}"
            )
        if self.keep.rounds == "best" and not self.keep.by:
            found.append("keep.by: found nothing with keep.rounds best; name scores, for example ['psnr/*/valid']")
        address = (self.tracking.uri or "").partition("://")[2]
        if "@" in address or "?" in address:
            found.append("tracking.uri: found '@' or '?', which may hold credentials; use MLFLOW_TRACKING_URI instead")
        if "\0" in self.run.folder + self.data.shards:
            found.append("run.folder, data.shards: found a NUL character; no folder has one in its name")
        kind = self.run.folder.partition("://")[0]
        if kind not in ("s3", "file", self.run.folder):
            found.append(f"run.folder: found {kind}://; runs are kept in folders and under s3://bucket/prefix")
        endpoint = self.store.endpoint or "http://"
        if not endpoint.startswith(("http://", "https://")) or "@" in endpoint or "?" in endpoint:
            found.append("store.endpoint: found no plain address; write http(s)://host:port, keys belong into AWS's")
        if self.ranks.timeout_seconds <= self.store.patience_seconds:
            found.append(
                f"ranks.timeout_seconds: found {self.ranks.timeout_seconds:g}, not more than store.patience_seconds "
                f"{self.store.patience_seconds:g}; ranks would give up rank 0 while it waits for the store: raise it"
            )
        if self.store.kms_key is not None and self.store.encryption != "aws:kms":
            found.append("store.kms_key: found without store.encryption aws:kms; set that too, or remove the key")
        return found

    def _rewind_inconsistencies(self) -> list[str]:
        found, to = [], self.rewinds_to()
        if to != "finetune" and self.prune.finetune_lr is not None:
            found.append(f"prune.finetune_lr: found with rewind.to {to}; remove it, or set rewind.to finetune")
        if to in ("rate", "finetune") and self.rewind.what != "all":
            found.append(f"rewind.what: found 'published' with rewind.to {to}, which moves no weight; remove it")
        if to == "step" and self.rewind.step is None:
            found.append("rewind.step: found nothing with rewind.to step; give the step of round 0 to return to")
        if to != "step" and self.rewind.step is not None:
            found.append(f"rewind.step: found {self.rewind.step} with rewind.to {to}; remove it, or set rewind.to step")
        if to == "step" and self.start.ticket is not None:
            found.append("rewind.to: found step with start.ticket; a ticket has first values only: use initial")
        return found

    def rewinds_to(self) -> str:
        """Where survivors go after a cut: 'initial', 'step', 'rate' or 'finetune'."""
        return self.rewind.to or ("finetune" if self.prune.style == "one_shot" else "initial")

    def method(self) -> str:
        """The papers' word for what is done after round 0, with all that differs from it: 'MIR-L-G', 'PIR-OSM 70%'."""
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

    def _head_widths(self) -> list[tuple[str, int, int]]:
        m = self.model
        levels = [(f"heads[{i}]", h, m.dim * 2**i) for i, h in enumerate(m.heads)]
        lifted = (m.dim * 2, m.dim * 4, m.dim * 8)  # width that each prompt is joined to
        return levels + [("prompt_heads", m.prompt_heads, a + b) for a, b in zip(m.prompt_dims, lifted, strict=True)]

    def round_epochs(self, round_: int) -> int:
        """Epochs of a round: fine-tuning after a cut is shorter."""
        if self.is_finetuning(round_):
            return max(1, round(self.prune.finetune_epochs_fraction * self.train.epochs))
        return self.train.epochs

    def is_finetuning(self, round_: int) -> bool:
        """Whether a round is fine-tuning."""
        return round_ > 0 and self.rewinds_to() == "finetune"

    def dump(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    def fingerprint(self) -> str:
        """16 hex digits over the non-default keys that change the numbers; equal for equal experiments."""
        return _digest(self.experiment_keys())

    def training_digest(self) -> str:
        """The same over how networks are trained and scored alone, whatever the seed: not how they are pruned. Runs of
        one training and one seed have the same dense network."""
        said = {
            key: value
            for key, value in self.experiment_keys().items()
            if key not in ("prune", "rewind", "start", "run")
        }
        return _digest(said)

    def experiment_digest(self) -> str:
        """The same over all but the seed and the ticket that was begun from: runs of one experiment are its seeds."""
        said = self.experiment_keys()
        said.pop("run", None)
        if "start" in said:
            said["start"] = {"kind": self.start.kind}
        return _digest(said)

    def experiment_keys(self) -> dict[str, Any]:
        """The keys that change the numbers and differ from the published recipe, as a tree."""
        usual = "finetune" if self.prune.style == "one_shot" else "initial"
        said = _changed_keys(self, Config())
        if self.rewind.to == usual:  # written out or left out, it is the same
            said["rewind"] = {key: value for key, value in said["rewind"].items() if key != "to"}
            if not said["rewind"]:
                del said["rewind"]
        return said


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _changed_keys(node: Node, default: Node) -> dict[str, Any]:
    """The non-default, not-aside values of a node by key."""
    said: dict[str, Any] = {}
    for name, field in type(node).model_fields.items():
        value, usual = getattr(node, name), getattr(default, name)
        if isinstance(value, Node):
            inner = _changed_keys(value, usual)
            if inner:
                said[field.alias or name] = inner
        elif value != usual and Local not in field.metadata:
            said[field.alias or name] = value
    return said


def read(path: Path, sets: Sequence[str] = ()) -> Config:
    """The config of one run: defaults, the file, the `--set` assignments. Raises UserError with every complaint."""
    return yaml_loader.read(Config, path, sets, "configs/demo.yaml", "the config of a run")


def from_dump(tree: dict[str, Any], where: str) -> Config:
    """The config that `dump` wrote. Raises UserError when this version does not understand it."""
    return yaml_loader.build(Config, tree, where)


def differences(mine: Config, other: Config) -> list[str]:
    """`key: mine / other` for each key that changes the numbers."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return out

    a, b = flat(mine.experiment_keys()), flat(other.experiment_keys())
    defaults = flat(Config().dump())
    return [
        f"{k}: {a.get(k, defaults.get(k))} here, {b.get(k, defaults.get(k))} there"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]


__all__ = ["Local", "Config", "differences", "from_dump", "read"]
