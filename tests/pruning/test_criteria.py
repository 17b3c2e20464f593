"""Laws of scores that need more than weights: SynFlow's flow, the product of weight and gradient, and cuts by them."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from mirl_dist.config import config
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning import saliency, synflow
from mirl_dist.pruning.criteria import CRITERIA
from mirl_dist.pruning.masks import Masks, dense_masks
from mirl_dist.pruning.prune import PruneConfig, PruneResult, count_to_remove, in_scope, prune
from tests.factories import small_promptir

IMAGE = (1, 3, 16, 16)  # the smallest whose coarsest level, 2 x 2, every place of a 3 x 3 kernel touches
BLOCK = "decoder_level1.0"


def small(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small PromptIR and a copy of its values, shifts of norms among them not zero."""
    network = small_promptir(seed)
    weights = {n: p.detach().clone() for n, p in network.named_parameters()}
    return network, {n: torch.rand_like(w) if n.endswith("body.bias") else w for n, w in weights.items()}


def published(weights: Mapping[str, Tensor]) -> Masks:
    return dense_masks(weights, in_scope(weights, "published"))


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# -- the table --------------------------------------------------------------------------------------------------


def test_rules_and_configs_know_the_criteria_of_the_table() -> None:
    assert set(get_args(get_type_hints(PruneConfig)["criterion"])) == set(CRITERIA)
    assert set(get_args(type(config.Config().prune).model_fields["criterion"].annotation)) == set(CRITERIA)


@pytest.mark.parametrize("criterion", ["synflow", "snip", "gradient"])
def test_a_criterion_that_needs_more_than_weights_is_not_guessed_from_them(criterion: Any) -> None:
    weights = {"a.weight": torch.ones(4)}
    with pytest.raises(ValueError, match=f"'{criterion}' needs {CRITERIA[criterion].needs}: pass its scores"):
        prune(weights, dense_masks(weights, weights), PruneConfig(0.5, criterion))


# -- SynFlow ----------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Convolutions and ReLU: a network of the paper's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in ((3, 5), (5, 4), (4, 3)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.b(self.a(x).relu()).relu())
        return out


def test_on_convolutions_and_relu_the_scores_are_the_papers_up_to_one_factor() -> None:
    torch.manual_seed(1)
    network = Chain()
    weights = {n: p.detach().clone() for n, p in network.named_parameters()}
    masks = {n: torch.rand_like(w) > 0.3 for n, w in weights.items()}
    found = synflow.scores(network, weights, masks, IMAGE)
    naive = copy.deepcopy(network).double()
    for name, p in naive.named_parameters():
        p.data = (weights[name].double() * masks[name]).abs()
    torch.autograd.backward(naive(torch.ones(IMAGE, dtype=torch.float64)).sum())
    papers = {n: p.grad * p.detach() for n, p in naive.named_parameters() if p.grad is not None}
    factor = found["a.weight"].sum() / papers["a.weight"].sum()
    for name, expected in papers.items():
        torch.testing.assert_close(found[name].double(), factor * expected, rtol=1e-6, atol=0)


def test_flow_is_conserved_through_the_network_and_in_every_channel() -> None:
    network, weights = small()
    masks = dense_masks(weights, weights)
    found = {n: s.double() for n, s in synflow.scores(network, weights, masks, IMAGE).items()}
    close = partial(torch.testing.assert_close, atol=0)
    total = {n: s.sum() for n, s in found.items()}
    prompts_and_biases = sum(s for n, s in total.items() if "prompt_param" in n or n.endswith("bias"))
    close(prompts_and_biases + total["patch_embed.proj.weight"], total["output.weight"], rtol=1e-6)
    assert total["output.weight"] > 1
    for part, norm, inner, outer in (("ffn", 2, "project_in", "dwconv"), ("attn", 1, "qkv", "qkv_dwconv")):
        first, second = (found[f"{BLOCK}.{part}.{n}.weight"] for n in (inner, outer))
        close(first.sum(dim=(1, 2, 3)), second.sum(dim=(1, 2, 3)), rtol=1e-5)
        scale, shift = (found[f"{BLOCK}.norm{norm}.body.{n}"] for n in ("weight", "bias"))
        close(first.sum(dim=(0, 2, 3)), scale + shift, rtol=1e-5)
    gate, value = found[f"{BLOCK}.ffn.dwconv.weight"].sum(dim=(1, 2, 3)).chunk(2)
    close(gate, value, rtol=1e-5)
    close(gate + value, found[f"{BLOCK}.ffn.project_out.weight"].sum(dim=(0, 2, 3)), rtol=1e-5)


