"""Runs that are kept on S3: refusals, a server that goes away, two launches at once, and a commit that was spoiled."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.services.faulty_proxy import FORBIDDEN, FaultyProxy, answer
from tests.services.outcomes import expect
from tests.services.s3_server import S3Server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        running.bucket("runs")
        yield running


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.url) as running:
        yield running


class Bucket:
    """What lies below a run's prefix, past any proxy."""

    def __init__(self, server: S3Server, run: str) -> None:
        self._client, self.url, self._prefix = server.client(), f"s3://runs/{run}", f"{run}/"

    def names(self) -> list[str]:
        found = self._client.list_objects_v2(Bucket="runs", Prefix=self._prefix).get("Contents", [])
        return sorted(o["Key"].removeprefix(self._prefix) for o in found)

    def get(self, name: str) -> bytes:
        return bytes(self._client.get_object(Bucket="runs", Key=self._prefix + name)["Body"].read())

    def put(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket="runs", Key=self._prefix + name, Body=data)

    def restore(self, objects: dict[str, bytes]) -> None:
        """Make the bucket hold these objects and no others."""
        for name in set(self.names()) - objects.keys():
            self._client.delete_object(Bucket="runs", Key=self._prefix + name)
        for name, data in objects.items():
            self.put(name, data)

    def digests(self) -> list[str]:
        ended = [n for n in self.names() if "/ticket-" in n and n.endswith("/ticket.json")]
        return [json.loads(self.get(name))["digest"] for name in ended]

    def commits(self) -> list[str]:
        return [n for n in self.names() if n.endswith("/COMPLETE.json")]


Start = Callable[..., Any]


@pytest.fixture
def start(lab: Any, server: S3Server, proxy: FaultyProxy, tmp_path: Path) -> Start:
    """Train the tiny config on two ranks with its run on S3, reached through the proxy."""

    def starting(bucket: Bucket, fatal: dict[str, Any] | None = None, **sets: Any) -> Any:
        sets = {"run.folder": bucket.url, "store.lease_seconds": 2, **sets}
        env = server.env(proxy.url) | ({} if fatal is None else {"MIRL_FATAL": json.dumps(fatal)})
        script = None if fatal is None else lab.fatal
        return lab.start(*lab.train(tmp_path, sets), cwd=tmp_path, world=2, env=env, script=script)

    return starting


LONG = {"train.epochs": 40, "prune.rounds": 0}  # some seconds: what is done to it happens while it trains


def test_a_run_on_s3_that_is_killed_goes_on_to_the_tickets_of_one_in_a_folder(
    lab: Any, reference: Path, server: S3Server, start: Start
) -> None:
    bucket = Bucket(server, "killed")
    assert start(bucket, {"rank": "all", "step": [1, 3]}).wait().codes == (-9, -9)
    assert any(name.startswith("rounds/01/steps/00000002-0001/") for name in bucket.commits())
    ended = expect(0, start(bucket).wait(), "resuming: round 1, after step 2")
    assert "is dead; going on in its place" in ended.err, "at once: it ran on this machine"
    assert bucket.digests() == lab.digests(reference)
    assert not any("/steps/" in name for name in bucket.names())
    assert b"testing-secret" not in b"".join(bucket.get(name) for name in bucket.names())
    status = json.loads(lab.start("status", bucket.url, "--json", cwd=lab.folder, env=server.env()).wait().out)
    assert status["rounds_finished"] == 3 and status["writer"]["ended"] == "finished"


@pytest.mark.long
def test_a_refusal_names_bucket_key_and_right_and_nothing_is_begun_afresh(
    server: S3Server, proxy: FaultyProxy, start: Start
) -> None:
    bucket = Bucket(server, "refused")
    assert start(bucket, {"rank": "all", "step": [0, 3]}).wait().codes == (-9, -9)
    before = {name: bucket.get(name) for name in bucket.names()}
    proxy.always = answer(*FORBIDDEN)
    words = ("s3://runs/refused/run.json", "AccessDenied (HTTP 403)", "s3:GetObject")
    assert expect((2, 2), start(bucket).wait(), *words).err.count("\n") == 1
    assert {name: bucket.get(name) for name in bucket.names()} == before


