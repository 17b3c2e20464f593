"""The sections of a config: every key of a run, its unit, its range and its default, MIR-L's published recipe.

Keys marked `Aside` (places, logging, workers) do not change the numbers of a run. Recipe: paper section IV and the
released code, at full size.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from mirl_dist.config.tasks import Task
from mirl_dist.config.yaml_loader import Node
from mirl_dist.errors import UserError


class _Local:
    """Marks a key that does not change the numbers of a run."""


Local = _Local()
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Four = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
Three = tuple[PositiveInt, PositiveInt, PositiveInt]


class RunSection(Node):
    folder: Annotated[str, Local] = Field("runs/run", min_length=1)
    """Where everything of this run is kept: a folder, or s3://bucket/prefix."""
    seed: Seed = 0


class StoreSection(Node):
    """How stores are talked to: of the run, and of its shards."""

    endpoint: Annotated[str | None, Local] = None
    """The S3 server, http(s)://host:port. Null: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, a profile, else AWS."""
    encryption: Annotated[Literal["AES256", "aws:kms"] | None, Local] = None
    """Server-side encryption of what is written to S3. Null: as the bucket says."""
    kms_key: Annotated[str | None, Local] = None
    """With aws:kms: the key's id or ARN. Null: the account's own key for S3."""
    patience_seconds: Annotated[PositiveFloat, Local] = 900
    """How long a store that is away or full is tried again, since the last byte that passed. After that a run stops,
    resumably."""
    lease_seconds: Annotated[float, Field(ge=1), Local] = 60
    """A launch without a sign of life for so long is dead, and another may go on with its run."""


class RanksSection(Node):
    timeout_seconds: Annotated[PositiveFloat, Local] = 1800
    """How long ranks wait for one another. After that those who did not come are named, and the ranks end."""
    restarts: Annotated[Count, Local] = 3
    """How often `train --launch` starts the ranks again after one of them died."""
    slow_factor: Annotated[float, Field(gt=1), Local] = 1.5
    """A rank that reaches the all-reduce later than the others by this factor, report after report, is named."""
    logs: Annotated[str | None, Local] = None
    """The folder in which each rank keeps a log, rank-0003.jsonl. Null: logs/ inside a run.folder that is a folder; for
    s3:// a folder named after the run below XDG_STATE_HOME or ~/.local/state/mirl-dist."""


class PreemptSection(Node):
    deadline_seconds: Annotated[PositiveFloat, Local] = 120
    """From SIGTERM, SIGINT or SIGUSR1 to the end of the process, at the latest."""


class GuardSection(Node):
    skip_bad_batches: Annotated[Count, Local] = 0
    """How many global batches of a round may have a loss or gradient that is not finite: they are left out, told and
    counted in the ticket. 0: the first one stops the run."""
    spike_factor: Annotated[float | None, Field(gt=1), Local] = 10
    """A step whose loss is so many times the median of the 50 before it is reported. Null: none is."""
    same_step_failures: Annotated[PositiveInt, Local] = 3
    """Launches on one machine that may die in one and the same step before the next one refuses to try it again."""


class ModelSection(Node):
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
    weights: Annotated[str, Field(min_length=1)] | None = None
    """First values to begin from: a safetensors file as `mirl-dist import` writes. Null: drawn from run.seed."""

    def sizes(self) -> dict[str, Any]:
        """The keyword arguments of `models.create`."""
        return self.model_dump(exclude={"name", "weights"})


MOST_REPEATS = 10_000
_PUBLISHED_MIX: dict[str, float | dict[str, float]] = {
    "denoise_15": 3.0,
    "denoise_25": 3.0,
    "denoise_50": 3.0,
    "derain": 120.0,
    "dehaze": 1.0,
}


class CacheSection(Node):
    folder: Annotated[str | None, Local] = None
    """Where shards are kept on each node, on a disk of its own; all its ranks share it. Null: below SLURM_TMPDIR,
    TMPDIR or /tmp for s3:// and https://, and none for a folder, whose shards are read in place."""
    gigabytes: Annotated[PositiveFloat, Local] = 50
    """Most that the cache may take on the disk, in 10^9 bytes."""


class DataSection(Node):
    shards: Annotated[str, Local] = Field("shards/built", min_length=1)
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
    damage: Annotated[Literal["refuse", "skip"], Local] = "refuse"
    """What a damaged or missing training sample does: stop the run, or be replaced, told and counted in the ticket."""
    cache: CacheSection = CacheSection()
    workers: Annotated[Count, Local] = 2
    """Loader processes of each rank; 0 reads in the training process."""

    def inconsistencies(self) -> list[str]:
        found = []
        if not self.mix:
            found.append("data.mix: found no task; name at least one, for example derain: 1")
        for word, amount in self.mix.items():
            try:
                Task.of(word)
            except UserError as fault:
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


class BatchSection(Node):
    global_: PositiveInt = Field(8, alias="global")
    """Samples per optimiser step over all ranks. The world size never changes it."""
    forward: Annotated[PositiveInt | None, Local] = None
    """Samples per forward pass on a rank; less than the rank's share means accumulation. Null: the whole share."""


class OptimiserSection(Node):
    name: Literal["adam", "adamw"] = "adamw"
    lr: PositiveFloat = 2e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NotNegative | None = None
    """Null: 0.01 with adamw, the released code's choice; 0 with adam, the paper's text."""
    clip_norm: PositiveFloat | None = None


class ScheduleSection(Node):
    by: Literal["epoch", "step"] = "epoch"
    """epoch: as published (the whole first epoch runs at rate 0 when warm-up is on); step: smooth."""
    warmup_epochs: NotNegative = 15
    horizon_epochs: PositiveFloat | None = None
    """Where the cosine reaches 0. Null: train.epochs."""


