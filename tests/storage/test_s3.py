"""Laws of a bucket: the same as a folder's, over a network that breaks, against a real server."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mirl_dist.storage import Folder, NotFound, Options, Rejected, Store, Unavailable, open_store
from mirl_dist.storage.retry import Patience, download, with_retries
from mirl_dist.storage.s3 import S3Store
from tests.services.ceph_server import MISSING, CephServer
from tests.services.faulty_proxy import FORBIDDEN, SLOW_DOWN, FaultyProxy, answer
from tests.services.s3_server import S3Server
from tests.storage import test_local
from tests.storage.test_local import PART, big

SECRET = "testing-secret"
SHORT = Patience(seconds=20, first=0.01, most=0.1)
ONCE = Patience(0)


@pytest.fixture(scope="module")
def ceph() -> Iterator[CephServer]:
    if not CephServer.installed():
        pytest.skip(MISSING)
    with CephServer() as running:
        yield running


def use(monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str]) -> None:
    """This process's S3 stores take their server and keys from `env` alone."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """In front of the server; this process's S3 stores go through it."""
    with FaultyProxy(server.url) as between:
        use(monkeypatch, server.env(between.url))
        yield between


def own(request: pytest.FixtureRequest) -> str:
    """A bucket's name of this test's own."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40].strip("-")
    return f"{name}-{random.randrange(1 << 32):08x}"


@pytest.fixture
def bucket(server: S3Server, request: pytest.FixtureRequest) -> str:
    """The address of a bucket of this test's own."""
    return server.bucket(own(request))


@pytest.fixture
def ceph_bucket(ceph: CephServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same in Ceph, where this process's S3 stores then go."""
    use(monkeypatch, ceph.env())
    return ceph.bucket(own(request))


@pytest.fixture
def store(proxy: FaultyProxy, bucket: str, lines: list[str]) -> S3Store:
    return S3Store(f"{bucket}/some/prefix", patience=SHORT, say=lines.append, connect_seconds=2, read_seconds=2)


def treat(proxy: FaultyProxy, requests: str, how: tuple[bytes | None, int | None], times: int = 1000) -> None:
    """Give some requests of a kind that answer, or cut the server's after so many bytes. requests: a pattern."""
    left = [how] * times

    def begin(line: str) -> tuple[bytes | None, int | None]:
        begun = FaultyProxy._begin(proxy, line)
        return left.pop() if re.search(requests, line) and left else begun

    proxy._begin = begin  # type: ignore[method-assign]


def impatient(url: str, **more: Any) -> S3Store:
    return S3Store(url, patience=ONCE, say=pytest.fail, **{"connect_seconds": 2, "read_seconds": 0.5, **more})


class TestTheLawsOfEveryStore(test_local.TestEveryStore):
    """All that a folder keeps."""

    MANY = 210  # this server lists 100 at once
    TURNS = 10

    @pytest.fixture
    def store(self, proxy: FaultyProxy, bucket: str) -> Store:
        return S3Store(f"{bucket}/some/prefix", patience=SHORT, say=pytest.fail)


class TestTheLawsOfEveryStoreInCeph(test_local.TestEveryStore):
    """The same against a server that people use in earnest."""

    TURNS = 10

    @pytest.fixture
    def store(self, ceph_bucket: str) -> Store:
        return S3Store(f"{ceph_bucket}/some/prefix", patience=SHORT, say=pytest.fail)


# -- a bucket ---------------------------------------------------------------------------------------------------


def test_stores_of_neighbouring_prefixes_do_not_see_each_other(proxy: FaultyProxy, bucket: str) -> None:
    one, two, all_ = (S3Store(f"{bucket}{end}", say=pytest.fail) for end in ("/run/", "/run2", ""))
    one.put("a", b"1")
    two.put("a", b"2")
    assert (one.list(""), two.list("")) == (["a"], ["a"])
    assert all_.list("") == ["run/a", "run2/a"]
    assert all_.list("run") == ["run/a"]
    assert one.where("a") == f"{bucket}/run/a"
    assert one.where() == f"{bucket}/run"
    assert all_.where() == bucket


def test_a_listing_comes_in_pages_and_leaves_out_what_consoles_call_folders(
    server: S3Server, proxy: FaultyProxy, bucket: str
) -> None:
    store, client = S3Store(f"{bucket}/p", say=pytest.fail), server.client()
    for key in ["p/folder/", *(f"p/{n:05d}" for n in range(110))]:
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"")
    assert store.list("") == [f"{n:05d}" for n in range(110)]
    assert len([line for line in proxy.requests if "list-type=2" in line]) == 2


