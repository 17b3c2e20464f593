"""Finds the files of a recipe, and pairs degraded with clean images, by file name and without reading pixels."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path

from mirl_dist.data.building.demo_photos import locate
from mirl_dist.data.building.recipe import ImageFolder, ImageSet, Recipe, Role, expand_folder
from mirl_dist.data.image_files import ENDINGS
from mirl_dist.data.manifest import Kind
from mirl_dist.errors import UserError

SHOWN, EXAMPLES = 20, 3


@dataclass(frozen=True)
class SourceImage:
    """One image or pair of a set. name: path of the degraded (or only) file relative to its folder."""

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
    """Why an image or pair cannot be used. Only `path` and `expected` contain paths of this machine."""

    label: str
    name: str
    path: str
    problem: str
    expected: str = ""

    def full(self) -> str:
        return f"{self.path}: {self.problem}" + (f" in {self.expected}" if self.expected else "")

    def portable(self) -> str:
        return f"{self.label}: {self.name}: {self.problem}"


def printable(path: str | Path) -> str:
    """Return a file name as valid text; bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def error_of(complaints: Sequence[str], heading: str, advice: str) -> UserError:
    """Return an error about many files that lists at most SHOWN of them, and the number of the others."""
    more = [f"and {len(complaints) - SHOWN} more"] if len(complaints) > SHOWN else []
    return UserError("\n".join([heading, *(f"  {c}" for c in [*complaints[:SHOWN], *more]), advice]))


def compile_template(names: str) -> re.Pattern[str]:
    """Compile a name template to a pattern. {id} is greedy, {any} is not; both match one or more characters but '/'."""
    parts = re.split(r"(\{first\}|\{id\}|\{any\})", names.replace("{id}", "{first}", 1))
    known = {"{first}": "(?P<id>[^/]+)", "{id}": "([^/]+)", "{any}": "[^/]+?"}
    return re.compile("".join(known.get(part, re.escape(part)) for part in parts))


def _list_files(folder: ImageFolder, *, is_counted: bool) -> dict[str, Path]:
    """Return a folder's images by relative path, sorted.

    Raises UserError if there are none, or none for one of its globs. is_counted: the set has `expect`, which notices a
    missing image; its globs may then be alternatives.
    """
    root = expand_folder(folder.folder)
    if not root.is_dir():
        near = next((p for p in root.parents if p.is_dir()), Path("."))
        raise UserError(
            f"no folder at {printable(root)} (the nearest that exists is {printable(near)}). "
            f"Put the images there, or correct '{folder.folder}' in the recipe."
        )
    images: dict[str, Path] = {}
    for glob in folder.include:
        is_matched = False
        for path in root.glob(glob):
            name = path.relative_to(root).as_posix()
            is_hidden = any(part.startswith(".") for part in Path(name).parts)
            is_excluded = any(fnmatchcase(name, pattern) for pattern in folder.exclude)
            if path.suffix.lower() in ENDINGS and not is_hidden and not is_excluded and not path.is_dir():
                images[name] = path
                is_matched = True
        if not is_matched and not is_counted:
            raise UserError(
                f"no image in {printable(root)} fits '{glob}'. Put images there ({', '.join(ENDINGS)}), or correct "
                "'include' in the recipe ('**/*' looks at all depths; linked folders must be named)."
            )
    if not images:
        raise UserError(
            f"no image in {printable(root)} fits {', '.join(folder.include)}. Put images there "
            f"({', '.join(ENDINGS)}), or correct 'include' ('**/*' looks at all depths) in the recipe."
        )
    return dict(sorted(images.items()))


def find_unused(recipe: Recipe, used: Collection[Path]) -> list[str]:
    """Return a line for each image folder of a recipe that holds files which no set uses: how many, by reason."""
    folders = [f for _, one in recipe.sets() for f in (one.clean, one.degraded) if f is not None]
    parents = {parent for path in used for parent in path.parents}
    lines = []
    for root in sorted({expand_folder(folder.folder) for folder in folders}):
        reasons: Counter[str] = Counter()
        for at, names, files in os.walk(root):
            names[:] = [name for name in names if not name.startswith(".")]
            links = [Path(at, name) for name in names if Path(at, name).is_symlink()]
            reasons["linked folders, which ** does not enter"] += sum(link not in parents for link in links)
            reasons.update(_why_unused(name) for name in files if Path(at, name) not in used)
        texts = [f"{count:,} {reason}" for reason, count in reasons.most_common() if count]
        if texts:
            lines.append(f"not used in {printable(root)}: {', '.join(texts)}")
    return lines


def _why_unused(name: str) -> str:
    if name.startswith("."):
        return "hidden files"
    ending = Path(name).suffix.lower()
    if ending not in ENDINGS:
        return f"files of the ending '{printable(ending)}'"
    return "images that no 'include' names or that 'exclude' names"


def _group_by_id(
    folder: ImageFolder, label: str, *, is_counted: bool
) -> tuple[dict[str, list[tuple[str, Path]]], list[ImageProblem]]:
    """Group the files of a folder by the {id} in their names; also return complaints about names that do not match."""
    pattern, whole = compile_template(folder.names), "/" in folder.names
    by_id: dict[str, list[tuple[str, Path]]] = {}
    complaints = []
    for name, path in _list_files(folder, is_counted=is_counted).items():
        match = pattern.fullmatch(name.removesuffix(path.suffix) if whole else path.stem)
        if match is None:
            problem = f"its name does not fit '{folder.names}'"
            complaints.append(ImageProblem(label, printable(name), printable(path), problem))
        else:
            # One name may be spelt in two forms of Unicode by the programs that made the two sides.
            by_id.setdefault(unicodedata.normalize("NFC", "/".join(match.groups())), []).append((name, path))
    return by_id, complaints


