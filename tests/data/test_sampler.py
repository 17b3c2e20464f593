"""Laws of the sampler: one global batch is one set of samples, on any number of ranks and from any position."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirl_dist.config.tasks import Task
from mirl_dist.data.manifest import Shard
from mirl_dist.data.mixture import apportion
from mirl_dist.data.sampler import BatchSplit, GlobalSampler, Position, Slot, split_batch
from mirl_dist.errors import UserError
from tests.data.loaders import shard


def shards(counts: Mapping[tuple[str, Any], tuple[int, ...]]) -> list[Shard]:
    """Shards of (set, kind), as many samples in each as told."""
    return [shard(n, c, set=s, kind=kind) for (s, kind), held in counts.items() for n, c in enumerate(held)]


MIX: dict[str, float] = {"denoise_25": 2, "denoise_50": 1, "derain": 3, "dehaze": 1}
HELD = shards(
    {
        ("bsd", "clean"): (3, 4),
        ("wed", "clean"): (2,),
        ("rain", "derain"): (5,),
        ("ots", "dehaze"): (1, 6, 5),
        ("gopro", "deblur"): (99,),
    }
)  # clean 9, derain 5, dehaze 12: 9 x 3 + 5 x 3 + 12 = 54 slots
EPOCHS = 3


def sampler(
    global_batch: int = 8, seed: int = 0, mix: Any = MIX, held: list[Shard] = HELD, **more: Any
) -> GlobalSampler:
    return GlobalSampler(mix, held, global_batch, seed, **more)


def epoch_of(made: GlobalSampler, epoch: int, round_: int = 0) -> list[list[Slot]]:
    return [made.slots(round_, Position(epoch, step)) for step in range(made.steps_per_epoch)]


def read(made: GlobalSampler, slots: list[Slot]) -> Counter[tuple[str, int, int]]:
    """How often each sample was read for each task."""
    return Counter((made.tasks[s.task].name, s.shard, s.sample) for s in slots)


def walked(made: GlobalSampler, rank: int, split: BatchSplit, start: Position = Position(0, 0)) -> list[list[Slot]]:  # noqa: B008
    return list(made.passes(0, start, EPOCHS, rank, split))


# -- one batch on any number of ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "forward"),
    [(w, f) for w in (1, 2, 3, 4, 6, 12) for f in (None, 1, 2, 3, 4, 6, 12) if f is None or 12 // w % f == 0],
)
@pytest.mark.parametrize("sizes", [(100,), (1, 99), (7,) * 14, (1,) * 100], ids=["one", "two", "fourteen", "hundred"])
def test_a_global_batch_of_12_has_the_same_samples_on_any_ranks_and_passes(
    world: int, forward: int | None, sizes: tuple[int, ...]
) -> None:
    """From one shard, fewer than any readers, to a hundred."""
    made = sampler(12, mix={"derain": 2}, held=shards({("rain", "derain"): sizes}))
    split = split_batch(12, forward, world)
    per_rank = [walked(made, rank, split) for rank in range(world)]
    steps = list(made.positions(Position(0, 0), EPOCHS))
    assert all(len(passes) == len(steps) * split.passes for passes in per_rank), "every rank ends at one step"
    for number, at in enumerate(steps):
        begin = number * split.passes
        dealt = [s for passes in per_rank for one in passes[begin : begin + split.passes] for s in one]
        assert dealt == made.slots(0, at), "the ranks' split, one after the other, are the global batch"
        assert len(dealt) == 12
    assert all(len(one) == split.forward for passes in per_rank for one in passes)


@pytest.mark.parametrize("global_batch", [1, 4, 8, 27, 53, 54])
def test_an_epoch_reads_every_sample_for_every_task_as_often_as_the_mix_says(global_batch: int) -> None:
    """What does not fill the last batch is left out, and nothing else."""
    made = sampler(global_batch)
    assert made.length == 54
    assert made.steps_per_epoch == 54 // global_batch
    wanted: Counter[tuple[str, int, int]] = Counter()
    for name, copies in MIX.items():
        of_kind = ((number, one.samples) for number, one in enumerate(HELD) if one.kind == Task.of(name).kind)
        wanted.update({(name, number, sample): int(copies) for number, count in of_kind for sample in range(count)})
    for epoch in range(2):
        slots = [s for step in epoch_of(made, epoch) for s in step]
        found = read(made, slots)
        assert found <= wanted
        assert sum((wanted - found).values()) == 54 % global_batch
        reads = {(s.pass_index, s.shard, s.sample) for s in slots}
        assert len(reads) == len(slots), "no two reads of a sample are alike"


@pytest.mark.parametrize("world", [1, 2])
def test_any_position_is_reached_without_replay(world: int) -> None:
    split = split_batch(8, 2, world)
    for rank in range(world):
        whole = walked(sampler(), rank, split)
        for epoch in range(EPOCHS):
            for step in range(sampler().steps_per_epoch):
                before = (epoch * sampler().steps_per_epoch + step) * split.passes
                assert walked(sampler(), rank, split, Position(epoch, step)) == whole[before:]
    assert walked(sampler(), 0, split, Position(EPOCHS, 0)) == []


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (4, 12), (12, 1)])
def test_a_change_of_world_size_in_the_middle_of_an_epoch_changes_no_global_batch(before: int, after: int) -> None:
    made = sampler(12, mix={"derain": 4, "denoise_25": 3})
    stopped = Position(1, 1)

    def global_batches(world: int, start: Position) -> list[list[Slot]]:
        split = split_batch(12, 1, world)
        ranks = [list(made.passes(5, start, EPOCHS, rank, split)) for rank in range(world)]
        steps = zip(*(list(zip(*[iter(p)] * split.passes, strict=True)) for p in ranks), strict=True)
        return [[s for rank in step for one in rank for s in one] for step in steps]

    uninterrupted = global_batches(before, Position(0, 0))
    assert uninterrupted[made.steps_per_epoch + 1 :] == global_batches(after, stopped)


def test_the_order_is_pure_and_differs_by_seed_round_and_epoch() -> None:
    def told(seed: int, round_: int, epoch: int) -> tuple[Any, ...]:
        steps = epoch_of(sampler(seed=seed), epoch, round_)
        return tuple((s.task, s.shard, s.sample) for step in steps for s in step)

    keys = [(seed, round_, epoch) for seed in (0, 1) for round_ in (0, 1) for epoch in (0, 1)]
    found = [told(*key) for key in keys]
    assert len(set(found)) == len(keys)
    assert found == [told(*key) for key in keys]
    made = sampler()
    first = made.slots(0, Position(0, 0))
    for other in range(8):
        made.slots(1, Position(other, 2))
    assert made.slots(0, Position(0, 0)) == first, "asking for other epochs leaves no trace"


def test_the_order_of_tasks_in_a_config_does_not_change_the_samples() -> None:
    other = sampler(mix=dict(reversed(MIX.items())))
    assert other.tasks == tuple(reversed(sampler().tasks))

    def named(made: GlobalSampler, at: Position) -> list[tuple[Any, ...]]:
        return [(made.tasks[s.task].name, s.shard, s.sample, s.pass_index) for s in made.slots(0, at)]

    for at in sampler().positions(Position(0, 0), 2):
        assert named(other, at) == named(sampler(), at)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["denoise_15", "deblur_easy", "derain", "dehaze"]), st.integers(1, 5), min_size=1),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(0, 3),
)
def test_every_mix_is_read_evenly(mix: dict[str, int], counts: list[int], world: int, seed: int) -> None:
    held = shards({(kind, kind): tuple(counts) for kind in ("clean", "derain", "dehaze")})
    length = sum(copies * sum(counts) for copies in mix.values())
    if length < world:
        return
    made, split = sampler(world, seed, mix, held), split_batch(world, None, world)
    ranks = [list(made.passes(1, Position(0, 0), 1, rank, split)) for rank in range(world)]
    slots = [s for passes in ranks for one in passes for s in one]
    assert len(slots) == length // world * world
    for (name, _, _), times in read(made, slots).items():
        assert times <= mix[name]
    for slot in slots:
        assert held[slot.shard].kind == made.tasks[slot.task].kind
        assert 0 <= slot.sample < held[slot.shard].samples


# -- sets, weights, balance ---------------------------------------------------------------------------------------


def test_numbers_per_set_are_repeats_of_that_set_alone() -> None:
    made = sampler(1, mix={"denoise_25": {"bsd": 1, "wed": 3}, "derain": 2})
    found = read(made, [s for step in epoch_of(made, 0) for s in step])
    times = {(name, HELD[number].set): n for (name, number, _), n in found.items()}
    assert times == {("denoise_25", "bsd"): 1, ("denoise_25", "wed"): 3, ("derain", "rain"): 2}
    assert made.length == 7 + 3 * 2 + 2 * 5


def test_weights_share_an_epoch_and_walks_go_on_from_epoch_to_epoch() -> None:
    made = sampler(4, mix={"denoise_25": 3, "derain": 1}, mix_by="weights", steps_per_epoch=5)
    assert made.length == 20
    seen: Counter[tuple[str, int, int]] = Counter()
    for epoch in range(9):
        slots = [s for step in epoch_of(made, epoch) for s in step]
        assert Counter(made.tasks[s.task].name for s in slots) == {"denoise_25": 15, "derain": 5}
        seen += read(made, slots)
        for name in ("denoise_25", "derain"):
            times = [n for (task, _, _), n in seen.items() if task == name]
            assert max(times) - min(times) <= 1, "no sample is read again before all others were"
    assert {n for (task, _, _), n in seen.items() if task == "denoise_25"} == {15}


def test_balanced_gives_every_task_an_equal_part_of_the_steps_all_samples_fill() -> None:
    made = sampler(4, mix={"denoise_25": 1, "derain": 1, "dehaze": 1}, mix_by="balanced")
    assert made.steps_per_epoch == (9 + 5 + 12) // 4
    slots = [s for step in epoch_of(made, 0) for s in step]
    assert Counter(made.tasks[s.task].name for s in slots) == {"denoise_25": 8, "derain": 8, "dehaze": 8}


def test_parts_add_up_and_are_as_near_to_the_weights_as_whole_numbers_can_be() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(7, [2, 1, 0.5]) == [4, 2, 1]
    assert apportion(3, [1e-9, 1]) == [0, 3]


def test_a_weight_too_small_to_be_read_is_refused() -> None:
    wanted = r"^data\.mix: derain gets none of the 8 samples of an epoch\. Raise its weight"
    with pytest.raises(UserError, match=wanted):
        sampler(8, mix={"denoise_25": 1, "derain": 0.001}, mix_by="weights", steps_per_epoch=1)


# -- shards are read one after the other --------------------------------------------------------------------------

MANY = shards({("bsd", "clean"): (20,) * 10, ("rain", "derain"): (10,) * 4})


def lanes_of(made: GlobalSampler, epoch: int) -> list[list[Slot]]:
    return [list(lane) for lane in zip(*epoch_of(made, epoch), strict=True)]


def test_every_lane_reads_whole_shards_in_sequence() -> None:
    """Of each source a lane comes back to no shard in a pass, and leaves none unfinished but at its own two ends."""
    made = sampler(4, mix={"denoise_25": 4, "denoise_50": 4, "derain": 10}, held=MANY)
    for lane in lanes_of(made, 1):
        for kind in ("clean", "derain"):
            mine = [s for s in lane if MANY[s.shard].kind == kind]
            by_shard = itertools.groupby(mine, lambda s: (s.pass_index, s.shard))
            runs = [(key, len(list(group))) for key, group in by_shard]
            assert len({key for key, _ in runs}) == len(runs), "a shard was left and entered again"
            for (_, number), length in runs[1:-1]:
                assert length == MANY[number].samples


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_rank_needs_at_most_one_shard_of_each_source_per_lane_at_any_position(world: int) -> None:
    made, split = sampler(4, mix={"denoise_25": 4, "derain": 10}, held=MANY), split_batch(4, None, world)
    for rank in range(world):
        for at in itertools.islice(made.positions(Position(0, 0), 2), 0, None, 17):
            first = next(made.passes(0, at, 2, rank, split))
            assert len({s.shard for s in first}) <= split.per_rank


def test_reads_of_one_image_lie_about_as_far_apart_as_in_a_full_shuffle() -> None:
    """Distances in steps between one image's reads, against a permutation of all slots: the median and the tenth."""
    made = sampler(8, mix={"denoise_15": 3, "denoise_25": 3, "denoise_50": 3}, held=MANY)

    def distances(steps: list[list[Any]]) -> list[int]:
        last: dict[Any, int] = {}
        found = []
        for number, step in enumerate(steps):
            for image in step:
                if image in last:
                    found.append(number - last[image])
                last[image] = number
        return found

    ours = distances([[(s.shard, s.sample) for s in step] for step in epoch_of(made, 0)])
    flat = [(s.shard, s.sample) for step in epoch_of(made, 0) for s in step]
    rng = np.random.default_rng(0)
    full = []
    for _ in range(5):
        mixed = [flat[i] for i in rng.permutation(len(flat))]
        full += distances([mixed[i : i + 8] for i in range(0, len(mixed), 8)])
    for quantile in (0.1, 0.5):
        assert np.quantile(ours, quantile) >= 0.5 * np.quantile(full, quantile)


