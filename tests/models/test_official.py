"""Weights go out in the official layout as they came in, and the official code loads them as it loads its own."""

from __future__ import annotations

import io
import re
import zipfile

import pytest
import torch
from torch import Tensor, nn

from mirl_dist import models
from mirl_dist.errors import UserError
from tests.models.test_models import SMALL, golden, meta_promptir


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published class, as it was measured."""
    return {name: tuple(shape) for name, (shape, _) in golden("official")["tensors"].items()}


def stand_in(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A module that owns parameters of these names and shapes, as the published class does."""
    root = nn.Module()
    for name, shape in shapes.items():
        at, *path = root, *name.split(".")[:-1]
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.register_parameter(name.split(".")[-1], nn.Parameter(torch.empty(shape), requires_grad=False))
    return root


def sparse(density: float) -> dict[str, Tensor]:
    """A small network's weights, most of them pruned."""
    torch.manual_seed(0)
    weights = models.create("promptir", **SMALL).state_dict()
    return {n: t * (torch.rand(t.shape) < density) if "weight" in n else t for n, t in weights.items()}


@pytest.mark.parametrize("compact", [False, True])
def test_an_official_checkpoint_comes_in_and_goes_out_key_by_key(compact: bool) -> None:
    shapes = official_shapes()
    torch.manual_seed(0)
    official = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for tensor in official.values():
        tensor.reshape(-1)[::97] = torch.randn(tensor.reshape(-1)[::97].shape)
    ours = models.from_official("promptir", {"state_dict": {f"net.{n}": t for n, t in official.items()}}).weights
    out = models.to_official("promptir", ours)
    assert {n: tuple(t.shape) for n, t in out.items()} == shapes
    unused = meta_promptir().official_only_shapes().keys()
    assert all(torch.equal(out[n], official[n]) for n in shapes.keys() - unused)
    assert all(not out[n].any() and out[n].dtype == torch.float32 for n in unused)
    if compact:
        out = {n: t for n, t in out.items() if t.numel() < 50_000} | {n: out[n] for n in list(unused)[:1]}
    read = torch.load(io.BytesIO(models.write_official(out, compact=compact)), weights_only=True)
    assert read.keys() == {"state_dict", "pytorch-lightning_version", "epoch", "global_step"}, "Lightning asks for them"
    whole = stand_in({n: tuple(t.shape) for n, t in out.items()})
    whole.load_state_dict({n.removeprefix("net."): t for n, t in read["state_dict"].items()}, strict=True)
    assert all(torch.equal(tensor, out[name]) for name, tensor in whole.state_dict().items())


def test_the_exported_network_restores_images_as_before() -> None:
    weights = sparse(0.3)
    network = models.create("promptir", **SMALL).eval()
    network.load_state_dict(weights)
    data = models.write_official(models.to_official("promptir", weights, **SMALL), compact=True)
    read = torch.load(io.BytesIO(data), weights_only=True)
    again = models.create("promptir", **SMALL).eval()
    again.load_state_dict(models.from_official("promptir", read, **SMALL).weights)
    image = torch.rand(1, 3, 24, 16)
    with torch.no_grad():
        assert torch.equal(network(image), again(image))


def test_a_compact_file_of_a_sparse_ticket_is_small_and_the_same_each_time() -> None:
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(500, 1_000) * (torch.rand(500, 1_000) < 0.1)}
    dense, compact = (models.write_official(weights, compact=c) for c in (False, True))
    assert len(dense) > 2_000_000
    assert len(compact) < 0.22 * len(dense)
    assert models.write_official(weights, compact=True) == compact
    with zipfile.ZipFile(io.BytesIO(compact)) as archive:
        assert archive.testzip() is None


def test_a_slice_of_a_large_tensor_exports_no_more_than_itself() -> None:
    view = torch.zeros(1_000_000)[:10]
    assert len(models.write_official({"a": view}, compact=False)) < 10_000


def test_weights_of_another_network_are_refused_all_at_once() -> None:
    weights = sparse(0.5)
    odd = {n: t for n, t in weights.items() if n != "output.weight"} | {"strange": torch.zeros(2)}
    odd["patch_embed.proj.weight"] = torch.zeros(1)
    with pytest.raises(UserError) as fault:
        models.to_official("promptir", odd, **SMALL)
    assert re.fullmatch(
        r"found 1 missing \('output.weight'\); 1 unknown \('strange' \(2,\)\); 1 misshapen \(.*\), where weights of "
        r"'promptir' were exported. Give the weights of this very network, and its sizes.",
        str(fault.value),
    )
    with pytest.raises(UserError, match="unknown sizes 'width'"):
        models.to_official("promptir", weights, width=3)
