"""What people do wrong, and the one line they get for it: exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "cpu_two.yaml"


def assert_refused(ended: Any, *pieces: str) -> None:
    """One headline on standard error, further lines only below a list of faults, and the pieces inside."""
    assert set(ended.codes) == {2}, ended.said()
    assert "Traceback" not in ended.err, ended.said()
    head, *rest = ended.err.splitlines()
    assert head.startswith("mirl-dist: "), ended.said()
    assert all(line.startswith("  ") for line in rest), ended.said()
    for piece in pieces:
        assert piece in ended.err, ended.said()


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def shards(lab: Any, tmp_path: Path) -> Path:
    """A copy of the tiny shards to damage."""
    return Path(shutil.copytree(lab.shards, tmp_path / "copied"))


def test_all_faults_of_a_config_come_at_once_with_the_nearest_key_or_file(lab: Any, tmp_path: Path) -> None:
    sets = {"prune.fracton": 0.2, "batch.global": 0, "optimiser.lr": "fast", "schedule.warmup_epochs": 9}
    ended = lab.mirl(*lab.train(tmp_path, sets), cwd=tmp_path)
    assert_refused(ended, "4 faults in ", "nearest key is 'fraction'", "batch.global: found 0", "optimiser.lr", "warm")
    assert ended.err.count("\n") == 5
    missing = lab.mirl("train", str(tmp_path / "tinny.yaml"))
    assert_refused(missing, f"no file at {tmp_path / 'tinny.yaml'}", str(tmp_path / "tiny.yaml"))
    assert files(tmp_path) == {"tiny.yaml"}


def test_a_world_that_does_not_fit_is_told_the_numbers_that_work_once(lab: Any, tmp_path: Path) -> None:
    ended = lab.play(tmp_path, {"batch.global": 8}, world=3)
    assert_refused(ended, "a global batch of 8 cannot be shared by 3 ranks", "Use 1, 2, 4, 8 ranks", "6 or 9")
    assert ended.err.count("\n") == 1
    arguments = lab.train(tmp_path, {"batch.global": 5}, "--launch", str(LAUNCH))
    front = lab.cold("python", "-m", "mirl_dist", *arguments, cwd=tmp_path).wait()
    assert_refused(front, "a global batch of 5 cannot be shared by 2 ranks", "Use 1, 5 ranks", "4 or 6")
    assert files(tmp_path) == {"tiny.yaml"}, "no rank was started"


@pytest.mark.parametrize(
    ("sets", "pieces"),
    [
        ({"data.shards": "nowhere"}, ("data.shards: nowhere holds no manifest", "shards build RECIPE --out nowhere")),
        (
            {"data.steps_per_epoch": None, "batch.global": 64},
            ("an epoch has 54 samples, fewer than one global batch of 64", "Lower batch.global"),
        ),
        ({"data.steps_per_epoch": 99}, ("data.steps_per_epoch: found 99", "13 steps of 4")),
        ({"data.patch_pixels": 41}, ("data.patch_pixels: found 41", "train-clean-00000.tar", "40 pixels", "Lower it")),
        ({"data.mix": {"deblur": 1, "desnow": 1}}, ("no training samples for deblur, desnow; they hold", "(derain)")),
        ({"data.mix": {"derain": {"rain": 1, "fog": 1}}}, ("no training samples for derain@fog; they hold the sets",)),
        ({"data.mix": {"derian": 1}}, ("data.mix: found 'derian'", "did you mean 'derain'?")),
        (
            {"data.mix": {"derain": 1e-9, "dehaze": 1}, "data.mix_by": "weights"},
            ("data.mix: derain gets none of the 12 samples of an epoch", "Raise its weight, or data.steps_per_epoch"),
        ),
        ({"data.shards": "s3://"}, ("s3://",)),
        ({"data.shards": "ftp://host/shards"}, ("ftp://",)),
        ({"data.cache.folder": "tiny.yaml"}, ("the cache tiny.yaml", "choose another data.cache.folder")),
        ({"evaluate.sets": ["set5"]}, ("evaluate.sets: found set5", "clean, haze, rain")),
        ({"prune.scope": ["teacher*"]}, ("the glob 'teacher*' matches no parameter",)),
        ({"run.folder": "https://host/run"}, ("run.folder: found https://", "under s3://bucket/prefix")),
        ({"run.folder": "s3://bucket/run"}, ("no usable credentials were found",)),
    ],
)
def test_a_config_that_does_not_fit_its_data_or_machine_writes_nothing(
    lab: Any, tmp_path: Path, sets: dict[str, Any], pieces: tuple[str, ...]
) -> None:
    assert_refused(lab.mirl(*lab.train(tmp_path, sets), cwd=tmp_path), *pieces)
    assert files(tmp_path) == {"tiny.yaml"}


def test_a_cache_that_holds_no_shard_is_refused_before_the_run_begins(lab: Any, tmp_path: Path) -> None:
    sets = {"data.cache.gigabytes": 1e-6, "data.cache.folder": "cache"}
    ended = lab.mirl(*lab.train(tmp_path, sets), cwd=tmp_path)
    text = "data.cache.gigabytes: found 1e-06, but each of 1 ranks on this node needs"
    assert_refused(ended, text, "Set it to 0.000434 or more")
    assert files(tmp_path) == {"tiny.yaml", "cache/room.lock"}


def test_shards_that_do_not_fit_their_manifest_are_refused_by_name(lab: Any, tmp_path: Path, shards: Path) -> None:
    whole = (shards / "manifest.json").read_text()
    arguments = lab.train(tmp_path, {"data.shards": str(shards)})

    def refused(*pieces: str) -> None:
        assert_refused(lab.mirl(*arguments, cwd=tmp_path), *pieces)
        assert not (tmp_path / "run").exists()

    edited = json.loads(whole)
    edited["shards"] = [s for s in edited["shards"] if s["kind"] != "derain"]
    (shards / "manifest.json").write_text(json.dumps(edited))
    refused("hold no training samples for derain", "they hold the sets clean (clean), haze (dehaze)")
    (shards / "manifest.json").write_text(whole.replace("mirl-dist-shards-2", "mirl-dist-shards-9"))
    refused("says format 'mirl-dist-shards-9'", "this version reads 'mirl-dist-shards-2'")
    edited = json.loads(whole)
    edited["shards"][0]["samples"] += 1
    (shards / "manifest.json").write_text(json.dumps(edited))
    refused(edited["shards"][0]["name"].removesuffix(".tar") + ".index.json: lists 2 samples", "build the shards again")
    edited["shards"][0]["index_sha256"] = "0" * 64
    (shards / "manifest.json").write_text(json.dumps(edited))
    refused("the manifest says 000000000000")
    (shards / "manifest.json").write_text("{")
    refused("is not a manifest of shards")
    (shards / "manifest.json").write_text(whole)
    tar = shards / "train-rain-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    refused("train-rain-00000.tar has ", "the manifest says")
    tar.unlink()
    refused("train-rain-00000.tar is missing")


def test_images_that_cannot_become_shards_are_listed_and_nothing_is_built(lab: Any, tmp_path: Path) -> None:
    for name in ("clean/one.png", "clean/two.png", "rainy/one.png", "rainy/three.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), len(name), np.uint8)).save(tmp_path / name)
    (tmp_path / "empty").mkdir()

    def refused(**one: Any) -> str:
        recipe = {"name": "pairs", "least_pixels": 32, "train": [one]}
        (tmp_path / "pairs.yaml").write_text(json.dumps(recipe))
        ended = lab.mirl("shards", "build", "pairs.yaml", "--out", "built", "--workers", "1", cwd=tmp_path)
        assert ended.rc == 2 and "Traceback" not in ended.err, ended.said()
        return str(ended.err)

    err = refused(set="rain", kind="derain", clean={"folder": "clean"}, degraded={"folder": "rainy"})
    assert err.startswith("mirl-dist: 2 things in the images of recipe 'pairs' are wrong:\n")
    assert "two.png" in err and "three.png" in err
    for folder in ("empty", "absent"):
        assert folder in refused(set="noise", kind="clean", clean={"folder": folder})
    assert not (tmp_path / "built/manifest.json").exists()
    assert not list(tmp_path.glob("built/*.tar"))


def test_the_folder_of_another_run_is_refused_with_the_keys_that_differ(
    lab: Any, reference: Path, tmp_path: Path, shards: Path
) -> None:
    before = files(reference)
    manifest = (shards / "manifest.json").read_text().replace('"name": "tiny"', '"name": "other"')
    (shards / "manifest.json").write_text(manifest)
    run, changes = {"run.folder": str(reference)}, "prune.fraction: 0.3 here, 0.2 there; run.seed: 4 here, 0 there"
    for sets, resume, pieces in (
        (run | {"prune.fraction": 0.3, "run.seed": 4}, "auto", ("belongs to another config", changes)),
        (run, "never", ("--resume never, but", "holds a run")),
        ({}, "must", ("--resume must, but", "holds no run")),
        ({}, "maybe", ("--resume: found 'maybe'", "auto, never or must")),
        (run | {"data.shards": str(shards)}, "auto", ("was trained on shards with digest", "other data")),
    ):
        assert_refused(lab.mirl(*lab.train(tmp_path, sets, "--resume", resume), cwd=tmp_path), *pieces)
    assert files(reference) == before
    assert files(tmp_path) - {str(p.relative_to(tmp_path)) for p in shards.rglob("*")} == {"tiny.yaml"}


@pytest.mark.long
def test_damaged_initial_weights_are_made_anew_from_the_seed(lab: Any, reference: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    initial = run / "initial.safetensors"
    data = bytearray(initial.read_bytes())
    data[-1] ^= 1
    initial.write_bytes(data)
    ended = lab.play(tmp_path, {"prune.rounds": 3})
    assert ended.rc == 0, ended.said()
    assert "warning: initial.safetensors was damaged or missing; made anew from the seed, same digest" in ended.out
    assert len(lab.tickets(run)) == 4
    (run / "rounds/02/ticket-0001/ticket.json").write_text("{")
    assert_refused(lab.mirl("tickets", "list", str(run)), "ticket.json is not a ticket")
    (run / "run.json").write_text("{}")
    assert_refused(lab.mirl("status", str(run)), "run.json does not describe a run")


def test_folders_without_a_run_are_refused_by_every_command(lab: Any, tmp_path: Path) -> None:
    for command in (["tickets", "list"], ["tickets", "show"], ["status"], ["evaluate"]):
        assert_refused(lab.mirl(*command, str(tmp_path)), "holds no run (no run.json)")
    assert files(tmp_path) == set()


@pytest.mark.long
@pytest.mark.parametrize("small_disk", [6], indirect=True)
def test_a_full_disk_keeps_the_last_commit_and_the_run_goes_on_with_room(
    lab: Any, reference: Path, tmp_path: Path, small_disk: Path
) -> None:
    # Initial weights 1 MB, a commit 3 MB: the second commit does not fit beside the first.
    sets = {"run.folder": str(small_disk / "run")}
    ended = lab.play(tmp_path, sets | {"store.patience_seconds": 1})
    assert ended.codes == (75, 75) and "Traceback" not in ended.err, ended.said()
    assert "a commit failed, and training stops: " in ended.err
    for words in ("No space left on device", "Make room or repair the disk, then start again", "Given up on a commit"):
        assert words in ended.err
    assert len(list(small_disk.rglob("COMPLETE.json"))) == 1
    assert not list(small_disk.rglob(".writing-*"))
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    ended = lab.play(tmp_path, sets)
    assert ended.rc == 0, ended.said()
    assert "resuming: round 0, after step " in ended.out
    assert lab.digests(small_disk / "run") == lab.digests(reference)


# -- and what the same commands say when all is well ------------------------------------------------------------------


def test_tickets_are_listed_and_shown_as_json_with_the_promised_keys(lab: Any, reference: Path) -> None:
    listed = json.loads(lab.mirl("tickets", "list", str(reference), "--json").out)
    promised = {"round", "alive", "prunable", "total", "sparsity", "threshold", "mask_digest", "initial_digest"}
    promised |= {"parent", "scores"}
    assert [t["round"] for t in listed] == [0, 1, 2]
    for ticket in listed:
        assert promised <= ticket.keys()
        assert ticket["sparsity"] == pytest.approx(1 - ticket["alive"] / ticket["prunable"])
    shown = json.loads(lab.mirl("tickets", "show", str(reference / "rounds/01"), "--json").out)
    assert {k: shown[k] for k in promised} == {k: listed[1][k] for k in promised}
    plain = lab.mirl("tickets", "list", str(reference))
    assert plain.rc == 0 and plain.err == "" and "derain" in plain.out
    missing = lab.mirl("tickets", "show", str(reference / "rounds/07"))
    assert_refused(missing, "is not there; finished rounds are 0, 1, 2")


def test_status_tells_the_newest_commit_and_a_ticket_has_its_scores_again(lab: Any, reference: Path) -> None:
    said = json.loads(lab.mirl("status", str(reference), "--json").out)
    assert (said["rounds_finished"], said["rounds_planned_at_first"]) == (3, 3)
    assert said["newest_commit"] == {"round": 2, "step": None, "folder": "rounds/02/ticket-0001"}
    ended = lab.mirl("evaluate", str(reference / "rounds/01"), "--json")
    assert ended.rc == 0, ended.said()
    assert json.loads(ended.out)["scores"] == lab.tickets(reference)[1]["scores"]


def test_images_of_odd_sizes_and_grey_ones_are_restored_at_their_size(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (37, 51, 3), dtype=np.uint8)).save(tmp_path / "odd.png")
    Image.fromarray(draw.integers(0, 256, (16, 23), dtype=np.uint8)).save(tmp_path / "grey.jpg")
    images = [str(tmp_path / "odd.png"), str(tmp_path / "grey.jpg")]
    ended = lab.mirl("restore", *images, "--ticket", str(reference), "--out", str(tmp_path / "out"))
    assert ended.rc == 0, ended.said()
    shapes = {path.name: np.asarray(Image.open(path)).shape for path in (tmp_path / "out").iterdir()}
    assert shapes == {"odd.png": (37, 51, 3), "grey.png": (16, 23, 3)}
    (tmp_path / "text.png").write_text("no image")
    refused = lab.mirl("restore", str(tmp_path / "text.png"), "--ticket", str(reference), "--out", str(tmp_path / "no"))
    assert_refused(refused, "text.png is not an image that Pillow can read", "Give an image file of 8 bits")
    assert not (tmp_path / "no").exists()


class RunsCode:
    """A hostile checkpoint: unpickled without care, it would make a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self._mark}",)


