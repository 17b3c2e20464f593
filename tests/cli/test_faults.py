"""Faults of files and of the system, through the command line: one line, exit code 2, and nothing left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch


def refused(ended: Any, *texts: str) -> None:
    assert ended.rc == 2 and "Traceback" not in ended.err, ended.said()
    assert len(ended.err.splitlines()) == 1 and all(text in ended.err for text in texts), ended.said()


@pytest.mark.parametrize(
    "name, data, text",
    [
        ("page.ckpt", b"<!DOCTYPE html><title>Sign in</title>", "page.ckpt is a web page"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        ("index.pth", b'{"metadata": {}}', "index.pth is a JSON text"),
        ("ours.ckpt", safetensors.torch.save({"x": torch.ones(2)}), "found "),
    ],
)
def test_a_file_that_is_no_official_checkpoint_is_named(
    lab: Any, name: str, data: bytes, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    ended = lab.mirl("import", str(tmp_path / name), "--out", str(tmp_path / "out.safetensors"))
    refused(ended, text, name)
    assert "code from the file" not in ended.err and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("spoil", ["nan", "half", "another network", "no file"])
def test_a_start_from_unusable_weights_leaves_no_run_folder(
    lab: Any, reference: Path, spoil: str, tmp_path: Path
) -> None:
    weights = safetensors.torch.load_file(reference / "initial.safetensors")
    if spoil == "nan":
        next(iter(weights.values())).view(-1)[0] = float("nan")
    elif spoil == "half":
        weights = {name: tensor.half() for name, tensor in weights.items()}
    elif spoil == "another network":
        weights.popitem()
    if spoil != "no file":
        safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    ended = lab.play(tmp_path, {"model.weights": str(tmp_path / "w.safetensors")}, world=1)
    assert ended.codes == (2,) and "model.weights" in ended.err and "Traceback" not in ended.err, ended.said()
    assert not (tmp_path / "run").exists()


def test_a_config_in_utf_16_is_named(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text("run: {folder: run}\n", encoding="utf-16")
    refused(lab.mirl("train", str(tmp_path / "wide.yaml")), "wide.yaml", "its text is UTF-16. Save it as UTF-8")


@pytest.mark.long
def test_a_loader_process_that_the_system_kills_is_named(lab: Any, tmp_path: Path) -> None:
    arguments = lab.train(tmp_path, {"data.workers": 1, "train.epochs": 3000, "ranks.restarts": 0})
    started = lab.start(*arguments, cwd=tmp_path)
    started.until(lambda: list((tmp_path / "run").glob("rounds/00/steps/*/COMPLETE.json")))
    (process,) = (psutil.Process(pid) for pid in started.pids)
    servers = [child for child in process.children() if "forkserver" in " ".join(child.cmdline())]
    (loader,) = (child for server in servers for child in server.children())
    os.kill(loader.pid, signal.SIGKILL)
    ended = started.wait(60)
    assert ended.codes == (2,) and "Traceback" not in ended.err, ended.said()
    first = ended.err.splitlines()[0]  # Python's tracker of semaphores may add lines
    assert f"data.workers: the loader process {loader.pid} " in first and "/dev/shm" in first
