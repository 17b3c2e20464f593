"""The networks beside PromptIR: equal to the published ones in numbers and names, and open to any image size."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mirl_dist.errors import UserError
from mirl_dist.models.airnet import AirNet, deformable_convolution
from mirl_dist.models.base import ImageNetwork, pad_reflect, upsample_bilinear, upsample_nearest
from mirl_dist.models.epdn import EPDN, discriminator_parameters
from mirl_dist.models.ffdnet import FFDNet
from mirl_dist.models.mprnet import MPRNet
from mirl_dist.models.nafnet import NAFNet
from mirl_dist.models.restormer import pad_to_multiple
from mirl_dist.models.srresnet import SRResNet
from mirl_dist.models.transweather import TransWeather
from mirl_dist.models.uformer import Uformer
from tests.models.fingerprints import assert_published, fill, golden, hashed_image

TINY: dict[type[ImageNetwork], dict[str, Any]] = {
    SRResNet: {"width": 4, "blocks": 2},
    Uformer: {
        "width": 4,
        "encoder_blocks": (1, 2),
        "encoder_heads": (1, 2),
        "bottleneck_blocks": 2,
        "bottleneck_heads": 4,
        "decoder_blocks": (2, 1),
        "decoder_heads": (4, 2),
        "window": 4,
        "ffn_ratio": 2,
    },
    FFDNet: {"width": 4, "layers": 3},
    TransWeather: {
        "widths": (4, 8, 12, 16),
        "blocks": (1, 1, 1, 1),
        "decoder_blocks": 1,
        "queries": 3,
        "tail_widths": (4, 4),
    },
    NAFNet: {"width": 4, "encoder_blocks": (1, 1), "middle_blocks": 1, "decoder_blocks": (1, 1)},
    MPRNet: {"width": 4, "level_step": 4, "last_step": 4, "reduction": 1, "blocks": 1},
    AirNet: {"width": 4, "groups": 1, "blocks": 1, "queue": 5},
    EPDN: {"width": 2, "downs": 2, "blocks": 1, "local_blocks": 1, "enhancer_width": 3},
}
every_network = pytest.mark.parametrize("kind", TINY)


def tiny(kind: type[ImageNetwork], seed: int = 0, **sizes: Any) -> Any:
    torch.manual_seed(seed)
    return kind(**(TINY[kind] | sizes)).eval()


def on_meta(kind: type[ImageNetwork], **sizes: Any) -> Any:
    with torch.device("meta"):
        return kind(**sizes)


# -- equal to the published networks --------------------------------------------------------------------------------


class Published(NamedTuple):
    """A published network: how to build it, its numbers in golden/, how to run it, and the tolerance of gradients."""

    build: Callable[[], Any]
    file: str
    run: Callable[[Any, Tensor], Sequence[Tensor]] = lambda network, x: network.restore(x)
    gradients: float = 1e-9


def noise(x: Tensor) -> Tensor:
    return x.new_full((1, 1, 1, 1), 25 / 255)


PUBLISHED = [
    Published(SRResNet, "srresnet"),
    Published(FFDNet, "ffdnet_colour", lambda network, x: [network(x, noise(x))]),
    Published(
        lambda: FFDNet(width=64, layers=15, channels=1),
        "ffdnet_grey",
        lambda network, x: [network.denoise(torch.cat((x, noise(x).expand_as(x)), dim=1))],
    ),
    Published(EPDN, "epdn", lambda network, x: [2 * stage - 1 for stage in reversed(network.restore((x + 1) / 2))]),
    Published(TransWeather, "transweather", lambda network, x: network.restore((x + 1) / 2)),
    Published(MPRNet, "mprnet_deraining"),
    Published(AirNet, "airnet"),
    Published(Uformer, "uformer"),
]
VARIANTS = [
    # Their gradients have norms up to 7e7, where the order of additions shows in the eighth digit.
    Published(lambda: MPRNet(80, 48, 32), "mprnet_denoising", gradients=2e-7),
    Published(lambda: MPRNet(96, 48, 32), "mprnet_deblurring", gradients=2e-7),
    Published(TransWeather, "transweather_art", lambda network, x: network.restore((x + 1) / 2)),
]
QUICK = ("srresnet", "ffdnet_colour", "ffdnet_grey", "epdn")


@pytest.mark.parametrize(
    "case",
    [pytest.param(p, id=p.file, marks=[] if p.file in QUICK else pytest.mark.long) for p in PUBLISHED + VARIANTS],
)
def test_outputs_and_gradients_equal_the_published_ones(case: Published) -> None:
    assert_published(case.build(), case.file, case.run, case.gradients)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.file)
def test_names_and_shapes_of_parameters_are_the_official_ones(case: Published) -> None:
    numbers = golden(case.file)
    with torch.device("meta"):
        network = case.build()
    ours = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    unused = network.official_only_shapes()
    assert not ours.keys() & unused.keys()
    assert ours | unused == {name: tuple(shape) for name, (shape, _) in numbers["tensors"].items()}
    without_gradient = {name for name, (_, norm) in numbers["tensors"].items() if norm is None}
    assert unused.keys() == without_gradient - ours.keys()


@pytest.mark.parametrize(
    ("network", "parameters", "tensors"),
    [
        (lambda: SRResNet(), 1_222_147, 70),
        (lambda: Uformer(), 50_880_946, 719),
        (lambda: FFDNet(), 852_108, 24),
        (lambda: FFDNet(width=64, layers=15, channels=1), 485_316, 30),
        (lambda: FFDNet(width=64, layers=15), 494_540, 30),
        (lambda: TransWeather(), 37_755_411, 341),
        (lambda: NAFNet(), 29_159_715, 664),
        (lambda: NAFNet(32, (1, 1, 1, 28), 1, (1, 1, 1, 1)), 17_111_907, 664),
        (lambda: MPRNet(), 3_637_249, 262),
        (lambda: MPRNet(80, 48, 32), 15_741_025, 262),
        (lambda: MPRNet(96, 48, 32), 20_127_073, 262),
        (lambda: AirNet(), 8_930_313, 528),
        (lambda: EPDN(), 17_379_249 - 400, 82 - 4),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(
    network: Callable[[], ImageNetwork], parameters: int, tensors: int
) -> None:
    with torch.device("meta"):
        sizes = [tensor.numel() for tensor in network().parameters()]
    assert (sum(sizes), len(sizes)) == (parameters, tensors)


def test_epdn_with_its_discriminator_has_the_number_of_parameters_that_papers_state() -> None:
    unused = sum(torch.Size(shape).numel() for shape in on_meta(EPDN).official_only_shapes().values())
    generator = sum(tensor.numel() for tensor in on_meta(EPDN).parameters()) + unused
    assert discriminator_parameters() == 5_535_618
    assert generator + discriminator_parameters() == 22_914_867


def test_uformers_official_buffers_follow_from_its_sizes() -> None:
    network = tiny(Uformer)
    constants = network.official_constants()
    assert not list(network.buffers())
    assert len(constants) == 8
    for name, index in constants.items():
        attention = network.get_submodule(name.removesuffix(".relative_position_index"))
        bias = attention.relative_position_bias_table[index].permute(2, 0, 1)
        assert torch.equal(attention._position_bias(), bias)


def test_mprnets_shared_slope_has_54_further_official_names() -> None:
    network = on_meta(MPRNet)
    aliases = network.official_aliases()
    assert len(aliases) == 54 and set(aliases.values()) == {"shallow_feat1.1.body.1.weight"}
    assert not aliases.keys() & network.state_dict().keys()


def test_airnets_buffers_are_the_official_ones_and_its_slow_copy_does_not_train() -> None:
    network, numbers = on_meta(AirNet), golden("airnet")
    assert {n: list(buffer.shape) for n, buffer in network.named_buffers()} == numbers["buffers"]
    training = [tensor.numel() for tensor in network.parameters() if tensor.requires_grad]
    assert sum(training) == 7_610_377
    unused = ("E.E.encoder_k", "E.E.encoder_q.E.", "E.E.encoder_q.mlp")
    assert sum(t.numel() for n, t in network.named_parameters() if not n.startswith(unused)) == 6_329_609


@pytest.mark.long
def test_airnets_encoder_gives_the_published_features() -> None:
    numbers = golden("airnet")
    network = AirNet().double().eval()
    fill(network, sorted(numbers["tensors"]), numbers["factors"])
    encoder = network.get_submodule("E.E.encoder_q")
    with torch.no_grad():
        features = encoder.E(encoder.E_pre(hashed_image((1, 3, 64, 64)))).mean(dim=(-2, -1))
    assert features.mean().item() == pytest.approx(numbers["features"]["mean"], rel=1e-9)
    assert features.std(correction=0).item() == pytest.approx(numbers["features"]["std"], rel=1e-9)


def spandrels_nafnet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class NAFNet of spandrel, without the rest of that package, which imports torchvision."""
    spec = importlib.util.find_spec("spandrel")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("spandrel is not installed: pip install --no-deps spandrel")
    root = spec.submodule_search_locations[0]
    for path in ("", "/architectures", "/architectures/NAFNet", "/architectures/NAFNet/__arch"):
        package = ModuleType("spandrel" + path.replace("/", "."))
        package.__path__ = [root + path]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    return importlib.import_module("spandrel.architectures.NAFNet.__arch.NAFNet_arch").NAFNet


