"""What a folder of shards says of itself: `manifest.json`, and one index beside every tar.

    <shards>/manifest.json                 written last: shards without it do not exist
    <shards>/train-<set>-00000.tar         samples as `key.clean.ppm`, `key.degraded.ppm`, `key.json`
    <shards>/train-<set>-00000.index.json  where every member of every sample lies, and its SHA-256

A sample is one whole image or pair. Its images are binary PPM (raw pixels: a crop is read without the rest) or PNG.
Addressing by index means that a damaged tar header can never hide the rest of a shard.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mirl_dist.faults import Fault

FORMAT = "mirl-dist-shards-2"
MANIFEST = "manifest.json"
Kind = Literal["clean", "derain", "dehaze", "desnow", "deraindrop", "deblur", "enlighten"]
"""What samples are for: clean images alone, which are degraded on reading, or pairs, by the task that undoes them."""
ImageFormat = Literal["ppm", "png"]
CLEAN, DEGRADED, NOTES = "clean", "degraded", "json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Record):
    """One tar member: `offset` of its first data byte in the tar, `size` in bytes, hex SHA-256 of its bytes."""

    offset: int
    size: int
    sha256: str


class Entry(_Record):
    """One sample: its key (unique in the whole manifest), image height and width in pixels, and its parts.

    parts: by member name without the key: 'clean.ppm', 'degraded.ppm' (pairs only), 'json'.
    """

    key: str
    height: int
    width: int
    parts: dict[str, Part]

    def image(self, which: str) -> tuple[ImageFormat, Part] | None:
        """Format and place of the image CLEAN or DEGRADED; None where the sample has none."""
        for form in get_args(ImageFormat):
            if f"{which}.{form}" in self.parts:
                return form, self.parts[f"{which}.{form}"]
        return None


class Index(_Record):
    """The samples of one shard in the order in which they lie in the tar."""

    entries: tuple[Entry, ...]


class Shard(_Record):
    """One tar: `kind` says what its samples are for, `samples` how many, digests are hex SHA-256 of whole files.

    least_pixels: the shortest side of any of its images.
    """

    name: str
    role: Literal["train", "evaluate"]
    set: str
    kind: Kind
    samples: int
    least_pixels: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".index.json"


class Manifest(_Record):
    """All shards of one build. `recipe` is the fingerprint of the recipe and of every source file it read."""

    format: Literal["mirl-dist-shards-2"] = "mirl-dist-shards-2"
    name: str
    recipe: str
    skipped: tuple[str, ...] = ()
    shards: tuple[Shard, ...]

    def role(self, role: str) -> tuple[Shard, ...]:
        return tuple(s for s in self.shards if s.role == role)

    def samples(self, role: str) -> dict[str, int]:
        """Samples per kind in one role."""
        counts: Counter[str] = Counter()
        for shard in self.role(role):
            counts[shard.kind] += shard.samples
        return dict(counts)

    def dump(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n").encode()

    def digest(self) -> str:
        """Hex SHA-256 of the manifest: with the digests inside it, the identity of all the data."""
        return hashlib.sha256(self.dump()).hexdigest()


def read_manifest(data: bytes, where: str) -> Manifest:
    """Parse a manifest. Raises Fault for another format or a file that is no manifest."""
    try:
        raw = json.loads(data)
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise Fault(f"{where} says format {found!r}; this version reads '{FORMAT}'. Build the shards again.")
        return Manifest.model_validate(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise Fault(f"{where} is not a manifest of shards ({first}). Build the shards again.") from None


def read_index(data: bytes, shard: Shard, where: str) -> Index:
    """Parse one shard's index and hold it against the manifest. Raises Fault where they do not fit."""
    found = hashlib.sha256(data).hexdigest()
    if found != shard.index_sha256:
        raise Fault(
            f"{where} has SHA-256 {found[:12]}, the manifest says {shard.index_sha256[:12]}: "
            "the index belongs to another build or is damaged. Build the shards again."
        )
    index = Index.model_validate_json(data)
    if len(index.entries) != shard.samples:
        raise Fault(
            f"{where} lists {len(index.entries)} samples, the manifest {shard.samples}. Build the shards again."
        )
    return index
