"""Laws of the stream: the same batches whoever reads them, from any position, or a Fault that names shard and key."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mirl_dist import yaml_tree
from mirl_dist.data import photographs
from mirl_dist.data.build import build
from mirl_dist.data.manifest import CLEAN, DEGRADED, MANIFEST, Manifest, Part
from mirl_dist.data.order import Order, Position, share_batch
from mirl_dist.data.recipe import Recipe
from mirl_dist.data.sample import Batch, Pixels, Task, decode, make_patch, to_tensor, turn
from mirl_dist.data.stream import Shards, Stream
from mirl_dist.faults import Fault

MIX = {"denoise_25": 1, "denoise_50": 1, "derain": 1}
TILE, PATCH, GLOBAL = 48, 16, 8


def quiet(done: int, total: int, what: str) -> None:
    pass


def crops(folder: Path, name: str, at: int, count: int) -> Path:
    """A folder of real crops of a photograph in PNG files."""
    path = folder / name
    path.mkdir(parents=True)
    photo = np.array(Image.open(photographs.locate("chelsea")[0]).convert("RGB"))
    for number in range(count):
        x = 8 * number
        Image.fromarray(photo[at : at + 2 * TILE, x : x + TILE]).save(path / f"{number}.png")
    return path


def built_at(folder: Path, at: int = 0) -> Path:
    """Shards of real pixels: 10 tiles for noise in several tars, 6 pairs for rain in one."""
    clean, rainy = crops(folder, "clean", at, 5), crops(folder, "rain", at + 100, 3)
    recipe: dict[str, Any] = {
        "name": "tiny",
        "tile_pixels": TILE,
        "shard_megabytes": 0.05,
        "train": [
            {"set": "c", "kind": "denoise", "clean": {"folder": str(clean)}},
            {"set": "r", "kind": "derain", "clean": {"folder": str(rainy)}, "make": "rain"},
        ],
        "evaluate": [{"set": "e", "kind": "denoise", "photographs": ["coffee"], "centre_pixels": 32}],
    }
    build(yaml_tree.build(Recipe, recipe, "the test"), folder / "shards", 1, quiet)
    return folder / "shards"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_at(tmp_path_factory.mktemp("stream"))


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """The shards, to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "copy"))


def stream(
    folder: Path, *, rank: int = 0, world: int = 1, workers: int = 0, seed: int = 0, forward: int | None = None
) -> Stream:
    shards = Shards(folder)
    return Stream(
        shards,
        Order(MIX, shards.manifest.samples("train"), GLOBAL, seed),
        seed=seed,
        patch_pixels=PATCH,
        augment="published",
        workers=workers,
        rank=rank,
        shares=share_batch(GLOBAL, forward, world),
        pin=False,
    )


def batches(of: Stream, epochs: int = 2, start: Position = Position(0, 0), round_: int = 0) -> list[Batch]:  # noqa: B008
    return list(of.batches(round_, start, epochs))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys == b.keys
        and torch.equal(a.degraded, b.degraded)
        and torch.equal(a.clean, b.clean)
        and torch.equal(a.task, b.task)
        for a, b in zip(one, other, strict=True)
    )


def by_sample(found: list[Batch]) -> dict[str, list[tuple[bytes, bytes]]]:
    """'task:key' -> the bytes of (degraded, clean) each time that it was read."""
    said: dict[str, list[tuple[bytes, bytes]]] = {}
    for batch in found:
        for i, key in enumerate(batch.keys):
            said.setdefault(key, []).append((batch.degraded[i].numpy().tobytes(), batch.clean[i].numpy().tobytes()))
    return said


# -- what is read -----------------------------------------------------------------------------------------------


