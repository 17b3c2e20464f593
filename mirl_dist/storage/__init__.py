"""Storage: folders, S3 and web servers behind one interface. `open_store` picks the store that an address means."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mirl_dist.storage.base import DEFAULT_OPTIONS, NotFound, Options, Rejected, StorageError, Store, Unavailable
from mirl_dist.storage.local import Folder
from mirl_dist.storage.retry import Patience

__all__ = ["Folder", "Rejected", "NotFound", "Options", "StorageError", "Store", "Unavailable", "open_store"]


def open_store(url: str, options: Options = DEFAULT_OPTIONS) -> Store:
    """The store that an address means: a folder's path, file://, s3://, http:// or https:// (read only).

    A folder tries everything once, whatever the options say. Nothing is asked of a server yet. Raises Rejected for
    other kinds, for 's3:/' where 's3://' must be meant, and for addresses that hold a key or a query.
    """
    kind, is_url, _ = url.partition("://")
    if not is_url:
        _check_scheme(url)
        return Folder(Path(url).expanduser())
    if kind == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
            raise Rejected(f"{url} is no folder of this machine. Write file:///path, or the path alone.")
        return Folder(Path(unquote(parts.path)))
    if kind == "s3":
        from mirl_dist.storage.s3 import S3Store

        return S3Store(url, options)
    if kind in ("http", "https"):
        from mirl_dist.storage.http import HttpStore

        return HttpStore(url, patience=Patience(options.patience_seconds))
    raise Rejected(f"{kind}:// is not known here. Give a folder's path, file://, s3://bucket/prefix, or http(s)://.")


def _check_scheme(url: str) -> None:
    """Raise Rejected for a path that begins as an address does: nobody means a folder named 's3:'."""
    one = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", url)
    if one is None:
        return
    kind, rest = one[1], url[one.end() :]
    meant = f"{kind}:///{rest}" if kind == "file" else f"{kind}://{rest}"
    if re.search(r"[@?#]", rest):
        raise Rejected(f"The address begins with {kind}:/ and holds '@', '?' or '#'. Write {kind}://, without keys.")
    if kind not in ("file", "s3", "http", "https"):
        meant = "a folder's path, file:///path, s3://bucket/prefix, or http(s)://host/folder"
    raise Rejected(f"{url} is no address and hardly a folder. Write {meant} (for a folder of that name: ./{url}).")