EMPTY = b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
AGAIN = b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (EMPTY, "the server's answer is no listing"),
        (EMPTY.replace(b": 0", b": %d" % len(AGAIN)) + AGAIN, "the server's listing does not go on"),
    ],
)
def test_an_answer_that_is_no_listing_is_never_an_empty_one(
    proxy: FaultyProxy, bucket: str, said: bytes, expected: str
) -> None:
    proxy.always = said
    for act in (lambda: impatient(bucket).list(""), impatient(bucket).sweep):
        with pytest.raises(Unavailable, match=expected):
            act()


# -- options ----------------------------------------------------------------------------------------------------


def test_the_endpoint_of_the_options_beats_the_environment(
    server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(server.url) as other:
        use(monkeypatch, server.env(other.url))
        open_store(bucket, Options(endpoint=server.url)).put("a", b"1")
        assert other.requests == []
        assert open_store(bucket).get("a") == b"1"
        assert len(other.requests) == 1


def test_patience_comes_from_the_options(proxy: FaultyProxy, bucket: str) -> None:
    proxy.always = answer(*SLOW_DOWN)
    for url in (bucket, proxy.url):
        with pytest.raises(Unavailable, match="503"):
            open_store(url, Options(patience_seconds=0)).get("a")
    assert proxy.answered == 2, "one try each"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (Options(), None),
        (Options(encryption="AES256"), ("AES256", None)),
        (Options(encryption="aws:kms"), ("aws:kms", None)),
        (Options(encryption="aws:kms", kms_key="arn:aws:kms:eu-1:1:key/7"), ("aws:kms", "arn:aws:kms:eu-1:1:key/7")),
    ],
)
def test_all_that_is_written_is_encrypted_as_the_options_say(
    server: S3Server, proxy: FaultyProxy, bucket: str, options: Options, told: tuple[str, str | None] | None
) -> None:
    store = S3Store(bucket, options, patience=SHORT, say=pytest.fail)
    store.put("short", b"1")
    assert store.put_if_absent("lease", b"1")
    if options.kms_key:
        store.put("long", bytes(PART + 1))
    for name in store.list(""):
        said = server.client().head_object(Bucket=bucket.removeprefix("s3://"), Key=name)
        usual = (said.get("ServerSideEncryption"), None)  # as the bucket is set
        assert (said.get("ServerSideEncryption"), said.get("SSEKMSKeyId")) == (told or usual)


def test_a_server_that_cannot_encrypt_says_so(ceph_bucket: str) -> None:
    store = impatient(ceph_bucket, options=Options(encryption="aws:kms"), read_seconds=5)
    for data in (b"short", bytes(PART + 1)):
        with pytest.raises(Rejected, match=r"answered InvalidRequest \(HTTP 400\)\. Check .* and store\.encryption"):
            store.put("a", data)
    assert store.list("") == []


# -- what is sent -----------------------------------------------------------------------------------------------


def test_long_data_goes_up_in_parts_of_which_few_are_in_memory(
    server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, server.env())
    part = 5 << 20  # the least that S3 takes
    monkeypatch.setattr("mirl_dist.storage.s3.PART_BYTES", part)
    monkeypatch.setattr("mirl_dist.storage.s3_client.PART_BYTES", part)
    store, data = S3Store(bucket, say=pytest.fail), big(11 * part + 17)
    store.put("a", bytes(part + 1))  # loads the client
    tracemalloc.start()
    try:
        store.put("a", data)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert server.client().head_object(Bucket=bucket.removeprefix("s3://"), Key="a")["ETag"].endswith('-12"')
    assert store.get("a") == data
    assert most < 7 * part, "four that are sent, the next one, and what the client takes"