def test_scores_depend_on_no_sign_and_are_the_same_bits_again() -> None:
    network, weights = small()
    masks = published(weights)
    found = synflow.scores(network, weights, masks, IMAGE)
    assert same(found, synflow.scores(network, weights, masks, IMAGE))
    assert same(found, synflow.scores(network, {n: -w for n, w in weights.items()}, masks, IMAGE))
    assert all(s.dtype == torch.float32 and bool((s >= 0).all() & s.isfinite().all()) for s in found.values())
    assert all(bool((s > 0).all()) for s in found.values()), "every weight lies on a path"


def test_scoring_leaves_the_network_and_the_weights_as_they_are() -> None:
    network, weights = small()
    network.train()
    before, given = copy.deepcopy(network.state_dict()), copy.deepcopy(weights)
    image = torch.rand(1, 3, 8, 8)
    restored = network(image)
    pruned = synflow.iterate(network, weights, published(weights), PruneConfig(0.2, "synflow", iterations=2), IMAGE)
    assert pruned.removed > 0
    assert same(network.state_dict(), before) and same(weights, given)
    assert torch.equal(network(image), restored), "norms and gates are themselves again"
    assert network.training and all(p.grad is None for p in network.parameters())
    with pytest.raises(UserError):
        synflow.scores(network, weights, published(weights), (1, 4, 8, 8))
    assert torch.equal(network(image), restored), "after an error too"


def test_what_no_path_of_surviving_weights_reaches_scores_zero() -> None:
    network, weights = small()
    masks = published(weights)
    masks[f"{BLOCK}.ffn.project_out.weight"][:] = False
    masks[f"{BLOCK}.attn.qkv.weight"][3] = False
    found = synflow.scores(network, weights, masks, IMAGE)
    cut = [n for n in found if not found[n].any()]
    assert cut == [f"{BLOCK}.{n}.weight" for n in ("ffn.dwconv", "ffn.project_in", "ffn.project_out", "norm2.body")]
    assert not found[f"{BLOCK}.attn.qkv_dwconv.weight"][3].any()


def test_values_that_are_not_finite_are_refused() -> None:
    network, weights = small()
    weights["output.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(
        UserError, match=r"^found NaN or infinite first values, where SynFlow scored them\. Give others"
    ):
        synflow.scores(network, weights, published(weights), IMAGE)


