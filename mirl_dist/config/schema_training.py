"""What is trained, pruned and scored: the sections of a config that make an experiment; defaults: MIR-L's recipe.

Each key has its unit, its range and its default here. Where and how a run is kept stands in schema.py. Recipe: paper
section IV and the released code, at full size.
"""

from __future__ import annotations

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
    """First values to begin from: a safetensors file as `mirl-dist import` writes. Null: drawn from run.seed."""

    def sizes(self) -> dict[str, Any]:
        """The keyword arguments of `models.create`."""
        return self.model_dump(exclude={"name", "weights"})

    def inconsistencies(self) -> list[str]:
        return [
            f"model.{key}: found {heads} heads for a width of {width}; heads must divide the width"
            for key, heads, width in self._head_widths()
            if width % heads
        ]

    def _head_widths(self) -> list[tuple[str, int, int]]:
        """Key, number of heads and width in channels of each attention."""
        levels = [(f"heads[{i}]", heads, self.dim * 2**i) for i, heads in enumerate(self.heads)]
        joined = (self.dim * 2, self.dim * 4, self.dim * 8)  # width that each prompt is joined to
        prompts = [a + b for a, b in zip(self.prompt_dims, joined, strict=True)]
        return levels + [("prompt_heads", self.prompt_heads, width) for width in prompts]


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
        texts = []
        if not self.mix:
            texts.append("data.mix: found no task; name at least one, for example derain: 1")
        for word, amount in self.mix.items():
            try:
                Task.of(word)
            except UserError as error:
                texts.append(f"data.mix: {error}")
            numbers = {"": amount} if isinstance(amount, float) else amount
            if not numbers:
                texts.append(f"data.mix.{word}: found no set; give a number, or numbers of sets")
            for name, number in numbers.items():
                key = f"data.mix.{word}" + (f".{name}" if name else "")
                if self.mix_by == "repeats" and number != int(number):
                    texts.append(f"{key}: found {number:g} with mix_by repeats; use a whole number, or mix_by: weights")
                if self.mix_by == "repeats" and number > MOST_REPEATS:
                    texts.append(f"{key}: found {number:g} with mix_by repeats; at most {MOST_REPEATS:,} make sense")
                if self.mix_by == "balanced" and number != 1:
                    texts.append(f"{key}: found {number:g} with mix_by balanced; write 1, or use mix_by: weights")
        return texts


class BatchSection(Node):
    global_: PositiveInt = Field(8, alias="global")
    """Samples per optimiser step over all ranks. The world size never changes it."""
    forward: Annotated[PositiveInt | None, Local] = None
    """Samples per forward pass on a rank; less than the rank's share means accumulation. Null: the whole share."""

    def inconsistencies(self) -> list[str]:
        if self.forward is not None and self.global_ % self.forward:
            return [f"batch.forward: found {self.forward}, which does not divide batch.global {self.global_}"]
        return []


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

    def inconsistencies(self) -> list[str]:
        if self.ticket is None and self.kind != "ticket":
            return [f"start.kind: found {self.kind} without start.ticket; name a ticket, or remove it"]
        return []


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

    def ends_after(self, round_: int, total_sparsity: float) -> bool:
        """Whether no round follows a round that has this sparsity over all parameters."""
        return round_ >= self.rounds or (self.target_sparsity is not None and total_sparsity >= self.target_sparsity)

    def inconsistencies(self) -> list[str]:
        texts = []
        if self.style == "one_shot" and self.rounds != 1:
            texts.append(
                f"prune.rounds: found {self.rounds} with prune.style one_shot; one-shot prunes once: set it to 1"
            )
        if self.floor and self.per != "global":
            texts.append("prune.floor: found with prune.per layer, which cuts each tensor by itself; remove it")
        return texts


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

    def inconsistencies(self) -> list[str]:
        texts = []
        if self.tile_pixels is not None and self.tile_overlap >= self.tile_pixels:
            texts.append(
                f"evaluate.tile_overlap: found {self.tile_overlap} for tiles of {self.tile_pixels} "
                "pixels; it must be smaller"
            )
        if not self.protocols or len(set(self.protocols)) < len(self.protocols):
            texts.append(f"evaluate.protocols: found {list(self.protocols)}; name at least one, and each once")
        return texts
