"""Laws of damage: refused with shard and key, or skipped, told, counted, replaced by the same samples everywhere."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mirl_dist.data.cache import ShardCache
from mirl_dist.data.manifest import CLEAN, DEGRADED, MANIFEST, SampleEntry, Shard, StoredImage
from mirl_dist.data.sample import Batch
from mirl_dist.data.sampler import Position
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.data.shards import SamplePlace, Shards
from mirl_dist.errors import Stopped, UserError
from mirl_dist.storage import Folder, Unavailable
from mirl_dist.storage.retry import Patience
from tests.data.loaders import GLOBAL, batches, built_at, flip, loader_of, pool_of, same


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_at(tmp_path_factory.mktemp("damage"))


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """The shards, to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


def victim(folder: Path, kind: str = "derain") -> SamplePlace:
    """The first sample of the first training shard of a kind that holds more than one."""
    shards = Shards(Folder(folder))
    shard = next(s for s in shards.train if s.kind == kind and s.samples > 1)
    return SamplePlace(shard, shards.index(shard).entries[0])


def part_of(entry: SampleEntry, which: str) -> StoredImage:
    found = entry.image(which)
    assert found is not None
    return found


def flip_bit(folder: Path, place: SamplePlace, which: str = CLEAN) -> None:
    part = part_of(place.entry, which)
    flip(folder / place.shard.name, part.offset + part.size // 2)


def cut(folder: Path, place: SamplePlace) -> None:
    """The tar ends at its second sample."""
    second = Shards(Folder(folder)).index(place.shard).entries[1]
    tar = folder / place.shard.name
    tar.write_bytes(tar.read_bytes()[: part_of(second, CLEAN).offset + 7])


def remove(folder: Path, place: SamplePlace) -> None:
    (folder / place.shard.name).unlink()


def mix_up(folder: Path, place: SamplePlace) -> None:
    """The index of another build."""
    path = folder / place.shard.index_name
    path.write_bytes(path.read_bytes().replace(b"16", b"17"))


def spoil(folder: Path, place: SamplePlace) -> None:
    """A member that was wrong when it was built: every digest fits, the image does not."""
    part, tar, index = part_of(place.entry, CLEAN), folder / place.shard.name, folder / place.shard.index_name
    data = bytearray(tar.read_bytes())
    wrong = (b"\x89PNG" + bytes(part.size))[: part.size]
    data[part.offset : part.offset + part.size] = wrong
    tar.write_bytes(data)
    index.write_bytes(index.read_bytes().replace(part.sha256.encode(), sha256(wrong).hexdigest().encode()))
    manifest = (folder / MANIFEST).read_text()
    for was, file in ((place.shard.sha256, tar), (place.shard.index_sha256, index)):
        manifest = manifest.replace(was, sha256(file.read_bytes()).hexdigest())
    (folder / MANIFEST).write_text(manifest)


Damage = Callable[[Path, SamplePlace], None]
DAMAGES: list[tuple[Damage, str]] = [
    (flip_bit, r"{shard}: its bytes are not the manifest's: sample '{key}' is damaged \(clean\.p[np][mg]\)\. Copy the"),
    (cut, r"{shard}: its bytes are not the manifest's: sample '.*' is damaged \(.*\)"),
    (remove, r"{shard} is missing\. Copy the shard again"),
    (mix_up, r"{index} has SHA-256 .*the index belongs to another build or is damaged"),
]


NAMES = ["flipped bit", "truncated", "missing", "another build"]


@pytest.mark.parametrize(("damage", "text"), DAMAGES, ids=NAMES)
def test_damage_is_refused_with_shard_and_key(copy: Path, damage: Damage, text: str) -> None:
    place = victim(copy)
    damage(copy, place)
    wanted = text.format(shard=place.shard.name, key=place.entry.key, index=place.shard.index_name)
    for workers in (0, 1) if damage is flip_bit else (0,):
        with pytest.raises(UserError, match=wanted):
            batches(loader_of(copy, workers=workers))


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES], ids=NAMES)
def test_skipped_damage_is_reported_and_replaced_alike_on_any_ranks(copy: Path, damage: Damage) -> None:
    place = victim(copy)
    damage(copy, place)
    said: list[str] = []
    one = loader_of(copy, damage="skip", said=said)
    alone = batches(one)
    assert sum(batch.skipped for batch in alone) > 0
    assert one.damaged
    assert all(name.startswith(place.shard.name) for name in one.damaged)
    lost = {name.partition(" ")[2] for name in one.damaged} - {""}
    read = {key.partition(":")[2] for batch in alone for key in batch.keys}
    assert not lost & read, "a damaged sample was used"
    assert len([line for line in said if place.shard.name in line]) == 1, said
    ranks = [loader_of(copy, damage="skip", rank=rank, world=4) for rank in range(4)]
    parts = [batches(rank) for rank in ranks]
    for step, whole in enumerate(alone):
        assert tuple(key for part in parts for key in part[step].keys) == whole.keys
        assert torch.equal(torch.cat([part[step].degraded for part in parts]), whole.degraded)
        assert sum(part[step].skipped for part in parts) == whole.skipped
    together = {name: why for rank in ranks for name, why in rank.damaged.items()}
    assert together == one.damaged