class TrainSection(Node):
    epochs: PositiveInt = 120
    """Epochs of every round."""
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Annotated[Literal["auto", "cpu"], Local] = "auto"


class StartSection(Node):
    """Begin from a finished ticket in place of a dense network; with prune.rounds 0 that is a control."""

    ticket: Annotated[str, Field(min_length=1)] | None = None
    """`RUN/rounds/NN`, or a ticket file."""
    kind: Literal["ticket", "reinit", "random_layer", "random_global"] = "ticket"
    """ticket: its mask and its first values; reinit: its mask, and first values drawn anew;
    random_layer, random_global: its first values, and a random mask of the same density per tensor, or over all."""


class PruneSection(Node):
    style: Literal["iterative", "one_shot"] = "iterative"
    """iterative: MIR-L, `rounds` times prune and rewind; one_shot: prune once, then as rewind.to says (PIR-OSM and
    PIR-OSR fine-tune)."""
    rounds: Annotated[Count, Local] = 15
    """Pruned rounds after the dense round 0. 0 trains the dense network alone."""
    target_sparsity: Annotated[Share | None, Local] = None
    """Stop after the first round whose sparsity over all parameters reaches this."""
    fraction: Share = 0.2
    """Of the surviving prunable weights, per round."""
    criterion: Literal["magnitude", "random", "synflow", "snip", "gradient"] = "magnitude"
    """What makes a weight w strong: |w| after training; chance; SynFlow's flow of the first values, without data;
    SNIP's |w g| of the first values; or |w g| after training, with g the gradient over `criterion_batches`."""
    synflow_steps: PositiveInt = 100
    """synflow: cuts of growing depth, each scored anew under the masks so far."""
    criterion_batches: PositiveInt = 8
    """snip and gradient: global batches, the first of the round to come, over which g is summed."""
    per: Literal["global", "layer"] = "global"
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """With per global: the share of each tensor that stays alive in any case."""
    scope: Literal["published", "all"] | tuple[str, ...] = "published"
    """published: names that contain 'weight'; all: every parameter; or globs of names."""
    output_layers: tuple[str, ...] = ("output.weight",)
    """Globs of tensors that layer-wise pruning treats at `output_factor` x fraction."""
    output_factor: PositiveFloat = 0.5
    finetune_epochs_fraction: Share = 0.05
    """rewind.to finetune: length of the fine-tuning as a share of train.epochs (at least one epoch)."""
    finetune_lr: PositiveFloat | None = None
    """rewind.to finetune: peak rate of the fine-tuning, cosine by step without warm-up. Null: optimiser.lr."""


class RewindSection(Node):
    to: Literal["initial", "step", "rate", "finetune"] | None = None
    """Where survivors train from after a cut: their first values; their values at `step` of round 0, with the schedule
    from there; their trained values with the whole schedule (learning-rate rewinding); or their trained values with
    prune.finetune_*. Null: initial, and finetune with prune.style one_shot."""
    step: PositiveInt | None = None
    """rewind.to step: the optimiser step of round 0."""
    what: Literal["all", "published"] = "all"
    """all: every tensor returns to its first value; published: as the released code (prompts and temperatures
    never, biases before round 1 only)."""


class EvaluateSection(Node):
    sets: tuple[str, ...] | None = None
    """Evaluation sets of the shards. Null: all."""
    seed: Seed = 0
    """Seed of the test noise, which depends on nothing but this, the image's name and sigma."""
    protocols: tuple[Literal["promptir", "restormer", "basicsr_rgb", "basicsr_y", "mioir"], ...] = ("promptir",)
    """How PSNR and SSIM are computed (docs/protocols.md), all in one pass. The first one's are the headline."""
    every_epochs: PositiveInt | None = None
    """Score within a round too, every so many epochs: for the iterations to the best score. Null: at its end alone."""
    curve_images: PositiveInt = 4
    """Within a round: the first so many images of each task and set."""
    tile_pixels: Annotated[int, Field(ge=64)] | None = None
    """Restore images in square tiles of so many pixels, which changes scores a little. Null: whole images."""
    tile_overlap: Annotated[int, Field(ge=0)] = 32
    """Pixels that neighbouring tiles share, and over which they are blended."""
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    """Compile the network for scoring (torch.compile): for GPUs; on a CPU the first image takes minutes."""
    pictures: Annotated[PositiveInt, Local] = 2
    """How many images of each task and set a ticket's strip of pictures shows."""


class KeepSection(Node):
    rounds: Annotated[Literal["all", "best"], Local] = "all"
    """best: at the end the run names the round with the best validation score and drops other rounds' weights."""
    by: Annotated[tuple[str, ...], Local] = ()
    """Globs of score names, `psnr/<task>/<set>`; their mean decides. Needed for rounds: best."""


class CheckpointSection(Node):
    every_steps: Annotated[PositiveInt | None, Local] = 1000
    """Null: only when a round's training has ended, and at the end of the round."""
    keep_last: Annotated[int, Field(ge=2), Local] = 2


class TrackingSection(Node):
    enabled: Annotated[bool, Local] = True
    uri: Annotated[str | None, Local] = None
    """Null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db. Passwords belong into the environment."""
    experiment: Annotated[str, Local] = "mirl_dist"
    run_name: Annotated[str | None, Local] = None
    tags: Annotated[dict[str, str], Local] = Field(default_factory=dict)
    """Of the run in MLflow, beside those that it has anyway."""
    every_steps: Annotated[PositiveInt, Local] = 10
    journal: Annotated[str | None, Local] = None
    """The folder of this machine where all that MLflow is to hear waits until it has heard it. Null: inside a
    run.folder that is a folder; for s3:// below XDG_CACHE_HOME or ~/.cache."""