def test_what_was_damaged_on_its_way_is_refused_and_sent_again(
    ceph: CephServer, ceph_bucket: str, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the SHA-256 in a request's signature, which the other server does not look at."""
    data = big(PART + 5000)
    (tmp_path / "file").write_bytes(data)
    with FaultyProxy(ceph.url) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", between.url)
        store = S3Store(ceph_bucket, patience=SHORT, say=lines.append)
        acts: list[tuple[str, bytes, Callable[[], object]]] = [
            ("short", data[:100_000], lambda: store.put("short", data[:100_000])),
            ("long", data, lambda: store.put("long", data)),
            ("file", data, lambda: store.put_file("file", tmp_path / "file")),
            ("lease", data[:2000], lambda: store.put_if_absent("lease", data[:2000])),
        ]
        for name, whole, act in acts:
            between.flip_up_after, between.flips_left = 1000, 1
            before = between.flips
            assert act() in (None, True)
            assert between.flips == before + 1
            assert store.get(name) == whole
            assert re.search(r"answered XAmzContentSHA256Mismatch \(HTTP 400\)\. .*Trying again", lines[-1])


# -- leftovers --------------------------------------------------------------------------------------------------


def begun(client: Any, bucket: str) -> list[str]:
    """Keys of uploads in parts that neither ended nor were aborted."""
    return sorted(found["Key"] for found in client.list_multipart_uploads(Bucket=bucket).get("Uploads", []))


KEYS = ["run/a", "run/b/c", "run2/d", "run-2/e", "ru/f"]


def test_sweep_aborts_what_dead_uploads_left_and_only_below_the_prefix(
    server: S3Server, proxy: FaultyProxy, bucket: str
) -> None:
    """This server dates all uploads years back."""
    client, name = server.client(), bucket.removeprefix("s3://")
    for key in KEYS:
        client.create_multipart_upload(Bucket=name, Key=key)
    store = S3Store(f"{bucket}/run", say=pytest.fail)
    store.sweep(36500 * 86400)
    assert begun(client, name) == sorted(KEYS), "uploads that may still live stay"
    store.sweep()
    assert begun(client, name) == ["ru/f", "run-2/e", "run2/d"]
    S3Store(bucket, say=pytest.fail).sweep(0)
    assert begun(client, name) == []


def test_uploads_begun_now_are_swept_only_by_who_says_so(ceph: CephServer, ceph_bucket: str) -> None:
    client, name = ceph.client(), ceph_bucket.removeprefix("s3://")
    uploads = {key: client.create_multipart_upload(Bucket=name, Key=key)["UploadId"] for key in KEYS}
    client.upload_part(Bucket=name, Key="run/a", UploadId=uploads["run/a"], PartNumber=1, Body=b"half")
    store = S3Store(f"{ceph_bucket}/run", say=pytest.fail)
    store.sweep()
    store.sweep(3600)
    assert begun(client, name) == sorted(KEYS)
    for _ in range(4):
        client.create_multipart_upload(Bucket=name, Key="run/now")
        store.sweep(0)
        assert begun(client, name) == ["ru/f", "run-2/e", "run2/d"], "however young, by whatever clock"
    assert store.list("") == []


@pytest.mark.parametrize("ask", [r"\?uploads", r"\?uploadId"])
def test_a_store_that_may_not_sweep_says_so_and_goes_on(
    server: S3Server, proxy: FaultyProxy, bucket: str, lines: list[str], ask: str
) -> None:
    client, name = server.client(), bucket.removeprefix("s3://")
    client.create_multipart_upload(Bucket=name, Key="run/a")
    client.create_multipart_upload(Bucket=name, Key="run/b")

    treat(proxy, ask, (answer(*FORBIDDEN), None))
    S3Store(f"{bucket}/run", patience=SHORT, say=lines.append).sweep()
    missing = "s3:AbortMultipartUpload on it" if "Id" in ask else "s3:ListBucketMultipartUploads on the bucket"
    assert len(lines) == 1
    assert re.match(
        rf"warning: {bucket}/run: the server answered AccessDenied \(HTTP 403\)\. This needs the right {missing}\. "
        r"Grant it to these credentials, or use others\. Until then uploads that died stay there",
        lines[0],
    )


# -- refusals ---------------------------------------------------------------------------------------------------


def test_a_missing_bucket_is_not_allowed_and_never_not_there(proxy: FaultyProxy, tmp_path: Path) -> None:
    for act in acts_of(impatient("s3://nobody-made-this/run"), "a", tmp_path / "file").values():
        with pytest.raises(Rejected, match=r"^s3://nobody-made-this/run.*: the bucket does not exist\. Create it"):
            act()


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:///run", "s3://ab", "s3://b_cket!/x", f"s3://key:{SECRET}@bucket/run", f"s3://bucket/r?sig={SECRET}"],
)
def test_an_address_that_is_none_is_refused_and_its_keys_are_not_repeated(url: str) -> None:
    with pytest.raises(Rejected, match=r"An address of S3 is s3://bucket/prefix") as caught:
        open_store(url)
    assert SECRET not in str(caught.value)


