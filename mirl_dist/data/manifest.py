"""The manifest of a folder of shards, `manifest.json`, and one index for every tar.

    <shards>/manifest.json                 written last: shards without it do not exist
    <shards>/train-<set>-00000.tar         samples as `key.clean.ppm`, `key.degraded.ppm`, `key.json`
    <shards>/train-<set>-00000.index.json  where every member of every sample lies, and its SHA-256

A sample is one whole image or pair. Its images are binary PPM (raw pixels: a crop is read without the rest) or PNG.
Addressing by index means that a damaged tar header can never hide the rest of a shard.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mirl_dist.config.canonical_json import to_json
from mirl_dist.errors import UserError

FORMAT = "mirl-dist-shards-2"
MANIFEST = "manifest.json"
Kind = Literal["clean", "derain", "dehaze", "desnow", "deraindrop", "deblur", "enlighten"]
"""What samples are for: clean images alone, which are degraded on reading, or pairs, by the task that undoes them."""
ImageFormat = Literal["ppm", "png"]
CLEAN, DEGRADED, NOTES = "clean", "degraded", "json"
REBUILD = "Copy it again, or build the shards again."

# Names become file names in caches and in folders where tars are unpacked: nothing in them may lead elsewhere.
SAFE_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_Key = Annotated[str, Field(pattern=f"^{SAFE_KEY.pattern}$")]
_ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*\.tar$")]
_SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, strict=True)]
_Pixels = Annotated[int, Field(ge=1, strict=True)]
_Member = Literal["clean.ppm", "clean.png", "degraded.ppm", "degraded.png", "json"]
MEMBERS: tuple[str, ...] = get_args(_Member)


def ppm_header(height: int, width: int) -> bytes:
    """Make what comes before the raw RGB pixels of a binary PPM file of that size."""
    return b"P6\n%d %d\n255\n" % (width, height)


class _ManifestPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_ManifestPart):
    """One tar member: `offset` of its first data byte in the tar, `size` in bytes, hex SHA-256 of its bytes."""

    offset: _Count
    size: _Count
    sha256: _Digest


class SampleEntry(_ManifestPart):
    """One sample: its key (unique in the whole manifest), image height and width in pixels, and its parts.

    parts: by member name without the key: 'clean.ppm', 'degraded.ppm' (pairs only), 'json'.
    """

    key: _Key
    height: _Pixels
    width: _Pixels
    parts: dict[_Member, Part]

    def image(self, which: str) -> tuple[ImageFormat, Part] | None:
        """Format and place of the image CLEAN or DEGRADED; None where the sample has none."""
        for name, part in self.parts.items():
            stem, _, form = name.partition(".")
            if stem == which and form:
                return ("ppm" if form == "ppm" else "png"), part
        return None


class Index(_ManifestPart):
    """The samples of one shard in the order in which they lie in the tar."""

    entries: tuple[SampleEntry, ...]


class Shard(_ManifestPart):
    """One tar: `kind` says what its samples are for, `samples` how many, digests are hex SHA-256 of whole files.

    least_pixels: the shortest side of any of its images.
    """

    name: _ShardName
    role: Literal["train", "evaluate"]
    set: _SetName
    kind: Kind
    samples: Annotated[int, Field(ge=1, strict=True)]
    least_pixels: _Pixels
    bytes: _Count
    sha256: _Digest
    index_sha256: _Digest

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".index.json"


class Manifest(_ManifestPart):
    """All shards of one build. `recipe` is the fingerprint of the recipe and of every source file it read."""

    format: Literal["mirl-dist-shards-2"] = "mirl-dist-shards-2"
    name: str
    recipe: str
    skipped: tuple[str, ...] = ()
    shards: tuple[Shard, ...]

    def role(self, role: str) -> tuple[Shard, ...]:
        return tuple(s for s in self.shards if s.role == role)

    def samples(self, role: str) -> dict[str, int]:
        """Count the samples per kind in one role."""
        counts: Counter[str] = Counter()
        for shard in self.role(role):
            counts[shard.kind] += shard.samples
        return dict(counts)

    def dump(self) -> bytes:
        return to_json(self.model_dump())

    def digest(self) -> str:
        """Hex SHA-256 of the manifest: with the digests inside it, the identity of all the data."""
        return hashlib.sha256(self.dump()).hexdigest()


_Read = TypeVar("_Read", bound=_ManifestPart)


def parse(cls: type[_Read], data: bytes, source: str, what: str) -> _Read:
    """Parse a record of one of the classes above from JSON. Raises UserError that names the first wrong place."""
    try:
        return cls.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = f"{place}: {first['msg']}" if place else first["msg"]
        raise UserError(f"{source} is not {what} ({message}). {REBUILD}") from None


def read_manifest(data: bytes, source: str) -> Manifest:
    """Parse a manifest. Raises UserError for another format, a file that is no manifest, and names given twice."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not a manifest of shards ({str(error)[:120]}). {REBUILD}") from None
    version = raw.get("format") if isinstance(raw, dict) else None
    if version != FORMAT:
        raise UserError(f"{source} says format {version!r:.40}; this version reads '{FORMAT}'. Build the shards again.")
    manifest = parse(Manifest, data, source, "a manifest of shards")
    twice = [name for name, n in Counter(s.name for s in manifest.shards).items() if n > 1]
    if twice:
        raise UserError(f"{source} names the shard {twice[0]} twice. {REBUILD}")
    return manifest


