"""Ways to train alone, or on half of the data, without a word: known of the tools, shut here."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mirl_dist.data.manifest import CLEAN
from mirl_dist.data.sampler import Position
from mirl_dist.data.shards import Shards
from mirl_dist.storage import Folder
from tests.data.loaders import loader_of, pool_of

ONE_STEP = {"prune.rounds": 0, "data.steps_per_epoch": 1, "evaluate.sets": [], "checkpoint.every_steps": None}


@pytest.mark.long
def test_accelerates_cpu_launcher_which_starts_one_process_is_refused(lab: Any, tmp_path: Path) -> None:
    arguments = ["launch", "--cpu", "--num_processes", "2", "-m", "mirl_dist", *lab.train(tmp_path, ONE_STEP)]
    ended = lab.cold("accelerate", *arguments, cwd=tmp_path).wait()
    assert ended.rc != 0, ended.said()
    assert "mirl-dist: accelerate launch was asked for several processes but started only this one" in ended.err
    assert "launch/cpu_two.yaml" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_accelerates_gpu_launcher_on_a_machine_without_gpus_trains_together(lab: Any, tmp_path: Path) -> None:
    # By itself accelerate gives two processes here that each train alone. Every rank proves at the end of a round
    # that it holds the weights of the others, so a run that finishes on different data has trained together.
    arguments = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    arguments += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "mirl_dist"]
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    sets = ONE_STEP | {"train.device": "auto"}
    ended = lab.cold("accelerate", *arguments, *lab.train(tmp_path, sets), cwd=tmp_path).wait()
    assert ended.rc == 0, ended.said()
    assert "2 ranks x 1 pass x 2 samples" in ended.out
    (ticket,) = lab.tickets(tmp_path / "run")
    assert (ticket["world"], ticket["samples"]) == (2, 8)


def test_a_world_size_that_nobody_answers_to_is_refused(lab: Any, tmp_path: Path) -> None:
    started = lab.start(*lab.train(tmp_path, ONE_STEP), cwd=tmp_path, env={"WORLD_SIZE": "2"})
    ended = started.wait(60)
    assert ended.rc == 2, ended.said()
    assert "found WORLD_SIZE=2 in the environment, but not RANK, MASTER_ADDR and MASTER_PORT" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_read_every_sample_of_an_epoch_exactly_once(lab: Any, workers: int) -> None:
    places = Shards(Folder(lab.shards)).places("train")
    everything = {
        f"{task}:{place.entry.key}"
        for task, of in (("denoise_25", "clean"), ("derain", "rain"), ("dehaze", "haze"))
        for place in places[of]
    }
    mix = dict.fromkeys(("denoise_25", "derain", "dehaze"), 1)
    seen: Counter[str] = Counter()
    for rank in range(2):
        reader = loader_of(
            lab.shards, rank=rank, world=2, workers=workers, seed=1, mix=mix, augment="all", global_batch=6
        )
        for batch in reader.batches(0, Position(0, 0), 1):
            seen.update(batch.keys)
    assert len(everything) == 18
    assert seen == Counter(dict.fromkeys(everything, 1))


def plain_webdataset(tar: Path) -> set[str]:
    """The samples that webdataset's own reader finds."""
    import webdataset

    return {sample["__key__"] for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)}


def damage(tar: Path, how: str) -> None:
    """A broken header, or two blocks of zeros where a header was, in the middle of a tar."""
    data = bytearray(tar.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as archive:
        members = archive.getmembers()
    member = members[len(members) // 2]
    if how == "header":
        data[member.offset + 148 : member.offset + 156] = b"garbage!"
    else:
        data[member.offset : member.offset + 1024] = bytes(1024)
    tar.write_bytes(data)


@pytest.mark.parametrize("how", ["header", "zeros"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_damaged_header_hides_samples_from_a_plain_reader_and_none_from_ours(
    lab: Any, tmp_path: Path, how: str
) -> None:
    folder = Path(shutil.copytree(lab.shards, tmp_path / "shards"))
    tar = folder / "train-clean-00000.tar"
    whole = plain_webdataset(tar)
    damage(tar, how)
    try:
        left = plain_webdataset(tar)
    except (tarfile.TarError, OSError):
        left = set()
    assert len(left) < len(whole), "the trap is gone: plain reading lost nothing"

    shards = Shards(Folder(folder))
    places = [p for p in shards.places("train")["clean"] if p.shard.name == tar.name]
    assert {p.entry.key for p in places} == whole
    said: list[str] = []
    pool = pool_of(folder, damage="skip", said=said)
    shard = places[0].shard
    pool.acquire(shard)
    lost = {pool.get(shard).entries[number].key for number in pool.get(shard).damaged}
    for place in places:
        if place.entry.key not in lost:
            image = pool.image(place, CLEAN)
            assert image.shape == (place.entry.height, place.entry.width, 3)
    pool.release(shard)
    assert len(lost) <= 1, "damage of one place costs at most the sample that lies there"
    assert len(said) == 1 and tar.name in said[0], "it is told even where no image is lost"
    assert all(key in said[0] for key in lost)
    checked = lab.mirl("shards", "check", str(folder))
    assert checked.rc == 2 and tar.name in checked.err, checked.said()