def test_an_endpoint_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, server: S3Server) -> None:
    for endpoint in ("not an address", f"http://user:{SECRET}@127.0.0.1:9"):
        for name, value in server.env(endpoint).items():
            monkeypatch.setenv(name, value)
        for store in (impatient("s3://bucket/run"), impatient("s3://bucket/run", options=Options(endpoint=endpoint))):
            with pytest.raises(Rejected, match=r"Set store\.endpoint or AWS_ENDPOINT_URL_S3 to http") as caught:
                store.get("a")
            assert SECRET not in str(caught.value)


def test_missing_credentials_are_named(proxy: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Rejected, match="no usable credentials were found. Set AWS_ACCESS_KEY_ID"):
        impatient(bucket).get("a")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(Rejected, match="there is no profile 'nobody'"):
        impatient(bucket).get("a")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "SignatureDoesNotMatch", "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (403, "InvalidAccessKeyId", "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (400, "ExpiredToken", "Renew the credentials"),
        (403, "NoSuchKey", "This needs the right"),
        (401, "Unauthorized", "This needs the right"),
        (400, "AuthorizationHeaderMalformed", "Set AWS_DEFAULT_REGION"),
        (400, "KMS.DisabledException", r"Check the encryption's key \(store\.kms_key\) and the right to use it"),
        (501, "NotImplemented", "It cannot do this: use another, or leave out store.encryption"),
        (418, f"a teapot {SECRET}", "no code .HTTP 418.. Check the endpoint"),
    ],
)
def test_a_refusal_is_not_allowed_says_what_to_do_and_is_not_tried_again(
    proxy: FaultyProxy, store: S3Store, tmp_path: Path, status: int, code: str, said: str
) -> None:
    proxy.always = answer(status, code, f"your key testing and {SECRET}")
    acts = acts_of(store, "a", tmp_path / "file")
    for name in ("get", "put_if_absent", "list", "read"):
        before = proxy.answered
        with pytest.raises(Rejected, match=said) as caught:
            acts[name]()
        assert str(caught.value).startswith("s3://")
        assert SECRET not in str(caught.value)
        assert 1 <= proxy.answered - before <= 3, "a region's redirect may be followed, a refusal is not repeated"
    for name in ("exists", "size"):
        with pytest.raises(Rejected):
            acts[name]()


NEEDED = {
    "put": r"s3:PutObject on it",
    "put long": r"s3:PutObject on it",
    "put_file": r"s3:PutObject on it",
    "put_if_absent": r"s3:PutObject on it",
    "get": r"s3:GetObject \(and s3:ListBucket\) on it",
    "read": r"s3:GetObject \(and s3:ListBucket\) on it",
    "size": r"s3:GetObject \(and s3:ListBucket\) on it",
    "exists": r"s3:GetObject \(and s3:ListBucket\) on it",
    "list": r"s3:ListBucket on the bucket",
    "remove": r"s3:DeleteObject on it",
}


