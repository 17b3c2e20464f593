"""Laws of the loader: the same batches whoever reads them, from any position, cut as published from what was built."""

from __future__ import annotations

import functools
import http.server
import os
import struct
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from mirl_dist.config.tasks import Task
from mirl_dist.data.building import demo_photos
from mirl_dist.data.image_files import Box
from mirl_dist.data.manifest import CLEAN, DEGRADED, MANIFEST, StoredImage
from mirl_dist.data.sample import (
    Batch,
    PatchReader,
    Pixels,
    SampleLocation,
    crop,
    decode,
    to_tensor,
    turned_planes,
)
from mirl_dist.data.sampler import Position
from mirl_dist.data.shards import Shards
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder
from tests.data.loaders import GLOBAL, HEIGHT, MIX, PATCH, WIDTH, batches, built_at, loader_of, pool_of, same, turn


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_at(tmp_path_factory.mktemp("loader"))


def by_sample(found: list[Batch]) -> dict[str, list[tuple[bytes, bytes]]]:
    """'task:key' -> the bytes of (degraded, clean) each time that it was read."""
    said: dict[str, list[tuple[bytes, bytes]]] = {}
    for batch in found:
        for i, key in enumerate(batch.keys):
            said.setdefault(key, []).append((batch.degraded[i].numpy().tobytes(), batch.clean[i].numpy().tobytes()))
    return said


# -- what is read -----------------------------------------------------------------------------------------------


