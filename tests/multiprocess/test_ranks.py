"""What ranks owe each other, in real processes over gloo: 1, 2, 3 and 4 of them on one checkpoint."""

from __future__ import annotations

import json
import math
import platform
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.services.lab import PROGRAMS

WORLDS = (1, 2, 3, 4)
Seen = dict[int, list[dict[str, Any]]]


def checkpoint() -> dict[str, torch.Tensor]:
    """Weights with many ties: small integers over eight, beside ordinary ones, in sizes that no world divides."""
    draw = torch.Generator().manual_seed(5)
    return {
        "body.weight": torch.randint(-40, 41, (37, 11), generator=draw) / 8,
        "head.weight": torch.randn(13, 7, generator=draw),
        "output.weight": torch.randint(-3, 4, (101,), generator=draw) / 8,
        "same.weight": torch.full((6, 5), 0.125),
        "body.bias": torch.randn(37, generator=draw),
    }


@pytest.fixture(scope="module")
def seen(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What every rank of every world saw."""
    folder = tmp_path_factory.mktemp("laws")
    safetensors.torch.save_file(checkpoint(), folder / "weights.safetensors")
    script = str(PROGRAMS / "collectives.py")
    found = {}
    for world in WORLDS:
        lab.start(str(folder), cwd=folder, world=world, script=script).wait().ok()
        found[world] = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    return found


def test_every_world_and_every_rank_prunes_the_same_weights_at_the_same_threshold(seen: Seen) -> None:
    alone = seen[1][0]["pruned"]
    assert len(alone) == 8
    for world in WORLDS:
        assert [rank["pruned"] for rank in seen[world]] == [alone] * world


def test_a_global_cut_removes_the_published_count_although_its_threshold_is_tied(seen: Seen) -> None:
    prunable = [t.flatten() for n, t in checkpoint().items() if "weight" in n]
    magnitudes = torch.cat(prunable).abs().sort().values
    k = math.ceil(0.2 * (len(magnitudes) - 1) - 1e-9)
    digest, threshold, removed, alive = seen[1][0]["pruned"]["global 1"]
    assert (removed, alive) == (k, len(magnitudes) - k)
    assert float.fromhex(threshold) == magnitudes[k - 1].item()
    assert (magnitudes == magnitudes[k - 1]).sum() > 1, "the checkpoint was meant to tie here"


def test_the_rules_choose_different_weights(seen: Seen) -> None:
    firsts = {name: said[0] for name, said in seen[1][0]["pruned"].items()}
    assert len(set(firsts.values())) == len(firsts)


@pytest.mark.parametrize("world", WORLDS)
def test_what_ranks_tell_each_other_arrives_on_every_rank(seen: Seen, world: int) -> None:
    for rank in (rank["told"] for rank in seen[world]):
        assert rank["any"] == [True, False]
        assert rank["gather"] == [[r, 10 * r] for r in range(world)], "in the order of ranks"
        assert rank["objects"] == [f"rank {r}" for r in range(world)]
        assert rank["sent"] == {
            "flags": ["torch.bool", [2, 2], [[True, False], [False, True]]],
            "empty": ["torch.float32", [0, 3], []],
            "scalar": ["torch.float64", [], 2.5],
            "counts": ["torch.int64", [2], [2**40, -1]],
            "half": ["torch.bfloat16", [2], [1.0, 2.0]],
        }
        assert rank["from main"] == "from rank 0"
        assert rank["main stops"] == "stopped on request"
        fails, away = rank["main fails"], rank["server away"]
        assert (fails["text"], fails["resumable"]) == ("found something on rank 0, here, do that.", False)
        assert (away["text"], away["resumable"]) == ("the server is away.", True)
    assert len({tuple(rank["told"]["sum"]) for rank in seen[world]}) == 1, "a sum of floats has the same bits"


@pytest.mark.parametrize("world", WORLDS)
def test_replicas_take_the_weights_of_rank_0_and_average_gradients(seen: Seen, world: int) -> None:
    found = [rank["averaged"] for rank in seen[world]]
    mean = sum(range(world)) / world
    assert {f["weights"] for f in found} == {seen[1][0]["averaged"]["weights"]}
    assert all(f["gradient"] == [[mean, mean]] for f in found)
    assert world == 1 or {f["type"] for f in found} == {"DistributedDataParallel"}


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_in_buckets_have_the_bits_of_plain_ddp_in_one_pass_and_in_two(seen: Seen, world: int) -> None:
    digests = [rank["as plain DDP"] for rank in seen[world]]
    assert all(ours == plain for ours, plain in digests[0]) and digests[0][0] != digests[0][1]
    assert digests == [digests[0]] * world


@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_replica_that_drifted_by_one_bit_is_named_before_anything_is_pruned(seen: Seen, world: int) -> None:
    drifted = f"Rank {world - 1} ({platform.node()}) has drifted"
    for rank in seen[world]:
        broken, fault = rank["guarded"], rank["told"]["agree"]
        assert "ranks disagree on the colour" in fault["text"] and drifted in fault["text"] and fault["everywhere"]
        assert rank["told"]["agreed"] is None
        assert "ranks disagree on the trained weights" in broken["drift"]["text"] and drifted in broken["drift"]["text"]
        assert broken["drifted masks"] == 17, "nothing may be pruned"
        assert broken["opened"] == ["selecting"], "nothing comes after it"
        assert "ranks disagree on the initial weights" in broken["other start"]["text"]


@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_rank_with_a_wrong_rewind_a_risen_weight_or_a_bad_loss_is_named(seen: Seen, world: int) -> None:
    name = f"rank {world - 1} ({platform.node()})"
    for rank in (rank["guarded"] for rank in seen[world]):
        rewind, loss = rank["rewind"], rank["loss"]["text"]
        assert "the weights at the start of round 1 are not mask x what they were rewound to" in rewind["text"]
        assert f": {name}, tensor 'b.weight'." in rewind["text"] and rewind["everywhere"]
        assert f"pruned weights moved in round 1: {name}, tensor 'b.weight'" in rank["risen"]["text"]
        assert "not finite at round 1, epoch 2, step 3" in loss
        assert f"{name}: derain:two-{world - 1}." in loss and "one-" not in loss


@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_stop_request_of_one_rank_reaches_all_and_replaced_samples_are_added_up(seen: Seen, world: int) -> None:
    assert [rank["guarded"]["stop"] for rank in seen[world]] == [[True, 2 * world - 1]] * world
