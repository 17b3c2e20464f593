"""A recipe: which folders of images become which sets of shards. Typed YAML, checked as a whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from mirl_dist import yaml_tree
from mirl_dist.faults import Fault
from mirl_dist.yaml_tree import Node

Kind = Literal["denoise", "derain", "dehaze"]
Role = Literal["train", "evaluate"]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,23}$")]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
MAKES: dict[str, Kind] = {"rain": "derain", "haze": "dehaze"}


class Folder(Node):
    """Images of one folder. `folder` may hold `${NAME}`: the value of that environment variable."""

    folder: str = Field(min_length=1)
    include: tuple[str, ...] = ("*",)
    """Globs below the folder, `**/*` for all depths. Only images' endings count, no name with a dot first."""
    exclude: tuple[str, ...] = ()
    """Globs of names (paths below the folder) to leave out."""
    names: str = "{id}"
    """How a file's name without its ending is made: `rain-{id}`; in `{id}_{any}` {id} takes what it can."""


class ImageSet(Node):
    """One set: clean images alone (denoise), pairs of two folders, or clean images and a made degradation."""

    set: SetName
    kind: Kind
    clean: Folder | None = None
    degraded: Folder | None = None
    photographs: tuple[str, ...] = ()
    """Instead of `clean`: photographs that lie inside scikit-image, by name."""
    make: Literal["rain", "haze"] | None = None
    """Instead of `degraded`: a synthetic degradation, seeded by the recipe's seed and the sample's key."""
    unused_clean: bool = False
    """True where the clean folder holds images that no degraded one belongs to, as in OTS."""
    expect: PositiveInt | None = None
    """Images or pairs which the official set has; another count is a complaint."""
    limit: PositiveInt | None = None
    fraction: Share | None = None
    """Keep so many, or this share, of the images or pairs, chosen by the recipe's seed and their names."""

    def contradictions(self) -> list[str]:
        found = []
        if (self.clean is None) == (not self.photographs):
            found.append("has 'clean' and 'photographs' both or neither; keep one of them as the source")
        if self.kind == "denoise" and (self.degraded or self.make):
            found.append("is of kind denoise, whose noise the reader adds; remove 'degraded' and 'make'")
        if self.kind != "denoise" and (self.degraded is None) == (self.make is None):
            found.append(f"is of kind {self.kind} and has 'degraded' and 'make' both or neither; keep one")
        if self.degraded is not None and self.photographs:
            found.append("pairs 'photographs' with a folder 'degraded'; write make: rain or haze instead")
        if self.make is not None and MAKES[self.make] != self.kind:
            found.append(f"makes {self.make}, which is of kind {MAKES[self.make]}, not {self.kind}; change one")
        if self.limit is not None and self.fraction is not None:
            found.append("has 'limit' and 'fraction'; keep one of them")
        for key, folder in (("clean", self.clean), ("degraded", self.degraded)):
            if folder is not None and folder.names.count("{id}") != 1:
                found.append(f"has {key}.names '{folder.names}'; it must hold {{id}} exactly once")
            if folder is not None and re.search(r"[{}]", re.sub(r"\{(id|any)\}", "", folder.names)):
                found.append(f"has {key}.names '{folder.names}'; known in braces are only {{id}} and {{any}}")
            if folder is not None and any(not g or g.startswith("/") or ".." in g for g in folder.include):
                found.append(f"has {key}.include {list(folder.include)}; globs lie below the folder")
        if self.clean is not None and "{any}" in self.clean.names:
            found.append(f"has clean.names '{self.clean.names}'; {{any}} may stand in degraded.names only")
        return found


class EvaluateSet(ImageSet):
    """A set to score on: whole images, or their centres."""

    centre_pixels: PositiveInt | None = None
    """Side of the centre to keep. Null: the whole image."""


class Recipe(Node):
    """Everything that decides the bytes of a folder of shards, beside the images themselves."""

    name: str = Field(min_length=1)
    seed: Annotated[int, Field(ge=0)] = 0
    tile_pixels: Annotated[int, Field(ge=8)] = 128
    """Side of the training tiles, which is also their stride; the last tile of a side ends at the border."""
    shard_megabytes: Annotated[float, Field(gt=0)] = 64
    """About the size of one tar, from the pixels' count; PNG's true size is known only afterwards."""
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

    def contradictions(self) -> list[str]:
        found = []
        seen: set[str] = set()
        if not self.train and not self.evaluate:
            found.append("train, evaluate: found no set in either; describe at least one")
        for role, one in self.sets():
            found += [f"{role}: the set '{one.set}' {complaint}" for complaint in one.contradictions()]
            name = f"{role}-{one.set}".lower()
            if name in seen:
                found.append(f"{role}: found two sets named '{one.set}'; give each its own name")
            seen.add(name)
        return found

    def content(self) -> dict[str, Any]:
        """The recipe without the places of its folders: what its fingerprint counts."""
        everywhere = {"clean": {"folder"}, "degraded": {"folder"}}
        return self.model_dump(
            mode="json", exclude={"train": {"__all__": everywhere}, "evaluate": {"__all__": everywhere}}
        )


def read(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe. Raises Fault that lists every unknown key, wrong value and contradiction."""
    return yaml_tree.read(Recipe, path, sets)


def expand(folder: str) -> Path:
    """The path a recipe's `folder` means: `${NAME}` replaced, `~` opened. Raises Fault for one not set."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        found = os.environ.get(name, "")
        if not found:
            raise Fault(
                f"the environment variable {name} is not set, and the folder '{folder}' needs it. "
                f"Say where the images are: export {name}=/path/to/the/images"
            )
        return found

    return Path(re.sub(r"\$\{(\w+)\}", value, folder)).expanduser()