@pytest.mark.long
def test_a_right_that_is_taken_away_while_training_stops_at_a_step_with_the_cause(
    server: S3Server, proxy: FaultyProxy, start: Start
) -> None:
    bucket = Bucket(server, "taken")
    launch = start(bucket, **LONG)
    launch.until(bucket.commits)
    proxy.always = answer(*FORBIDDEN)
    failed = "a commit failed, and training stops: s3://runs/taken/"
    expect((2, 2), launch.wait(), failed, "AccessDenied (HTTP 403). This needs the right s3:")
    proxy.calm()
    expect(0, start(bucket, **LONG).wait(), "resuming: round 0, after step ")


@pytest.mark.long
def test_training_outlives_an_absent_store_and_stops_resumably_when_it_stays_away(
    server: S3Server, proxy: FaultyProxy, start: Start
) -> None:
    bucket = Bucket(server, "away")
    launch = start(bucket, **LONG, **{"store.patience_seconds": 3})
    launch.until(bucket.commits)
    proxy.refuse()
    ended = launch.wait()
    proxy.accept()
    expect((75, 75), ended, "a commit failed, and training stops: ", "Given up", "Go on with --resume auto.")
    assert bucket.commits(), "what was committed is there"


@pytest.mark.long
def test_a_store_that_comes_back_in_time_is_not_noticed_by_the_run(
    lab: Any, reference: Path, server: S3Server, proxy: FaultyProxy, start: Start
) -> None:
    bucket = Bucket(server, "back")
    launch = start(bucket)
    launch.until(bucket.commits)
    proxy.refuse()
    time.sleep(1.5)
    proxy.accept()
    expect(0, launch.wait())
    assert bucket.digests() == lab.digests(reference)


@pytest.mark.long
def test_of_two_launches_one_runs_and_when_it_falls_silent_the_other_takes_over(
    lab: Any, server: S3Server, start: Start
) -> None:
    bucket = Bucket(server, "twice")
    sets = LONG | {"store.lease_seconds": 5}  # so long may a busy machine keep the first from telling that it lives
    first = start(bucket, **sets)
    first.until(bucket.commits)
    ended = expect((2, 2), start(bucket, **sets).wait())
    assert "s3://runs/twice is held by another launch (" in ended.err and "which is alive" in ended.err
    assert f"pid {first.pids[0]}" in ended.err and "choose another run.folder" in ended.err
    first.kill(signal.SIGSTOP)  # silent, but not gone: as a machine that was cut off
    second = start(bucket, **sets)
    second.until(lambda: any(name.startswith("accepted/00000002") for name in bucket.names()))
    second.until(lambda: any("-0002/COMPLETE.json" in name for name in bucket.commits()))
    first.kill(signal.SIGCONT)
    late = first.wait()
    assert late.rc in (1, 2), late.said()
    assert "no longer holds s3://runs/twice" in late.err or "another rank has exited" in late.err
    expect(0, second.wait(), "sent no heartbeat for 5 s; going on in its place")
    assert len(bucket.digests()) == 1


@pytest.mark.long
def test_a_spoiled_commit_is_noticed_and_the_one_before_it_taken(
    lab: Any, reference: Path, server: S3Server, start: Start
) -> None:
    bucket, often = Bucket(server, "spoiled"), {"guard.same_step_failures": 9}
    assert start(bucket, {"rank": "all", "step": [1, 5]}).wait().codes == (-9, -9)
    step, whole = "rounds/01/steps/00000004-0001", {name: bucket.get(name) for name in bucket.names()}
    for part in ("weights.safetensors", "moments.safetensors", "mask.safetensors", "state.json", "COMPLETE.json"):
        bucket.restore(whole)
        name = f"{step}/{part}"
        data = bytearray(whole[name])
        data[len(data) // 2] ^= 4
        bucket.put(name, bytes(data))
        ended = start(bucket, {"rank": "all", "step": [1, 3]}, **often).wait()
        assert ended.codes == (-9, -9), f"{part}: {ended.said()}"
        assert f"warning: {bucket.url}/{name} is damaged" in ended.out, ended.said()
        assert "falling back to rounds/01/steps/00000002-0001\n" in ended.out, ended.said()
    expect(0, start(bucket, **often).wait())
    assert bucket.digests() == lab.digests(reference)
