"""Config sections that define an experiment: model, data, training, pruning, scoring. Defaults are MIR-L's recipe.

Each key has its unit, range and default here. Sections about storing and operating a run are in schema.py. Source of
the recipe: paper section IV and the released code, at full size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from mirl_dist.config.schema import Count, Local, Seed
from mirl_dist.config.tasks import Task
from mirl_dist.config.yaml_loader import Node
from mirl_dist.errors import UserError

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Four = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
Three = tuple[PositiveInt, PositiveInt, PositiveInt]


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
    """Initial weights: a safetensors file as written by `mirl-dist import`. Null: drawn from run.seed."""

    def sizes(self) -> dict[str, Any]:
        """Return the keyword arguments of `models.create`."""
        return self.model_dump(exclude={"name", "weights"})

    def inconsistencies(self) -> Iterator[str]:
        levels = [(f"heads[{i}]", heads, self.dim * 2**i) for i, heads in enumerate(self.heads)]
        joined = (self.dim * 2, self.dim * 4, self.dim * 8)  # width of the features that each prompt is concatenated to
        prompts = [("prompt_heads", self.prompt_heads, a + b) for a, b in zip(self.prompt_dims, joined, strict=True)]
        for key, heads, width in levels + prompts:
            if width % heads:
                yield f"model.{key}: found {heads} heads for a width of {width}; heads must divide the width"


MOST_REPEATS = 10_000
Mix = dict[str, PositiveFloat | dict[str, PositiveFloat]]


class CacheSection(Node):
    folder: Annotated[str | None, Local] = None
    """Folder for cached shards on a local disk of each node, shared by its ranks. Null: below SLURM_TMPDIR, TMPDIR or
    /tmp for s3:// and https://; no cache for a folder, whose shards are read in place."""
    gigabytes: Annotated[PositiveFloat, Local] = 50
    """Maximum size of the cache on disk, in 10^9 bytes."""


class DataSection(Node):
    shards: Annotated[str, Local] = Field("shards/built", min_length=1)
    """Output of `mirl-dist shards build`: a folder, s3://bucket/prefix or https://host/path. The digest of its manifest
    is part of the run's identity."""
    mix: Mix = {"denoise_15": 3.0, "denoise_25": 3.0, "denoise_50": 3.0, "derain": 120.0, "dehaze": 1.0}
    """Task -> number, or task -> set -> number; mix_by defines the numbers' meaning. Tasks: docs/degradations.md."""
    mix_by: Literal["repeats", "weights", "balanced"] = "repeats"
    """repeats: how often each sample is read per epoch, as published; weights: relative shares of the epoch; balanced:
    equal shares (all numbers 1)."""
    patch_pixels: Annotated[int, Field(ge=8)] = 64
    augment: Literal["published", "all", "flips", "none"] = "published"
    """published: one of the 7 rotations and flips that change the image; all: these and the identity; flips: as in the
    paper's text."""
    steps_per_epoch: PositiveInt | None = None
    """Null: the whole mix once, without the last incomplete global batch."""
    damage: Annotated[Literal["refuse", "skip"], Local] = "refuse"
    """Damaged or missing training samples. refuse: stop the run; skip: replace, report and count them in the ticket."""
    cache: CacheSection = CacheSection()
    workers: Annotated[Count, Local] = 2
    """Loader processes per rank; 0 reads in the training process."""

    def inconsistencies(self) -> Iterator[str]:
        if not self.mix:
            yield "data.mix: found no task; name at least one, for example derain: 1"
        for word, amount in self.mix.items():
            try:
                Task.of(word)
            except UserError as error:
                yield f"data.mix: {error}"
            numbers = {"": amount} if isinstance(amount, float) else amount
            if not numbers:
                yield f"data.mix.{word}: found no set; give a number, or numbers of sets"
            for name, number in numbers.items():
                text = f"data.mix.{word}{name and f'.{name}'}: found {number:g} with mix_by {self.mix_by}"
                if self.mix_by == "repeats" and number != int(number):
                    yield f"{text}; use a whole number, or mix_by: weights"
                if self.mix_by == "repeats" and number > MOST_REPEATS:
                    yield f"{text}; at most {MOST_REPEATS:,} make sense"
                if self.mix_by == "balanced" and number != 1:
                    yield f"{text}; write 1, or use mix_by: weights"


class BatchSection(Node):
    global_: PositiveInt = Field(8, alias="global")
    """Samples per optimiser step over all ranks, independent of the world size."""
    forward: Annotated[PositiveInt | None, Local] = None
    """Samples per forward pass on a rank; if less than the rank's share, gradients are accumulated. Null: the share."""

    def inconsistencies(self) -> Iterator[str]:
        if self.forward is not None and self.global_ % self.forward:
            yield f"batch.forward: found {self.forward}, which does not divide batch.global {self.global_}"


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
    """When the learning rate is updated. epoch: as published (with warm-up the rate is 0 for all of the first
    epoch); step: at every step."""
    warmup_epochs: NotNegative = 15
    horizon_epochs: PositiveFloat | None = None
    """Epoch at which the cosine reaches 0. Null: train.epochs."""