def test_nafnet_equals_spandrels(monkeypatch: pytest.MonkeyPatch) -> None:
    other = spandrels_nafnet(monkeypatch)(
        img_channel=3, width=8, middle_blk_num=2, enc_blk_nums=[1, 2, 1], dec_blk_nums=[1, 1, 2]
    ).double()
    ours = NAFNet(8, (1, 2, 1), 2, (1, 1, 2)).double()
    names = sorted(ours.state_dict())
    fill(ours, names, [])
    other.load_state_dict(ours.state_dict(), strict=True)
    image = hashed_image((2, 3, 24, 40))
    torch.testing.assert_close(ours(image), other(image), rtol=1e-9, atol=1e-9)


# -- laws that hold for each network --------------------------------------------------------------------------------


@every_network
@pytest.mark.parametrize("shape", [(1, 3, 37, 51), (2, 3, 5, 3), (1, 3, 1, 1), (1, 3, 1, 16), (1, 3, 64, 30)])
def test_any_image_size_comes_back_as_it_went_in(kind: type[ImageNetwork], shape: tuple[int, ...]) -> None:
    network, image = tiny(kind), torch.rand(shape)
    with torch.no_grad():
        output = network(image)
        padded = network(network.pad(image))
    assert output.shape == image.shape and output.dtype == image.dtype
    assert bool(output.isfinite().all())
    torch.testing.assert_close(output, padded[..., : shape[2], : shape[3]], rtol=0, atol=0)


