"""Storage behind one interface: local folders, S3 and web servers. `open_store` selects the store for an address."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mirl_dist.config.local_paths import expand_home
from mirl_dist.errors import UserError
from mirl_dist.storage.base import DEFAULT_OPTIONS, NotFound, Options, Rejected, StorageError, Store, Unavailable
from mirl_dist.storage.local import Folder
from mirl_dist.storage.retry import Patience

__all__ = ["Folder", "Rejected", "NotFound", "Options", "StorageError", "Store", "Unavailable", "open_store"]


def open_store(url: str, options: Options = DEFAULT_OPTIONS) -> Store:
    """Return the store for an address: a folder's path, file://, s3://, or http:// and https:// (read only).

    Sends no request yet. A folder ignores the options and never retries. Raises Rejected for an unknown scheme, for a
    scheme with a single slash ('s3:/'), and for an address that contains credentials or a query.
    """
    kind, is_url, _ = url.partition("://")
    if not is_url:
        _check_scheme(url)
        try:
            return Folder(expand_home(url))
        except UserError as fault:
            raise Rejected(str(fault)) from None
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
    """Raise Rejected for a path that looks like a mistyped address, such as 's3:/bucket'."""
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