def test_batches_are_floats_from_zero_to_one_with_their_tasks_and_keys(built: Path) -> None:
    found = batches(loader_of(built))
    assert len(found) == 2 * (26 // GLOBAL)
    for batch in found:
        assert batch.degraded.shape == batch.clean.shape == (GLOBAL, 3, PATCH, PATCH)
        assert batch.degraded.dtype == batch.clean.dtype == torch.float32
        assert batch.task.dtype == torch.int64
        assert 0 <= float(batch.degraded.min()) <= float(batch.degraded.max()) <= 1
        names = list(MIX)
        assert [key.partition(":")[0] for key in batch.keys] == [names[t] for t in batch.task.tolist()]
        assert batch.skipped == 0


@pytest.mark.parametrize("form", ["ppm", "png"])
def test_every_patch_is_cut_from_its_image_and_the_pair_is_cut_alike(tmp_path: Path, form: str) -> None:
    folder = built_at(tmp_path, form=form, counts=(3, 6))
    pool = pool_of(folder)
    places = {p.entry.key: p for group in pool.shards.places("train").values() for p in group}
    found = batches(loader_of(folder, mix={"denoise_25": 1, "derain": 2}, global_batch=5), epochs=2)
    assert {key.partition(":")[0] for batch in found for key in batch.keys} == {"denoise_25", "derain"}
    for batch in found:
        for i, key in enumerate(batch.keys):
            task, _, name = key.partition(":")
            place = places[name]
            clean, patch = pool.image(place, CLEAN), pixels(batch.clean[i])
            assert clean.shape == (HEIGHT, WIDTH, 3)
            spots = list(where(patch, clean))
            assert spots, f"{key} lies inside its image"
            if task == "derain":
                rainy, given = pool.image(place, DEGRADED), pixels(batch.degraded[i])
                alike = (np.array_equal(turn(rainy[y : y + PATCH, x : x + PATCH], t), given) for y, x, t in spots)
                assert any(alike), "the same place, turned the same way"


def pixels(image: torch.Tensor) -> Pixels:
    made: Pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert torch.equal(to_tensor([made])[0], image), "whole steps of 1/255"
    return made


def where(patch: Pixels, image: Pixels) -> Iterator[tuple[int, int, int]]:
    """Places and turns at which a patch lies in an image."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (PATCH, PATCH, 3))[:, :, 0]
    for index in range(8):
        back = next(b for b in range(8) if np.array_equal(turn(turn(patch, b), index), patch))
        for y, x in np.argwhere((windows == turn(patch, back)).all(axis=(2, 3, 4))):
            yield int(y), int(x), index


def test_raw_and_compressed_members_give_the_same_batches(tmp_path: Path) -> None:
    """Shards of another size hold other samples, so one shard of each kind."""
    ppm, png = (built_at(tmp_path / form, form=form, mb=10) for form in ("ppm", "png"))
    assert same(batches(loader_of(ppm)), batches(loader_of(png)))


def test_the_bytes_that_a_crop_reads_are_its_rows_and_no_more(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Mock(side_effect=os.pread)
    monkeypatch.setattr("mirl_dist.data.sample.os.pread", reads)
    batches(loader_of(built, mix={"derain": 8}), epochs=1)
    assert [call.args[1] for call in reads.call_args_list] == [PATCH * WIDTH * 3] * 2 * 48


def test_crops_come_from_the_whole_image_evenly() -> None:
    image = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
    corners = {tuple(image[y, x]): (y, x) for y in range(12) for x in range(10)}
    found = Counter(corners[tuple(patch[0, 0])] for patch in patches_of(image, "none", 4000, size=8))
    assert set(found) == {(y, x) for y in range(5) for x in range(3)}
    assert all(200 < n < 340 for n in found.values()), "4,000 draws over 15 places: 267 each, with a deviation of 16"


def patches_of(image: Pixels, augment: str, count: int, size: int) -> list[Pixels]:
    """The clean side of `count` patches of one pair in a file of its own."""
    with tempfile.NamedTemporaryFile() as file:
        header = b"P6\n%d %d\n255\n" % (image.shape[1], image.shape[0])
        file.write(header + image.tobytes())
        file.flush()
        member = StoredImage("ppm", 0, len(header) + image.size, "")
        reads = [SampleLocation(file.name, "s", "k", *image.shape[:2], member, member, 0, 0, n) for n in range(count)]
        reader = PatchReader((Task.of("derain"),), 0, size, augment)
        return [reader.read(location).clean.transpose(1, 2, 0) for location in reads]


def test_published_turns_never_leave_a_patch_as_it_is() -> None:
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)

    def seen(augment: str) -> set[bytes]:
        return {p.tobytes() for p in patches_of(image, augment, 200, size=8)}

    eight = {np.ascontiguousarray(turn(image, t)).tobytes() for t in range(8)}
    assert len(eight) == 8
    assert seen("all") == eight
    for index in range(8):
        assert np.array_equal(turned_planes(image, index).transpose(1, 2, 0), turn(image, index))
    assert seen("published") == eight - {image.tobytes()}
    assert seen("none") == {image.tobytes()}
    assert seen("flips") == {flip.tobytes() for flip in (image, image[::-1], image[:, ::-1], image[::-1, ::-1])}


# -- chance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [25, 50])
def test_the_noise_of_a_patch_has_the_strength_of_its_task(built: Path, sigma: int) -> None:
    differences = []
    for batch in batches(loader_of(built), epochs=8):
        for i, key in enumerate(batch.keys):
            if key.startswith(f"denoise_{sigma}:"):
                clean = batch.clean[i] * 255
                safe = (clean > 3 * sigma) & (clean < 255 - 3 * sigma) if sigma < 40 else (clean > 110) & (clean < 150)
                differences.append((batch.degraded[i] * 255 - clean)[safe])
    noise = torch.cat(differences)
    assert noise.numel() > 2000
    assert float(noise.std()) == pytest.approx(sigma, rel=0.06)
    assert float(noise.mean()) == pytest.approx(-0.5, abs=0.1 * sigma)


def test_chance_differs_by_epoch_round_and_seed_and_nothing_else(built: Path) -> None:
    first = by_sample(batches(loader_of(built), epochs=1))
    assert by_sample(batches(loader_of(built), epochs=1)) == first
    second = by_sample(batches(loader_of(built), epochs=2, start=Position(1, 0)))
    third = by_sample(batches(loader_of(built), 1, round_=1))
    for other in (second, third, by_sample(batches(loader_of(built, seed=1), 1))):
        both = first.keys() & other.keys()
        assert len(both) > 10
        assert all(first[key] != other[key] for key in both if key.startswith("denoise"))


def test_the_same_image_has_its_own_noise_for_each_task(built: Path) -> None:
    found = by_sample(batches(loader_of(built), epochs=3))
    images = {key.partition(":")[2] for key in found if key.startswith("denoise_25")}
    pairs = [(found[f"denoise_25:{t}"], found[f"denoise_50:{t}"]) for t in images if f"denoise_50:{t}" in found]
    assert pairs
    assert all(not set(a) & set(b) for a, b in pairs)


def test_copies_of_a_sample_in_one_epoch_are_cut_differently(built: Path) -> None:
    for copies in by_sample(batches(loader_of(built, mix={"derain": 8}, augment="none"), epochs=1)).values():
        assert len(copies) == 8
        assert len(set(copies)) >= 6


@pytest.mark.parametrize("word", ["denoise_25", "deblur_hard", "superres_easy", "dejpeg_hard", "enlighten_mild"])
def test_every_family_of_tasks_that_degrade_on_reading_can_be_trained(built: Path, word: str) -> None:
    (batch, *_) = batches(loader_of(built, mix={word: 1}), epochs=1)
    assert batch.degraded.shape == batch.clean.shape == (GLOBAL, 3, PATCH, PATCH)
    differs = [not torch.equal(d, c) for d, c in zip(batch.degraded, batch.clean, strict=True)]
    assert sum(differs) >= GLOBAL - 2


# -- who reads --------------------------------------------------------------------------------------------------


def test_workers_change_nothing(built: Path) -> None:
    assert same(batches(loader_of(built, workers=2)), batches(loader_of(built, workers=0)))


@pytest.mark.parametrize("start", [Position(0, 1), Position(1, 0), Position(1, 2)])
def test_a_stream_from_a_position_is_the_tail_of_the_whole_one(built: Path, start: Position) -> None:
    whole = batches(loader_of(built))
    done = start.epoch * 3 + start.step
    assert same(batches(loader_of(built), start=start), whole[done:])


@pytest.mark.parametrize("mb", [0.03, 10], ids=["many shards", "one shard"])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_rank_is_fed_its_part_of_the_same_global_batch(tmp_path: Path, mb: float, world: int) -> None:
    """With one shard of each kind there are fewer shards than readers."""
    folder = built_at(tmp_path, mb=mb)
    kinds = [s.kind for s in Shards(Folder(folder)).train]
    assert kinds.count("derain") == (1 if mb == 10 else 5)
    alone = batches(loader_of(folder))
    ranks = [batches(loader_of(folder, rank=rank, world=world)) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert all(len(part.keys) == GLOBAL // world for part in parts)
        assert tuple(key for part in parts for key in part.keys) == whole.keys
        assert torch.equal(torch.cat([part.degraded for part in parts]), whole.degraded)
    assert {len(rank) for rank in ranks} == {len(alone)}


def test_passes_of_one_step_are_parts_of_its_batch(built: Path) -> None:
    alone, parts = batches(loader_of(built)), batches(loader_of(built, forward=2, workers=1))
    assert len(parts) == 4 * len(alone)
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([part.clean for part in parts[4 * step : 4 * step + 4]]), whole.clean)


def test_a_stream_over_http_through_a_cache_is_the_one_from_the_folder(built: Path, tmp_path: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(built))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}"
            assert same(batches(loader_of(address, cache=tmp_path / "cache")), batches(loader_of(built)))
        finally:
            server.shutdown()
            serving.join()
    held = {path.name for path in (tmp_path / "cache").glob("*.tar")}
    assert held == {f"{shard.sha256}.tar" for shard in Shards(Folder(built)).train}


@pytest.mark.parametrize("start", [Position(0, 0), Position(1, 2)])
def test_before_its_first_batch_a_reader_opens_at_most_one_shard_per_lane(built: Path, start: Position) -> None:
    """What is brought beyond that is ahead of need, and no more than told."""
    for world in (1, 4):
        pool = pool_of(built)
        pool.acquire = Mock(side_effect=pool.acquire)  # type: ignore[method-assign]
        pool.get = Mock(side_effect=pool.get)  # type: ignore[method-assign]
        running = loader_of(built, world=world, pool=pool).batches(0, start, 2)
        next(running)
        wanted, asked = ([call.args[0].name for call in m.call_args_list] for m in (pool.acquire, pool.get))
        lanes, opened = GLOBAL // world, len(set(asked))
        assert opened <= lanes
        assert wanted[:opened] == list(dict.fromkeys(wanted))[:opened]
        assert len(set(wanted)) <= 3 * lanes
        running.close()


def test_shards_are_let_go_when_they_are_not_needed_any_more(built: Path) -> None:
    pool = pool_of(built)
    running = loader_of(built, pool=pool, workers=1).batches(0, Position(0, 0), 2)
    next(running)
    assert pool._acquired
    running.close()
    assert not pool._acquired
    list(loader_of(built, pool=pool).batches(0, Position(0, 0), 2))
    assert not pool._acquired


# -- what cannot be read ------------------------------------------------------------------------------------------


def test_a_png_cut_short_does_not_decode() -> None:
    data = demo_photos.locate("chelsea")[0].read_bytes()
    assert decode(data, "here").shape == (300, 451, 3)
    with pytest.raises(UserError, match=r"^here does not decode as an image \(.*\)\. Build the shards again\.$"):
        decode(data[: len(data) // 2], "here")


def test_an_image_too_large_to_be_safe_does_not_decode() -> None:
    """A header that claims 20,000 x 20,000 pixels, as a hostile file would."""
    data = demo_photos.locate("chelsea")[0].read_bytes()
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + data[24:29]
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with pytest.raises(UserError, match=r"^here does not decode as an image \(.*400000000 pixels.*\)\. Build"):
        decode(bomb, "here")


def test_a_file_that_ends_inside_a_crop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"P6\n8 8\n255\n" + bytes(100))
    member = StoredImage("ppm", 0, 11 + 192, "")
    read = SampleLocation(str(tmp_path / "x"), "x.tar", "key", 8, 8, member, None, 0, 0, 0)
    wanted = r"^x\.tar, sample 'key': the shard ends inside its pixels\. Copy the shard again"
    with pytest.raises(UserError, match=wanted):
        crop(read, member, Box(4, 0, 4, 4))


def test_a_folder_without_shards_is_refused_with_the_command_that_builds_them(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        wanted = rf"^data\.shards: {folder} holds no manifest\.json\. Build .* --out {folder}"
        with pytest.raises(UserError, match=wanted):
            Shards(Folder(folder))


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"format": "mirl-dist-shards-9"}', "\xff"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest\.json (says format|is not a manifest).*uild the shards again\."):
        Shards(Folder(tmp_path))


def test_patches_larger_than_the_smallest_image_are_refused(built: Path) -> None:
    shards: Any = Shards(Folder(built))
    shards.check_patch_size(WIDTH)
    wanted = rf"^data\.patch_pixels: found 49, but an image in train-.* has a side of {WIDTH} "
    with pytest.raises(UserError, match=wanted):
        shards.check_patch_size(WIDTH + 1)


@pytest.mark.long
def test_a_folder_for_temporary_files_with_too_long_a_path_is_a_fault_that_names_it(lab: Any, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    arguments = lab.train(tmp_path, {"data.workers": 1})
    ended = lab.cold("python", "-m", "mirl_dist", *arguments, cwd=tmp_path, env={"TMPDIR": str(long)}).wait()
    assert ended.rc == 2, ended.said()
    assert f"found {long} as the folder for temporary files" in ended.err and "Traceback" not in ended.err
    assert "Set TMPDIR to a folder with a short path, or data.workers=0." in ended.err
