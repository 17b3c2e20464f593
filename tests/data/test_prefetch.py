"""Laws of looking ahead: wanted before it is used, released after it was, never more than the cache can hold."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirl_dist.data.manifest import Shard
from mirl_dist.data.prefetch import PrefetchWindow, shards_ahead
from mirl_dist.data.sampler import GlobalSampler, Position, Slot, split_batch
from mirl_dist.errors import UserError
from tests.data.loaders import shard


def passes(*shards: tuple[int, ...]) -> Iterator[list[Slot]]:
    """One pass for each tuple, which names the shards of its slots."""
    for number, held in enumerate(shards):
        yield [Slot(0, number, 0, shard, 0) for shard in held]


class Ledger:
    """What is wanted, and when it was asked for and released."""

    def __init__(self) -> None:
        self.held: Counter[int] = Counter()
        self.acquired: list[int] = []

    def window(self, *held: tuple[int, ...], behind: int, extra: int) -> PrefetchWindow:
        return PrefetchWindow(passes(*held), self.acquire, self.release, behind=behind, extra=extra)

    def acquire(self, shard: int) -> None:
        self.held[shard] += 1
        self.acquired.append(shard)

    def release(self, shard: int) -> None:
        assert self.held[shard] > 0
        self.held[shard] -= 1

    def now(self) -> set[int]:
        return {shard for shard, count in self.held.items() if count}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple), max_size=30),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_a_pass_and_those_before_it_are_held_and_little_more(
    held: list[tuple[int, ...]], behind: int, extra: int
) -> None:
    ledger = Ledger()
    most = max((len({s for one in held[max(0, n - behind) : n + 1] for s in one}) for n in range(len(held))), default=0)
    window = ledger.window(*held, behind=behind, extra=extra)
    for number, slots in enumerate(window):
        assert tuple(slot.shard for slot in slots) == held[number]
        needed = {shard for one in held[max(0, number - behind) : number + 1] for shard in one}
        assert needed <= ledger.now()
        assert max(ledger.held.values()) == 1, "one want for each shard, however many passes use it"
        assert len(ledger.now()) <= most + extra
    assert len(list(window)) == 0
    window.close()
    assert ledger.now() == set(), "as many releases as acquisitions"


def test_shards_are_wanted_in_the_order_of_their_first_use() -> None:
    ledger = Ledger()
    next(ledger.window((3, 1), (1, 2), (0, 3), (4,), behind=9, extra=9))
    assert ledger.acquired == [3, 1, 2, 0, 4]


def test_a_long_round_begins_with_a_short_window_which_grows() -> None:
    ledger, taken = Ledger(), itertools.count()
    endless = ([Slot(0, next(taken), 0, 0, 0)] for _ in itertools.repeat(0))
    window = PrefetchWindow(endless, ledger.acquire, ledger.release, behind=0, extra=1)
    next(window)
    first = next(taken)
    assert first < 100
    for _ in range(1000):
        next(window)
    assert next(taken) > 10 * first, "shards are asked for long before their use"


def test_closing_in_the_middle_releases_what_was_looked_ahead_at() -> None:
    ledger = Ledger()
    window = ledger.window(*((n,) for n in range(50)), behind=2, extra=5)
    for _ in itertools.islice(window, 10):
        pass
    assert 8 <= len(ledger.now()) <= 9
    window.close()
    assert ledger.now() == set()


def shards(count: int, megabytes: int, samples: int = 100) -> list[Shard]:
    return [shard(number, samples, bytes=megabytes * 10**6) for number in range(count)]


def ahead(lanes: int, behind: int, held: list[Shard], limit: int | None, ranks: int, steps: int = 1000) -> int:
    return shards_ahead(lanes, behind, steps, held, limit, ranks)


def test_without_a_limit_every_lane_looks_one_shard_ahead() -> None:
    assert ahead(8, 6, shards(50, 64), None, 4) == 8
    assert ahead(8, 6, shards(3, 64), None, 4) == 3
    assert ahead(1, 6, shards(50, 64), None, 1) == 2
    assert ahead(8, 6, shards(50, 64), 50 * 64 * 10**6, 4) == 8, "everything fits"


def test_a_small_cache_looks_less_far_ahead_and_too_small_a_one_is_refused() -> None:
    """Two ranks of four lanes, each with the shard in use, the one just left, and one of the epoch before."""
    many = shards(100, 100)
    assert ahead(4, 6, many, 2 * 16 * 10**8, 2) == 4
    assert ahead(4, 6, many, 2 * 13 * 10**8, 2) == 1
    with pytest.raises(UserError) as caught:
        ahead(4, 6, many, 2 * 12 * 10**8, 2)
    assert str(caught.value) == (
        "data.cache.gigabytes: found 2.4, but each of 2 ranks on this node needs 13 shards of up to 0.1 GB at a time. "
        "Set it to 2.63 or more, or build smaller shards (shard_megabytes in the recipe)."
    )
    assert ahead(4, 6, many, round(2.63e9), 2) == 1, "the number that it names is enough"


def test_shards_and_epochs_shorter_than_what_loaders_hold_count_as_many_as_they_are() -> None:
    assert ahead(2, 6, shards(100, 1, samples=2), 12 * 10**6, 1) == 2
    assert ahead(2, 6, shards(100, 1), 12 * 10**6, 1, steps=2) == 2
    with pytest.raises(UserError, match="needs 11 shards"):
        ahead(2, 6, shards(100, 1, samples=2), 10 * 10**6, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=30),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 10),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_a_rank_never_holds_more_shards_than_the_cache_was_found_to_have_room_for(
    counts: list[int], lanes: int, behind: int, steps: int, extra_room: int
) -> None:
    """Whatever the shards and however short the epochs: else ranks could wait for each other's room for ever."""
    held = [one.model_copy(update={"samples": n}) for one, n in zip(shards(len(counts), 1), counts, strict=True)]
    made = GlobalSampler({"denoise_25": 12}, held, lanes, 0, steps_per_epoch=min(steps, 12 * sum(counts) // lanes or 1))
    room = lanes * 30 + extra_room
    for limit in range(room * 10**6, 0, -(10**6)):
        try:
            extra = ahead(lanes, behind, held, limit, 1, made.steps_per_epoch)
        except UserError:
            break
        if sum(one.bytes for one in held) <= limit:
            continue
        ledger, most = Ledger(), 0
        passes_of = made.passes(0, Position(0, 0), 3, 0, split_batch(lanes, None, 1))
        window = PrefetchWindow(passes_of, ledger.acquire, ledger.release, behind=behind, extra=extra)
        for _ in itertools.islice(window, 40):
            most = max(most, len(ledger.now()))
        assert most * 10**6 <= limit


def test_a_lent_shard_goes_with_the_pass_that_it_was_lent_for() -> None:
    ledger = Ledger()
    window = ledger.window((0,), (1,), (2,), (3,), behind=1, extra=1)
    next(window)
    window.acquire_extra(9)
    window.acquire_extra(9)
    assert ledger.held[9] == 1
    next(window)
    assert ledger.held[9] == 1, "a loader may still read it"
    next(window)
    assert ledger.held[9] == 0
    window.close()
    assert ledger.now() == set()