def read_index(data: bytes, shard: Shard, source: str) -> Index:
    """Parse one shard's index and hold it against the manifest. Raises UserError where they do not fit."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.index_sha256:
        raise UserError(
            f"{source} has SHA-256 {digest[:12]}, the manifest says {shard.index_sha256[:12]}: "
            f"the index belongs to another build or is damaged. {REBUILD}"
        )
    index = parse(Index, data, source, "an index of a shard")
    for problem in _find_mismatches(index, shard):
        raise UserError(f"{source}: {problem}. {REBUILD}")
    return index


def _find_mismatches(index: Index, shard: Shard) -> Iterator[str]:
    """Find what in an index cannot be true of its shard."""
    if len(index.entries) != shard.samples:
        yield f"lists {len(index.entries)} samples, the manifest {shard.samples}"
    wanted = {CLEAN} if shard.kind == "clean" else {CLEAN, DEGRADED}
    keys: set[str] = set()
    extents: list[tuple[int, int, str]] = []
    for entry in index.entries:
        if entry.key in keys:
            yield f"the key {entry.key} stands there twice"
        keys.add(entry.key)
        images = [name.partition(".")[0] for name in entry.parts if name != NOTES]
        if sorted(images) != sorted(wanted) or NOTES not in entry.parts:
            yield f"{entry.key} holds {', '.join(sorted(entry.parts)) or 'nothing'}; not what {shard.kind} samples hold"
        raw = len(ppm_header(entry.height, entry.width)) + 3 * entry.height * entry.width
        for name, part in entry.parts.items():
            extents.append((part.offset, part.offset + part.size, f"{entry.key}.{name}"))
            if name.endswith("ppm") and part.size != raw:
                yield f"{entry.key}.{name} has {part.size} bytes, but {entry.width}x{entry.height} pixels take {raw}"
        if min(entry.height, entry.width) < shard.least_pixels:
            size = f"{entry.width}x{entry.height}"
            yield f"{entry.key} is {size}, but the manifest says that no side is below {shard.least_pixels} pixels"
    before, last = 0, "the beginning"
    for start, end, member in sorted(extents):
        if end > shard.bytes:
            yield f"{member} ends at byte {end}, but the shard has {shard.bytes}"
        if start < before:
            yield f"{member} begins at byte {start}, inside {last}"
        before, last = end, member