def test_batches_are_floats_from_zero_to_one_with_their_tasks_and_keys(built: Path) -> None:
    found = batches(stream(built))
    assert len(found) == 2 * (26 // GLOBAL)
    for batch in found:
        assert batch.degraded.shape == batch.clean.shape == (GLOBAL, 3, PATCH, PATCH)
        assert batch.degraded.dtype == batch.clean.dtype == torch.float32
        assert batch.task.dtype == torch.int64
        assert 0 <= float(batch.degraded.min()) <= float(batch.degraded.max()) <= 1
        names = list(MIX)
        assert [key.partition(":")[0] for key in batch.keys] == [names[t] for t in batch.task.tolist()]


def test_every_patch_is_cut_from_its_tile_and_the_pair_is_cut_alike(built: Path) -> None:
    shards = Shards(built)
    places = {p.entry.key: p for group in shards.places("train").values() for p in group}
    for batch in batches(stream(built), epochs=1):
        for i, key in enumerate(batch.keys):
            task, _, name = key.partition(":")
            place = places[name]
            clean, patch = shards.image(place, CLEAN), pixels(batch.clean[i])
            spots = list(where(patch, clean))
            assert spots, f"{key} lies inside its tile"
            if task == "derain":
                rainy, given = shards.image(place, DEGRADED), pixels(batch.degraded[i])
                assert any(np.array_equal(turn(rainy[y : y + PATCH, x : x + PATCH], t), given) for y, x, t in spots), (
                    "the same place, turned the same way"
                )


def pixels(image: torch.Tensor) -> Pixels:
    made: Pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert torch.equal(to_tensor([made])[0], image), "whole steps of 1/255"
    return made


def where(patch: Pixels, tile: Pixels) -> Iterator[tuple[int, int, int]]:
    """Places and turns at which a patch lies in a tile."""
    windows = np.lib.stride_tricks.sliding_window_view(tile, (PATCH, PATCH, 3))[:, :, 0]
    for index in range(8):
        back = next(b for b in range(8) if np.array_equal(turn(turn(patch, b), index), patch))
        for y, x in np.argwhere((windows == turn(patch, back)).all(axis=(2, 3, 4))):
            yield int(y), int(x), index


@pytest.mark.parametrize("name", ["denoise_25", "denoise_50"])
def test_the_noise_of_a_patch_has_the_strength_of_its_task(built: Path, name: str) -> None:
    sigma = Task.of(name).sigma_255
    differences = []
    for batch in batches(stream(built), epochs=4):
        for i, key in enumerate(batch.keys):
            if key.startswith(f"{name}:"):
                clean = batch.clean[i] * 255
                safe = (clean > 3 * sigma) & (clean < 255 - 3 * sigma) if sigma < 40 else (clean > 110) & (clean < 150)
                differences.append((batch.degraded[i] * 255 - clean)[safe])
    noise = torch.cat(differences)
    assert noise.numel() > 2000
    assert float(noise.std()) == pytest.approx(sigma, rel=0.06)
    assert float(noise.mean()) == pytest.approx(-0.5, abs=0.1 * sigma)


def test_the_noise_differs_by_epoch_round_and_seed_and_nothing_else(built: Path) -> None:
    first = by_sample(batches(stream(built), epochs=1))
    assert by_sample(batches(stream(built), epochs=1)) == first
    second = by_sample(batches(stream(built), epochs=2, start=Position(1, 0)))
    others = [second, by_sample(batches(stream(built), 1, round_=1)), by_sample(batches(stream(built, seed=1), 1))]
    for other in others:
        both = first.keys() & other.keys()
        assert len(both) > 10
        assert all(first[key] != other[key] for key in both if key.startswith("denoise"))


def test_the_same_tile_has_its_own_noise_for_each_task(built: Path) -> None:
    found = by_sample(batches(stream(built), epochs=3))
    tiles = {key.partition(":")[2] for key in found if key.startswith("denoise_25")}
    pairs = [(found[f"denoise_25:{t}"], found[f"denoise_50:{t}"]) for t in tiles if f"denoise_50:{t}" in found]
    assert pairs
    assert all(not set(a) & set(b) for a, b in pairs)


def test_copies_of_a_sample_in_one_epoch_are_cut_differently(built: Path) -> None:
    shards = Shards(built)
    order = Order({"derain": 8}, shards.manifest.samples("train"), GLOBAL, 0)
    made = Stream(
        shards,
        order,
        seed=0,
        patch_pixels=PATCH,
        augment="none",
        workers=0,
        rank=0,
        shares=share_batch(GLOBAL, None, 1),
        pin=False,
    )
    for copies in by_sample(batches(made, epochs=1)).values():
        assert len(copies) == 8
        assert len(set(copies)) >= 6


def test_published_turns_never_leave_a_patch_as_it_is() -> None:
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)

    def seen(augment: str) -> set[bytes]:
        rngs = (np.random.default_rng(n) for n in range(200))
        return {make_patch(image, image, Task.of("derain"), 8, augment, rng)[1].tobytes() for rng in rngs}

    eight = {np.ascontiguousarray(turn(image, t)).tobytes() for t in range(8)}
    assert len(eight) == 8
    assert seen("all") == eight
    assert seen("published") == eight - {image.tobytes()}
    assert seen("none") == {image.tobytes()}
    assert seen("flips") == {
        np.ascontiguousarray(f).tobytes() for f in (image, image[::-1], image[:, ::-1], image[::-1, ::-1])
    }


