"""The typed tree of one run: every key, its unit, its range and its default.

Defaults are MIR-L's published recipe (paper section IV and the released code) at full size. `fingerprint` hashes
the non-default keys that change the numbers; keys marked `Aside` (places, logging, workers) stay out of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from mirl_dist import yaml_tree
from mirl_dist.faults import Fault
from mirl_dist.tasks import Task
from mirl_dist.yaml_tree import Node


class _Aside:
    """Marks a key that does not change the numbers of a run."""


Aside = _Aside()
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Four = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
Three = tuple[PositiveInt, PositiveInt, PositiveInt]


class Run(Node):
    folder: Annotated[str, Aside] = Field("runs/run", min_length=1)
    """Where everything of this run is kept: a folder, or s3://bucket/prefix."""
    seed: Seed = 0


class Store(Node):
    """How stores are talked to: of the run, and of its shards."""

    endpoint: Annotated[str | None, Aside] = None
    """The S3 server, http(s)://host:port. Null: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, a profile, else AWS."""
    encryption: Annotated[Literal["AES256", "aws:kms"] | None, Aside] = None
    """Server-side encryption of what is written to S3. Null: as the bucket says."""
    kms_key: Annotated[str | None, Aside] = None
    """With aws:kms: the key's id or ARN. Null: the account's own key for S3."""
    patience_seconds: Annotated[PositiveFloat, Aside] = 900
    """How long a store that is away or full is tried again, since the last byte that passed. After that a run stops,
    resumably."""
    lease_seconds: Annotated[float, Field(ge=1), Aside] = 60
    """A launch without a sign of life for so long is dead, and another may go on with its run."""


class Ranks(Node):
    timeout_seconds: Annotated[PositiveFloat, Aside] = 1800
    """How long ranks wait for one another. After that those who did not come are named, and the ranks end."""
    restarts: Annotated[Count, Aside] = 3
    """How often `train --launch` starts the ranks again after one of them died."""
    slow_factor: Annotated[float, Field(gt=1), Aside] = 1.5
    """A rank that reaches the all-reduce later than the others by this factor, report after report, is named."""


class Preempt(Node):
    deadline_seconds: Annotated[PositiveFloat, Aside] = 120
    """From SIGTERM, SIGINT or SIGUSR1 to the end of the process, at the latest."""


class Guard(Node):
    skip_bad_batches: Annotated[Count, Aside] = 0
    """How many global batches of a round may have a loss or gradient that is not finite: they are left out, told and
    counted in the ticket. 0: the first one stops the run."""
    spike_factor: Annotated[float | None, Field(gt=1), Aside] = 10
    """A step whose loss is so many times the median of the 50 before it is reported. Null: none is."""
    same_step_failures: Annotated[PositiveInt, Aside] = 3
    """Launches on one machine that may die in one and the same step before the next one refuses to try it again."""


class Model(Node):
    name: Literal["promptir"] = "promptir"
    dim: PositiveInt = 48
    blocks: Four = (4, 6, 6, 8)
    refinement_blocks: PositiveInt = 4
    heads: Four = (1, 2, 4, 8)
    ffn_expansion: PositiveFloat = 2.66
    prompt_length: PositiveInt = 5
    prompt_dims: Three = (64, 128, 320)
    prompt_sizes: Three = (64, 32, 16)
    prompt_heads: PositiveInt = 4

    def sizes(self) -> dict[str, Any]:
        """The keyword arguments of `models.create`."""
        return self.model_dump(exclude={"name"})


MOST_REPEATS = 10_000
_PUBLISHED_MIX: dict[str, float | dict[str, float]] = {
    "denoise_15": 3.0,
    "denoise_25": 3.0,
    "denoise_50": 3.0,
    "derain": 120.0,
    "dehaze": 1.0,
}


class Cache(Node):
    folder: Annotated[str | None, Aside] = None
    """Where shards are kept on each node, on a disk of its own; all its ranks share it. Null: below SLURM_TMPDIR,
    TMPDIR or /tmp for s3:// and https://, and none for a folder, whose shards are read in place."""
    gigabytes: Annotated[PositiveFloat, Aside] = 50
    """Most that the cache may take on the disk, in 10^9 bytes."""


