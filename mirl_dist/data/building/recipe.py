"""A recipe: which folders of images become which sets of shards. Typed YAML, checked as a whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from mirl_dist.config import yaml_loader
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
    """Images of one folder. `folder` may hold `${NAME}`: the value of that environment variable."""

    folder: str = Field(min_length=1)
    include: tuple[str, ...] = ("*",)
    """Globs below the folder, `**/*` for all depths. Only images' endings count, no name with a dot first."""
    exclude: tuple[str, ...] = ()
    """Globs of names (paths below the folder) to leave out."""
    names: str = "{id}"
    """How a file's name without its ending is made: `rain-{id}`; in `{id}_{any}` {id} takes what it can.

    With a `/` it describes the path below the folder: `{id}/blur/{id}`, whose two {id} are one identity.
    """


class ImageSet(Node):
    """One set: clean images alone (kind clean), pairs of two folders, or clean images and a made degradation."""

    set: SetName
    kind: Kind
    clean: ImageFolder | None = None
    degraded: ImageFolder | None = None
    photographs: tuple[str, ...] = ()
    """Instead of `clean`: photographs that lie inside scikit-image, by name."""
    make: Make | None = None
    """Instead of `degraded`: a synthetic degradation, seeded by the recipe's seed and the sample's key."""
    versions: PositiveInt = 1
    """How many degraded versions `make` makes of each clean image, each a pair of its own, as in OTS."""
    unused_clean: bool = False
    """True where the clean folder holds images that no degraded one belongs to, as in OTS."""
    expect: PositiveInt | None = None
    """Images or pairs which the official set has; another count stops the build."""
    get: str = ""
    """Where the set can be had and under which terms; shown where it is missing or incomplete."""
    limit: PositiveInt | None = None
    fraction: Share | None = None
    """Keep so many, or this share (to the nearest image), of the images or pairs, drawn by seed and name."""
    draw_seed: Seed | None = None
    """The seed of that draw alone. Null: the recipe's."""

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
            if folder is not None and not 1 <= folder.names.count("{id}") <= folder.names.count("/") + 1:
                problems.append(
                    f"has {key}.names '{folder.names}'; it must hold {{id}} exactly once, or once between /"
                )
            if folder is not None and re.search(r"[{}]", re.sub(r"\{(id|any)\}", "", folder.names)):
                problems.append(f"has {key}.names '{folder.names}'; known in braces are only {{id}} and {{any}}")
            if folder is not None and any(not g or g.startswith("/") or ".." in g for g in folder.include):
                problems.append(f"has {key}.include {list(folder.include)}; globs lie below the folder")
        if self.clean and self.degraded and self.clean.names.count("{id}") != self.degraded.names.count("{id}"):
            problems.append(f"pairs '{self.degraded.names}' with '{self.clean.names}'; write {{id}} as often in both")
        if self.clean is not None and "{any}" in self.clean.names:
            problems.append(f"has clean.names '{self.clean.names}'; {{any}} may stand in degraded.names only")
        return problems


class EvaluateSet(ImageSet):
    """A set to score on: whole images, or their centres."""

    centre_pixels: PositiveInt | None = None
    """Side of the centre to keep. Null: the whole image."""


class Recipe(Node):
    """Everything that decides the bytes of a folder of shards, beside the images themselves."""

    name: str = Field(min_length=1)
    seed: Seed = 0
    train_format: ImageFormat = "ppm"
    """How training images are stored: ppm (raw pixels, read without decoding) or png. Evaluation is always png."""
    least_pixels: PositiveInt = 64
    """Training images with a shorter side are a complaint: no patch could be cut from them."""
    shard_megabytes: Annotated[float, Field(gt=0)] = 64
    """About the size of one tar; by the pixels' count for PNG, whose true size is known only afterwards."""
    broken: Literal["stop", "skip"] = "stop"
    """What to do about images that cannot be used: stop and list them all, or leave out and list them."""
    allow_overlap: bool = False
    """True lets an image serve both training and evaluation."""
    train: tuple[ImageSet, ...] = ()
    evaluate: tuple[EvaluateSet, ...] = ()

    def sets(self) -> Iterator[tuple[Role, ImageSet]]:
        """All sets with their role, training first."""
        for one in self.train:
            yield "train", one
        for other in self.evaluate:
            yield "evaluate", other

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
        """The recipe without the places and the words about its sets: what its fingerprint counts."""
        everywhere: Any = {"clean": {"folder"}, "degraded": {"folder"}, "expect": True, "get": True}
        return self.model_dump(
            mode="json", exclude={"train": {"__all__": everywhere}, "evaluate": {"__all__": everywhere}}
        )


def read(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe. Raises UserError that lists every unknown key, wrong value and contradiction."""
    return yaml_loader.read(Recipe, path, sets, "shards/demo.yaml")


def expand_folder(folder: str) -> Path:
    """Expand a recipe's `folder` to a path: `${NAME}` replaced, `~` opened. Raises UserError for one not set."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        folder_path = os.environ.get(name, "")
        if not folder_path:
            raise UserError(
                f"the environment variable {name} is not set, and the folder '{folder}' needs it. "
                f"Say where the images are: export {name}=/path/to/the/images"
            )
        return folder_path

    return Path(re.sub(r"\$\{(\w+)\}", value, folder)).expanduser()