class TrainSection(Node):
    epochs: PositiveInt = 120
    """Epochs of every round."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of forward and backward passes; weights, moments and losses are float32 in all of them. tf32: GPUs from
    Ampere on multiply with 10 bits of mantissa; bf16: autocast to bfloat16, with 7 bits."""
    compile: bool = False
    """Compile each transformer block with torch.compile for training; results differ by rounding. DDP only."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Local] = "auto"
    """auto: a GPU per rank if this node has any, else processors; cuda: a GPU per rank, or the run is refused."""


class StartSection(Node):
    """Start from a finished ticket instead of a dense network; with prune.rounds 0 this is a control experiment."""

    ticket: Annotated[str, Field(min_length=1)] | None = None
    """`RUN/rounds/NN`, or the path of a ticket file."""
    kind: Literal["ticket", "reinit", "random_layer", "random_global"] = "ticket"
    """ticket: its mask and initial values; reinit: its mask with newly drawn initial values; random_layer,
    random_global: its initial values with a random mask of equal density per tensor, or over all tensors."""

    def inconsistencies(self) -> Iterator[str]:
        if self.ticket is None and self.kind != "ticket":
            yield f"start.kind: found {self.kind} without start.ticket; name a ticket, or remove it"


class PruneSection(Node):
    style: Literal["iterative", "one_shot"] = "iterative"
    """iterative: prune and rewind `rounds` times (MIR-L); one_shot: prune once, then train according to rewind.to
    (PIR-OSM and PIR-OSR fine-tune)."""
    rounds: Annotated[Count, Local] = 15
    """Pruned rounds after the dense round 0. 0 trains the dense network only."""
    target_sparsity: Annotated[Share | None, Local] = None
    """Stop after the first round whose sparsity over all parameters reaches this."""
    fraction: Share = 0.2
    """Fraction of the surviving prunable weights that each round prunes."""
    criterion: Literal["magnitude", "random", "synflow", "snip", "gradient"] = "magnitude"
    """Pruning score of a weight w. magnitude: |w| after training; random: a random number; synflow: SynFlow score of
    the initial values, without data; snip: |w g| of the initial values; gradient: |w g| after training. g is the
    gradient summed over `criterion_batches`."""
    synflow_steps: PositiveInt = 100
    """synflow: number of pruning steps of increasing sparsity; each recomputes the scores under the current masks."""
    criterion_batches: PositiveInt = 8
    """snip and gradient: number of global batches, the first ones of the next round, over which g is summed."""
    per: Literal["global", "layer"] = "global"
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """With per global: minimum fraction of each tensor's weights that survives."""
    scope: Literal["published", "all"] | tuple[str, ...] = "published"
    """Prunable parameters. published: names that contain 'weight'; all: every parameter; or globs of names."""
    output_layers: tuple[str, ...] = ("output.weight",)
    """Globs of tensors that layer-wise pruning prunes by only `output_factor` x fraction."""
    output_factor: PositiveFloat = 0.5
    finetune_epochs_fraction: Share = 0.05
    """rewind.to finetune: length of fine-tuning as a fraction of train.epochs (at least one epoch)."""
    finetune_lr: PositiveFloat | None = None
    """rewind.to finetune: peak learning rate; cosine schedule by step without warm-up. Null: optimiser.lr."""

    def ends_after(self, round_: int, total_sparsity: float) -> bool:
        """Whether this round is the last one. total_sparsity: its sparsity over all parameters."""
        return round_ >= self.rounds or (self.target_sparsity is not None and total_sparsity >= self.target_sparsity)

    def inconsistencies(self) -> Iterator[str]:
        if self.style == "one_shot" and self.rounds != 1:
            yield f"prune.rounds: found {self.rounds} with prune.style one_shot; one-shot prunes once: set it to 1"
        if self.floor and self.per != "global":
            yield "prune.floor: found with prune.per layer, which prunes each tensor separately; remove it"


class RewindSection(Node):
    to: Literal["initial", "step", "rate", "finetune"] | None = None
    """Values and schedule of surviving weights after pruning. initial: their initial values; step: their values at
    `step` of round 0, with the schedule from there; rate: their trained values with the whole schedule (learning-rate
    rewinding); finetune: their trained values with prune.finetune_*. Null: finetune with prune.style one_shot, else
    initial."""
    step: PositiveInt | None = None
    """rewind.to step: the optimiser step of round 0."""
    what: Literal["all", "published"] = "all"
    """Rewound tensors. all: every tensor; published: as in the released code (prompts and temperatures never, biases
    before round 1 only)."""


class EvaluateSection(Node):
    sets: tuple[str, ...] | None = None
    """Names of evaluation sets in the shards. Null: all."""
    seed: Seed = 0
    """Seed of the test noise, which depends only on this seed, the image's name and sigma."""
    protocols: tuple[Literal["promptir", "restormer", "basicsr_rgb", "basicsr_y", "mioir"], ...] = ("promptir",)
    """Definitions of PSNR and SSIM (docs/protocols.md), all computed in one pass. The first gives the main scores."""
    every_epochs: PositiveInt | None = None
    """Also score during a round, every so many epochs, to find the step of the best score. Null: only at its end."""
    curve_images: PositiveInt = 4
    """Number of images, the first ones of each task and set, that are scored during a round."""
    tile_pixels: Annotated[int, Field(ge=64)] | None = None
    """Restore images in square tiles of this side length, which changes scores slightly. Null: whole images."""
    tile_overlap: Annotated[int, Field(ge=0)] = 32
    """Overlap of neighbouring tiles in pixels, over which they are blended."""
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    """Compile the network for scoring with torch.compile; meant for GPUs, as on a CPU the first image takes minutes."""
    pictures: Annotated[PositiveInt, Local] = 2
    """Number of images of each task and set in a ticket's picture strip."""

    def inconsistencies(self) -> Iterator[str]:
        overlap, tile = self.tile_overlap, self.tile_pixels
        if tile is not None and overlap >= tile:
            yield f"evaluate.tile_overlap: found {overlap} for tiles of {tile} pixels; it must be smaller"
        if not self.protocols or len(set(self.protocols)) < len(self.protocols):
            yield f"evaluate.protocols: found {list(self.protocols)}; name at least one, and each once"