class Data(Node):
    shards: Annotated[str, Aside] = Field("shards/built", min_length=1)
    """Where `mirl-dist shards build` wrote: a folder, s3://bucket/prefix or https://host/path. The digest of its
    manifest is part of the run's identity."""
    mix: dict[str, PositiveFloat | dict[str, PositiveFloat]] = Field(default_factory=lambda: dict(_PUBLISHED_MIX))
    """Task -> number, or task -> set -> number; what the numbers mean says mix_by. Task words: docs/degradations.md."""
    mix_by: Literal["repeats", "weights", "balanced"] = "repeats"
    """repeats: how often each sample is read per epoch, as published; weights: shares of the epoch; balanced: equal
    shares (all numbers 1)."""
    patch_pixels: Annotated[int, Field(ge=8)] = 64
    augment: Literal["published", "all", "flips", "none"] = "published"
    """published: one of the 7 turns and flips that change the image; all: 8; flips: the paper's text."""
    steps_per_epoch: PositiveInt | None = None
    """Null: the whole mix once, the last incomplete global batch left out."""
    damage: Annotated[Literal["refuse", "skip"], Aside] = "refuse"
    """What a damaged or missing training sample does: stop the run, or be replaced, told and counted in the ticket."""
    cache: Cache = Cache()
    workers: Annotated[Count, Aside] = 2
    """Loader processes of each rank; 0 reads in the training process."""

    def contradictions(self) -> list[str]:
        found = []
        if not self.mix:
            found.append("data.mix: found no task; name at least one, for example derain: 1")
        for word, amount in self.mix.items():
            try:
                Task.of(word)
            except Fault as fault:
                found.append(f"data.mix: {fault}")
            numbers = {"": amount} if isinstance(amount, float) else amount
            if not numbers:
                found.append(f"data.mix.{word}: found no set; give a number, or numbers of sets")
            for name, number in numbers.items():
                key = f"data.mix.{word}" + (f".{name}" if name else "")
                if self.mix_by == "repeats" and number != int(number):
                    found.append(f"{key}: found {number:g} with mix_by repeats; use a whole number, or mix_by: weights")
                if self.mix_by == "repeats" and number > MOST_REPEATS:
                    found.append(f"{key}: found {number:g} with mix_by repeats; at most {MOST_REPEATS:,} make sense")
                if self.mix_by == "balanced" and number != 1:
                    found.append(f"{key}: found {number:g} with mix_by balanced; write 1, or use mix_by: weights")
        return found


class Batch(Node):
    global_: PositiveInt = Field(8, alias="global")
    """Samples per optimiser step over all ranks. The world size never changes it."""
    forward: Annotated[PositiveInt | None, Aside] = None
    """Samples per forward pass on a rank; less than the rank's share means accumulation. Null: the whole share."""


class Optimiser(Node):
    name: Literal["adam", "adamw"] = "adamw"
    lr: PositiveFloat = 2e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NotNegative | None = None
    """Null: 0.01 with adamw, the released code's choice; 0 with adam, the paper's text."""
    clip_norm: PositiveFloat | None = None


class Schedule(Node):
    by: Literal["epoch", "step"] = "epoch"
    """epoch: as published (the whole first epoch runs at rate 0 when warm-up is on); step: smooth."""
    warmup_epochs: NotNegative = 15
    horizon_epochs: PositiveFloat | None = None
    """Where the cosine reaches 0. Null: train.epochs."""


class Train(Node):
    epochs: PositiveInt = 120
    """Epochs of every round."""
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Annotated[Literal["auto", "cpu"], Aside] = "auto"


class Prune(Node):
    style: Literal["iterative", "one_shot"] = "iterative"
    """iterative: MIR-L, `rounds` times prune and rewind; one_shot: PIR-OSM / PIR-OSR, prune once and fine-tune."""
    rounds: Annotated[Count, Aside] = 15
    """Pruned rounds after the dense round 0. 0 trains the dense network alone."""
    target_sparsity: Annotated[Share | None, Aside] = None
    """Stop after the first round whose sparsity over all parameters reaches this."""
    fraction: Share = 0.2
    """Of the surviving prunable weights, per round."""
    criterion: Literal["magnitude", "random"] = "magnitude"
    per: Literal["global", "layer"] = "global"
    scope: Literal["published", "all"] | tuple[str, ...] = "published"
    """published: names that contain 'weight'; all: every parameter; or globs of names."""
    output_layers: tuple[str, ...] = ("output.weight",)
    """Globs of tensors that layer-wise pruning treats at `output_factor` x fraction."""
    output_factor: PositiveFloat = 0.5
    finetune_epochs_fraction: Share = 0.05
    """One-shot only: length of the fine-tuning as a share of train.epochs (at least one epoch)."""
    finetune_lr: PositiveFloat | None = None
    """One-shot only: peak rate of the fine-tuning, cosine by step without warm-up. Null: optimiser.lr."""


class Rewind(Node):
    what: Literal["all", "published"] = "all"
    """all: every tensor returns to its first value; published: as the released code (prompts and temperatures
    never, biases before round 1 only)."""


class Evaluate(Node):
    sets: tuple[str, ...] | None = None
    """Evaluation sets of the shards. Null: all."""
    seed: Seed = 0
    """Seed of the test noise, which depends on nothing but this, the image's name and sigma."""


