"""Laws of building shards straight into a bucket: the same bytes as in a folder, and a killed build goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mirl_dist.data.building.build import build
from mirl_dist.data.building.check import check
from mirl_dist.data.building.recipe import read
from mirl_dist.data.building.resume import AREA, MARKER
from mirl_dist.errors import UserError
from mirl_dist.storage import Folder, Store, open_store
from tests.data.building.test_build import SMALL, contents, killed_build
from tests.data.loaders import made, quiet, recipe
from tests.services.s3_server import S3Server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    number = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    return f"{server.bucket(f'shards-{number}')}/a/prefix"


def held(store: Store) -> dict[str, str]:
    return {name: hashlib.sha256(store.get(name)).hexdigest() for name in store.list("")}


def test_a_bucket_gets_the_same_bytes_as_a_folder(bucket: str, tmp_path: Path) -> None:
    made(SMALL, tmp_path / "out")
    store = open_store(bucket)
    manifest = build(recipe(SMALL), store, 2, quiet)
    assert held(store) == contents(tmp_path / "out")
    assert check(store, 2, quiet) == []
    said: list[str] = []
    assert build(recipe(SMALL), store, 1, lambda done, total, what: said.append(what)) == manifest
    assert said[-1] == "already built" and "writing shards" not in said
    with pytest.raises(UserError, match=f"{bucket} holds shards of another recipe or other images"):
        made(SMALL, store, seed=1)


@pytest.mark.long
def test_a_build_into_a_bucket_that_was_killed_goes_on(bucket: str, server: S3Server, tmp_path: Path) -> None:
    path = killed_build(tmp_path, bucket, server.env())
    store = open_store(bucket)
    done = [name for name in store.list(AREA) if name != MARKER]
    assert 2 <= len(done) <= 6 and not store.exists("manifest.json")
    with pytest.raises(UserError, match=f"{bucket} holds an unfinished build of another recipe"):
        build(read(path, ["seed=1"]), store, 1, quiet)
    before = written(server, bucket)
    build(read(path), store, 1, quiet)
    after = written(server, bucket)
    for name in done:
        tar = f"a/prefix/{Path(name).stem}.tar"
        assert after[tar] == before[tar], "what was done is left as it is"
    build(read(path), Folder(tmp_path / "undisturbed"), 1, quiet)
    assert held(store) == contents(tmp_path / "undisturbed")


def written(server: S3Server, bucket: str) -> dict[str, Any]:
    """When each object was written last."""
    found = server.client().list_objects_v2(Bucket=bucket.split("/")[2])["Contents"]
    return {one["Key"]: one["LastModified"] for one in found}


def test_the_marker_keeps_another_build_out_of_a_bucket(bucket: str) -> None:
    store = open_store(bucket)
    store.put(MARKER, json.dumps({"name": "theirs", "recipe": "f" * 64}).encode())
    with pytest.raises(UserError, match=r"holds an unfinished build of another .*'theirs', ffffffffffff"):
        made(SMALL, store)
    assert store.list("") == [MARKER]


@pytest.mark.long
def test_a_shard_that_is_missing_in_a_finished_bucket_is_written_again(bucket: str) -> None:
    store = open_store(bucket)
    manifest = made(SMALL, store)
    before = held(store)
    store.remove(manifest.shards[1].name)
    (fault,) = check(store, 1, quiet)
    assert fault.startswith(f"{bucket}/{manifest.shards[1].name}")
    assert made(SMALL, store) == manifest
    assert held(store) == before


def test_a_wrong_bucket_is_told_before_any_image_is_read(bucket: str) -> None:
    heard: list[str] = []
    store = open_store("s3://nobody-made-this-bucket/a")
    with pytest.raises(UserError, match=r"s3://nobody-made-this-bucket/a.*: the bucket does not exist\. Create it"):
        build(recipe(SMALL), store, 1, lambda done, total, what: heard.append(what))
    assert heard == []


def test_trying_a_bucket_leaves_nothing_there(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    one = {"set": "s", "kind": "clean", "clean": {"folder": str(tmp_path)}}
    with pytest.raises(UserError, match=r"a\.png: is empty"):
        made({"name": "s", "train": [one]}, open_store(bucket))
    assert open_store(bucket).list("") == []
