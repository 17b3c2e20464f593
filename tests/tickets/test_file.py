"""A ticket as one file: exact both ways, small, refused when damaged or hostile, and caught when it lies."""

from __future__ import annotations

import json
import random
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirl_dist import models
from mirl_dist.config import strict_json
from mirl_dist.errors import UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.prune import PruneConfig, in_scope, prune
from mirl_dist.tickets import container
from mirl_dist.tickets import file as ticket_file
from mirl_dist.tickets import verify as verifying
from mirl_dist.tickets.file import MEMORY_EXTRA, MEMORY_FACTOR, TicketContent
from mirl_dist.training.ticket import Ticket

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fuzz_tickets
from fuzz_tickets import repacked, with_digest, with_text

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "ticket_format.md"


def packed(content: TicketContent) -> bytes:
    return ticket_file.pack(content)


@pytest.fixture(scope="module")
def line() -> list[TicketContent]:
    """Four rounds of one small run."""
    return fuzz_tickets.rounds(4)


@pytest.fixture(scope="module")
def child(line: list[TicketContent]) -> TicketContent:
    return line[-1]


@pytest.fixture(scope="module")
def data(child: TicketContent) -> bytes:
    return packed(child)


def bits(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: (tuple(t.shape), t.numpy().tobytes()) for name, t in tensors.items()}


def same(one: TicketContent, other: TicketContent) -> bool:
    fields = zip(one[2:], other[2:], strict=True)
    return one.ticket == other.ticket and one.config == other.config and all(bits(a) == bits(b) for a, b in fields)


def broken(content: TicketContent) -> list[str]:
    """The names of the checks that do not hold."""
    return [check.what for check in verifying.verify(content) if not check.holds]


def told(content: TicketContent, **changes: Any) -> TicketContent:
    """The content with a record that says something else."""
    return content._replace(ticket=content.ticket.model_copy(update=changes))


def made(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], like: TicketContent) -> TicketContent:
    """A content of these weights, its record true where the file is proof of it."""
    initial = {n: t.clone() for n, t in weights.items()}
    masking.apply_masks(initial, masks)
    trained = {n: t * 2 for n, t in initial.items()}
    for name, mask in masks.items():
        trained[name].masked_fill_(~mask, 0.0)
    counts = {
        "alive": masking.count_surviving(masks),
        "prunable": masking.size(masks),
        "total": sum(t.numel() for t in weights.values()),
        "layer_density": masking.densities(masks),
        "collapsed": tuple(n for n in sorted(masks) if not masks[n].any()),
        "mask_digest": masking.digest(masks),
        "weights_digest": masking.digest_tensors(trained),
        "initial_digest": masking.digest_tensors(initial),
    }
    return told(like._replace(masks=dict(masks), initial=initial, trained=trained), **counts)