def acts_of(store: S3Store, name: str, file: Path) -> dict[str, Callable[[], object]]:
    file.write_bytes(b"x")
    return {
        "put": lambda: store.put(name, b"x"),
        "put long": lambda: store.put(name, bytes(PART + 1)),
        "put_file": lambda: store.put_file(name, file),
        "put_if_absent": lambda: store.put_if_absent(name, b"x"),
        "get": lambda: store.get(name),
        "read": lambda: list(store.read(name)),
        "size": lambda: store.size(name),
        "exists": lambda: store.exists(name),
        "list": lambda: store.list(name),
        "remove": lambda: store.remove(name),
    }


def refuse_all(store: S3Store, name: str, file: Path, but: Sequence[str] = ()) -> None:
    """See that each act is refused by the right that it lacks, except those in `but`, which work."""
    for act, work in acts_of(store, name, file).items():
        if act in but:
            work()
            continue
        text = (
            rf"{store.where(name)}: the server answered .*403.* This needs the right {NEEDED[act]}\. Grant it to these"
        )
        with pytest.raises(Rejected, match=text) as caught:
            work()
        assert not isinstance(caught.value, NotFound)


def test_every_refusal_names_the_place_and_the_right_that_is_needed(
    proxy: FaultyProxy, bucket: str, tmp_path: Path
) -> None:
    proxy.always = answer(*FORBIDDEN)
    refuse_all(impatient(f"{bucket}/run"), "run.json", tmp_path / "file")
    with pytest.raises(Rejected, match=r"s3:PutObject \(and kms:GenerateDataKey and kms:Decrypt of the key\) on it"):
        impatient(bucket, options=Options(encryption="aws:kms")).put("a", b"")