# -- sharing out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("global_batch", "forward", "world", "split"),
    [
        (8, None, 1, BatchSplit(8, 1, 8)),
        (8, 2, 1, BatchSplit(8, 4, 2)),
        (8, 2, 4, BatchSplit(2, 1, 2)),
        (8, 4, 4, BatchSplit(2, 1, 2)),
        (8, 1, 2, BatchSplit(4, 4, 1)),
        (6, 3, 2, BatchSplit(3, 1, 3)),
    ],
)
def test_a_batch_is_shared_into_ranks_and_passes(
    global_batch: int, forward: int | None, world: int, split: BatchSplit
) -> None:
    assert split_batch(global_batch, forward, world) == split
    assert split.passes * split.forward * world == global_batch


@pytest.mark.parametrize(
    ("split", "text"),
    [
        (
            (8, None, 3),
            "batch.global: a global batch of 8 cannot be shared by 3 ranks. Use 1, 2, 4, 8 ranks, or set batch.global "
            "to a multiple of 3 such as 6 or 9 (another experiment: the fingerprint changes).",
        ),
        (
            (8, None, 16),
            "batch.global: a global batch of 8 cannot be shared by 16 ranks. Use 1, 2, 4, 8 ranks, or set batch.global "
            "to a multiple of 16 such as 16 (another experiment: the fingerprint changes).",
        ),
        (
            (12, 4, 2),
            "batch.forward: 4 samples per pass do not divide the 6 samples that each of 2 ranks takes per step. "
            "Use 1, 2, 3, 6.",
        ),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused_with_numbers_that_can(
    split: tuple[int, int | None, int], text: str
) -> None:
    with pytest.raises(UserError) as caught:
        split_batch(*split)
    assert str(caught.value) == text and caught.value.everywhere


# -- what cannot be ordered -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "steps", "text"),
    [
        (55, None, r"^an epoch has 54 samples, fewer than one global batch of 55\. Lower batch"),
        (8, 7, r"^data\.steps_per_epoch: found 7, but the mix fills only 6 steps of 8\. Lower"),
    ],
)
def test_an_epoch_that_the_mix_cannot_fill_is_refused(batch: int, steps: int | None, text: str) -> None:
    assert sampler(steps_per_epoch=6).steps_per_epoch == 6
    with pytest.raises(UserError, match=text):
        sampler(batch, steps_per_epoch=steps)


def test_fewer_steps_than_the_mix_gives_read_no_sample_more_often_than_it_says() -> None:
    made = sampler(steps_per_epoch=3)
    for epoch in range(2):
        for (name, _, _), times in read(made, [s for step in epoch_of(made, epoch) for s in step]).items():
            assert times <= MIX[name]


def test_tasks_and_sets_without_samples_are_named_beside_what_there_is() -> None:
    held = shards({("rain", "derain"): (4,)})
    with pytest.raises(UserError) as caught:
        sampler(1, mix={"denoise_15": 1, "derain": {"rain": 1, "rian": 2}, "dehaze": 1}, held=held)
    assert str(caught.value).startswith(
        "data.mix: the shards hold no training samples for dehaze, denoise_15, derain@rian; they hold the sets "
        "rain (derain). Correct data.mix"
    )
    with pytest.raises(UserError, match="they hold the sets none"):
        sampler(1, mix={"derain": 1}, held=[])
