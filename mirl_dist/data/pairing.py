"""Which files a recipe means, and which clean image belongs to which degraded one: names only, no pixels."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mirl_dist.data.photographs import locate
from mirl_dist.data.recipe import Folder, ImageSet, Kind, Recipe, Role, expand
from mirl_dist.faults import Fault

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SHOWN = 20


@dataclass(frozen=True)
class Picture:
    """One image or pair of one set. `name` is the degraded (else the clean) file's path below its folder."""

    role: Role
    set: str
    kind: Kind
    name: str
    clean: Path
    degraded: Path | None = None
    make: str | None = None
    disparity: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.clean,) if self.degraded is None else (self.clean, self.degraded)

    @property
    def label(self) -> str:
        return f"{self.role} {self.set}"


@dataclass(frozen=True)
class Complaint:
    """Why something cannot be used. `where` and `sought` name this machine's folders, the rest does not."""

    label: str
    name: str
    where: str
    problem: str
    sought: str = ""

    def full(self) -> str:
        return f"{self.where}: {self.problem}" + (f" in {self.sought}" if self.sought else "")

    def portable(self) -> str:
        return f"{self.label}: {self.name}: {self.problem}"


def printable(path: str | Path) -> str:
    """A file name as valid text, whatever bytes it has on disk."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def listing(complaints: Sequence[str], heading: str, advice: str) -> str:
    """The text of a Fault about many files: at most SHOWN of them, and how many more."""
    more = [f"and {len(complaints) - SHOWN} more"] if len(complaints) > SHOWN else []
    return "\n".join([heading, *(f"  {c}" for c in [*complaints[:SHOWN], *more]), advice])


def template(names: str) -> re.Pattern[str]:
    """The pattern of a name template. {id} takes as much as it can, {any} at least one character."""
    parts = re.split(r"(\{id\}|\{any\})", names)
    known = {"{id}": "(?P<id>.+)", "{any}": ".+?"}
    return re.compile("".join(known.get(part, re.escape(part)) for part in parts), re.DOTALL)


def files(folder: Folder) -> tuple[Path, dict[str, Path]]:
    """The folder's path, and its images by their path below it, in order. Raises Fault where none is."""
    root = expand(folder.folder)
    if not root.is_dir():
        near = next((p for p in root.parents if p.is_dir()), Path("."))
        raise Fault(
            f"no folder at {printable(root)} (the nearest that exists is {printable(near)}). "
            f"Put the images there, or correct '{folder.folder}' in the recipe."
        )
    found: dict[str, Path] = {}
    for glob in folder.include:
        for path in root.glob(glob):
            name = path.relative_to(root).as_posix()
            hidden = any(part.startswith(".") for part in Path(name).parts)
            left_out = any(fnmatchcase(name, pattern) for pattern in folder.exclude)
            if path.suffix.lower() in ENDINGS and not hidden and not left_out and not path.is_dir():
                found[name] = path
    if not found:
        raise Fault(
            f"no image in {printable(root)} fits {', '.join(folder.include)}. Put images there "
            f"({', '.join(ENDINGS)}), or correct 'include' ('**/*' looks at all depths) in the recipe."
        )
    return root, dict(sorted(found.items()))


def _identify(folder: Folder, label: str) -> tuple[dict[str, list[tuple[str, Path]]], list[Complaint]]:
    """The folder's files by the {id} in their names, and complaints about names without any."""
    pattern = template(folder.names)
    by_id: dict[str, list[tuple[str, Path]]] = {}
    complaints = []
    for name, path in files(folder)[1].items():
        match = pattern.fullmatch(path.stem)
        if match is None:
            problem = f"its name does not fit '{folder.names}'"
            complaints.append(Complaint(label, printable(name), printable(path), problem))
        else:
            by_id.setdefault(match.group("id"), []).append((name, path))
    return by_id, complaints


def _pairs(role: Role, one: ImageSet, degraded: Folder, clean: Folder) -> tuple[list[Picture], list[Complaint]]:
    label = f"{role} {one.set}"
    partners, complaints = _identify(clean, label)
    seekers, more = _identify(degraded, label)
    complaints += more

    def complain(name: str, path: Path, problem: str, sought: str) -> None:
        complaints.append(Complaint(label, printable(name), printable(path), problem, sought))

    pictures = []
    for identity, held in seekers.items():
        found = partners.get(identity, [])
        for name, path in held:
            wanted = clean.names.replace("{id}", printable(identity))
            if len(found) == 1:
                pictures.append(Picture(role, one.set, one.kind, name, found[0][1], path))
            elif not found:
                complain(name, path, f"no clean partner '{wanted}'", clean.folder)
            else:
                several = ", ".join(printable(n) for n, _ in found)
                complain(name, path, f"several clean partners, {several},", clean.folder)
    if not one.unused_clean:
        for identity in partners.keys() - seekers.keys():
            for name, path in partners[identity]:
                complain(name, path, f"no degraded partner of id '{printable(identity)}'", degraded.folder)
    return sorted(pictures, key=lambda p: p.name), complaints


def _pictures(role: Role, one: ImageSet) -> tuple[list[Picture], list[Complaint]]:
    """All images or pairs of one set, in the order of their names."""
    if one.photographs:
        made = []
        for photograph in one.photographs:
            path, disparity = locate(photograph)
            picture = Picture(role, one.set, one.kind, path.name, path, None, one.make, disparity)
            made.append(picture)
        return made, []
    assert one.clean is not None
    if one.degraded is not None:
        return _pairs(role, one, one.degraded, one.clean)
    by_id, complaints = _identify(one.clean, f"{role} {one.set}")
    named = sorted((name, path) for held in by_id.values() for name, path in held)
    return [Picture(role, one.set, one.kind, n, p, None, one.make) for n, p in named], complaints


def _some(pictures: list[Picture], one: ImageSet, seed: int) -> list[Picture]:
    """The share that `limit` or `fraction` keeps, whatever order the files came in, in the order of names."""
    keep = one.limit if one.limit is not None else len(pictures)
    if one.fraction is not None:
        keep = max(1, round(one.fraction * len(pictures)))

    def lot(picture: Picture) -> bytes:
        return hashlib.sha256(f"{seed}/{one.set}/{printable(picture.name)}".encode()).digest()

    chosen = set(sorted(pictures, key=lot)[:keep])
    return [p for p in pictures if p in chosen]


def find(recipe: Recipe) -> tuple[list[Picture], list[Complaint]]:
    """Every image or pair that a recipe means, set by set, and everything that does not fit.

    Raises Fault that names all folders which are missing or hold no image, and all unset variables.
    """
    pictures: list[Picture] = []
    complaints: list[Complaint] = []
    missing: list[str] = []
    for role, one in recipe.sets():
        label = f"{role} {one.set}"
        try:
            found, against = _pictures(role, one)
        except Fault as fault:
            missing.append(f"the set '{one.set}' ({role}): {fault}")
            continue
        if one.expect is not None and len(found) != one.expect:
            problem = f"found {len(found)} usable images or pairs, the recipe expects {one.expect}"
            against.append(Complaint(label, "count", f"the set '{one.set}' ({role})", problem))
        pictures += _some(found, one, recipe.seed)
        complaints += against
    if missing:
        unique = list(dict.fromkeys(missing))
        raise Fault("\n".join(unique))
    return pictures, sorted(complaints, key=lambda c: (c.label, c.name))
