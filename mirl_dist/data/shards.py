"""Built shards at an address: manifest, indices, and checks that the files are present and fit the run."""

from __future__ import annotations

from typing import NamedTuple

from mirl_dist.data.manifest import MANIFEST, Index, Manifest, SampleEntry, Shard, read_index, read_manifest
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder, NotFound, Rejected, Store


class SamplePlace(NamedTuple):
    """The location of one sample: its shard, and its entry in that shard's index."""

    shard: Shard
    entry: SampleEntry


class Shards:
    """The shards at an address. Raises UserError for a missing manifest or one of another format."""

    def __init__(self, store: Store, manifest: bytes | None = None) -> None:
        """manifest: its bytes, if another process has already read them."""
        self.store = store
        try:
            data = store.get(MANIFEST) if manifest is None else manifest
        except NotFound:
            out = "FOLDER" if store.where().startswith("http") else store.where()
            raise UserError(
                f"data.shards: {store.where()} holds no {MANIFEST}. Build shards with "
                f"`mirl-dist shards build RECIPE --out {out}`."
            ) from None
        self.manifest: Manifest = read_manifest(data, store.where(MANIFEST))
        self.train = self.manifest.role("train")

    def index(self, shard: Shard) -> Index:
        """Read the index of one shard. Raises UserError if it is missing or does not match the manifest."""
        source = self.store.where(shard.index_name)
        try:
            return read_index(self.store.get(shard.index_name), shard, source)
        except NotFound:
            raise UserError(f"{source} is missing beside {shard.name}. Build the shards again.") from None

    def places(self, role: str) -> dict[str, list[SamplePlace]]:
        """Return the samples of one role by set, in shard order."""
        places: dict[str, list[SamplePlace]] = {}
        for shard in self.manifest.role(role):
            places.setdefault(shard.set, []).extend(SamplePlace(shard, entry) for entry in self.index(shard).entries)
        return places

    def check_present(self, *roles: str) -> None:
        """Raise UserError naming the missing shards and indices of the roles; in a folder, also shards of another size.

        A store that cannot be listed is not checked.
        """
        expected = [shard for role in roles for shard in self.manifest.role(role)]
        if not expected:
            return
        try:
            present = set(self.store.list(""))
        except Rejected:
            return  # HTTP has no listing, and a bucket may only allow reads; missing shards then fail on reading
        wrong = []
        for shard in expected:
            wrong += [f"{name} is missing" for name in (shard.name, shard.index_name) if name not in present]
        if isinstance(self.store, Folder):
            for shard in expected:
                if shard.name in present and (size := self.store.size(shard.name)) != shard.bytes:
                    wrong.append(f"{shard.name} has {size} bytes, the manifest says {shard.bytes} bytes")
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise UserError(
                f"{self.store.where()}: {'; '.join(wrong[:5])}{more}. Copy them again or build the shards again; for "
                "training shards alone, data.damage: skip trains without them."
            )

    def check_patch_size(self, patch_pixels: int) -> None:
        """Raise UserError if patches do not fit into every training image."""
        smallest = min(self.train, key=lambda shard: shard.least_pixels, default=None)
        if smallest is not None and smallest.least_pixels < patch_pixels:
            raise UserError(
                f"data.patch_pixels: found {patch_pixels}, but an image in {smallest.name} has a side of "
                f"{smallest.least_pixels} pixels. Lower it, or build shards with least_pixels of at least that.",
                everywhere=True,
            )
