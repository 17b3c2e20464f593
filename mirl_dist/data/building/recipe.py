"""Recipes, which define how folders of images become sets of shards: typed YAML, validated as a whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from mirl_dist.config import yaml_loader
from mirl_dist.config.local_paths import expand_home
from mirl_dist.config.yaml_loader import Node
from mirl_dist.data.manifest import ImageFormat, Kind
from mirl_dist.errors import UserError

Role = Literal["train", "evaluate"]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,23}$")]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0)]
Make = Literal["rain", "haze", "snow"]
MAKES: dict[Make, Kind] = {"rain": "derain", "haze": "dehaze", "snow": "desnow"}


class ImageFolder(Node):
    """The images of one folder. `folder` may contain `${NAME}`, the value of an environment variable."""

    folder: str = Field(min_length=1)
    include: tuple[str, ...] = ("*",)
    """Globs relative to the folder; `**/*` for all depths. Only files with image suffixes match, and no hidden ones."""
    exclude: tuple[str, ...] = ()
    """Globs of relative paths to exclude."""
    names: str = "{id}"
    """Template of file names without suffix, such as `rain-{id}`. In `{id}_{any}`, {id} is greedy.

    With a `/` it describes the relative path, such as `{id}/blur/{id}`; the {id} together form one identity.
    """


class ImageSet(Node):
    """One set: clean images (kind clean), pairs from two folders, or clean images with a synthetic degradation."""

    set: SetName
    kind: Kind
    clean: ImageFolder | None = None
    degraded: ImageFolder | None = None
    photographs: tuple[str, ...] = ()
    """Instead of `clean`: names of photographs in scikit-image."""
    make: Make | None = None
    """Instead of `degraded`: a synthetic degradation, seeded by the recipe's seed and the sample's key."""
    versions: PositiveInt = 1
    """Number of degraded versions that `make` makes of each clean image, each a separate pair, as in OTS."""
    unused_clean: bool = False
    """Allow clean images without a degraded partner, as in OTS."""
    expect: PositiveInt | None = None
    """Number of images or pairs in the official set; another count stops the build."""
    get: str = ""
    """Where to get the set and under which terms; shown if it is missing or incomplete."""
    limit: PositiveInt | None = None
    fraction: Share | None = None
    """Keep this number (limit) or fraction (rounded) of the images or pairs, drawn by seed and name."""
    draw_seed: Seed | None = None
    """Seed of that draw only. Null: the recipe's seed."""

    def inconsistencies(self) -> list[str]:
        problems = []
        if (self.clean is None) == (not self.photographs):
            problems.append("has 'clean' and 'photographs' both or neither; keep one of them as the source")
        if self.kind == "clean" and (self.degraded or self.make):
            problems.append("is of kind clean, which the reader degrades; remove 'degraded' and 'make'")
        if self.kind != "clean" and (self.degraded is None) == (self.make is None):
            problems.append(f"is of kind {self.kind} and has 'degraded' and 'make' both or neither; keep one")
        if self.degraded is not None and self.photographs:
            problems.append("pairs 'photographs' with a folder 'degraded'; write make: rain, haze or snow instead")
        if self.versions > 1 and self.make is None:
            problems.append(f"has versions: {self.versions} without 'make', which alone makes versions; remove one")
        if self.make is not None and MAKES[self.make] != self.kind:
            problems.append(f"makes {self.make}, which is of kind {MAKES[self.make]}, not {self.kind}; change one")
        if self.limit is not None and self.fraction is not None:
            problems.append("has 'limit' and 'fraction'; keep one of them")
        if self.draw_seed is not None and self.limit is None and self.fraction is None:
            problems.append("has 'draw_seed', but keeps all it finds; add 'limit' or 'fraction', or remove it")
        for key, folder in (("clean", self.clean), ("degraded", self.degraded)):
            if folder is None:
                continue
            if not 1 <= folder.names.count("{id}") <= folder.names.count("/") + 1:
                problems.append(
                    f"has {key}.names '{folder.names}'; it must hold {{id}} exactly once, or once between /"
                )
            if re.search(r"[{}]", re.sub(r"\{(id|any)\}", "", folder.names)):
                problems.append(f"has {key}.names '{folder.names}'; known in braces are only {{id}} and {{any}}")
            if any(not g or g.startswith("/") or ".." in g for g in folder.include):
                problems.append(f"has {key}.include {list(folder.include)}; globs lie below the folder")
        if self.clean and self.degraded and self.clean.names.count("{id}") != self.degraded.names.count("{id}"):
            problems.append(f"pairs '{self.degraded.names}' with '{self.clean.names}'; write {{id}} as often in both")
        if self.clean is not None and "{any}" in self.clean.names:
            problems.append(f"has clean.names '{self.clean.names}'; {{any}} may stand in degraded.names only")
        return problems


class EvaluateSet(ImageSet):
    """An evaluation set: whole images, or their centres."""

    centre_pixels: PositiveInt | None = None
    """Side of the centre to keep. Null: the whole image."""


class Recipe(Node):
    """Everything, besides the images, that determines the bytes of the shards."""

    name: str = Field(min_length=1)
    seed: Seed = 0
    train_format: ImageFormat = "ppm"
    """Format of training images: ppm (raw pixels, read without decoding) or png. Evaluation images are always png."""
    least_pixels: PositiveInt = 64
    """Minimum side of training images; smaller ones are unusable, because no patch can be cropped from them."""
    shard_megabytes: Annotated[float, Field(gt=0)] = 64
    """Approximate size of one tar in MiB; for PNG, estimated from the number of pixels."""
    broken: Literal["stop", "skip"] = "stop"
    """Policy for unusable images: stop and list them all, or skip and list them."""
    allow_overlap: bool = False
    """Allow images to be in both training and evaluation."""
    train: tuple[ImageSet, ...] = ()
    evaluate: tuple[EvaluateSet, ...] = ()

    def sets(self) -> Iterator[tuple[Role, ImageSet]]:
        """Yield all sets with their roles, training first."""
        yield from (("train", one) for one in self.train)
        yield from (("evaluate", one) for one in self.evaluate)

    def inconsistencies(self) -> list[str]:
        problems = []
        seen: set[str] = set()
        if not self.train and not self.evaluate:
            problems.append("train, evaluate: found no set in either; describe at least one")
        for role, one in self.sets():
            problems += [f"{role}: the set '{one.set}' {complaint}" for complaint in one.inconsistencies()]
            name = f"{role}-{one.set}".lower()
            if name in seen:
                problems.append(f"{role}: found two sets named '{one.set}'; give each its own name")
            seen.add(name)
        return problems

    def content(self) -> dict[str, Any]:
        """Return the part of the recipe that its fingerprint covers: without folders, `expect` and `get`."""
        everywhere: Any = {"clean": {"folder"}, "degraded": {"folder"}, "expect": True, "get": True}
        return self.model_dump(
            mode="json", exclude={"train": {"__all__": everywhere}, "evaluate": {"__all__": everywhere}}
        )


def read(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe. Raises UserError listing every unknown key, invalid value and contradiction."""
    return yaml_loader.read(Recipe, path, sets, "shards/demo.yaml")


def expand_folder(folder: str) -> Path:
    """Expand `${NAME}` and `~` in a recipe's `folder`. Raises UserError for an unset variable."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        folder_path = os.environ.get(name, "")
        if not folder_path:
            raise UserError(
                f"the environment variable {name} is not set, and the folder '{folder}' needs it. "
                f"Say where the images are: export {name}=/path/to/the/images"
            )
        return folder_path

    return expand_home(re.sub(r"\$\{(\w+)\}", value, folder))