def test_rights_are_refused_by_a_real_server_and_never_read_as_not_there(
    ceph: CephServer, ceph_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: list[str]
) -> None:
    client, name = ceph.client(), ceph_bucket.removeprefix("s3://")
    client.put_object(Bucket=name, Key="run/there", Body=b"x")
    use(monkeypatch, ceph.user("guest", "guest-secret"))
    for key in ("there", "missing"):
        refuse_all(impatient(f"{ceph_bucket}/run", read_seconds=5), key, tmp_path / "file")

    def allow(*rights: str) -> None:
        on = [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"]
        who = {"AWS": ["arn:aws:iam:::user/guest"]}
        said = {"Effect": "Allow", "Principal": who, "Action": [f"s3:{right}" for right in rights], "Resource": on}
        client.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": [said]}))

    store = S3Store(f"{ceph_bucket}/run", patience=ONCE, say=lines.append)
    allow("GetObject")
    refuse_all(store, "there", tmp_path / "file", ["get", "read", "size", "exists"])
    refuse_all(store, "missing", tmp_path / "file")
    allow("GetObject", "ListBucket")
    refuse_all(store, "there", tmp_path / "file", ["get", "read", "size", "exists", "list"])
    assert store.exists("missing") is False
    allow("PutObject", "GetObject", "ListBucket", "DeleteObject")
    refuse_all(store, "there", tmp_path / "file", list(NEEDED))
    client.create_multipart_upload(Bucket=name, Key="run/there")
    assert lines == []
    store.sweep(0)
    assert len(lines) == 1 and "This needs the right s3:ListBucketMultipartUploads on the bucket" in lines[0]


def test_a_wrong_key_is_told_from_a_missing_right(
    ceph: CephServer, ceph_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in (("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId")):
        use(monkeypatch, ceph.env() | {name: "another"})
        with pytest.raises(Rejected, match=rf"answered {code} \(HTTP 403\)\. Check AWS_ACCESS_KEY_ID and"):
            impatient(ceph_bucket, read_seconds=5).get("a")


def test_a_clock_that_is_wrong_for_a_while_is_waited_for(proxy: FaultyProxy, store: S3Store, lines: list[str]) -> None:
    store.put("a", b"1")
    skewed = answer(403, "RequestTimeTooSkewed")
    proxy.answers = [skewed, skewed]
    assert store.get("a") == b"1"
    assert re.search(
        r"answered RequestTimeTooSkewed \(HTTP 403\)\. Set this machine's clock\. Trying again for", lines[0]
    )
    proxy.always = skewed
    with pytest.raises(Unavailable, match=r"Set this machine's clock\."):
        impatient(store.where()).put("a", b"")


def test_a_404_of_something_else_is_never_not_there(proxy: FaultyProxy, store: S3Store, tmp_path: Path) -> None:
    """As a gateway answers while the S3 server behind it is away."""
    page = b"<html>default backend - 404</html>"
    head = b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: "
    for body in (page, b""):
        proxy.always = head + b"%d\r\n\r\n" % len(body) + body
        for work in acts_of(impatient(store.where()), "run.json", tmp_path / "file").values():
            with pytest.raises(Unavailable, match=r"/run\.json: .*404.*\. Check the"):
                work()
    proxy.always, proxy.answers = None, [head + b"0\r\n\r\n"] * 4
    assert store.exists("run.json") is False
    with pytest.raises(NotFound):
        store.get("run.json")


def test_a_redirect_that_leads_nowhere_is_not_allowed(proxy: FaultyProxy, bucket: str) -> None:
    proxy.always = answer(301, "PermanentRedirect")
    with pytest.raises(Rejected, match="redirects without saying where to. Set AWS_DEFAULT_REGION"):
        impatient(bucket).get("a")


# -- a network that breaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["reset", "end"])
def test_a_broken_download_goes_on_and_only_the_missing_bytes_travel(
    proxy: FaultyProxy, store: S3Store, tmp_path: Path, lines: list[str], ending: str
) -> None:
    data = big()
    store.put("a", data)
    proxy.ending, proxy.cut_after = ending, 1_000_000
    before = proxy.bytes_down
    download(store, "a", tmp_path / "a", len(data), patience=SHORT, say=lines.append)
    assert (tmp_path / "a").read_bytes() == data
    assert proxy.cuts >= 3, "the network did break"
    assert proxy.bytes_down - before < len(data) + (proxy.cuts + 1) * ((1 << 16) + 1000)
    assert len(lines) == 1, "one line, not one for each try"
    assert re.match(r"s3://.*/some/prefix/a: .*Check the server and the network.* Trying again for \d+ s\.", lines[0])


@pytest.mark.parametrize("ending", ["reset", "end"])
def test_a_body_that_ends_early_is_never_taken_for_the_whole(proxy: FaultyProxy, store: S3Store, ending: str) -> None:
    data = big(500_000)
    store.put("a", data)
    plain = impatient(f"{store.where()}")
    for after in (1, 300, 2000, 262_144, 499_999):
        proxy.calm()
        proxy.ending, proxy.cut_after = ending, after
        with pytest.raises(Unavailable):
            list(plain.read("a"))
        with pytest.raises(Unavailable):
            plain.get("a")
    proxy.cut_after, proxy.cuts_left = 300_000, 3
    assert store.get("a") == data, "with patience it comes whole"


def test_a_get_never_mixes_two_versions(server: S3Server, proxy: FaultyProxy, store: S3Store) -> None:
    old, new = big(900_000), bytes(900_000)
    store.put("a", old)
    proxy.cut_after, proxy.cuts_left = 600_000, 1

    def replace(line: str) -> None:
        bucket, _, prefix = store.where("a").removeprefix("s3://").partition("/")
        server.client().put_object(Bucket=bucket, Key=prefix, Body=new)

    store._client.say = replace  # called between the break and the next try
    assert store.get("a") == new
    assert proxy.cuts == 1


def test_random_resets_are_survived(server: S3Server, proxy: FaultyProxy, store: S3Store, tmp_path: Path) -> None:
    proxy.cut_every, proxy.cut_within = 3, 200
    for n in range(10):
        store.put(f"r/{n}", big(5000 + n))
    assert store.list("r") == [f"r/{n}" for n in range(10)]
    for n in range(10):
        assert store.exists(f"r/{n}")
        assert store.get(f"r/{n}") == big(5000 + n)
        download(store, f"r/{n}", tmp_path / str(n), 5000 + n, patience=SHORT, say=lambda line: None)
        assert (tmp_path / str(n)).read_bytes() == big(5000 + n)
    assert proxy.cuts > 5


def test_slow_down_is_obeyed_by_trying_later(
    proxy: FaultyProxy, store: S3Store, tmp_path: Path, lines: list[str]
) -> None:
    acts: list[tuple[Callable[[], object], object]] = [
        (lambda: store.put("a", b"1"), None),
        (lambda: store.put_if_absent("b", b"2"), True),
        (lambda: store.get("a"), b"1"),
        (lambda: store.exists("a"), True),
        (lambda: store.size("a"), 1),
        (lambda: store.list(""), ["a", "b"]),
        (lambda: store.remove("a"), None),
        (store.sweep, None),
        (lambda: download(store, "b", tmp_path / "b", 1, patience=SHORT, say=lines.append), None),
    ]
    for act, expected in acts:
        proxy.answers = [answer(*SLOW_DOWN), answer(500, "InternalError"), answer(503, "ServiceUnavailable")]
        assert act() == expected
        assert proxy.answers == []
    assert proxy.answered == 3 * len(acts)
    proxy.answers = [answer(400, "KMS.ThrottlingException")]
    store.put("b", b"2")
    proxy.always = answer(*SLOW_DOWN)
    with pytest.raises(Unavailable, match=r"answered SlowDown \(HTTP 503\)\. Check the server"):
        impatient(store.where()).get("b")


@pytest.mark.long
def test_a_server_that_says_nothing_does_not_hang_for_ever(proxy: FaultyProxy, store: S3Store) -> None:
    store.put("a", b"1")
    proxy.drop()
    proxy.silent = True
    quick = impatient(store.where())
    for act in (lambda: quick.get("a"), lambda: list(quick.read("a")), lambda: quick.put("a", b"2")):
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:\d+ fell silent\. Check the server"):
            act()
    assert proxy.silences == 3


def test_a_body_that_stops_in_the_middle_does_not_hang_for_ever(proxy: FaultyProxy, store: S3Store) -> None:
    store.put("a", big())
    proxy.ending, proxy.cut_after, proxy.cuts_left = "stall", 1_000_000, 1
    came = 0
    with pytest.raises(Unavailable, match=r"fell silent\. Check the server"):
        for block in impatient(store.where()).read("a"):
            came += len(block)
    assert proxy.cuts == 1
    assert 900_000 < came < 1_000_000, "what came before is kept"


def test_a_put_whose_answer_is_lost_is_still_the_winners(proxy: FaultyProxy, store: S3Store, tmp_path: Path) -> None:
    proxy.cut_after, proxy.cuts_left = 1, 1
    assert store.put_if_absent("lease", b"mine") is True, "the retry meets its own object"
    assert proxy.cuts == 1
    assert store.put_if_absent("lease", b"mine") is False, "the same bytes of another writer are not mine"


@pytest.mark.long
def test_an_upload_in_parts_survives_resets_and_lost_answers(
    server: S3Server, proxy: FaultyProxy, store: S3Store, tmp_path: Path
) -> None:
    data = big(3 * (PART) + 17)
    (tmp_path / "file").write_bytes(data)
    proxy.cut_after, proxy.cuts_left = 1, 4
    store.put_file("big", tmp_path / "file")
    assert proxy.cuts == 4
    assert store.get("big") == data
    before = len(proxy.requests)
    treat(proxy, r"^POST.*uploadId=", (None, 1), times=1)
    store.put_file("big", tmp_path / "file")
    assert store.get("big") == data
    ends = [line for line in proxy.requests[before:] if line.startswith("POST") and "uploadId=" in line]
    assert len(ends) == 2, "the answer to the first one got lost"


def test_an_upload_in_parts_that_fails_leaves_nothing(
    server: S3Server, proxy: FaultyProxy, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes((PART) + 1))
    store = impatient(bucket, read_seconds=5)
    treat(proxy, "partNumber=2", (answer(*FORBIDDEN), None))
    with pytest.raises(Rejected, match="AccessDenied"):
        store.put_file("big", tmp_path / "file")
    assert not store.exists("big")
    assert server.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://")).get("Uploads", []) == []
    with pytest.raises(Rejected, match=r"gone: No such file or directory\. Nothing was written to s3://"):
        store.put_file("big", tmp_path / "gone")


def test_a_server_that_is_away_for_a_while_is_waited_for(proxy: FaultyProxy, store: S3Store, lines: list[str]) -> None:
    store.put("a", b"1")
    proxy.refuse()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(store.get, "a")
        while not lines:
            time.sleep(0.01)
        assert not reading.done()
        proxy.accept()
        assert reading.result(30) == b"1"
    assert re.search(r"127\.0\.0\.1:\d+ (cannot be reached|broke the transfer)", lines[0])


def test_patience_ends_with_what_was_tried_and_how_long(proxy: FaultyProxy, store: S3Store, lines: list[str]) -> None:
    proxy.refuse()
    short = S3Store(store.where(), patience=Patience(0.3, 0.01, 0.05), say=lines.append)
    short._client.client()  # takes its time on a busy machine
    with pytest.raises(
        Unavailable, match=r"cannot be reached\..* Given up on reading s3://.*/a after \d+ tries and \d+ s"
    ) as caught:
        short.get("a")
    assert SECRET not in str(caught.value)
    assert len(lines) == 1


def test_a_server_that_dies_again_and_again_keeps_what_it_took(
    ceph: CephServer, ceph_bucket: str, lines: list[str]
) -> None:
    store = S3Store(ceph_bucket, patience=Patience(60, 0.01, 0.1), say=lines.append, read_seconds=5)
    done = threading.Event()
    leases: list[bool] = []

    def write() -> int:
        n = 0
        while not done.is_set() or n < 20:
            store.put(f"steps/{n:05d}", big(20_000 + n))
            leases.append(store.put_if_absent(f"leases/{n:05d}", b"mine"))
            n += 1
        return n

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            for kill in (ceph.kill, ceph.kill_all, ceph.kill):
                time.sleep(0.3)
                kill()
                ceph.restart()
        finally:
            done.set()
        count = writing.result(60)
    assert store.list("steps") == [f"steps/{n:05d}" for n in range(count)]
    assert all(store.get(f"steps/{n:05d}") == big(20_000 + n) for n in range(count))
    assert leases == [True] * count, "an answer that was lost costs no lease"
    assert lines and all("Trying again" in line for line in lines)


# -- patience ---------------------------------------------------------------------------------------------------


def test_patience_tries_again_what_may_pass_and_leaves_the_global_chance_alone() -> None:
    left = [Unavailable("busy."), Unavailable("busy."), NotFound("gone")]

    def work() -> None:
        raise left.pop(0)

    random.seed(7)
    before = random.getstate()
    with pytest.raises(NotFound):
        with_retries(work, "the work", SHORT, lambda line: None)
    assert left == [] and random.getstate() == before


def test_patience_begins_afresh_when_bytes_arrive(tmp_path: Path) -> None:
    class Drip(Folder):
        def read(self, name: str, offset: int = 0) -> Iterator[bytes]:
            time.sleep(0.2)
            yield b"x"
            raise Unavailable("broken.")

    download(Drip(tmp_path), "a", tmp_path / "a", 12, patience=Patience(2, 0.01, 0.02), say=lambda line: None)
    assert (tmp_path / "a").read_bytes() == b"x" * 12, "in all it took longer than patience"


def test_a_client_belongs_to_one_process(proxy: FaultyProxy, store: S3Store) -> None:
    store.put("a", b"1")
    assert list(store._client._clients) == [(os.getpid(), 1)]
    assert pickle.loads(pickle.dumps(store))._client._clients == {}
    assert SECRET.encode() not in pickle.dumps(store)
