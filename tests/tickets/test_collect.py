"""Tickets on their way in and out: runs told apart, masks proved, strangers' files that get no say, outputs refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mirl_dist import models
from mirl_dist.cli import compare, evaluate, restore, show
from mirl_dist.config import config as configs
from mirl_dist.config.config import portable
from mirl_dist.config.schema import StoreSection
from mirl_dist.errors import UserError
from mirl_dist.evaluation.score import Score
from mirl_dist.observability.mlflow import reader
from mirl_dist.pruning import masks as masking
from mirl_dist.storage import Folder, output_paths
from mirl_dist.tickets import collect, transfer
from mirl_dist.tickets import open as opening
from mirl_dist.tickets.file import TicketContent, pack, read
from mirl_dist.tickets.verify import MASK_FOLLOWS, check_size, verify
from mirl_dist.training.checkpointing.checkpoint import INITIAL, Checkpoints
from mirl_dist.training.progress import Progress
from mirl_dist.training.state import Snapshot
from mirl_dist.training.ticket import Ticket, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fuzz_tickets

TREE: dict[str, Any] = {
    "run": {"folder": "secret/run", "seed": 3},
    "store": {"endpoint": "http://secret.example:9000", "patience_seconds": 1},
    "model": {"dim": 8, "blocks": [1] * 4, "refinement_blocks": 1, "prompt_dims": [8] * 3, "prompt_sizes": [4] * 3},
    "data": {"shards": "s3://secret/shards", "mix": {"derain": 1}, "cache": {"folder": "/secret"}, "workers": 7},
    "train": {"device": "cpu"},
    "prune": {"rounds": 4},
    "tracking": {"experiment": "secret", "run_name": "secret"},
}
SCORE = Score(psnr=30.0, ssim=0.9, degraded_psnr=20.0, degraded_ssim=0.5, images=2)


@pytest.fixture(scope="module")
def contents() -> list[TicketContent]:
    """Two rounds of a tiny PromptIR that nobody trained."""
    sizes = configs.from_dump(TREE, "the tiny run").model.sizes()
    with torch.random.fork_rng():
        first = {n: p.detach() for n, p in models.create("promptir", **sizes).named_parameters()}
    return fuzz_tickets.rounds(2, TREE, first)


def written(contents: list[TicketContent], folder: Path, rounds: int = 2) -> Path:
    """A run folder of these rounds."""
    kept, ticket = Checkpoints(Folder(folder)), contents[0].ticket
    identity = {name: getattr(ticket, name) for name in ("fingerprint", "manifest_digest", "initial_digest")}
    kept.begin({"config": contents[0].config, "versions": {}} | identity)
    kept.save_tensors(INITIAL, contents[0].initial)
    for content in contents[:rounds]:
        progress = Progress(round=content.ticket.round, mask_digest=content.ticket.mask_digest)
        kept.commit_round(content.ticket, Snapshot(progress, content.masks, content.trained, {}), b"", None, 2)
    return folder


def tracked(contents: list[TicketContent], id_: str, name: str) -> reader.RemoteTickets:
    each = [reader.RemoteTicket(c.ticket.round, c.ticket.dump(), packed(c.masks), None) for c in contents]
    return reader.RemoteTickets(name, id_, contents[0].config, each)


def packed(masks: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(masking.pack(masks))


# -- runs told apart --------------------------------------------------------------------------------------------


def test_runs_of_one_name_stay_two_runs_with_labels_of_their_own(
    contents: list[TicketContent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {id_: [tracked(contents, id_, "run")] for id_ in ("aaaaaaaa", "bbbbbbbb")}
    monkeypatch.setattr(reader, "read", lambda reference, uri: found[reference])
    folder = written(contents, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    shown = collect.gather(["mlflow:aaaaaaaa", "mlflow:bbbbbbbb", "run"])
    assert [s.name for s in shown] == [
        f"{run}, round {n}" for run in ("run-aaaaaa", "run-bbbbbb", "run") for n in range(2)
    ]
    with pytest.raises(UserError, match="found round 1 of run twice"):
        collect.gather(["run/rounds/01", str(folder)])
    with pytest.raises(UserError, match="found round 0 of run twice"):
        collect.gather(["mlflow:aaaaaaaa", "mlflow:aaaaaaaa"])


def test_runs_below_a_folder_named_rounds_are_runs(contents: list[TicketContent], tmp_path: Path) -> None:
    runs = [str(written(contents, tmp_path / "rounds" / name)) for name in ("one", "two")]
    assert [(s.run, s.ticket.round) for s in collect.gather([runs[0], f"{runs[1]}/rounds/01/"])] == [
        ("one", 0),
        ("one", 1),
        ("two", 1),
    ]


def test_a_run_without_a_finished_round_is_told_and_not_dropped(contents: list[TicketContent], tmp_path: Path) -> None:
    whole, bare = written(contents, tmp_path / "whole"), written(contents, tmp_path / "bare", rounds=0)
    with pytest.raises(UserError, match="bare has no finished round yet"):
        collect.gather([str(whole), str(bare)])


def test_a_ticket_file_of_any_name_is_compared_and_a_missing_one_told(
    contents: list[TicketContent], tmp_path: Path
) -> None:
    (tmp_path / "mine.tkt").write_bytes(pack(contents[1]))
    (shown,) = collect.gather([str(tmp_path / "mine.tkt")])
    assert (shown.run, shown.ticket) == ("mine.tkt", contents[1].ticket)
    with pytest.raises(UserError, match=r"^no file at other.ticket\."):
        collect.gather(["other.ticket"])


# -- masks and records that are somebody else's -----------------------------------------------------------------


def flipped(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    found = masking.pack(masks)
    found["output.weight"] = found["output.weight"] ^ 1
    return found


def without(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in masking.pack(masks).items() if n != "output.weight"}


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a bit": (flipped, "is not the one that its ticket names"),
    "a tensor less": (without, "does not fit its network, first in 'output.weight'"),
    "a tensor more": (lambda m: masking.pack(m) | {"x": torch.zeros(1, dtype=torch.uint8)}, "first in 'x'"),
    "another kind": (lambda m: {n: t.float() for n, t in masking.pack(m).items()}, "does not fit its network"),
    "another size": (lambda m: {n: t[:1] for n, t in masking.pack(m).items()}, "does not fit its network"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_a_mask_and_a_ticket_from_mlflow_must_be_those_of_their_round(
    contents: list[TicketContent], monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], Any], said: str
) -> None:
    run = tracked(contents, "aaaa", "run")
    run.tickets[1] = run.tickets[1]._replace(mask=safetensors.torch.save(spoil(contents[1].masks)))
    monkeypatch.setattr(reader, "read", lambda reference, uri: [run])
    with pytest.raises(UserError, match=f"^MLflow run aaaa, round 1: its mask .*{said}"):
        collect.gather(["mlflow:aaaa"])
    run.tickets[0] = run.tickets[1]._replace(round=0)
    with pytest.raises(UserError, match="^MLflow run aaaa, round 0: its ticket is of round 1"):
        collect.gather(["mlflow:aaaa"])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"blocks": [100_000, 1, 1, 1]}, "model.blocks makes a larger"),
        ({"dim": 2**40}, "model.dim makes a larger"),
        ({"prompt_sizes": [2**40, 4, 4]}, "model.prompt_sizes makes a larger"),
        ({"ffn_expansion": 1e300}, "model.ffn_expansion makes a larger"),
        ({"blocks": [2, 1, 1, 1]}, "model section makes"),
    ],
)
def test_a_config_cannot_ask_for_a_network_beyond_its_ticket(
    contents: list[TicketContent], monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], said: str
) -> None:
    run = tracked(contents, "aaaa", "run")
    asking = run._replace(config=contents[0].config | {"model": contents[0].config["model"] | sizes})
    monkeypatch.setattr(reader, "read", lambda reference, uri: [asking])
    if sizes != {"blocks": [2, 1, 1, 1]}:
        monkeypatch.setattr(models, "create", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(UserError, match=f"^MLflow run aaaa: its .*{said}"):
        collect.gather(["mlflow:aaaa"])


def test_a_file_cannot_make_export_build_a_larger_network(
    contents: list[TicketContent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = contents[1].config["model"] | {"blocks": [100_000, 1, 1, 1]}
    (tmp_path / "x.ticket").write_bytes(pack(contents[1]._replace(config=contents[1].config | {"model": model})))
    monkeypatch.setattr(models, "to_official", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(UserError, match=r"x\.ticket: its model.blocks makes a larger network"):
        transfer.export(str(tmp_path / "x.ticket"), tmp_path / "x.ckpt", compact=False)


def test_no_published_size_is_taken_for_too_large() -> None:
    config = configs.Config()
    with torch.device("meta"):
        network = models.create("promptir", **config.model.sizes())
    check_size(config, sum(p.numel() for p in network.parameters()), "the published network")


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "\x1b[2J"}, r"U\+001B"),
    "score": ({"scores": {"a\u202eb/c": SCORE.model_dump()}}, r"U\+202E"),
    "tensor": ({"layer_density": {"a\nb\r": 0.5}}, r"U\+000D"),
    "protocol": ({"protocols": {"x": "\x9b"}}, r"U\+009B"),
    "version": ({"versions": {"torch": "\x07"}}, r"U\+0007"),
    "density": ({"layer_density": {"a": 1.5}}, "counts what cannot be: the density of 'a'"),
    "alive": ({"alive": -1}, "counts what cannot be: alive"),
    "prunable": ({"prunable": 0, "alive": 0}, "counts what cannot be: alive"),
    "samples": ({"samples": -1}, "counts what cannot be: samples"),
    "threshold": ({"threshold": float("nan")}, "not a ticket .NaN"),
    "seconds": ({"seconds": float("inf")}, "not a ticket .Infinity"),
    "curve": ({"curve": {"steps": [1, 2], "psnr": {"a/b": [3.0]}}}, "counts what cannot be: the curve"),
    "decibels": ({"scores": {"a/b": SCORE.model_dump() | {"psnr": 1e6}}}, r"scores\.a/b\.psnr"),
    "likeness": ({"scores": {"a/b": SCORE.model_dump() | {"ssim": 1.5}}}, r"scores\.a/b\.ssim"),
    "images": ({"also": {"x": {"a/b": SCORE.model_dump() | {"images": 0}}}}, r"also\.x\.a/b\.images"),
    "a bad name": ({"scores": {"\x1b[2J": SCORE.model_dump() | {"images": 0}}}, r"scores\.\\x1b\[2J\.images"),
}


@pytest.mark.parametrize(("changes", "said"), ODD.values(), ids=ODD)
def test_a_record_that_no_run_could_have_made_is_refused_wherever_it_comes_from(
    contents: list[TicketContent], changes: dict[str, Any], said: str
) -> None:
    record = json.loads(contents[1].ticket.dump()) | changes
    with pytest.raises(UserError, match=said) as caught:
        parse(json.dumps(record).encode(), "here")
    assert str(caught.value).isprintable()


def test_what_any_run_wrote_is_still_read(contents: list[TicketContent]) -> None:
    older = contents[1].ticket.model_dump(exclude={"method", "seed", "protocols", "also", "measured", "curve", "bad"})
    extreme = {"psnr": 100.0, "ssim": 1.0000001, "degraded_psnr": -3.0, "degraded_ssim": -0.2, "images": 1}
    ticket = Ticket.model_validate(older | {"scores": {"a/b": extreme}, "damaged": {"x.tar 1": "bad\x1b"}})
    assert parse(ticket.dump(), "here") == ticket


# -- strangers' files -------------------------------------------------------------------------------------------


def test_a_packed_ticket_tells_no_place_and_still_proves_itself(
    contents: list[TicketContent], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = written(contents, tmp_path / "run"), tmp_path / "x.ticket"
    transfer.pack(f"{folder}/rounds/01", file)
    content = read(file.read_bytes(), "x")
    assert "secret" not in json.dumps(content.config)
    assert content.config["prune"]["rounds"] == 4
    assert [check.what for check in verify(content) if not check.holds] == []
    transfer.verify(str(file), str(folder), False)
    assert "BROKEN" not in capsys.readouterr().out
    with pytest.raises(UserError, match="is a ticket file already"):
        transfer.pack(str(file), tmp_path / "again.ticket")


def test_every_place_goes_and_nothing_that_tells_the_experiment() -> None:
    config = configs.from_dump(TREE | {"prune": {"style": "one_shot", "rounds": 1}, "batch": {"forward": 2}}, "here")
    bare = portable(config)
    assert "secret" not in json.dumps(bare.dump())
    assert (bare.fingerprint(), bare.method()) == (config.fingerprint(), config.method())
    assert configs.from_dump(bare.dump(), "there") == bare
    usual = configs.Config()
    for name in ("store", "ranks", "preempt", "guard", "keep", "checkpoint", "tracking"):
        assert getattr(bare, name) == getattr(usual, name)
    assert (bare.data.shards, bare.data.cache, bare.data.workers) == (usual.data.shards, usual.data.cache, 2)
    assert (bare.train.device, bare.run.folder, bare.batch.forward) == ("auto", usual.run.folder, None)


def test_a_strangers_file_says_neither_where_shards_are_nor_how_stores_are_reached(
    contents: list[TicketContent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stranger.ticket"
    file.write_bytes(pack(contents[1]))
    assert "secret.example" in json.dumps(read(file.read_bytes(), "x").config)

    class Asked(Exception):
        pass

    def open_configured(section: StoreSection, address: str) -> None:
        assert (address, section) == ("s3://mine/shards", configs.Config().store)
        raise Asked

    monkeypatch.setattr(evaluate, "open_configured", open_configured)
    opened = opening.open_ticket(str(file)).config
    assert opened.train.device == "auto" and "secret" not in json.dumps(opened.dump())
    with pytest.raises(UserError, match="Name the shards with --shards"):
        evaluate.print_scores(str(file), None, evaluate.EvalOptions(), table=None, overwrite=False, as_json=True)
    with pytest.raises(Asked):
        evaluate.print_scores(
            str(file), "s3://mine/shards", evaluate.EvalOptions(), table=None, overwrite=False, as_json=True
        )


# -- proof ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_proved_is_not_called_broken(
    contents: list[TicketContent], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(contents, tmp_path / "run")
    Checkpoints(Folder(folder)).drop_weights(0)
    transfer.verify(f"{folder}/rounds/01", None, False)
    told = capsys.readouterr().out
    assert "unknown  the mask follows from the parent's weights: not provable: the run did not keep" in told
    assert "holds    survivors have the run's first values" in told and "BROKEN" not in told
    transfer.verify(f"{folder}/rounds/01", None, True)
    assert [c["what"] for c in json.loads(capsys.readouterr().out) if c["holds"] is None] == [MASK_FOLLOWS]
    later = tmp_path / "later.ticket"
    later.write_bytes(pack(contents[1]))
    early = written(contents, tmp_path / "early", rounds=1)
    transfer.verify(str(later), str(early), False)
    assert "unknown  the run has this exact ticket" in capsys.readouterr().out


def test_the_run_of_another_ticket_is_named_as_such(contents: list[TicketContent], tmp_path: Path) -> None:
    file = tmp_path / "x.ticket"
    file.write_bytes(pack(contents[1]))
    tickets = [c._replace(ticket=c.ticket.model_copy(update={"manifest_digest": "1" * 64})) for c in contents]
    other = written(tickets, tmp_path / "other")
    with pytest.raises(UserError, match="other is another run than the ticket's: its manifest digest") as caught:
        transfer.verify(str(file), str(other), False)
    assert "Do not use it" not in str(caught.value)


# -- what people call things, and where they want them ----------------------------------------------------------


@pytest.mark.parametrize("name", ["run[best]", "a[/b]", "[red]x", ":smile:"])
def test_names_are_no_markup(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    show.print_score_table(name, {f"{name}/set": SCORE})
    assert capsys.readouterr().out.count(name) == 2


WRITERS: dict[str, Callable[[Path], None]] = {
    "pack": lambda out: transfer.pack("run", out),
    "export": lambda out: transfer.export("run", out, compact=False),
    "import": lambda out: transfer.import_official(Path("x.ckpt"), "promptir", out),
    "pictures": lambda out: show.write_pictures("run", out),
    "evaluate": lambda out: evaluate.print_scores(
        "run", None, evaluate.EvalOptions(), table=out, overwrite=False, as_json=False
    ),
    "compare": lambda out: compare.compare(
        ["run"], compare.Report(out, "t", None, None, True), overwrite=False, as_json=False
    ),
    "restore": lambda out: restore.restore_files([], "run", out, "auto", None, overwrite=False),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_an_impossible_place_is_refused_before_any_work(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for out, said in (
        ("s3://bucket/x.ckpt", "an address of s3://"),
        ("file:///x.ckpt", "an address of file://"),
        ("file/x/y.ckpt", "file, which is no folder"),
        ("a" * 300, "too long a name"),
    ):
        with pytest.raises(UserError, match=f"^--(out|table): found .*{said}"):
            write(Path(out))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="which is a folder, where a file"):
        output_paths.check_file(tmp_path)
    with pytest.raises(UserError, match="which is no folder"):
        output_paths.check_folder(tmp_path / "file")
    output_paths.check_file(tmp_path / "file", overwrite=True)
    output_paths.check_file(tmp_path / "new" / "deep" / "file")
    output_paths.check_folder(tmp_path / "new" / "deep")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may do everything
    with pytest.raises(UserError, match="which is not writable. Correct its permissions"):
        output_paths.check_folder(tmp_path / "new")


def test_beside_json_notes_go_to_standard_error(
    contents: list[TicketContent], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = compare.Report(None, "t", None, None, True)
    compare.compare([str(written(contents, tmp_path / "run"))], report, overwrite=False, as_json=True)
    told = capsys.readouterr()
    assert [row["round"] for row in json.loads(told.out)] == [0, 1]
    assert "note: one seed only" in told.err
