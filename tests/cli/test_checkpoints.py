"""Checkpoints as people save and pass them on: `import` takes the right values, or names the file and what it is."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mirl_dist import models
from tests.cli.test_server_settings import refused
from tests.models.test_official import official_shapes

Tensors = dict[str, Tensor]
PAGE = b"<!DOCTYPE html><title>Sign in</title>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(scope="module")
def official() -> Tensors:
    """Random values of the published names and shapes; the tensors that the published class never uses are dropped."""
    chance = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=chance) for name, shape in official_shapes().items()}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive its test: files of the published size take 140 MB each."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def torch_bytes(content: object) -> bytes:
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()


def named(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


SAVED: dict[str, Any] = {
    "plain.pth": lambda t: torch_bytes(t),
    "ours.ckpt": lambda t: safetensors.torch.save(t),
    "torch.safetensors": lambda t: torch_bytes({"state_dict": named("net.", t), "epoch": 3}),
    "ddp.pth": lambda t: torch_bytes(named("module.", t)),
    "both.ckpt": lambda t: torch_bytes({"state_dict": named("module.net.", t)}),
    "compiled.pth": lambda t: torch_bytes({"params": named("_orig_mod.", t)}),
    "average.pth": lambda t: torch_bytes({"params": {n: x[:0] for n, x in t.items()}, "params_ema": t}),
    "trainer.pt": lambda t: torch_bytes({"model_state_dict": t, "optimizer_state_dict": {"state": {}}}),
}
REMARKS = {
    "ddp.pth": "removed from all names: the prefix 'module.'",
    "both.ckpt": "removed from all names: the prefix 'module.net.'",
    "compiled.pth": "removed from all names: the prefix '_orig_mod.'",
    "average.pth": "taken: the weights under 'params_ema', not those under 'params'",
    "trainer.pt": "taken: the weights under 'model_state_dict'",
}


def import_(lab: Any, file: Path, data: bytes) -> Any:
    file.write_bytes(data)
    return lab.mirl("import", str(file), "--out", str(file.parent / "out" / "mine.safetensors"))


def check_values(found: Path, official: Tensors) -> None:
    """The imported weights are these values, bit by bit, in float32, and all that the network has."""
    mine = safetensors.torch.load_file(found)
    with torch.device("meta"):
        wanted = models.create("promptir").state_dict().keys()
    assert mine.keys() == wanted
    assert all(mine[n].dtype == torch.float32 and torch.equal(mine[n], official[n].float()) for n in wanted)


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_is_taken_with_its_values_however_it_was_saved(
    lab: Any, official: Tensors, name: str, place: Path
) -> None:
    ended = import_(lab, place / name, SAVED[name](official)).ok()
    assert ended.err == "" and REMARKS.get(name, "542 tensors") in ended.out, ended.said()
    check_values(place / "out" / "mine.safetensors", official)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_another_precision_is_converted_and_the_output_says_so(
    lab: Any, official: Tensors, kind: str, place: Path
) -> None:
    other = {name: tensor.to(getattr(torch, kind)) for name, tensor in official.items()}
    ended = import_(lab, place / "x.pth", torch_bytes({"params": other})).ok()
    assert f"converted to float32: {len(other) - ended.out.count('dropped')} tensors of {kind}" in ended.out, (
        ended.said()
    )
    check_values(place / "out" / "mine.safetensors", other)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_values_that_are_not_finite_are_refused_by_name(lab: Any, official: Tensors, value: str, place: Path) -> None:
    name = "patch_embed.proj.weight"
    spoilt = official | {name: torch.full_like(official[name], float(value))}
    ended = import_(lab, place / "x.pth", torch_bytes(spoilt))
    refused(ended, "x.pth: found 1 tensors with NaN or infinite values", name, "use another checkpoint")
    assert not (place / "out").exists()


STARTS: dict[str, tuple[Any, str]] = {
    "page.ckpt": (lambda t: PAGE, "is a web page, as a link that needs a click or a login gives"),
    "page.safetensors": (lambda t: PAGE, "is a web page, as a link that needs a click or a login gives"),
    "lfs.safetensors": (lambda t: POINTER, "is a pointer of Git LFS, not the checkpoint. Run `git lfs pull`"),
    "index.ckpt": (lambda t: b'{"metadata": {}}', "is a JSON text. Name the file with the tensors"),
    "empty.safetensors": (lambda t: b"", "is empty. Get the file again"),
    "cut.safetensors": (
        lambda t: safetensors.torch.save(t)[:5000],
        "is not a checkpoint that can be read. Get the file again",
    ),
    "torch.safetensors": (lambda t: torch_bytes({"params": t}), "a checkpoint of torch. Convert it with"),
    "ddp.safetensors": (lambda t: safetensors.torch.save(named("module.", t)), "its names have the prefix 'module.'"),
    "half.ckpt": (lambda t: safetensors.torch.save({n: x.half() for n, x in t.items()}), "is not float32. Save it as"),
    "nan.ckpt": (lambda t: safetensors.torch.save({n: x / 0 for n, x in t.items()}), "has NaN or infinite values"),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_from_what_is_no_checkpoint_names_it_and_leaves_no_run(
    lab: Any, reference: Path, name: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    data, text = STARTS[name]
    file.write_bytes(data(safetensors.torch.load_file(reference / "initial.safetensors")))
    for key, more in (("model.weights", text), ("start.ticket", "is no ticket file")):
        for launch in ([], ["--launch", "auto"]):
            ended = lab.start(*lab.train(tmp_path, {key: str(file)}, *launch), cwd=tmp_path).wait(60)
            refused(ended, str(file), more)
    assert not (tmp_path / "run").exists()


def test_a_start_goes_by_the_content_of_a_file_and_not_by_its_name(lab: Any, reference: Path, tmp_path: Path) -> None:
    weights = reference / "initial.safetensors"
    (tmp_path / "w.ckpt").write_bytes(weights.read_bytes())
    sets = {"model.weights": str(tmp_path / "w.ckpt"), "prune.rounds": 0}
    lab.start(*lab.train(tmp_path, sets), cwd=tmp_path).wait().ok()
    assert (tmp_path / "run" / "initial.safetensors").read_bytes() == weights.read_bytes()
