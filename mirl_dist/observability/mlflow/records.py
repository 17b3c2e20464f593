"""Records for a tracking store, their line format in journals and commits, and names and texts that MLflow 3 accepts.

Runs have names of this project ("run", "round/03") and records hold plain values only, independent of any store. A line
may be damaged or come from another machine, so `parse` checks every field. Texts returned here contain no passwords.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from mirl_dist.config import credentials
from mirl_dist.errors import UserError

POINTS_PER_CALL, PARAMS_PER_CALL = 1000, 100  # MLflow's limits, as are the next three (characters)
LONGEST_NAME, LONGEST_PARAM, LONGEST_TAG = 250, 6000, 8000
BY_ROUND = "round/"  # prefix of names with step = round; scores without the prefix have step = alive weights
IMAGES, SMALL_PIXELS = "images/", 640  # folder of MLflow's image grid; longer side of the thumbnails
_KINDS = ("open", "params", "points", "ticket", "file", "end")
_ID, _RUN_KEY = re.compile(r"[0-9a-f]{32}-\d{1,15}"), re.compile(r"run|round/\d{2,6}")


@dataclass(eq=False)
class Record:
    """One item to deliver to a tracking store."""

    kind: str  # open, params, points, ticket, file or end
    run_key: str  # "run" or "round/03"
    name: str = ""  # name of a run or a file; the final status for kind "end"
    texts: dict[str, str] = field(default_factory=dict)  # tags or params
    points: list[tuple[str, float, int, int]] = field(default_factory=list)  # name, value, time in ms, step
    data: bytes = b""  # content of a file
    at_ms: int = 0  # wall-clock time of creation
    id: str = ""  # unique over all processes of a run: 32 hex digits of the process, '-', and a number


class DamagedRecord(ValueError):
    """Raised for a line that is not a valid record."""


def to_line(record: Record, *, with_data: bool = True) -> bytes:
    """Return a record as one JSON line. with_data: include a file's content."""
    fields: dict[str, object] = {"id": record.id, "do": record.kind, "where": record.run_key, "at_ms": record.at_ms}
    for key in ("name", "texts", "points"):
        if value := getattr(record, key):
            fields[key] = value
    if with_data and record.data:
        fields["data"] = base64.b64encode(record.data).decode()
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def parse(line: bytes, data: bytes | None = None) -> Record:
    """Parse a line. data: a file's content if it is not in the line. Raise DamagedRecord for an invalid line."""
    try:
        fields = json.loads(line)
        record = Record(
            fields["do"],
            fields["where"],
            fields.get("name", ""),
            {str(name): str(text) for name, text in fields.get("texts", {}).items()},
            [(str(name), float(value), int(ms), int(step)) for name, value, ms, step in fields.get("points", [])],
            base64.b64decode(fields.get("data", ""), validate=True) if data is None else data,
            int(fields["at_ms"]),
            fields["id"],
        )
        valid = (
            record.kind in _KINDS
            and _RUN_KEY.fullmatch(record.run_key) is not None
            and _ID.fullmatch(record.id) is not None
            and 0 <= record.at_ms < 2**53
            and all(math.isfinite(value) for _, value, _, _ in record.points)
            and (record.kind != "file" or is_relative_file(record.name))
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedRecord(str(error)) from None
    if not valid:
        raise DamagedRecord("no run writes such a record")
    return record


def is_relative_file(name: str) -> bool:
    """Whether a name is a relative file path without '..' parts."""
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def parse_all(lines: bytes) -> tuple[list[Record], int]:
    """Parse a commit's lines. Return the records and the number of damaged lines."""
    records, damaged = list[Record](), 0
    for line in lines.splitlines():
        try:
            records.append(parse(line))
        except DamagedRecord:
            damaged += 1
    return records, damaged


def flatten(params: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Flatten nested params to {'a.b': text}; values other than strings are written as JSON."""
    texts: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            texts |= flatten(value, f"{prefix}{name}.")
        else:
            texts[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return texts


def legal_name(name: str) -> str:
    """Return a name that MLflow accepts for metrics, params and tags: letters, digits, _ - . / space, 250 at most."""
    parts = re.sub(r"[^/\w.\- ]", "_", name)[:LONGEST_NAME].split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "_"


def round_name(run_name: str, round_: int) -> str:
    """Return the name of a nested run: 'RUN, round 03'."""
    return f"{run_name}, round {round_:02d}"


def is_score(name: str) -> bool:
    """Whether a metric is a score of any protocol: 'psnr/...', 'ssim/...', 'psnr.<protocol>/...'."""
    return name.partition("/")[0].partition(".")[0] in ("psnr", "ssim")


def image_files(key: str, png: bytes, step: int) -> dict[str, bytes]:
    """Return the two files that MLflow's image grid needs for a picture: the original and a thumbnail.

    They are named as by MLflow's `log_image`, except that timestamp and UUID are derived from key and step, so that
    logging a picture again replaces the first one.
    """
    from PIL import Image

    path = f"{IMAGES}{legal_name(key).replace('/', '~')}+step+{step}+timestamp+{step}"
    path += f"+{uuid.uuid5(uuid.NAMESPACE_URL, path)}"
    small, data = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    small.thumbnail((SMALL_PIXELS, SMALL_PIXELS))
    small.save(data, "WEBP", quality=90)
    return {f"{path}.png": png, f"{path}+compressed.webp": data.getvalue()}


def redact_uri(uri: str) -> str:
    """Return a tracking URI without password, token and query; web addresses also lose the user name.

    A password may contain an unescaped '/', so everything up to the last '@' is treated as credentials."""
    kind, is_url, rest = uri.partition("://")
    place, *query = re.split("[?#]", rest if is_url else uri, maxsplit=1)
    if is_url and place.startswith("/") and not _is_web(kind):  # a file path
        return f"{kind}://{place}"
    if query and "@" in query[0]:  # the start of the host is ambiguous
        return f"{kind}://***" if is_url else "***"
    user, at, host = place.rpartition("@")
    if not is_url:
        return f"***@{host}" if at else uri
    name = user.partition(":")[0]
    if _is_web(kind) or "/" in name:
        name = ""
    return f"{kind}://{name}{'@' if name else ''}{host}"


def check_uri(uri: str) -> None:
    """Raise UserError, without credentials in it, for a tracking URI with an '@' behind the host or an invalid port.

    Also for credentials in MLflow's environment variables that no header can carry.
    """
    credentials.check_variables(("MLFLOW_TRACKING_TOKEN",))
    credentials.check_variables(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), is_encoded=True)
    kind, is_url, rest = uri.partition("://")
    place, *query = re.split("[?#]", rest, maxsplit=1)
    if not is_url or (place.startswith("/") and not _is_web(kind)):
        return
    host, _, path = place.partition("/")
    try:
        sound = urlsplit(uri).port != 0
    except ValueError:
        sound = False
    said_by = "the tracking URI of tracking.uri or MLFLOW_TRACKING_URI"
    if "@" in path or (query and "@" in query[0] and (_is_web(kind) or not sound)):
        raise UserError(
            f"found an '@' behind the host in {said_by}. Write a / in a password as %2F, ? as %3F, # as %23, @ as %40."
        )
    if not sound:
        port = host.rpartition("@")[2].rpartition(":")[2]
        out_of_range = port.isdecimal() and not 0 < int(port) < 65536
        what = f"the port {port}, which is out of range," if out_of_range else "no host and port"
        raise UserError(f"found {what} in {said_by}. Write http://host:port with a port from 1 to 65535.")


def _is_web(kind: str) -> bool:
    return kind.lower() in ("http", "https")


def default_uri(configured: str | None) -> str:
    """Return the configured tracking URI, else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def page_address(uri: str, experiment_id: str, run_id: str) -> str:
    """Return a run's page, or the command that opens the store, without credentials. run_id: '' while unknown."""
    clean = redact_uri(uri)
    if not clean.startswith("http"):
        own = Path(sys.executable).parent / "mlflow"  # this environment's; its relative path if it is near
        is_near = own.exists() and own.is_relative_to(Path.cwd())
        command = own.relative_to(Path.cwd()) if is_near else "mlflow"
        return f"{clean} (to see it: {command} ui --backend-store-uri {clean})"
    return f"{clean.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}" if run_id else clean


def redact(text: str, uri: str) -> str:
    """Mask in a text the secrets of the tracking URI, of MLflow's environment variables and of any URL."""
    kind, _, rest = uri.partition("://")
    secrets = [os.environ.get(f"MLFLOW_TRACKING_{word}", "") for word in ("PASSWORD", "TOKEN")]
    for place in (rest, re.split("[?#]", rest)[0], re.split("[/?#]", rest)[0]):
        user, _, password = place.rpartition("@")[0].partition(":")
        secrets += [password, unquote(password), user if not password and _is_web(kind) else ""]
    secrets.append(rest.partition("?")[2].partition("#")[0])
    text = re.sub(r"(\w://)(?!/)\S+@", r"\1***@", text.replace(uri, redact_uri(uri)))
    return credentials.mask(text, credentials.written_forms(secrets))


def database(uri: str) -> Path:
    """Return the path of a SQLite store's file."""
    return Path(uri.partition(":///")[2].partition("?")[0]).resolve()


def describe(trouble: BaseException, uri: str) -> str:
    """Return a short error description for messages, with secrets of the tracking URI masked."""
    text = " ".join(redact(str(trouble), uri).split())
    if "out-of-date database schema" in text:
        text = (
            "the database has the schema of another MLflow version; back it up and run `mlflow db upgrade "
            f"{redact_uri(uri)}`, or install the version that made it"
        )
    short = text if len(text) <= 300 else f"{text[:120]} ... {text[-170:]}"  # the cause is at the end
    return f"{type(trouble).__name__}: {short}"