@every_network
def test_images_of_a_batch_do_not_influence_each_other(kind: type[ImageNetwork]) -> None:
    network = tiny(kind).double()
    images = torch.rand(3, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(network(images), alone, rtol=1e-11, atol=1e-11)


@every_network
def test_everything_that_trains_has_a_gradient_and_nothing_else(kind: type[ImageNetwork]) -> None:
    network = tiny(kind).train()
    image = torch.rand(2, 3, 128, 128)  # smaller, and attention to a single pixel has no gradient
    with torch.no_grad():
        for tensor in network.parameters():  # some start from zero, and what they multiply then has no gradient
            tensor.add_(0.1 * torch.rand_like(tensor))
    outputs = network.contrast(image, image.flip(-1)) if isinstance(network, AirNet) else network.stages(image)
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    for name, tensor in network.named_parameters():
        assert (tensor.grad is not None) == tensor.requires_grad, name
        assert tensor.grad is None or bool(tensor.grad.any()), name


@every_network
def test_the_restored_image_is_the_first_stage(kind: type[ImageNetwork]) -> None:
    network, image = tiny(kind), torch.rand(1, 3, 20, 36)
    with torch.no_grad():
        stages = network.stages(image)
        assert torch.equal(stages[0], network(image))
    assert len(stages) == {MPRNet: 3, EPDN: 2}.get(kind, 1)
    assert all(stage.shape == image.shape for stage in stages)


@pytest.mark.long
@every_network
def test_one_graph_without_breaks_gives_the_same_image(kind: type[ImageNetwork]) -> None:
    network, image = tiny(kind), torch.rand(1, 3, 32, 48)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), network(image), rtol=1e-4, atol=1e-5)


