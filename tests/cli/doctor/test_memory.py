"""Laws of the memory budget: counted without numbers, it is what a real pass keeps; engines share as they say."""

from __future__ import annotations

import pytest
import torch

from mirl_dist import models
from mirl_dist.cli.doctor import memory
from mirl_dist.cli.doctor.memory import GIB, Gpu, Pass, Passes, Size
from mirl_dist.distributed.engines.spec import EngineName
from mirl_dist.errors import UserError
from mirl_dist.training import losses

SMALL = {"dim": 8, "blocks": (1, 2, 1, 1), "refinement_blocks": 1}
SMALL |= {"prompt_dims": (8, 8, 8), "prompt_sizes": (4, 4, 4)}
ENGINES: tuple[EngineName, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.long
def test_activations_counted_on_meta_are_those_that_a_real_pass_keeps(precision: str) -> None:
    model, images = models.create("promptir", **SMALL), torch.rand(3, 3, 32, 32)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            restored = model(images)
        return losses.per_sample_l1(restored, images).mean()

    real = memory.measure_pass(model, loss)
    told = memory.passes_of("promptir", SMALL, 32, precision, "cpu")
    assert told.of(3).saved == real.saved > 10**7
    assert told.of(3).working == pytest.approx(real.working, rel=0.05) and real.working > 10**5
    assert all(p.grad is None for p in model.parameters())


def test_what_a_pass_keeps_is_the_sum_of_the_tensors_that_autograd_saves() -> None:
    layer, images = torch.nn.Conv2d(3, 3, 1), torch.rand(2, 3, 8, 8)
    images.requires_grad_()
    image = 2 * 3 * 8 * 8 * 4
    assert memory.saved_bytes(lambda: layer(images).exp().sum(), layer) == 2 * image, "the input, and exp's own output"


@pytest.mark.long
def test_activations_shrink_with_bfloat16_and_grow_with_samples_and_pixels() -> None:
    def saved(precision: str, kind: str, samples: int, side: int) -> int:
        with torch.device("meta"):
            model, images = models.create("promptir", **SMALL), torch.rand(samples, 3, side, side)
            return memory.saved_bytes(memory.loss_of(model, images, precision, kind), model)

    full = saved("fp32", "cuda", 2, 32)
    assert saved("bf16", "cpu", 2, 32) < saved("bf16", "cuda", 2, 32) < 0.7 * full, "on a GPU norms keep float32"
    assert saved("fp32", "cuda", 4, 64) == pytest.approx(8 * full, rel=0.05), "twice the samples, four times the pixels"


def test_each_engine_takes_no_more_than_the_last_and_offload_moves_moments() -> None:
    size = Size(weights=1_000, prunable=800, unit=100)
    alone = memory.state_bytes(size, "ddp", 1)
    assert alone.gpu == {"weights": 4_000, "gradients": 4_000, "moments": 8_000, "masks": 4_000}
    assert memory.state_bytes(size, "ddp", 8).total == alone.total + 4_000, "DDP's buckets"
    found = {engine: memory.state_bytes(size, engine, 8).gpu for engine in ENGINES}
    assert [found[e]["moments"] for e in ENGINES] == [8_000] + 4 * [1_000]
    assert [found[e]["gradients"] for e in ENGINES] == [4_000, 4_000, 500, 500, 500]
    assert [found[e]["weights"] for e in ENGINES] == [4_000, 4_000, 4_000, 500, 500]
    assert found["fsdp"]["gathered for use"] == 2 * 4 * 100 and found["fsdp"]["masks"] == 100
    assert [found[e].get("DeepSpeed's bucket", 0) for e in ENGINES] == [0, 4_000, 4_000, 4_000, 0]
    away = memory.state_bytes(size, "zero2", 8, offload=True)
    assert away.host == 1_000 + 500 and "moments" not in away.gpu
    assert memory.state_bytes(size, "fsdp", 8, offload=True).host == 500 + 500 + 1_000


def test_the_published_network_has_its_weights_and_a_largest_unit_within_it() -> None:
    size = memory.size_of("promptir", {}, "published")
    assert size.weights == 35_376_967 and size.unit < size.prunable < size.weights
    assert memory.size_of("promptir", {}, "all").prunable == size.weights


def test_the_largest_batch_that_fits_divides_the_share_of_a_rank() -> None:
    passes = Passes(5, Pass(9, 1))
    assert [memory.largest_forward(passes, 100, room, 12) for room in (105, 115, 154, 164, 1_000)] == [0, 1, 4, 4, 12]


def test_scoring_takes_the_weights_and_more_the_larger_the_image() -> None:
    small, large = (memory.scoring_bytes("promptir", SMALL, side, 2 * side) for side in (64, 128))
    weights = 4 * memory.size_of("promptir", SMALL, "all").weights
    assert large - weights == pytest.approx(4 * (small - weights), rel=0.05)


def test_a_gpu_is_known_by_its_name_in_any_case_and_another_is_refused() -> None:
    assert memory.gpu_of("a40") == Gpu("A40", int(44.3 * GIB))
    with pytest.raises(UserError, match=r"--gpu: found 'A41'\. Give one of A40, A100-40, A100-80, H100, H200\."):
        memory.gpu_of("A41")
