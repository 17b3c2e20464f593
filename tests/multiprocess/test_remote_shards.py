"""Real runs whose shards come over a bad network, and runs that are killed inside an epoch and go on elsewhere."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.loaders import built_at
from tests.services.faulty_proxy import FaultyProxy
from tests.services.lab import PROGRAMS
from tests.services.s3_server import S3Server

pytestmark = pytest.mark.long

KEYS = str(PROGRAMS / "print_keys.py")
At = tuple[int, int, int]


def told(folder: Path) -> dict[At, list[tuple[str, str]]]:
    """(round, epoch, step) -> the global batch as sorted (key, loss), over all ranks and passes."""
    found: dict[At, list[tuple[str, str]]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            said = json.loads(line)
            found.setdefault(tuple(said["at"]), []).extend(zip(said["keys"], said["losses"], strict=True))
    return {at: sorted(batch) for at, batch in found.items()}


def keys_of(batches: dict[At, list[tuple[str, str]]]) -> dict[At, list[str]]:
    return {at: [key for key, _ in batch] for at, batch in batches.items()}


@pytest.fixture(scope="module")
def play(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train the tiny config in a folder of its own and tell what each step read."""
    counted, tmp_path = iter(range(100)), tmp_path_factory.mktemp("play")

    def start(name: str, sets: dict[str, Any], *, world: int, env: dict[str, str] | None = None) -> Any:
        folder, keys = tmp_path / name, tmp_path / f"keys-{name}-{next(counted)}"
        folder.mkdir(exist_ok=True)
        keys.mkdir()
        env = {"MIRL_KEYS": str(keys)} | (env or {})
        return lab.start(*lab.train(folder, sets), cwd=folder, world=world, script=KEYS, env=env), folder / "run", keys

    def finish(name: str, sets: dict[str, Any], *, world: int, rc: int = 0, kill: Any = None) -> Any:
        running, run, keys = start(name, sets, world=world, env={"MIRL_KILL": json.dumps(kill)})
        ended = running.wait()
        assert ended.rc == rc, ended.said()
        return run, told(keys)

    finish.start = start  # type: ignore[attr-defined]
    return finish


# -- killed inside an epoch -----------------------------------------------------------------------------------------

EPOCHS = {
    "batch.global": 12,
    "data.steps_per_epoch": None,
    "train.epochs": 3,
    "prune.rounds": 0,
    "checkpoint.every_steps": 3,
    "schedule.warmup_epochs": 0,
}  # 54 samples an epoch: 4 steps of 12, 12 steps in all


@pytest.fixture(scope="module")
def whole(play: Any) -> dict[At, list[tuple[str, str]]]:
    """What an undisturbed run reads."""
    _, found = play("whole", EPOCHS, world=2)
    assert len(found) == 12
    return dict(found)


@pytest.mark.parametrize(
    ("before", "after", "workers"),
    [(1, 3, 1), (2, 2, 0)],
)
def test_after_a_kill_inside_an_epoch_the_remaining_batches_are_the_same(
    play: Any, whole: dict[At, list[tuple[str, str]]], before: int, after: int, workers: int
) -> None:
    name = f"killed-{before}-{after}"
    _, until = play(name, EPOCHS, world=before, rc=-9, kill=[0, 8])
    assert keys_of(until) == keys_of({at: batch for at, batch in whole.items() if at < (0, 2, 0)})
    _, rest = play(name, EPOCHS | {"data.workers": workers}, world=after)
    committed = (0, 1, 2)  # after 6 updates, in the middle of the second epoch
    assert keys_of(rest) == keys_of({at: batch for at, batch in whole.items() if at >= committed})
    if before == after == 2:
        assert rest == {at: batch for at, batch in whole.items() if at >= committed}, "losses to the last bit"


GROWING = EPOCHS | {"batch.global": 4, "train.epochs": 1, "prune.rounds": 1, "checkpoint.every_steps": 2}
"""13 steps a round."""


def test_a_run_on_one_two_four_and_one_ranks_reads_and_loses_the_same(play: Any) -> None:
    _, undisturbed = play("fixed", GROWING, world=2)
    assert len(undisturbed) == 26
    seen: dict[At, list[tuple[str, str]]] = {}
    for world, kill in ((1, [0, 5]), (2, [0, 11]), (4, [1, 6]), (1, None)):
        run, found = play("growing", GROWING, world=world, rc=0 if kill is None else -9, kill=kill)
        assert not seen or min(found) > (0, 0, 0), "it goes on from a commit"
        seen |= found
    assert keys_of(seen) == keys_of(undisturbed)
    for at, batch in undisturbed.items():
        mean, other = (sum(float.fromhex(loss) for _, loss in of) / len(of) for of in (batch, seen[at]))
        assert other == pytest.approx(mean, rel=1e-4), at
    tickets = [json.loads(p.read_text()) for p in sorted(run.glob("rounds/*/ticket-*/ticket.json"))]
    assert [ticket["world"] for ticket in tickets] == [4, 1]


# -- over a bad network ---------------------------------------------------------------------------------------------

LIMIT = 950_000  # bytes of a cache that holds not quite all shards
STREAMED = {
    "data.mix": {"derain": 2},
    "data.steps_per_epoch": None,
    "train.epochs": 3,
    "prune.rounds": 0,
    "checkpoint.every_steps": None,
    "schedule.warmup_epochs": 0,
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen shards of one or two pairs each."""
    folder = built_at(tmp_path_factory.mktemp("many"), counts=(1, 46), mb=0.04)
    assert len(list(folder.glob("train-r-*.tar"))) >= 20
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


def test_two_ranks_over_resets_delays_and_a_server_that_dies_train_as_from_a_folder(
    play: Any, many: Path, server: S3Server, tmp_path: Path
) -> None:
    run, from_folder = play("folder", STREAMED | {"data.shards": str(many)}, world=2)

    def refill() -> None:
        server.bucket("mirl")
        server.fill("s3://mirl/some/shards", many)

    refill()
    with FaultyProxy(server.url, seed=3) as proxy:
        proxy.latency, proxy.cut_every, proxy.cut_within = 0.001, 4, 20_000
        sets = STREAMED | {
            "data.shards": "s3://mirl/some/shards",
            "data.cache.folder": str(tmp_path / "cache"),
            "data.cache.gigabytes": LIMIT / 1e9,
        }
        running, remote, keys = play.start("remote", sets, world=2, env=server.env(proxy.url))
        killer = threading.Thread(target=die_once, args=(proxy, server, refill))
        killer.start()
        ended = running.wait()
        killer.join()
        assert ended.rc == 0, ended.said()
        assert proxy.cuts >= 10, "the network was bad"
        brought = [line for line in proxy.requests if ".tar" in line]
    assert len(brought) > 26 + proxy.cuts, "shards went from the small cache and came again"
    assert told(keys) == from_folder, "losses to the last bit"
    assert digests(remote) == digests(run)
    assert sum(p.stat().st_size for p in (tmp_path / "cache").iterdir()) <= LIMIT


def die_once(proxy: FaultyProxy, server: S3Server, refill: Any) -> None:
    """In the middle of the streaming the server is killed; it comes back, filled again, on the same port."""
    last = time.monotonic() + 120
    while sum(".tar" in line for line in proxy.requests) < 12 and time.monotonic() < last:
        time.sleep(0.005)
    proxy.refuse()
    server.restart(refill)
    time.sleep(0.5)
    proxy.accept()


def digests(run: Path) -> list[str]:
    return [json.loads(p.read_text())["digest"] for p in sorted(run.glob("rounds/*/ticket-*/ticket.json"))]