def test_files_that_are_no_checkpoints_are_refused_and_code_in_them_is_not_run(lab: Any, tmp_path: Path) -> None:
    mark = tmp_path / "code_ran"
    (tmp_path / "junk.ckpt").write_text("junk\n")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 40)
    torch.save({"state_dict": RunsCode(mark)}, tmp_path / "hostile.ckpt")
    said = dict.fromkeys(("junk.ckpt", "empty.pth", "junk.safetensors"), "is not a checkpoint that can be read")
    said["empty.pth"] = "is empty"
    for name, text in (said | {"hostile.ckpt": "none was run", "absent.ckpt": "no file at"}).items():
        ended = lab.mirl("import", str(tmp_path / name), "--out", str(tmp_path / "out.safetensors"))
        assert_refused(ended, text)
        assert ended.err.count("\n") == 1
    assert not mark.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_a_tracking_address_with_an_unescaped_password_is_refused_without_it(lab: Any, tmp_path: Path) -> None:
    address = {"MLFLOW_TRACKING_URI": "http://bob:hunt/er2secret@127.0.0.1:9"}
    ended = lab.start(*lab.train(tmp_path, {"tracking.enabled": True}), cwd=tmp_path, env=address).wait()
    assert_refused(ended, "MLFLOW_TRACKING_URI", "Write a / in a password as %2F")
    assert "hunt" not in ended.said() and "er2" not in ended.said()
    assert not (tmp_path / "run").exists()
