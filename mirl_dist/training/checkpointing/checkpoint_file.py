"""Reads checkpoint files of other programs by their content, whatever their name; runs no code from them."""

from __future__ import annotations

import pickle  # for its error
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mirl_dist.errors import UserError

_HEAD_BYTES = 4096
# The beginning of files that are saved in place of a checkpoint: what each is, and what to do.
_OTHERS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the checkpoint. Run `git lfs pull` in its repository"),
    (b"<!doctype", "is a web page, as a link that needs a click or a login gives. Download the file itself"),
    (b"<html", "is a web page, as a link that needs a click or a login gives. Download the file itself"),
    (b"<?xml", "is an XML document, as a server's error page is. Download the file again"),
    (b"{", "is a JSON text. Name the file with the tensors"),
    (b"[", "is a JSON text. Name the file with the tensors"),
    (b"\x1f\x8b", "is compressed with gzip. Unpack it first"),
)
# torch's restricted unpickler raises any of these for bytes that are not a checkpoint, depending on the bytes.
_ERRORS = (
    *(RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
    safetensors.SafetensorError,
    *(zipfile.BadZipFile, struct.error, ArithmeticError),
)


def read(file: Path) -> dict[str, Any]:
    """Return the content of a checkpoint: names to tensors, or to mappings of them. Raise UserError for other files."""
    try:
        with file.open("rb") as stream:
            head, size = stream.read(_HEAD_BYTES), file.stat().st_size
        if _is_safetensors(head, size):
            return dict(safetensors.torch.load_file(file))
        _check_kind(file, head)
        with file.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats
            # Of a path instead of a stream, torch takes the name for the format.
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no file at {file}. Give the path of a checkpoint.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder. Give the path of a checkpoint file.") from None
    except pickle.UnpicklingError:  # torch's own message advises running the file's code
        if not head.startswith((b"PK", b"\x80")):
            raise UserError(f"{file} is not a checkpoint that can be read. Get the file again.") from None
        raise UserError(
            f"{file} holds more than tensors and plain values, which only code from the file could read; none was run. "
            "Save its state dict alone, where you trust the file."
        ) from None
    except _ERRORS as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(
            f"{file} is not a checkpoint that can be read ({type(error).__name__}: {reason}). Get the file again."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not names with tensors. Save a state dict.")
    return content


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file begins with the length of a header that fits into it, and the header with a brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _check_kind(file: Path, head: bytes) -> None:
    """Raise UserError for a file that is evidently something else than a checkpoint."""
    if not head:
        raise UserError(f"{file} is empty. Get the file again.")
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for sign, text in _OTHERS:
        if begin.startswith(sign):
            raise UserError(f"{file} {text}.")
    if head.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(file) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                raise UserError(f"{file} is a zip archive without a checkpoint of torch at its top. Unpack it first.")
