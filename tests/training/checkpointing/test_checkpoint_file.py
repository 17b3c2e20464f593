"""Files of other programs are told apart by content; what is no checkpoint is named for what it is."""

import gzip
import io
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mirl_dist.errors import UserError
from mirl_dist.training.checkpointing import checkpoint_file

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3)}


def torch_bytes(content: object, **options: bool) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, **options)
    return data.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, content)
    return data.getvalue()


@pytest.mark.parametrize("name", ["x.ckpt", "x.pth", "x.safetensors", "x", "x.bin"])
@pytest.mark.parametrize(
    "data",
    [
        torch_bytes(WEIGHTS),
        torch_bytes(WEIGHTS, _use_new_zipfile_serialization=False),
        safetensors.torch.save(WEIGHTS),
    ],
    ids=["zip", "pickle", "safetensors"],
)
def test_the_content_decides_and_not_the_name(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert torch.equal(checkpoint_file.read(tmp_path / name)["a.weight"], WEIGHTS["a.weight"])


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><html>", "is a web page"),
        (b"<HTML><head>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is an XML document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of Git LFS"),
        (b'{"weights": "https://x"}', "is a JSON text"),
        (gzip.compress(b"x", mtime=0), "is compressed with gzip"),
        (zipped("weights/x.ckpt", b"x"), "is a zip archive without a checkpoint"),
        (torch_bytes(WEIGHTS)[:200], "is not a checkpoint that can be read"),
        (torch_bytes([1, 2]), "holds a list"),
        (b"\0" * 64, "is not a checkpoint that can be read"),
    ],
)
def test_what_is_no_checkpoint_is_named(data: bytes, text: str, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(data)
    with pytest.raises(UserError) as refused:
        checkpoint_file.read(file)
    assert str(refused.value).startswith(f"{file} {text}"), refused.value
    assert "code" not in str(refused.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file at"):
        checkpoint_file.read(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="is a folder"):
        checkpoint_file.read(tmp_path)