@every_network
def test_the_network_exports_and_the_exported_program_gives_the_same_image(kind: type[ImageNetwork]) -> None:
    network, image = tiny(kind), torch.rand(1, 3, 32, 48)
    exported = torch.export.export(network, (torch.rand(1, 3, 32, 48),))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(image), network(image), rtol=1e-5, atol=1e-6)


@every_network
def test_autocast_to_bfloat16_changes_little(kind: type[ImageNetwork]) -> None:
    network, image = tiny(kind), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        exact = network(image)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = network(image)
    assert (coarse.float() - exact).abs().max() < 0.1 * max(1.0, exact.abs().max().item())


@every_network
def test_the_same_seed_gives_the_same_weights(kind: type[ImageNetwork]) -> None:
    first, second = tiny(kind, seed=3).state_dict(), tiny(kind, seed=3).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@every_network
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 0, 16)])
def test_an_input_that_is_no_batch_of_colour_images_is_refused(
    kind: type[ImageNetwork], shape: tuple[int, ...]
) -> None:
    with pytest.raises(UserError, match=re.escape(f"found an input of shape {shape}, where {kind.__name__} takes")):
        tiny(kind)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("kind", "sizes", "problems"),
    [
        (SRResNet, {"width": 0, "blocks": 0}, ["width = 0 (must be >= 1)", "blocks = 0 (must be >= 1)"]),
        (
            Uformer,
            {"encoder_heads": (1, 2, 3), "window": 7},
            ["encoder_heads = [1, 2, 3] has 3 numbers (must be 4)", "window = 7 (must be even and >= 2)"],
        ),
        (
            Uformer,
            {"encoder_heads": (1, 2, 3, 8), "bottleneck_heads": 3},
            [
                "encoder level 3 has 128 channels, which encoder_heads[2] = 3 does not divide",
                "bottleneck_heads = 3 does not divide its 512 channels",
            ],
        ),
        (
            FFDNet,
            {"layers": 1, "channels": 2, "sigma": -1.0},
            ["layers = 1 (must be >= 2)", "channels = 2 (must be", "sigma = -1.0 (must be from 0 to 255)"],
        ),
        (
            TransWeather,
            {"heads": (1, 3, 4, 4), "reductions": (16, 2, 2, 1)},
            ["stage 2 has 128 channels, which heads[1] = 3 does", "(must be at most [8, 4, 2, 2])"],
        ),
        (
            NAFNet,
            {"middle_blocks": 0, "decoder_blocks": (1, 1)},
            ["middle_blocks = 0 (must be >= 1)", "decoder_blocks = [1, 1] has 2 numbers (must be 4)"],
        ),
        (
            MPRNet,
            {"width": 3, "last_step": -1},
            ["last_step = -1 (must be >= 0)", "reduction = 4 leaves no channel at width = 3"],
        ),
        (
            AirNet,
            {"queue": 0, "momentum": 2.0, "temperature": 0.0},
            ["queue = 0", "momentum = 2.0 (must be from 0 to 1)", "temperature = 0.0 (must be > 0)"],
        ),
        (EPDN, {"downs": 0, "enhancer_width": 0}, ["downs = 0 (must be >= 1)", "enhancer_width = 0 (must be >= 1)"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused_all_at_once(
    kind: type[ImageNetwork], sizes: dict[str, Any], problems: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        kind(**sizes)
    assert f"where {kind.__name__} is built. Change these numbers" in str(caught.value)
    assert [problem for problem in problems if problem not in str(caught.value)] == []


# -- what single networks do ----------------------------------------------------------------------------------------


def test_ffdnet_takes_a_noise_level_for_all_for_each_image_or_each_pixel() -> None:
    network, image = tiny(FFDNet, sigma=50.0), torch.rand(2, 3, 7, 10)
    assumed = network(image)
    assert torch.equal(assumed, network(image, torch.full((2, 1, 7, 10), 50 / 255)))
    other = network(image, torch.tensor([50 / 255, 0.0]).reshape(2, 1, 1, 1))
    assert torch.equal(other[0], assumed[0]) and not torch.equal(other[1], assumed[1])


def test_grey_ffdnet_restores_each_channel_alone() -> None:
    network, image = tiny(FFDNet, channels=1), torch.rand(2, 3, 8, 8)
    swapped = network(image.flip(1))
    torch.testing.assert_close(network(image), swapped.flip(1), rtol=1e-6, atol=1e-6)


def test_airnets_contrast_moves_the_slow_copy_and_fills_the_queue() -> None:
    network = tiny(AirNet).train()
    contrast = network.get_submodule("E.E")
    query, key = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16)
    for tensor in contrast.encoder_q.parameters():
        tensor.data.add_(1.0)
    slow = [tensor.clone() for tensor in contrast.encoder_k.parameters()]
    queue = contrast.queue.clone()
    restored, logits = network.contrast(query, key)
    assert restored.shape == query.shape and logits.shape == (3, 1 + 5)
    for before, after in zip(slow, contrast.encoder_k.parameters(), strict=True):
        torch.testing.assert_close(after, before + 0.001, rtol=1e-4, atol=1e-6)
    assert torch.equal(contrast.queue[:, 3:], queue[:, 3:]) and not torch.equal(contrast.queue[:, :3], queue[:, :3])
    torch.testing.assert_close(contrast.queue.norm(dim=0), torch.ones(5))
    network.contrast(query, key)
    assert contrast.queue_ptr.item() == 6 % 5


def test_a_deformable_convolution_without_moves_is_a_plain_one() -> None:
    torch.manual_seed(0)
    x, weight = torch.rand(2, 3, 6, 7, dtype=torch.float64), torch.rand(4, 3, 3, 3, dtype=torch.float64)
    offset, mask = torch.zeros(2, 9, 2, 6, 7, dtype=torch.float64), torch.ones(2, 9, 6, 7, dtype=torch.float64)
    plain = torch.nn.functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close(deformable_convolution(x, offset, mask, weight), plain)
    offset[:, :, 0] = 1.0
    moved = deformable_convolution(x, offset, 0.5 * mask, weight)
    torch.testing.assert_close(moved[:, :, :-2], 0.5 * plain[:, :, 1:-1])
    offset[:, :, 0], offset[:, :, 1] = 0.0, -0.25
    halfway = deformable_convolution(x, offset, mask, weight)
    left = torch.nn.functional.conv2d(x.roll(1, -1), weight, padding=1)
    torch.testing.assert_close(halfway[..., 2:-1], (0.75 * plain + 0.25 * left)[..., 2:-1])


def test_resizing_and_padding_equal_torchs() -> None:
    x = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    bilinear = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample_bilinear(x), bilinear)
    assert torch.equal(upsample_nearest(x, 4), torch.nn.functional.interpolate(x, scale_factor=4, mode="nearest"))
    assert torch.equal(pad_reflect(x, 3), torch.nn.functional.pad(x, (3, 3, 3, 3), mode="reflect"))


def test_networks_pad_as_pad_to_multiple_does() -> None:
    image = torch.rand(1, 3, 70, 9)
    multiples = {Uformer: 128, TransWeather: 64, NAFNet: 16, MPRNet: 8, AirNet: 1}
    for kind, multiple in multiples.items():
        assert torch.equal(on_meta(kind).pad(image), pad_to_multiple(image, multiple)), kind
    assert torch.equal(on_meta(FFDNet).pad(image), torch.cat((image, image[..., -1:]), dim=-1))
    assert on_meta(EPDN).pad(image).shape[2:] == (128, 64) and on_meta(EPDN).pad(image.mT).shape[2:] == (64, 128)
    assert on_meta(EPDN).pad(torch.rand(1, 3, 65, 65)).shape[2:] == (96, 96)
