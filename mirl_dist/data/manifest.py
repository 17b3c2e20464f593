"""The manifest of a folder of shards, `manifest.json`, and one index for every tar.

    <shards>/manifest.json                 written last; shards without a manifest are ignored
    <shards>/train-<set>-00000.tar         samples as `key.clean.ppm`, `key.degraded.ppm`, `key.json`
    <shards>/train-<set>-00000.index.json  offset, size and SHA-256 of every member of every sample

A sample is one whole image or pair. Its images are PNG, or binary PPM: raw pixels, of which a crop can be read alone.
Because members are addressed by index, a damaged tar header cannot hide the rest of a shard.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mirl_dist.config.canonical_json import to_json
from mirl_dist.errors import UserError

FORMAT = "mirl-dist-shards-2"
MANIFEST = "manifest.json"
Kind = Literal["clean", "derain", "dehaze", "desnow", "deraindrop", "deblur", "enlighten"]
"""Kind of samples: clean images, which are degraded on reading, or pairs, named after the task that restores them."""
ImageFormat = Literal["ppm", "png"]
CLEAN, DEGRADED, NOTES = "clean", "degraded", "json"
REBUILD = "Copy it again, or build the shards again."

# Names become file names in caches and wherever a tar is unpacked, so they must not allow path traversal.
SAFE_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_Key = Annotated[str, Field(pattern=f"^{SAFE_KEY.pattern}$")]
_ShardName = Annotated[str, Field(pattern=rf"^{SAFE_KEY.pattern}\.tar$")]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, strict=True)]
_Pixels = Annotated[int, Field(ge=1, strict=True)]
_Member = Literal["clean.ppm", "clean.png", "degraded.ppm", "degraded.png", "json"]
MEMBERS: tuple[str, ...] = get_args(_Member)


def ppm_header(height: int, width: int) -> bytes:
    """Return the header of a binary PPM file of that size, which raw RGB pixels follow."""
    return b"P6\n%d %d\n255\n" % (width, height)


class _ManifestPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_ManifestPart):
    """One tar member: offset of its data in the tar, size in bytes, and hex SHA-256."""

    offset: _Count
    size: _Count
    sha256: _Digest


class StoredImage(NamedTuple):
    """An image inside a shard: format, byte offset, size in bytes, and hex SHA-256."""

    format: ImageFormat
    offset: int
    size: int
    sha256: str


class SampleEntry(_ManifestPart):
    """One sample: its key (unique in the manifest), image height and width in pixels, and its parts.

    parts: keyed by member name without the key: 'clean.ppm', 'degraded.ppm' (pairs only), 'json'.
    """

    key: _Key
    height: _Pixels
    width: _Pixels
    parts: dict[_Member, Part]

    def image(self, which: str) -> StoredImage | None:
        """Return the CLEAN or DEGRADED image; None if the sample does not have it."""
        for name, part in self.parts.items():
            if name in (f"{which}.ppm", f"{which}.png"):
                return StoredImage("ppm" if name.endswith("ppm") else "png", part.offset, part.size, part.sha256)
        return None


class Index(_ManifestPart):
    """The samples of one shard, in tar order."""

    entries: tuple[SampleEntry, ...]


class Shard(_ManifestPart):
    """One tar file. Digests are the hex SHA-256 of the tar and of its index file.

    kind: of its samples. samples: their number. least_pixels: the shortest side of any of its images.
    """

    name: _ShardName
    role: Literal["train", "evaluate"]
    set: _Key
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
    """All shards of one build. recipe: fingerprint of the recipe and of every source file."""

    format: Literal["mirl-dist-shards-2"] = "mirl-dist-shards-2"
    name: str
    recipe: str
    skipped: tuple[str, ...] = ()
    shards: tuple[Shard, ...]

    def role(self, role: str) -> tuple[Shard, ...]:
        return tuple(s for s in self.shards if s.role == role)

    def dump(self) -> bytes:
        return to_json(self.model_dump())

    def digest(self) -> str:
        """Return the hex SHA-256 of the manifest; it identifies all data through the digests in the manifest."""
        return hashlib.sha256(self.dump()).hexdigest()


_Read = TypeVar("_Read", bound=_ManifestPart)


def parse(cls: type[_Read], data: bytes, source: str, what: str) -> _Read:
    """Parse JSON as one of the classes above. Raises UserError naming the first invalid field."""
    try:
        return cls.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = f"{place}: {first['msg']}" if place else first["msg"]
        raise UserError(f"{source} is not {what} ({message}). {REBUILD}") from None


def read_manifest(data: bytes, source: str) -> Manifest:
    """Parse a manifest. Raises UserError for another format, an invalid manifest and duplicate shard names."""
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
    """Parse a shard's index and check it against the manifest. Raises UserError if they do not match."""
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
    """Yield the contradictions between an index and its shard."""
    if len(index.entries) != shard.samples:
        yield f"lists {len(index.entries)} samples, the manifest {shard.samples}"
    wanted = {CLEAN} if shard.kind == "clean" else {CLEAN, DEGRADED}
    keys: set[str] = set()
    extents: list[tuple[int, int, str]] = []
    for entry in index.entries:
        if entry.key in keys:
            yield f"the key {entry.key} appears there twice"
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