@st.composite
def networks(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of odd shapes and values, and masks of odd densities of some of them."""
    random_ = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes = st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=6)
    values, masks = {}, {}
    for at, shape in enumerate(draw(shapes)):
        name = draw(st.sampled_from(("a.weight", "a.0.bias", "B_2", "z.z.z"))) + f"{at}"
        tensor = torch.randn(shape, generator=random_) * 10 ** draw(st.sampled_from((-44.0, 0.0, 37.0)))
        values[name] = tensor * draw(st.sampled_from((1.0, -0.0)))
        if at == 0 or draw(st.booleans()):
            masks[name] = torch.rand(shape, generator=random_) < draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    return values, masks


# -- exact, small, readable without us --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(network=networks())
def test_what_is_packed_is_read_to_the_last_bit_and_holds(network: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    content = made(*network, like=fuzz_tickets.rounds(2)[1])
    data = packed(content)
    read = ticket_file.read(data, "x")
    assert same(read, content)
    assert packed(read) == data
    assert broken(read) == []


def test_the_same_content_gives_the_same_bytes_in_any_order_of_names(child: TicketContent, data: bytes) -> None:
    turned = [dict(reversed(list(tree.items()))) for tree in child[1:]]
    assert ticket_file.pack(TicketContent(child.ticket, *turned)) == data
    with pytest.raises(UserError, match="x is no ticket file"):
        ticket_file.read(safetensors.torch.save(child.trained), "x")


def test_first_values_may_come_with_the_dead_ones(line: list[TicketContent], data: bytes) -> None:
    assert packed(line[-1]._replace(initial=line[0].initial)) == data


@pytest.mark.parametrize("density", [1.0, 0.1, 0.03])
def test_a_file_is_hardly_larger_than_its_mask_and_its_survivors(child: TicketContent, density: float) -> None:
    network = models.create("promptir", dim=8, blocks=(1,) * 4, refinement_blocks=1, prompt_sizes=(4, 4, 4))
    weights = {name: p.detach() for name, p in network.named_parameters()}
    masks = masking.dense_masks(weights, in_scope(weights, "published"))
    if density < 1:
        masks = prune(weights, masks, PruneConfig(1 - density)).masks
    content = made(weights, masks, child)
    survivors = content.ticket.alive_total
    law = content.ticket.prunable / 8 + 2 * 4 * survivors
    assert len(weights) > 120
    assert law < len(packed(content)) < 1.05 * law


def test_the_document_shows_how_to_read_a_file_without_this_package(
    child: TicketContent, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "X.ticket").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    code = DOCUMENT.read_text().split("```python\n")[1].split("```")[0]
    assert "mirl_dist" not in code
    found: dict[str, Any] = {}
    exec(code, found)
    for name, tensor in child.trained.items():
        assert np.array_equal(found["trained"][name], tensor.numpy())
        assert np.array_equal(found["initial"][name], child.initial[name].numpy())
    assert found["about"]["ticket"]["mask_digest"] == child.ticket.mask_digest


# -- damage -----------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed(data: bytes) -> None:
    begin = 8 + int.from_bytes(data[:8], "little")
    chance = random.Random(0)
    places = {(at, bit) for at in range(begin) for bit in range(8)}
    places = set(chance.sample(sorted(places), 700)) | {(at, at % 8) for at in range(begin, len(data), 7)}
    for at, bit in places:
        with pytest.raises(UserError):
            ticket_file.read(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], "x")


def test_every_cut_and_everything_appended_is_noticed(data: bytes) -> None:
    for length in (*range(0, 900, 9), *range(900, len(data), 97), len(data) - 1):
        with pytest.raises(UserError, match="^x( is no ticket file| has|: its)"):
            ticket_file.read(data[:length], "x")
    with pytest.raises(UserError, match="x has 3,... bytes, its header wants 3,"):
        ticket_file.read(data + b"\0", "x")


@pytest.mark.parametrize("part", ["about", "initial", "mask", "trained"])
def test_a_damaged_part_is_named(data: bytes, part: str) -> None:
    begin = data.index(bytes(container.unpack(data, "x")[part]))
    with pytest.raises(UserError, match=f"^x: its part '{part}' is damaged"):
        ticket_file.read(data[:begin] + bytes([data[begin] ^ 1]) + data[begin + 1 :], "x")


def header(data: bytes, old: bytes, new: bytes) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].replace(old, new)
    assert text != data[8:end]
    return len(text).to_bytes(8, "little") + text + data[end:]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b'"dtype":"F32"', b'"dtype":"F16"', "its header is not the one of its parts"),
        (b'"data_offsets":[0,', b'"data_offsets":[4,', "its header is not the one of its parts"),
        (b'"mask":{', b'"mask":{"shape":[1],', r"its text cannot be read \(a key appears there twice\)"),
        (b'"shape":[', b'"shape":[-', "its header is not the one of its parts"),
        (b'"shape":[', b'"shape":[9999999999999999999', r"cannot be read \(a number of 2. digits\)"),
        (b'"shape":[', b'"shape":[NaN,', r"cannot be read \(a number that is not finite\)"),
        (b'"mask":{', b'"mosk":{', "its header does not name the parts"),
        (b"ticket-file-1", b"ticket-file-2", "is of another version than mirl-dist-ticket-file-1"),
        (b"mirl-dist-ticket", b"mirl-dost-ticket", "is no ticket file"),
        (b"}}", b'},"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "its header is not the one of its parts"),
        (b"}}", b"}}" + b" " * 3000, "its header of 3,... bytes is cut short, or too long"),
    ],
)
def test_a_header_of_any_other_form_is_refused(data: bytes, old: bytes, new: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ticket_file.read(header(data, old, new), "x")


# -- hostile content under checksums that fit -------------------------------------------------------------------


def index(change: Callable[[list[Any]], Any]) -> Callable[[Any], Any]:
    """A change of the text's index of tensors."""

    def changed(tree: Any) -> Any:
        new = change(tree["tensors"])
        return tree | {"tensors": tree["tensors"] if new is None else new}

    return changed


def record(**changes: Any) -> Callable[[Any], Any]:
    return lambda tree: tree | {"ticket": tree["ticket"] | changes}


def first(at: int, value: Any) -> Callable[[Any], Any]:
    """A change of name (0), shape (1) or prunable (2) of the first tensor, encoder.0.attn.qkv.weight (12, 4, 1, 1)."""
    return index(lambda tensors: tensors[0].__setitem__(at, value))


HOSTILE: list[tuple[str, Callable[[Any], Any], str]] = [
    ("no JSON", lambda t: b"{", "its text cannot be read"),
    ("no UTF-8", lambda t: b'"\xff"', "its text cannot be read"),
    ("a list", lambda t: [], "its text is not that of a ticket file"),
    ("a key more", lambda t: t | {"more": 1}, "its text is not that of a ticket file"),
    ("a key twice", lambda t: json.dumps(t)[:-1].encode() + b',"begins":""}', "a key appears there twice"),
    ("nested", lambda t: b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    ("nested a little", lambda t: t | {"config": {"a": json.loads("[" * 20 + "]" * 20)}}, "nested too deeply"),
    ("many values", lambda t: t | {"config": {"a": [0] * 60_000}}, "more than 50,000 values"),
    ("long", lambda t: b" " * 3_000_000, "2,097,153 bytes of text"),
    ("NaN", lambda t: t | {"config": {"a": float("nan")}}, "a number that is not finite"),
    ("1e999", lambda t: json.dumps(t).replace('"round": 3', '"round": 1e999').encode(), "a number that is not finite"),
    ("long number", lambda t: t | {"config": {"a": 10**400}}, "a number of 401 digits"),
    ("terminal", lambda t: t | {"config": {"a": "\x1b[2J"}}, r"the character U\+001B"),
    ("terminal key", lambda t: t | {"config": {"\x9b": 1}}, r"the character U\+009B"),
    ("right to left", record(protocol="\u202egpj.exe"), r"the character U\+202E"),
    ("half a character", lambda t: t | {"config": {"a": "\ud800"}}, r"the character U\+D800"),
    ("no config", lambda t: t | {"config": 1}, "its config or the digest"),
    ("other first values", lambda t: t | {"begins": "0" * 64}, "first values do not have the digest"),
    ("no index", index(lambda i: {}), "not named once each"),
    ("a tensor twice", index(lambda i: [i[0], *i]), "not named once each"),
    ("no order", index(lambda i: i[::-1]), "not named once each"),
    ("nothing prunable", index(lambda i: [[n, s, False] for n, s, _ in i]), "not named once each"),
    ("no entry", first(2, 1), "its index of tensors is damaged"),
    ("path", first(0, "../../etc/passwd"), r"found the tensor name '\.\./\.\./etc"),
    ("dots", first(0, "a..b"), "found the tensor name"),
    ("empty name", first(0, ""), "found the tensor name"),
    ("long name", first(0, "a" * 300), "found the tensor name"),
    ("other letters", first(0, "\u0430.weight"), r"found the tensor name '\\u0430.weight'"),
    ("negative", first(1, [-12, -4]), "found a shape of 'encoder.0.attn.qkv.weight' that is no shape"),
    ("zero", first(1, [0]), "that is no shape"),
    ("true", first(1, [True, 48]), "that is no shape"),
    ("real", first(1, [48.0]), "that is no shape"),
    ("nine sides", first(1, [48] + [1] * 8), "that is no shape"),
    ("huge", first(1, [10**17] * 8), "weights in 'encoder.0.attn.qkv.weight'"),
    ("large", first(1, [2**30]), "its mask has 29 bytes, its index wants 134,217,751"),
    ("unprunable and large", lambda t: index(lambda i: i[1].__setitem__(1, [2**40]))(t), "its masks leave 1,099,511"),
    ("one weight less", first(1, [47]), "has bits behind its last weight|its masks leave"),
    ("no record", lambda t: t | {"ticket": []}, "its record is none"),
    ("other digest", record(round=4), "does not have the digest it states"),
    ("field more", record(more=1), "is not a ticket"),
    ("no scores", record(scores={"a": {}}), "its scores are none"),
    ("text for a number", record(threshold="0.5"), "does not have the digest|values of other kinds"),
]


@pytest.mark.parametrize(("change", "said"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_a_hostile_text_is_refused(data: bytes, change: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ticket_file.read(with_text(data, change), "x")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threshold": "NaN"}, "counts what cannot be: threshold"),
        ({"alive": "7"}, "values of other kinds"),
        ({"total": 1}, "its record counts what cannot be"),
        ({"curve": {"steps": [], "psnr": {"a/set": []}}}, "its record counts what cannot be: the curve"),
    ],
)
def test_a_record_that_no_run_could_have_made_is_refused_even_with_its_digest(
    child: TicketContent, data: bytes, changes: dict[str, Any], said: str
) -> None:
    def change(tree: Any) -> Any:
        tree["ticket"] |= changes
        return with_digest(tree, child.ticket.layer_density)

    with pytest.raises(UserError, match=said):
        ticket_file.read(with_text(data, change), "x")


def test_folded_text_must_be_one_whole_stream(data: bytes) -> None:
    whole = bytes(container.unpack(data, "x")["about"])
    for about in (whole[:-1], whole + b"x", b"", b"x" + whole):
        with pytest.raises(UserError, match="its text (ends too early or too late|cannot be unfolded)"):
            ticket_file.read(repacked(data, lambda parts, about=about: parts.update(about=about)), "x")  # type: ignore


def test_a_collapse_that_is_not_told_is_caught(child: TicketContent) -> None:
    bare = {**child.masks, "output.weight": torch.zeros(3, 4, 3, 3, dtype=torch.bool)}
    content = made(child.initial, bare, child)
    assert broken(content) == []
    assert broken(told(content, collapsed=())) == ["tensors without surviving weights"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["initial", "trained"])
def test_values_that_are_not_finite_are_refused(data: bytes, part: str, value: float) -> None:
    odd = np.array([value], dtype="<f4").tobytes()
    with pytest.raises(UserError, match=f"found {part} values that are not finite"):
        ticket_file.read(repacked(data, lambda parts: parts.update({part: parts[part][:-4] + odd})), "x")


def test_a_mask_that_does_not_fit_the_values_is_refused(data: bytes) -> None:
    def one_more(parts: fuzz_tickets.Parts) -> None:
        parts["mask"] = bytes(len(parts["mask"]))

    with pytest.raises(UserError, match="its masks leave 7 survivors, but it holds"):
        ticket_file.read(repacked(data, one_more), "x")

    def behind(parts: fuzz_tickets.Parts) -> None:  # the mask of output.weight, 108 weights, ends in byte 20
        mask = bytearray(parts["mask"])
        at = 6 + 1 + 14 - 1
        mask[at] |= 1
        parts["mask"] = bytes(mask)

    with pytest.raises(UserError, match="the mask of 'output.weight' has bits behind its last weight"):
        ticket_file.read(repacked(data, behind), "x")


@pytest.mark.long
def test_random_forgeries_bring_out_faults_alone() -> None:
    counted = fuzz_tickets.play(1_500, seed=7)
    assert sum(sum(counts.values()) for counts in counted.values()) == 1_500
    assert counted["bytes of the file"].keys() <= {"UserError", "unchanged"}
    assert counted["header"].keys() <= {"UserError", "unchanged"}
    assert counted["values of the text, checksums and digest fit"]["read, and a check fails"] > 30


# -- memory -----------------------------------------------------------------------------------------------------


def peak_of_reading(data: bytes) -> int:
    """Bytes that reading allocates at most; numpy's and Python's are seen, and torch's are numpy's here."""
    tracemalloc.start()
    try:
        ticket_file.read(data, "x")
    except UserError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.long
def test_reading_allocates_no_more_than_stated(child: TicketContent, data: bytes) -> None:
    sparse = {"a.weight": torch.zeros(1_500, 1_000)}
    masks = {"a.weight": torch.zeros(1_500, 1_000, dtype=torch.bool)}
    masks["a.weight"][0, 0] = True
    file = packed(made(sparse, masks, child))
    assert len(file) < 200_000
    assert 70 * len(file) < peak_of_reading(file) < MEMORY_FACTOR * len(file)
    texts: list[Callable[[Any], Any]] = [
        lambda t: b"[" + b"{}," * 690_000 + b"{}]",
        record(curve={"steps": [""] * (strict_json.MOST_VALUES - 1_000), "psnr": {}}),
        first(1, [2**40]),
    ]
    for change in texts:
        assert peak_of_reading(with_text(data, change)) < MEMORY_EXTRA


# -- lies -------------------------------------------------------------------------------------------------------

WRONG = "f" * 64
RECORD_LIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "mask": ({"mask_digest": WRONG}, ["mask digest"]),
    "weights": ({"weights_digest": WRONG}, ["digest of the trained weights"]),
    "alive": ({"alive": 100}, ["alive weights"]),
    "prunable": ({"prunable": 200}, ["prunable weights"]),
    "total": ({"total": 10_000}, ["weights in all"]),
    "density": ({"layer_density": {"output.weight": 0.5}}, ["density of each tensor"]),
    "collapse": ({"collapsed": ("output.weight",)}, ["tensors without surviving weights"]),
    "config": ({"fingerprint": "0" * 16}, ["fingerprint of the config"]),
    "method": ({"method": "MIR-L-LW"}, ["method"]),
    "seed": ({"seed": 4}, ["seed"]),
    "protocol": ({"protocol": "another"}, ["every score's protocol is stated"]),
}


@pytest.mark.parametrize(("changes", "caught"), RECORD_LIES.values(), ids=RECORD_LIES)
def test_a_record_that_lies_is_caught_by_name(child: TicketContent, changes: dict[str, Any], caught: list[str]) -> None:
    liar = ticket_file.read(packed(told(child, **changes)), "x")
    assert liar.ticket == child.ticket.model_copy(update=changes)
    assert broken(liar) == caught


def test_an_honest_ticket_holds_and_a_dense_one_proves_its_first_values(line: list[TicketContent]) -> None:
    for content in line:
        assert broken(ticket_file.read(packed(content), "x")) == []
        dense = content.ticket.round == 0  # else the dead first values are not in the file
        assert broken(told(content, initial_digest=WRONG)) == ["digest of the first values"] * dense


def swapped(masks: Mapping[str, Tensor], name: str, dead: Tensor) -> dict[str, Tensor]:
    """The first alive weight of a tensor dies, and the first of `dead` lives."""
    flat = masks[name].reshape(-1).clone()
    flat[int(flat.nonzero()[0])], flat[int(dead.reshape(-1).nonzero()[0])] = False, True
    return {**masks, name: flat.reshape(masks[name].shape)}


def test_another_mask_weight_or_config_is_caught(child: TicketContent) -> None:
    name = "output.weight"
    other = made(child.trained, swapped(child.masks, name, ~child.masks[name]), child)
    assert broken(other._replace(ticket=child.ticket)) == ["mask digest", "digest of the trained weights"]
    trained = child.trained | {"encoder.0.attn.temperature": child.trained["encoder.0.attn.temperature"] + 1}
    assert broken(child._replace(trained=trained)) == ["digest of the trained weights"]
    opened = child.initial | {name: child.initial[name].masked_fill(~child.masks[name], 1.0)}
    assert broken(child._replace(initial=opened)) == ["dead weights are zero in the first values"]
    assert "dead weights are zero in the trained values" in broken(child._replace(trained=opened))
    checks = verifying.verify(child._replace(config={"prune": {"rounds": "many"}}))
    [(what, _, detail)] = [check for check in checks if not check.holds]
    assert what == "fingerprint of the config" and "prune.rounds" in detail


# -- descent ----------------------------------------------------------------------------------------------------

RULE = PruneConfig(0.2)


def unproven(child: TicketContent, parent: TicketContent, rule: PruneConfig = RULE) -> list[str]:
    return [check.what for check in verifying.verify_descent(child, parent, rule) if check.holds is False]


def test_every_round_descends_from_the_one_before_out_of_files_too(line: list[TicketContent]) -> None:
    for parent, child in zip(line, line[1:], strict=False):
        younger, elder = (ticket_file.read(packed(content), "x") for content in (child, parent))
        assert unproven(younger, elder) == []
        assert unproven(child, parent._replace(initial=line[0].initial)) == []  # from a run folder, with dead ones


def test_a_stranger_is_no_parent(line: list[TicketContent]) -> None:
    assert unproven(line[3], line[1]) == [
        "digest of the parent's ticket",
        "round",
        "weights removed by the rule",
        "the mask follows from the parent's weights",
        "threshold",
    ]
    other = told(line[2], fingerprint="x", manifest_digest="y", initial_digest="z")
    assert unproven(line[3], other)[1:] == [
        "fingerprint of the run",
        "manifest digest of the run",
        "initial digest of the run",
    ]


def test_a_mask_by_another_rule_or_chance_does_not_follow(line: list[TicketContent]) -> None:
    child, parent = line[3], line[2]
    assert unproven(child, parent, PruneConfig(0.2, criterion="random")) == [
        "the mask follows from the parent's weights",
        "threshold",
    ]
    assert "weights removed by the rule" in unproven(child, parent, PruneConfig(0.3))
    for elder, rule in ((parent, PruneConfig(0.2, criterion="snip")), (parent._replace(trained={}), RULE)):
        checks = list(verifying.verify_descent(child, elder, rule))  # without gradients, or without trained weights
        assert [(c.what, c.holds) for c in checks if not c.holds] == [(verifying.MASK_FOLLOWS, None)]
    name = "output.weight"
    other = swapped(child.masks, name, parent.masks[name] & ~child.masks[name])
    kept = child.ticket.model_dump(include={"initial_digest", "parent"})
    assert unproven(told(made(line[0].initial, other, child), **kept), parent) == [
        "the mask follows from the parent's weights"
    ]


def test_weights_that_came_back_moved_or_are_missing_are_caught(line: list[TicketContent]) -> None:
    child, parent = line[3], line[2]
    name = next(n for n, mask in parent.masks.items() if not bool(mask.all()))
    back = child.masks | {name: child.masks[name] | ~parent.masks[name]}
    assert "no pruned weight returned" in unproven(child._replace(masks=back), parent)
    for name in ("output.weight", "encoder.0.norm1.body.bias"):
        moved = child._replace(initial=child.initial | {name: child.initial[name] * 2})
        assert unproven(moved, parent) == ["survivors have the run's first values"]
    fewer = {n: t for n, t in child.initial.items() if n != "encoder.0.norm1.body.bias"}
    assert unproven(child._replace(initial=fewer), parent) == ["the same tensors"]


# -- what is not written ----------------------------------------------------------------------------------------


def test_nothing_is_packed_that_could_not_be_read(child: TicketContent) -> None:
    def refuses(content: TicketContent, said: str) -> None:
        with pytest.raises(UserError, match=said):
            packed(content)

    name = "output.weight"
    t = child.trained
    refuses(child._replace(trained=t | {name: t[name].double()}), "do not fit each other .* output.weight")
    refuses(child._replace(trained=t | {name: t[name][0]}), "do not fit each other .* output.weight")
    refuses(child._replace(initial={name: t[name]}), "do not fit each other")
    refuses(child._replace(masks=child.masks | {"strange": child.masks[name]}), "do not fit each other .* strange")
    refuses(child._replace(trained=t | {name: t[name].nan_to_num(0) / 0}), "dead weights of|not finite")
    opened = t[name].masked_fill(~child.masks[name], -0.0)
    refuses(child._replace(trained=t | {name: opened}), "dead weights of 'output.weight' that are not")
    bias = "encoder.0.norm1.body.bias"
    refuses(child._replace(initial=child.initial | {bias: t[bias] / 0}), "values of 'encoder.0.norm1.body.bias' in")
    refuses(told(child, threshold=float("inf")), "a number that is not finite in the record")
    refuses(told(child, damaged={"shard": "\x1b[2J"}), r"the character U\+001B")
    path = {"../x": torch.ones(1)}
    refuses(child._replace(initial=child.initial | path, trained=t | path), "found the tensor name '../x'")


def test_an_older_record_without_the_new_fields_is_packed_too(child: TicketContent) -> None:
    older = Ticket.model_validate(
        child.ticket.model_dump(exclude={"method", "seed", "also", "protocols", "curve", "collapsed", "measured"})
    )
    read = ticket_file.read(packed(child._replace(ticket=older)), "x")
    assert read.ticket == older
    assert broken(read) == []