def _pair_images(
    role: Role, image_set: ImageSet, degraded: ImageFolder, clean: ImageFolder
) -> tuple[list[SourceImage], list[ImageProblem]]:
    label = f"{role} {image_set.set}"
    is_counted = image_set.expect is not None
    clean_by_id, complaints = _group_by_id(clean, label, is_counted=is_counted)
    degraded_by_id, more = _group_by_id(degraded, label, is_counted=is_counted)
    complaints += more

    def complain(name: str, path: Path, problem: str, expected: str) -> None:
        complaints.append(ImageProblem(label, printable(name), printable(path), problem, expected))

    pictures = []
    for identity, named in degraded_by_id.items():
        partners = clean_by_id.get(identity, [])
        for name, path in named:
            if len(partners) == 1:
                pictures.append(SourceImage(role, image_set.set, image_set.kind, name, partners[0][1], path))
            elif not partners:
                wanted = clean.names
                for part in printable(identity).split("/"):
                    wanted = wanted.replace("{id}", part, 1)
                complain(name, path, f"no clean partner '{wanted}'", clean.folder)
            else:
                several = ", ".join(printable(n) for n, _ in partners)
                complain(name, path, f"several clean partners, {several},", clean.folder)
    if not image_set.unused_clean:
        for identity in clean_by_id.keys() - degraded_by_id.keys():
            for name, path in clean_by_id[identity]:
                complain(name, path, f"no degraded partner of id '{printable(identity)}'", degraded.folder)
    return sorted(pictures, key=lambda p: p.name), complaints


def _find_set_images(role: Role, one: ImageSet) -> tuple[list[SourceImage], list[ImageProblem]]:
    """Return all images or pairs of one set, sorted by name, and complaints."""
    if one.clean is not None and one.degraded is not None:
        return _pair_images(role, one, one.degraded, one.clean)
    complaints: list[ImageProblem] = []
    images = [(path.name, path, disparity) for path, disparity in map(locate, one.photographs)]
    if one.clean is not None:
        by_id, complaints = _group_by_id(one.clean, f"{role} {one.set}", is_counted=one.expect is not None)
        images = sorted((name, path, None) for files in by_id.values() for name, path in files)
    made = one.make, one.versions
    return [
        SourceImage(role, one.set, one.kind, name, path, None, *made, depth) for name, path, depth in images
    ], complaints


def count_kept(fraction: float, count: int) -> int:
    """Return the nearest integer to fraction * count, halves up, at least 1."""
    exact = Fraction(str(fraction)) * count  # the decimal that the user wrote, without float rounding
    return max(1, int(exact + Fraction(1, 2)))


def _draw_sample(pictures: list[SourceImage], image_set: ImageSet, seed: int) -> list[SourceImage]:
    """Draw the subset for `limit` or `fraction`, independent of the order of files; the result is sorted by name."""
    keep = image_set.limit if image_set.limit is not None else len(pictures)
    if image_set.fraction is not None:
        keep = count_kept(image_set.fraction, len(pictures))
    draw_seed = seed if image_set.draw_seed is None else image_set.draw_seed

    def sort_key(picture: SourceImage) -> bytes:
        return hashlib.sha256(f"{draw_seed}/{image_set.set}/{printable(picture.name)}".encode()).digest()

    chosen = set(sorted(pictures, key=sort_key)[:keep])
    return [p for p in pictures if p in chosen]


def _describe_miscount(image_set: ImageSet, count: int, uncounted: Sequence[ImageProblem]) -> str:
    """Return the message for a set whose size is not the expected one."""
    folders = filter(None, (image_set.degraded, image_set.clean))
    places = [f"{expand_folder(f.folder)} ({', '.join(f.include)})" for f in folders]
    what = "images" if image_set.degraded is None else "pairs"
    sources = " and ".join(map(printable, places)) or "scikit-image"
    text = f"found {count:,} {what}, expected {image_set.expect:,}, in {sources}."
    if uncounted:
        more = f"; and {len(uncounted) - EXAMPLES:,} more" if len(uncounted) > EXAMPLES else ""
        text += f" Not counted: {'; '.join(f'{c.name}: {c.problem}' for c in uncounted[:EXAMPLES])}{more}."
    return f"{text} Complete the set, or correct 'expect' in the recipe."


def find_images(recipe: Recipe) -> tuple[list[SourceImage], list[ImageProblem]]:
    """Return every image or pair of a recipe, set by set, and complaints about files that do not fit.

    Raises UserError naming all missing or empty folders, unset variables, and sets of another size than expected, each
    with the recipe's note on where to get the set.
    """
    pictures: list[SourceImage] = []
    complaints: list[ImageProblem] = []
    incomplete: list[str] = []
    for role, image_set in recipe.sets():
        try:
            images, uncounted = _find_set_images(role, image_set)
            if image_set.expect is not None and len(images) != image_set.expect:
                raise UserError(_describe_miscount(image_set, len(images), uncounted))
        except UserError as fault:
            origin = f"\n  available from: {image_set.get}" if image_set.get else ""
            incomplete.append(f"the set '{image_set.set}' ({role}): {fault}{origin}")
            continue
        pictures += _draw_sample(images, image_set, recipe.seed)
        complaints += uncounted
    if incomplete:
        raise UserError("\n".join(incomplete))
    return pictures, sorted(complaints, key=lambda c: (c.label, c.name))