@pytest.mark.parametrize(
    "rule",
    [PruneConfig(0.9), PruneConfig(0.5, per="layer"), PruneConfig(0.5, floor=0.3)],
    ids=["global", "layer", "floor"],
)
def test_many_steps_end_at_the_count_of_one(rule: PruneConfig) -> None:
    network, weights = small()
    masks = {n: m & (torch.rand(m.shape) > 0.2) for n, m in published(weights).items()}
    found = synflow.iterate(network, weights, masks, rule._replace(criterion="synflow", iterations=3), IMAGE)
    by_magnitude = prune(weights, masks, rule)
    assert (
        found.removed == by_magnitude.removed == masking.count_surviving(masks) - masking.count_surviving(found.masks)
    )
    assert not any(bool((found.masks[n] & ~masks[n]).any()) for n in masks), "nothing returns"
    assert masking.digest(found.masks) != masking.digest(by_magnitude.masks)
    if rule.per == "layer":
        assert {n: int(m.sum()) for n, m in found.masks.items()} == {
            n: int(m.sum()) for n, m in by_magnitude.masks.items()
        }
    if rule.floor:
        assert all(int(found.masks[n].sum()) >= min(int(masks[n].sum()), -(-3 * masks[n].numel() // 10)) for n in masks)
    one = synflow.iterate(network, weights, masks, rule._replace(criterion="synflow", iterations=1), IMAGE)
    scores = synflow.scores(network, weights, masks, IMAGE)
    assert masking.digest(one.masks) == masking.digest(prune(weights, masks, rule, scores=scores).masks)
    assert one.threshold == prune(weights, masks, rule, scores=scores).threshold


def test_the_surviving_share_falls_by_the_same_factor_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    network, weights = small()
    masks, seen, scored = published(weights), [], synflow.scores

    def watched(network: nn.Module, weights: Mapping[str, Tensor], now: Masks, shape: Any) -> dict[str, Tensor]:
        seen.append(masking.count_surviving(now))
        return scored(network, weights, now, shape)

    monkeypatch.setattr(synflow, "scores", watched)
    last = masking.count_surviving(
        synflow.iterate(network, weights, masks, PruneConfig(0.9, "synflow", iterations=4), IMAGE).masks
    )
    assert seen[0] == masking.size(masks)
    assert last == seen[0] - count_to_remove(seen[0], 0.9)
    for before, after in zip(seen, [*seen[1:], last], strict=True):
        assert after / before == pytest.approx(0.1**0.25, rel=1e-4)


def test_one_cut_empties_tensors_that_survive_many_small_ones() -> None:
    network, weights = small()
    rule = PruneConfig(0.9, "synflow")
    emptied = [
        synflow.iterate(network, weights, published(weights), rule._replace(iterations=n), IMAGE).collapsed
        for n in (1, 12)
    ]
    assert len(emptied[0]) > 20
    assert len(emptied[1]) < 10


# -- weight x gradient ------------------------------------------------------------------------------------------


def absolute(restored: Tensor, clean: Tensor) -> Tensor:
    """Per sample, as the training's."""
    return (restored - clean).abs().mean(dim=(1, 2, 3))


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(9)
    return [(torch.rand(2, 3, 8, 8, generator=draw), torch.rand(2, 3, 8, 8, generator=draw)) for _ in range(count)]


def test_gradients_are_what_training_would_see_added_over_batches() -> None:
    network, _ = small()
    found = saliency.gradients(network, batches(), absolute)
    expected: dict[str, Tensor] = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in network.named_parameters()}
    for degraded, clean in batches():
        network.zero_grad()
        torch.autograd.backward(absolute(network(degraded), clean).mean())
        for name, p in network.named_parameters():
            assert p.grad is not None
            expected[name] += p.grad
    assert same(found, expected)
    assert all(g.dtype == torch.float64 for g in found.values())
    assert same(saliency.gradients(network, batches(), absolute), found)
    other, _ = small(seed=1)
    assert same(saliency.gradients(other, batches(), absolute, at=dict(network.named_parameters())), found)


class Held(nn.Module):
    """One weight that counts, one that is never used, and a part that is held in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.full((3, 1, 1), 2.0)), nn.Parameter(torch.ones(2))
        self.noise = nn.Dropout(0.5).eval()
        self.more_noise = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.more_noise(self.noise(x * self.scale))
        return out


def test_gradients_and_scores_are_those_of_a_sum_done_by_hand() -> None:
    given = [(torch.full((1, 3, 2, 2), v), torch.zeros(1, 3, 2, 2)) for v in (1.0, 10.0)]
    network = Held()
    network.scale.data[1] = -2.0
    found = saliency.gradients(network, given, lambda restored, clean: restored - clean)
    assert found["scale"].flatten().tolist() == pytest.approx([11 / 3] * 3)
    assert found["unused"].tolist() == [0, 0]
    scores = saliency.scores(dict(network.named_parameters()), found)
    assert scores["scale"].flatten().tolist() == pytest.approx([22 / 3] * 3)
    assert all(s.dtype == torch.float32 and not s.requires_grad for s in scores.values())
    assert scores["scale"].shape == (3, 1, 1)


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_leave_the_network_as_it_is(fails: bool) -> None:
    network = Held()
    before = copy.deepcopy(network.state_dict())

    def loss(restored: Tensor, clean: Tensor) -> Tensor:
        assert not network.training and not network.more_noise.training
        if fails:
            raise UserError("no loss")
        return restored - clean

    try:
        saliency.gradients(network, [(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))], loss)
    except UserError:
        assert fails
    assert [network.training, network.noise.training, network.more_noise.training] == [True, False, True]
    assert same(network.state_dict(), before)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


# -- cuts by given scores ---------------------------------------------------------------------------------------


def test_given_scores_decide_by_size_without_sign_and_without_the_weights() -> None:
    weights = {"a.weight": torch.tensor([[9.0, 8.0], [7.0, 6.0]]), "b.weight": torch.tensor([1.0, 2.0])}
    scores = {"a.weight": torch.tensor([[0.1, -5.0], [-0.2, 4.0]]), "b.weight": torch.tensor([3.0, -0.3])}
    for given in (scores, scores.__getitem__):
        pruned = prune(weights, dense_masks(weights, weights), PruneConfig(0.5, "snip"), scores=given)
        assert {n: m.tolist() for n, m in pruned.masks.items()} == {
            "a.weight": [[False, True], [False, True]],
            "b.weight": [True, False],
        }
        assert pruned.threshold == pytest.approx(0.3)


def test_scores_of_another_shape_or_not_finite_are_refused() -> None:
    weights = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(4)}
    masks = dense_masks(weights, weights)
    with pytest.raises(ValueError, match=r"scores of 'a\.weight' are \(3, 2\), its weights \(2, 3\)"):
        prune(weights, masks, PruneConfig(0.5, "snip"), scores={n: w.t() for n, w in weights.items()})
    odd = weights | {"b.weight": torch.tensor([1, 2, float("inf"), 3])}
    with pytest.raises(
        UserError, match=r"NaN or infinite scores by prune\.criterion snip \(tensors: b\.weight\)"
    ) as caught:
        prune(weights, masks, PruneConfig(0.5, "snip"), scores=odd)
    assert caught.value.everywhere


# -- on real ranks ----------------------------------------------------------------------------------------------

RULES = {
    "global": PruneConfig(0.5, "snip"),
    "layer": PruneConfig(0.5, "snip", per="layer"),
    "floor": PruneConfig(0.5, "gradient", floor=0.35),
    "floor by magnitude": PruneConfig(0.5, floor=0.35),
}


def scored() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and scores full of ties, one tensor by far the weakest, in sizes that no world divides."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"a.weight": (11, 7), "b.weight": (101,), "weak.weight": (9, 5), "z.weight": (1,)}
    weights = {n: torch.randint(-9, 10, s, generator=draw) / 8 for n, s in shapes.items()}
    scores = {n: torch.randint(-9, 10, s, generator=draw) / 4 for n, s in shapes.items()}
    return weights | {"weak.weight": weights["weak.weight"] / 99}, scores | {"weak.weight": scores["weak.weight"] / 99}


def cut(rule: PruneConfig, **ranks: Any) -> PruneResult:
    weights, scores = scored()
    given = None if rule.criterion == "magnitude" else scores
    return prune(weights, dense_masks(weights, weights), rule, scores=given, **ranks)


def summary(pruned: PruneResult) -> list[Any]:
    return [masking.digest(pruned.masks), pruned.threshold.hex(), pruned.removed, list(pruned.collapsed)]


def test_real_ranks_cut_given_scores_as_one_process_does(lab: Any, tmp_path: Path) -> None:
    alone = {name: summary(cut(rule)) for name, rule in RULES.items()}
    assert len({digest for digest, *_ in alone.values()}) == len(RULES)
    for world in (2, 3):
        ended = lab.start(str(tmp_path), cwd=tmp_path, world=world, script=__file__).wait()
        assert ended.rc == 0, ended.said()
        for rank in range(world):
            assert json.loads((tmp_path / f"{world}-{rank}.json").read_text()) == alone


def on_this_rank(folder: Path) -> None:
    """What `lab` runs on every rank."""
    ranks = Ranks(device="cpu")
    found = {name: summary(cut(rule, partition=ranks.partition, gather=ranks.gather)) for name, rule in RULES.items()}
    (folder / f"{ranks.world}-{ranks.rank}.json").write_text(json.dumps(found))
    ranks.barrier()
    ranks.close()


if __name__ == "__main__":
    on_this_rank(Path(sys.argv[1]))
    os._exit(0)  # as the commands do: taking a gloo group apart at Python's end can hang
