"""Which files a recipe means, and which clean image belongs to which degraded one: names only, no pixels."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path

from mirl_dist.data.building.demo_photos import locate
from mirl_dist.data.building.recipe import ImageFolder, ImageSet, Recipe, Role, expand
from mirl_dist.data.manifest import Kind
from mirl_dist.errors import UserError

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SHOWN, EXAMPLES = 20, 3


@dataclass(frozen=True)
class SourceImage:
    """One image or pair of one set. `name` is the degraded (else the clean) file's path below its folder."""

    role: Role
    set: str
    kind: Kind
    name: str
    clean: Path
    degraded: Path | None = None
    make: str | None = None
    versions: int = 1
    disparity: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.clean,) if self.degraded is None else (self.clean, self.degraded)

    @property
    def label(self) -> str:
        return f"{self.role} {self.set}"


@dataclass(frozen=True)
class ImageProblem:
    """Why something cannot be used. `where` and `sought` name this machine's folders, the rest does not."""

    label: str
    name: str
    where: str
    problem: str
    expected: str = ""

    def full(self) -> str:
        return f"{self.where}: {self.problem}" + (f" in {self.expected}" if self.expected else "")

    def portable(self) -> str:
        return f"{self.label}: {self.name}: {self.problem}"


def printable(path: str | Path) -> str:
    """A file name as valid text, whatever bytes it has on disk."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def listing(complaints: Sequence[str], heading: str, advice: str) -> str:
    """The text of a UserError about many files: at most SHOWN of them, and how many more."""
    more = [f"and {len(complaints) - SHOWN} more"] if len(complaints) > SHOWN else []
    return "\n".join([heading, *(f"  {c}" for c in [*complaints[:SHOWN], *more]), advice])


def template(names: str) -> re.Pattern[str]:
    """The pattern of a name template. {id} takes as much as it can, {any} at least one character, neither a /."""
    parts = re.split(r"(\{first\}|\{id\}|\{any\})", names.replace("{id}", "{first}", 1))
    known = {"{first}": "(?P<id>[^/]+)", "{id}": "([^/]+)", "{any}": "[^/]+?"}
    return re.compile("".join(known.get(part, re.escape(part)) for part in parts))


def _filled(names: str, identity: str) -> str:
    """The name that a template makes of an identity."""
    for part in identity.split("/"):
        names = names.replace("{id}", part, 1)
    return names


def files(folder: ImageFolder) -> tuple[Path, dict[str, Path]]:
    """The folder's path, and its images by their path below it, in order. Raises UserError where none is."""
    root = expand(folder.folder)
    if not root.is_dir():
        near = next((p for p in root.parents if p.is_dir()), Path("."))
        raise UserError(
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
        raise UserError(
            f"no image in {printable(root)} fits {', '.join(folder.include)}. Put images there "
            f"({', '.join(ENDINGS)}), or correct 'include' ('**/*' looks at all depths) in the recipe."
        )
    return root, dict(sorted(found.items()))


def _identify(folder: ImageFolder, label: str) -> tuple[dict[str, list[tuple[str, Path]]], list[ImageProblem]]:
    """The folder's files by the {id} in their names, and complaints about names without any."""
    pattern, whole = template(folder.names), "/" in folder.names
    by_id: dict[str, list[tuple[str, Path]]] = {}
    complaints = []
    for name, path in files(folder)[1].items():
        match = pattern.fullmatch(name.removesuffix(path.suffix) if whole else path.stem)
        if match is None:
            problem = f"its name does not fit '{folder.names}'"
            complaints.append(ImageProblem(label, printable(name), printable(path), problem))
        else:
            by_id.setdefault("/".join(match.groups()), []).append((name, path))
    return by_id, complaints


def _pairs(
    role: Role, one: ImageSet, degraded: ImageFolder, clean: ImageFolder
) -> tuple[list[SourceImage], list[ImageProblem]]:
    label = f"{role} {one.set}"
    partners, complaints = _identify(clean, label)
    seekers, more = _identify(degraded, label)
    complaints += more

    def complain(name: str, path: Path, problem: str, sought: str) -> None:
        complaints.append(ImageProblem(label, printable(name), printable(path), problem, sought))

    pictures = []
    for identity, held in seekers.items():
        found = partners.get(identity, [])
        for name, path in held:
            wanted = _filled(clean.names, printable(identity))
            if len(found) == 1:
                pictures.append(SourceImage(role, one.set, one.kind, name, found[0][1], path))
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


def _pictures(role: Role, one: ImageSet) -> tuple[list[SourceImage], list[ImageProblem]]:
    """All images or pairs of one set, in the order of their names."""
    if one.photographs:
        made = []
        for photograph in one.photographs:
            path, disparity = locate(photograph)
            picture = SourceImage(role, one.set, one.kind, path.name, path, None, one.make, one.versions, disparity)
            made.append(picture)
        return made, []
    assert one.clean is not None
    if one.degraded is not None:
        return _pairs(role, one, one.degraded, one.clean)
    by_id, complaints = _identify(one.clean, f"{role} {one.set}")
    named = sorted((name, path) for held in by_id.values() for name, path in held)
    return [SourceImage(role, one.set, one.kind, n, p, None, one.make, one.versions) for n, p in named], complaints


def share(fraction: float, count: int) -> int:
    """How many of `count` a fraction keeps: the nearest whole number, halves up, at least one."""
    exact = Fraction(str(fraction)) * count  # 0.05 means one twentieth here, not the float beside it
    return max(1, int(exact + Fraction(1, 2)))


def _some(pictures: list[SourceImage], one: ImageSet, seed: int) -> list[SourceImage]:
    """The share that `limit` or `fraction` keeps, whatever order the files came in, in the order of names."""
    keep = one.limit if one.limit is not None else len(pictures)
    if one.fraction is not None:
        keep = share(one.fraction, len(pictures))
    drawn_by = seed if one.draw_seed is None else one.draw_seed

    def lot(picture: SourceImage) -> bytes:
        return hashlib.sha256(f"{drawn_by}/{one.set}/{printable(picture.name)}".encode()).digest()

    chosen = set(sorted(pictures, key=lot)[:keep])
    return [p for p in pictures if p in chosen]


def _miscount(one: ImageSet, found: int, against: Sequence[ImageProblem]) -> str:
    """What is said about a set of another size than its official one."""
    places = [f"{expand(f.folder)} ({', '.join(f.include)})" for f in (one.degraded, one.clean) if f is not None]
    what = "images" if one.degraded is None else "pairs"
    where = " and ".join(map(printable, places)) or "scikit-image"
    text = f"found {found:,} {what}, expected {one.expect:,}, in {where}."
    if against:
        more = f"; and {len(against) - EXAMPLES:,} more" if len(against) > EXAMPLES else ""
        text += f" Not counted: {'; '.join(f'{c.name}: {c.problem}' for c in against[:EXAMPLES])}{more}."
    return f"{text} Complete the set, or correct 'expect' in the recipe."


def find_images(recipe: Recipe) -> tuple[list[SourceImage], list[ImageProblem]]:
    """Every image or pair that a recipe means, set by set, and everything that does not fit.

    Raises UserError that names all folders which are missing or hold no image, all unset variables, and all sets which
    hold another number than expected, each with the recipe's words on where the set can be had.
    """
    pictures: list[SourceImage] = []
    complaints: list[ImageProblem] = []
    incomplete: list[str] = []
    for role, one in recipe.sets():
        try:
            found, against = _pictures(role, one)
            if one.expect is not None and len(found) != one.expect:
                raise UserError(_miscount(one, len(found), against))
        except UserError as fault:
            where = f"\n  where it can be had: {one.get}" if one.get else ""
            incomplete.append(f"the set '{one.set}' ({role}): {fault}{where}")
            continue
        pictures += _some(found, one, recipe.seed)
        complaints += against
    if incomplete:
        raise UserError("\n".join(incomplete))
    return pictures, sorted(complaints, key=lambda c: (c.label, c.name))