class Keep(Node):
    rounds: Annotated[Literal["all", "best"], Aside] = "all"
    """best: at the end the run names the round with the best validation score and drops other rounds' weights."""
    by: Annotated[tuple[str, ...], Aside] = ()
    """Globs of score names, `psnr/<task>/<set>`; their mean decides. Needed for rounds: best."""


class Checkpoint(Node):
    every_steps: Annotated[PositiveInt | None, Aside] = 1000
    """Null: only when a round's training has ended, and at the end of the round."""
    keep_last: Annotated[int, Field(ge=2), Aside] = 2


class Tracking(Node):
    enabled: Annotated[bool, Aside] = True
    uri: Annotated[str | None, Aside] = None
    """Null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db. Passwords belong into the environment."""
    experiment: Annotated[str, Aside] = "mirl_dist"
    run_name: Annotated[str | None, Aside] = None
    every_steps: Annotated[PositiveInt, Aside] = 10
    journal: Annotated[str | None, Aside] = None
    """The folder of this machine where all that MLflow is to hear waits until it has heard it. Null: inside a
    run.folder that is a folder; for s3:// below XDG_CACHE_HOME or ~/.cache."""


class Config(Node):
    run: Run = Run()
    store: Store = Store()
    model: Model = Model()
    data: Data = Data()
    batch: Batch = Batch()
    optimiser: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    train: Train = Train()
    prune: Prune = Prune()
    rewind: Rewind = Rewind()
    evaluate: Evaluate = Evaluate()
    keep: Keep = Keep()
    checkpoint: Checkpoint = Checkpoint()
    ranks: Ranks = Ranks()
    preempt: Preempt = Preempt()
    guard: Guard = Guard()
    tracking: Tracking = Tracking()

    def contradictions(self) -> list[str]:
        found = self.data.contradictions()
        if self.prune.style == "one_shot" and self.prune.rounds != 1:
            found.append(
                f"prune.rounds: found {self.prune.rounds} with prune.style one_shot; one-shot prunes once: set it to 1"
            )
        if self.prune.style == "iterative" and self.prune.finetune_lr is not None:
            found.append("prune.finetune_lr: found with prune.style iterative; remove it, or set style one_shot")
        if self.prune.style == "one_shot" and self.rewind.what != "all":
            found.append("rewind.what: found 'published' with prune.style one_shot, which never rewinds; remove it")
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

    def _head_widths(self) -> list[tuple[str, int, int]]:
        m = self.model
        levels = [(f"heads[{i}]", h, m.dim * 2**i) for i, h in enumerate(m.heads)]
        lifted = (m.dim * 2, m.dim * 4, m.dim * 8)  # width that each prompt is joined to
        return levels + [("prompt_heads", m.prompt_heads, a + b) for a, b in zip(m.prompt_dims, lifted, strict=True)]

    def round_epochs(self, round_: int) -> int:
        """Epochs of a round: fine-tuning after a one-shot cut is shorter."""
        if self.prune.style == "one_shot" and round_ > 0:
            return max(1, round(self.prune.finetune_epochs_fraction * self.train.epochs))
        return self.train.epochs

    def dump(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    def fingerprint(self) -> str:
        """16 hex digits over the non-default keys that change the numbers; equal for equal experiments."""
        text = json.dumps(_telling(self, Config()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _telling(node: Node, default: Node) -> dict[str, Any]:
    """The non-default, not-aside values of a node by key."""
    said: dict[str, Any] = {}
    for name, field in type(node).model_fields.items():
        value, usual = getattr(node, name), getattr(default, name)
        if isinstance(value, Node):
            inner = _telling(value, usual)
            if inner:
                said[field.alias or name] = inner
        elif value != usual and Aside not in field.metadata:
            said[field.alias or name] = value
    return said


def read(path: Path, sets: Sequence[str] = ()) -> Config:
    """The config of one run: defaults, the file, the `--set` assignments. Raises Fault with every complaint."""
    return yaml_tree.read(Config, path, sets)


def of_dump(tree: dict[str, Any], where: str) -> Config:
    """The config that `dump` wrote. Raises Fault when this version does not understand it."""
    return yaml_tree.build(Config, tree, where)


def differences(mine: Config, other: Config) -> list[str]:
    """`key: mine / other` for each key that changes the numbers."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return out

    a, b = flat(_telling(mine, Config())), flat(_telling(other, Config()))
    defaults = flat(Config().dump())
    return [
        f"{k}: {a.get(k, defaults.get(k))} here, {b.get(k, defaults.get(k))} there"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]


__all__ = ["Config", "Fault", "differences", "of_dump", "read"]