# -- who reads --------------------------------------------------------------------------------------------------


def test_workers_change_nothing(built: Path) -> None:
    assert same(batches(stream(built, workers=2)), batches(stream(built, workers=0)))


@pytest.mark.parametrize("start", [Position(0, 1), Position(1, 0), Position(1, 2)])
def test_a_stream_from_a_position_is_the_tail_of_the_whole_one(built: Path, start: Position) -> None:
    whole = batches(stream(built))
    done = start.epoch * 3 + start.step
    assert same(batches(stream(built), start=start), whole[done:])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_fewer_shards_than_ranks_feed_every_rank_the_same_global_batch(built: Path, world: int) -> None:
    assert len([s for s in Shards(built).manifest.role("train") if s.kind == "derain"]) < world or world == 2
    alone = batches(stream(built))
    ranks = [batches(stream(built, rank=rank, world=world)) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert all(len(part.keys) == GLOBAL // world for part in parts)
        assert tuple(key for part in parts for key in part.keys) == whole.keys
        assert torch.equal(torch.cat([part.degraded for part in parts]), whole.degraded)


def test_passes_of_one_step_are_parts_of_its_batch(built: Path) -> None:
    alone, parts = batches(stream(built)), batches(stream(built, forward=2))
    assert len(parts) == 4 * len(alone)
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([part.clean for part in parts[4 * step : 4 * step + 4]]), whole.clean)


# -- damage -----------------------------------------------------------------------------------------------------


def first(folder: Path, kind: str = "derain") -> tuple[Path, str, dict[str, Part]]:
    """The tar of the first sample of a kind, its key and its parts."""
    place = Shards(folder).places("train")[kind][0]
    return folder / place.shard.name, place.entry.key, place.entry.parts


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_bit_is_refused_with_shard_and_key(copy: Path, workers: int) -> None:
    tar, key, parts = first(copy)
    data = bytearray(tar.read_bytes())
    data[parts[DEGRADED].offset + parts[DEGRADED].size // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(Fault) as caught:
        batches(stream(copy, workers=workers))
    assert str(caught.value) == (
        f"{tar}, sample '{key}', degraded.png: the bytes are not those that were built (SHA-256 differs). "
        "Copy the shard again."
    )


def test_damage_in_a_header_of_the_tar_hides_nothing(copy: Path, built: Path) -> None:
    tar, _, parts = first(copy)
    data = bytearray(tar.read_bytes())
    data[parts[CLEAN].offset - 512 : parts[CLEAN].offset] = bytes(512)
    tar.write_bytes(data)
    assert same(batches(stream(copy)), batches(stream(built)))


def test_a_truncated_shard_is_refused_before_the_first_step(copy: Path) -> None:
    tar, *_ = first(copy)
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1024])
    with pytest.raises(Fault) as caught:
        Shards(copy)
    assert str(caught.value) == (
        f"{tar} has {len(whole) - 1024} bytes; the manifest says {len(whole)} bytes. "
        "Copy it again or build the shards again."
    )


def test_a_missing_shard_is_refused_before_the_first_step(copy: Path) -> None:
    tar, *_ = first(copy)
    tar.unlink()
    with pytest.raises(Fault, match=rf"^{tar} is missing; the manifest says \d+ bytes\. Copy it again"):
        Shards(copy)