def test_only_what_is_damaged_is_replaced(copy: Path, built: Path) -> None:
    place = victim(copy)
    flip_bit(copy, place, DEGRADED)
    whole, skipping = batches(loader_of(built)), loader_of(copy, damage="skip")
    keys = zip(*([key for batch in each for key in batch.keys] for each in (whole, batches(skipping))), strict=True)
    replaced = [old for old, new in keys if old != new]
    assert replaced == [f"derain:{place.entry.key}"] * 2, "two epochs"
    assert list(skipping.damaged) == [f"{place.shard.name} {place.entry.key}"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_member_that_does_not_decode_is_found_when_it_is_read(tmp_path: Path, workers: int) -> None:
    """Only a compressed member can be so: raw pixels have nothing to decode."""
    folder = built_at(tmp_path, form="png")
    place = victim(folder)
    spoil(folder, place)
    wanted = rf"^{place.shard.name}, sample '{place.entry.key}': .* does not decode as an image"
    with pytest.raises(UserError, match=wanted):
        batches(loader_of(folder, workers=workers))
    said: list[str] = []
    skipping = loader_of(folder, damage="skip", workers=workers, said=said)
    found = batches(skipping)
    assert sum(batch.skipped for batch in found) == 2
    assert list(skipping.damaged) == [f"{place.shard.name} {place.entry.key}"]
    assert len(said) == 1
    assert same(found, batches(loader_of(folder, damage="skip")))


def test_damage_between_the_members_loses_nothing(copy: Path, built: Path) -> None:
    place = victim(copy)
    with (copy / place.shard.name).open("r+b") as tar:
        tar.seek(part_of(place.entry, CLEAN).offset - 512)
        tar.write(bytes(512))
    with pytest.raises(UserError, match="no image is damaged, only bytes between images"):
        batches(loader_of(copy))
    said: list[str] = []
    skipping = loader_of(copy, damage="skip", said=said)
    assert same(batches(skipping), batches(loader_of(built)))
    assert skipping.damaged == {}
    assert len(said) == 1


def test_a_set_without_a_whole_sample_is_refused_whatever_the_policy(copy: Path) -> None:
    for shard in Shards(Folder(copy)).train:
        if shard.kind == "derain":
            (copy / shard.name).unlink()
    with pytest.raises(UserError, match=r"^data\.damage: no shard of derain has an undamaged sample left\."):
        batches(loader_of(copy, damage="skip"))


def test_scores_never_skip(copy: Path) -> None:
    shards = Shards(Folder(copy))
    ((place,),) = shards.places("evaluate").values()
    flip_bit(copy, place)
    wanted = rf"{place.shard.name}: its bytes are not the manifest's: sample '{place.entry.key}'"
    with pytest.raises(UserError, match=wanted):
        pool_of(copy, damage="skip").image(place, CLEAN)


def test_what_is_missing_is_told_before_any_work(copy: Path) -> None:
    shards = Shards(Folder(copy))
    shards.check_present("train", "evaluate")
    first, second = shards.train[:2]
    (copy / first.index_name).unlink()
    tar = copy / second.name
    tar.write_bytes(tar.read_bytes()[:-1024])
    with pytest.raises(UserError) as caught:
        shards.check_present("train")
    assert f"{first.index_name} is missing; {second.name} has {second.bytes - 1024} bytes, the" in str(caught.value)
    shards.check_present("evaluate")


def test_a_file_that_changes_while_it_is_in_use_is_looked_at_again(copy: Path) -> None:
    pool = pool_of(copy)
    list(loader_of(copy, pool=pool).batches(0, Position(0, 0), 1))
    place = victim(copy)
    flip_bit(copy, place)
    with pytest.raises(UserError, match=place.entry.key):
        list(loader_of(copy, pool=pool).batches(0, Position(0, 0), 1))


def test_a_cached_copy_that_went_bad_is_brought_again(copy: Path, tmp_path: Path, built: Path) -> None:
    first = batches(loader_of(copy, cache=tmp_path / "cache"))
    for tar in (tmp_path / "cache").glob("*.tar"):
        flip(tar)
    assert same(batches(loader_of(copy, cache=tmp_path / "cache")), first)
    assert same(first, batches(loader_of(built)))


def test_damage_in_the_store_is_found_through_the_cache_too_and_comes_once(copy: Path, tmp_path: Path) -> None:
    place = victim(copy)
    cut(copy, place)
    with pytest.raises(UserError, match=place.shard.name):
        batches(loader_of(copy, cache=tmp_path / "other"))
    skipping = batches(loader_of(copy, damage="skip", cache=tmp_path / "cache"))
    assert same(skipping, batches(loader_of(copy, damage="skip")))
    (kept,) = (tmp_path / "cache").glob("*.damaged")
    assert kept.name == f"{place.shard.sha256}.{(copy / place.shard.name).stat().st_size}.damaged", "it counts there"
    assert kept.read_bytes() == (copy / place.shard.name).read_bytes()


def test_a_batch_counts_what_stands_in_for_damage(copy: Path) -> None:
    place = victim(copy)
    remove(copy, place)
    found: list[Batch] = batches(loader_of(copy, damage="skip", mix={"derain": 4}), epochs=1)
    assert len(found) == 3
    assert sum(batch.skipped for batch in found) == 4 * place.shard.samples
    assert all(len(batch.keys) == GLOBAL for batch in found)


# -- a small cache, a store that is away, a disk that is full -------------------------------------------------------


def test_lost_shards_do_not_fill_the_cache_with_those_that_stand_in(tmp_path: Path) -> None:
    folder = built_at(tmp_path, counts=(1, 40), mb=0.03)
    rainy = [s for s in Shards(Folder(folder)).train if s.kind == "derain"]
    for shard in rainy[::2]:
        (folder / shard.name).unlink()
    limit = 9 * max(s.bytes for s in rainy)
    assert sum(s.bytes for s in rainy[1::2]) > limit
    skipping: dict[str, Any] = {"mix": {"derain": 1}, "global_batch": 2, "damage": "skip"}
    small = batches(loader_of(folder, cache=tmp_path / "c", limit=limit, **skipping))
    assert same(small, batches(loader_of(folder, **skipping)))


class Away(Folder):
    """A folder that can be away, as a server can."""

    away = False
    reads = 0

    def read(self, name: str, offset: int = 0) -> Iterator[bytes]:
        self.reads += 1
        if self.away:
            raise Unavailable(f"{name}: away")
        yield from super().read(name, offset)


def pool_over(store: Folder, cache: Path, damage: str = "refuse", seconds: float = 0.2, **more: Any) -> ShardPool:
    patience = Patience(seconds=seconds, first=0.01, most=0.1)
    cached = ShardCache(cache, 10**9, patience=1)
    return ShardPool(Shards(store), cached, damage, lambda line: None, patience=patience, **more)


def test_a_store_that_was_away_while_nobody_waited_stops_no_one(copy: Path, tmp_path: Path) -> None:
    store = Away(copy)
    pool = pool_over(store, tmp_path / "cache")
    shard = pool.shards.train[0]
    store.away = True
    pool.acquire(shard)
    while not pool._acquired[shard.name].future.done():
        pass
    store.away = False
    assert pool.get(shard).path.stat().st_size == shard.bytes
    pool.release(shard)
    store.away = True
    other = pool.shards.train[1]
    pool.acquire(other)
    with pytest.raises(Unavailable, match="away"):
        pool.get(other)  # this one was waited for until patience ended


@pytest.mark.parametrize("damage", ["refuse", "skip"])
def test_a_system_that_fails_is_no_damage(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A full disk, too many open files: no sample is skipped for that, since other ranks would not skip it."""
    pool = pool_over(Folder(copy), tmp_path / "cache", damage)
    shard = pool.shards.train[0]
    full, many = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr("mirl_dist.data.shard_fetcher.download", Mock(side_effect=full))
    with pytest.raises(UserError, match=r"the cache .*: No space left on device\. Make room"):
        pool.verify(shard)
    monkeypatch.undo()
    pool.verify(shard)
    running = loader_of(copy, damage=damage).batches(0, Position(0, 0), 1)
    next(running)
    monkeypatch.setattr("mirl_dist.data.sample.os.open", Mock(side_effect=many))
    with pytest.raises(UserError, match=r"cannot be read: .*Too many open files.*Check the disk, then start again"):
        list(running)


def test_a_passing_fault_of_the_system_is_tried_once_more(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batches(loader_of(copy))
    opened, calls = os.open, [0]

    def sometimes(path: str, flags: int) -> int:
        calls[0] += 1
        if calls[0] in (5, 30):
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, flags)

    monkeypatch.setattr("mirl_dist.data.sample.os.open", sometimes)
    skipping = loader_of(copy, damage="skip")
    found = batches(skipping)
    assert calls[0] > 50
    monkeypatch.undo()
    assert same(found, whole)
    assert skipping.damaged == {}


def test_who_is_asked_to_stop_does_not_wait_long_for_a_store(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirl_dist.data.shard_pool._GRACE_SECONDS", 0.1)
    store = Away(copy)
    pool = pool_over(store, tmp_path / "cache", seconds=60, stop_asked=lambda: True)
    store.away = True
    with pytest.raises(Stopped, match=r"stopped on request while waiting for train-.*; the last commit is intact"):
        pool.verify(pool.shards.train[0])


def test_ready_batches_are_trained_on_when_a_stop_meets_an_unavailable_store(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the ranks may yet meet and commit; then the stop is told."""
    monkeypatch.setattr("mirl_dist.data.shard_pool._GRACE_SECONDS", 0.0)
    store, asked = Away(copy), [False]
    pool = pool_over(store, tmp_path / "cache", seconds=60, stop_asked=lambda: asked[0])
    want, wanted = pool.acquire, [0]

    def wanting(shard: Shard) -> None:
        wanted[0] += 1
        if wanted[0] == 7:  # the shards of some passes are here
            for other in pool._acquired.values():
                other.future.result()
            store.away = asked[0] = True
        want(shard)

    monkeypatch.setattr(pool, "acquire", wanting)
    loader = loader_of(copy, pool=pool, mix={"denoise_25": 4, "derain": 4}, global_batch=2)
    made = 0
    with pytest.raises(Stopped, match="stopped on request while waiting for train-"):
        for _ in loader.batches(0, Position(0, 0), 9):
            made += 1
    assert made > 0


def test_a_file_that_goes_from_the_cache_is_brought_again(copy: Path, tmp_path: Path) -> None:
    """As when another process of the node finds it bad and brings another."""
    whole = batches(loader_of(copy))
    running = loader_of(copy, cache=tmp_path / "cache").batches(0, Position(0, 0), 2)
    first = next(running)
    for tar in (tmp_path / "cache").glob("*.tar"):
        tar.unlink()
    assert same([batch.to(torch.device("cpu")) for batch in (first, *running)], whole)
