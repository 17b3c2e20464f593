"""Laws of the order: one global batch is one set of samples, on any number of ranks and from any position."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirl_dist.data.order import Order, Position, Shares, Slot, share_batch
from mirl_dist.data.sample import Task
from mirl_dist.faults import Fault

MIX = {"denoise_25": 2, "derain": 3, "dehaze": 1}
SAMPLES = {"denoise": 7, "derain": 5, "dehaze": 12, "deblur": 99}  # 2 x 7 + 3 x 5 + 12 = 41 slots
EPOCHS = 3


def order(global_batch: int = 8, seed: int = 0, **more: Any) -> Order:
    return Order(MIX, SAMPLES, global_batch, seed, **more)


def named(made: Order, slots: list[Slot]) -> list[tuple[Any, ...]]:
    """Slots by the name of their task."""
    return [(made.tasks[s.task].name, s.round_, s.epoch, s.sample, s.copy) for s in slots]


def walked(made: Order, rank: int, shares: Shares, start: Position = Position(0, 0)) -> list[list[Slot]]:  # noqa: B008
    return list(made.passes(0, start, EPOCHS, rank, shares))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("forward", [None, 1, 2, 4, 8])
def test_a_global_batch_is_the_same_on_any_number_of_ranks_and_passes(world: int, forward: int | None) -> None:
    made, shares = order(), share_batch(8, forward, world)
    per_rank = [walked(made, rank, shares) for rank in range(world)]
    steps = [Position(e, s) for e in range(EPOCHS) for s in range(made.steps_per_epoch)]
    assert all(len(passes) == len(steps) * shares.accumulation for passes in per_rank)
    for number, at in enumerate(steps):
        begin = number * shares.accumulation
        dealt = [s for passes in per_rank for one in passes[begin : begin + shares.accumulation] for s in one]
        assert dealt == made.slots(0, at), "the ranks' shares, one after the other, are the global batch"
        assert len(dealt) == 8
    assert all(len(one) == shares.forward for passes in per_rank for one in passes)


@pytest.mark.parametrize("global_batch", [1, 4, 8, 40, 41])
def test_nothing_is_dropped_or_repeated_but_the_last_incomplete_batch(global_batch: int) -> None:
    made = order(global_batch)
    assert made.length == 41
    assert made.steps_per_epoch == 41 // global_batch
    everything = {
        (task.name, sample, copy)
        for task in made.tasks
        for sample in range(SAMPLES[task.kind])
        for copy in range(MIX[task.name])
    }
    for epoch in range(2):
        slots = [s for step in range(made.steps_per_epoch) for s in made.slots(0, Position(epoch, step))]
        read = Counter((made.tasks[s.task].name, s.sample, s.copy) for s in slots)
        assert max(read.values()) == 1
        assert read.keys() <= everything
        assert len(everything) - len(read) == 41 % global_batch


@pytest.mark.parametrize("world", [1, 2])
def test_any_position_is_reached_without_replay(world: int) -> None:
    shares = share_batch(8, 2, world)
    for rank in range(world):
        whole = walked(order(), rank, shares)
        for epoch in range(EPOCHS):
            for step in range(order().steps_per_epoch):
                before = (epoch * order().steps_per_epoch + step) * shares.accumulation
                assert walked(order(), rank, shares, Position(epoch, step)) == whole[before:]
    assert walked(order(), 0, shares, Position(EPOCHS, 0)) == []


def test_fewer_steps_per_epoch_are_the_first_of_the_same_order() -> None:
    short, whole = order(steps_per_epoch=2), order()
    assert short.steps_per_epoch == 2
    for epoch in (0, 1):
        for step in (0, 1):
            assert short.slots(0, Position(epoch, step)) == whole.slots(0, Position(epoch, step))
    assert [s.epoch for one in walked(short, 0, share_batch(8, None, 1)) for s in one] == [0] * 16 + [1] * 16 + [2] * 16


def test_the_order_is_pure_and_differs_by_seed_round_and_epoch() -> None:
    def epoch_of(seed: int, round_: int, epoch: int) -> tuple[Any, ...]:
        made = order(seed=seed)
        slots = [s for step in range(5) for s in made.slots(round_, Position(epoch, step))]
        return tuple((s.task, s.sample, s.copy) for s in slots)

    keys = [(seed, round_, epoch) for seed in (0, 1) for round_ in (0, 1) for epoch in (0, 1)]
    found = [epoch_of(*key) for key in keys]
    assert len(set(found)) == len(keys)
    assert found == [epoch_of(*key) for key in keys]
    made = order()
    first = made.slots(0, Position(0, 0))
    made.slots(1, Position(4, 2))
    assert made.slots(0, Position(0, 0)) == first, "asking for another epoch leaves no trace"


def test_slots_tell_their_round_and_epoch() -> None:
    assert {(s.round_, s.epoch) for s in order().slots(3, Position(2, 1))} == {(3, 2)}


def test_the_order_of_tasks_in_a_config_does_not_change_the_samples() -> None:
    other = Order(dict(reversed(MIX.items())), SAMPLES, 8, 0)
    assert other.tasks == tuple(reversed(order().tasks))
    for epoch in (0, 1):
        for step in range(5):
            at = Position(epoch, step)
            assert named(other, other.slots(0, at)) == named(order(), order().slots(0, at))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["denoise_15", "denoise_50", "derain", "dehaze"]), st.integers(1, 5), min_size=1),
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(0, 3),
)
def test_every_mix_is_read_evenly(mix: dict[str, int], count: int, world: int, seed: int) -> None:
    samples = {"denoise": count, "derain": count + 1, "dehaze": count + 2}
    length = sum(copies * samples[Task.of(name).kind] for name, copies in mix.items())
    if length < world:
        return
    made, shares = Order(mix, samples, world, seed), share_batch(world, None, world)
    ranks = [list(made.passes(1, Position(0, 0), 1, rank, shares)) for rank in range(world)]
    slots = [s for passes in ranks for one in passes for s in one]
    assert len(set(slots)) == len(slots) == length // world * world
    for slot in slots:
        task = made.tasks[slot.task]
        assert 0 <= slot.sample < samples[task.kind]
        assert 0 <= slot.copy < mix[task.name]


# -- sharing out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("global_batch", "forward", "world", "shares"),
    [
        (8, None, 1, Shares(8, 1, 8)),
        (8, 2, 1, Shares(8, 4, 2)),
        (8, 2, 4, Shares(2, 1, 2)),
        (8, 4, 4, Shares(2, 1, 2)),
        (8, 1, 2, Shares(4, 4, 1)),
        (6, 3, 2, Shares(3, 1, 3)),
    ],
)
def test_a_batch_is_shared_into_ranks_and_passes(
    global_batch: int, forward: int | None, world: int, shares: Shares
) -> None:
    assert share_batch(global_batch, forward, world) == shares
    assert shares.accumulation * shares.forward * world == global_batch


def test_a_batch_that_cannot_be_shared_is_refused_with_numbers_that_can() -> None:
    with pytest.raises(Fault) as caught:
        share_batch(8, None, 3)
    assert str(caught.value) == (
        "batch.global: a global batch of 8 cannot be shared by 3 ranks. Use 1, 2, 4, 8 ranks, or set batch.global to "
        "a multiple of 3 such as 6 or 9 (another experiment: the fingerprint changes)."
    )
    assert caught.value.everywhere
    with pytest.raises(Fault, match=r"a multiple of 16 such as 16 \("):
        share_batch(8, None, 16)


def test_passes_that_do_not_divide_the_share_are_refused_with_those_that_do() -> None:
    with pytest.raises(Fault) as caught:
        share_batch(12, 4, 2)
    assert str(caught.value) == (
        "batch.forward: 4 samples per pass do not divide the 6 samples that each of 2 ranks takes per step. "
        "Use 1, 2, 3, 6."
    )


# -- what cannot be ordered -------------------------------------------------------------------------------------


def test_an_epoch_shorter_than_a_global_batch_is_refused() -> None:
    with pytest.raises(Fault, match=r"^an epoch has 41 samples, fewer than one global batch of 42\. Lower batch"):
        order(42)


def test_more_steps_than_the_mix_gives_are_refused() -> None:
    assert order(steps_per_epoch=5).steps_per_epoch == 5
    with pytest.raises(Fault, match=r"^data\.steps_per_epoch: found 6, but the mix fills only 5 steps of 8\. Lower"):
        order(steps_per_epoch=6)


def test_tasks_without_samples_are_named_beside_what_there_is() -> None:
    with pytest.raises(Fault) as caught:
        Order({"denoise_15": 1, "derain": 1, "dehaze": 1}, {"derain": 4, "dehaze": 0}, 1, 0)
    assert str(caught.value).startswith(
        "data.mix: the shards hold no training samples for denoise_15, dehaze; they hold dehaze (0), derain (4)."
    )
    with pytest.raises(Fault, match="they hold nothing"):
        Order({"derain": 1}, {}, 1, 0)