def test_a_shard_that_vanishes_or_shrinks_later_is_refused_with_its_key(copy: Path) -> None:
    made = stream(copy)
    tar, key, parts = first(copy)
    tar.write_bytes(tar.read_bytes()[: parts[CLEAN].offset])
    with pytest.raises(Fault, match=rf"{tar}, sample '{key}', clean\.png: the bytes are not those"):
        Shards.image(made._patches._shards, made._patches._places["derain"][0], CLEAN)
    tar.unlink()
    with pytest.raises(Fault, match=rf"^{tar}, sample '.*', clean\.png cannot be read \(.*No such file"):
        batches(made)


def test_an_index_of_another_build_is_refused(copy: Path, tmp_path: Path) -> None:
    other = built_at(tmp_path / "other", at=40)
    tar, *_ = first(copy)
    name = tar.name.replace(".tar", ".index.json")
    (copy / name).write_bytes((other / name).read_bytes())
    with pytest.raises(Fault, match=rf"{name} has SHA-256 .*: the index belongs to another build or is damaged"):
        stream(copy)
    (copy / name).unlink()
    with pytest.raises(Fault, match=rf"{name} is missing beside {tar.name}\. Build the shards again\."):
        stream(copy)


def test_a_member_that_does_not_decode_is_refused_with_shard_and_key(copy: Path) -> None:
    """A member that was wrong when it was built: every digest fits, the image does not."""
    tar, key, parts = first(copy)
    part = parts[CLEAN]
    data = bytearray(tar.read_bytes())
    data[part.offset : part.offset + part.size] = b"x" * part.size
    tar.write_bytes(data)
    raw = json.loads((copy / MANIFEST).read_bytes())
    shard = next(s for s in raw["shards"] if s["name"] == tar.name)
    path = copy / tar.name.replace(".tar", ".index.json")
    index = json.loads(path.read_bytes())
    entry = next(e for e in index["entries"] if e["key"] == key)
    entry["parts"][CLEAN]["sha256"] = hashlib.sha256(b"x" * part.size).hexdigest()
    path.write_text(json.dumps(index))
    shard["sha256"] = hashlib.sha256(tar.read_bytes()).hexdigest()
    shard["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / MANIFEST).write_bytes(Manifest.model_validate(raw).dump())
    with pytest.raises(Fault, match=rf"^{tar}, sample '{key}', clean\.png does not decode as an image"):
        batches(stream(copy))


def test_a_png_cut_short_does_not_decode() -> None:
    data = photographs.locate("chelsea")[0].read_bytes()
    assert decode(data, "here").shape == (300, 451, 3)
    with pytest.raises(Fault, match=r"^here does not decode as an image \(.*\)\. Build the shards again\.$"):
        decode(data[: len(data) // 2], "here")


def test_an_image_too_large_to_be_safe_does_not_decode() -> None:
    """A header that claims 20,000 x 20,000 pixels, as a hostile file would."""
    data = photographs.locate("chelsea")[0].read_bytes()
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + data[24:29]
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with pytest.raises(Fault, match=r"^here does not decode as an image \(.*400000000 pixels.*\)\. Give a PNG"):
        decode(bomb, "here", "Give a PNG, JPEG or BMP file.")


def test_a_folder_without_shards_is_refused_with_the_command_that_builds_them(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"^data\.shards: .* holds no manifest\.json\. Build shards with `mirl-dist shards"):
        Shards(tmp_path)
    with pytest.raises(Fault, match=r"^data\.shards: .*nowhere does not exist\. Build shards with"):
        Shards(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"format": "mirl-dist-shards-9"}', "\xff"])
def test_a_manifest_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(Fault, match=r"manifest\.json (says format|is not a manifest).*Build the shards again\."):
        Shards(copy)


def test_patches_larger_than_the_tiles_are_refused(built: Path) -> None:
    shards = Shards(built)
    order = Order(MIX, shards.manifest.samples("train"), GLOBAL, 0)
    shares = share_batch(GLOBAL, None, 1)
    with pytest.raises(Fault, match=rf"^data\.patch_pixels: found 64, but the tiles in .* are {TILE} pixels\. Lower"):
        Stream(shards, order, seed=0, patch_pixels=64, augment="none", workers=0, rank=0, shares=shares, pin=False)
