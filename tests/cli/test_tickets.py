"""What users do with finished tickets: pack, show, prove, export, restore, compare, judge; and what they mistype."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from mirl_dist import models
from mirl_dist.tickets import open as opening


@pytest.fixture(scope="module")
def packed(lab: Any, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last ticket of the reference run as one file."""
    file = tmp_path_factory.mktemp("packed") / "last.ticket"
    ended = lab.mirl("tickets", "pack", str(reference), "--out", str(file))
    assert ended.rc == 0 and "round 2, 166,883 of 259,268 weights" in ended.out, ended.said()
    return file


def test_a_ticket_file_shows_what_its_run_shows(lab: Any, reference: Path, packed: Path) -> None:
    of_run, of_file = (lab.mirl("tickets", "show", str(t), "--json") for t in (f"{reference}/rounds/02", packed))
    assert of_run.rc == of_file.rc == 0
    assert json.loads(of_run.out) == json.loads(of_file.out)
    told = lab.mirl("tickets", "show", str(packed))
    assert told.rc == 0 and "denoise_25/clean" in told.out and "{" not in told.out, told.said()


def test_a_ticket_file_restores_the_same_pixels_as_its_run(
    lab: Any, reference: Path, packed: Path, tmp_path: Path
) -> None:
    image = lab.folder / "images" / "evaluate" / "chelsea.png"
    for name, ticket in (("run", f"{reference}/rounds/02"), ("file", packed)):
        ended = lab.mirl("restore", str(image), "--ticket", str(ticket), "--out", str(tmp_path / name))
        assert ended.rc == 0, ended.said()
    a, b = (np.asarray(Image.open(tmp_path / name / "chelsea.png")) for name in ("run", "file"))
    assert np.array_equal(a, b) and a.shape == (48, 48, 3)


def test_a_ticket_proves_itself_and_with_its_run_its_descent(
    lab: Any, reference: Path, packed: Path, tmp_path: Path
) -> None:
    alone = lab.mirl("tickets", "verify", str(packed))
    assert alone.rc == 0 and "BROKEN" not in alone.out and "name the run with --run" in alone.out, alone.said()
    with_run = lab.mirl("tickets", "verify", str(packed), "--run", str(reference), "--json")
    checks = json.loads(with_run.out)
    assert with_run.rc == 0 and all(check["holds"] for check in checks) and len(checks) > 6, with_run.said()
    assert any("parent" in check["what"] for check in checks)
    shutil.copytree(reference, tmp_path / "other")
    (mask,) = (tmp_path / "other").glob("rounds/01/ticket-*/weights.safetensors")
    weights = safetensors.torch.load_file(mask)
    (trained,) = reference.glob("rounds/00/ticket-*/weights.safetensors")
    assert weights.keys() == safetensors.torch.load_file(trained).keys()
    shutil.copy(trained, mask)
    broken = lab.mirl("tickets", "verify", str(packed), "--run", str(tmp_path / "other"))
    assert broken.rc == 2 and "is damaged" in broken.err, broken.said()


def test_a_flipped_bit_in_a_ticket_file_is_found_by_every_command(lab: Any, packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    data[len(data) // 2] ^= 4
    bad = tmp_path / "bad.ticket"
    bad.write_bytes(bytes(data))
    image = str(lab.folder / "images" / "evaluate" / "chelsea.png")
    for command in (
        *(("tickets", word, str(bad)) for word in ("verify", "show", "compare")),
        ("tickets", "export", str(bad), "--out", str(tmp_path / "x.ckpt")),
        ("restore", image, "--ticket", str(bad), "--out", str(tmp_path / "out")),
    ):
        ended = lab.mirl(*command)
        assert ended.rc == 2 and len(ended.err.splitlines()) == 1 and "bad.ticket" in ended.err, ended.said()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.ticket"], "nothing half-made is left"


@pytest.mark.parametrize("compact", [False, True])
def test_an_exported_ticket_loads_by_official_names_and_gives_the_same_output(
    lab: Any, reference: Path, packed: Path, tmp_path: Path, compact: bool
) -> None:
    out = tmp_path / "official.ckpt"
    ended = lab.mirl("tickets", "export", str(packed), "--out", str(out), *(["--compact"] if compact else []))
    assert ended.rc == 0, ended.said()
    state = torch.load(out, map_location="cpu", weights_only=True)["state_dict"]
    assert all(name.startswith("net.") for name in state)
    opened = opening.open_ticket(str(packed))
    sizes = opened.config.model.sizes()
    again = models.from_official("promptir", state, **sizes)
    assert len(again.dropped) == 6
    mine, theirs = (
        opening.network(opened.config, weights) for weights in (opened.trained_weights(), dict(again.weights))
    )
    image = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(mine(image), theirs(image))


@pytest.mark.long
def test_a_comparison_of_runs_files_and_mlflow_holds_the_same_scores(
    lab: Any, reference: Path, packed: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/m.db"
    sets = {"tracking.enabled": True, "tracking.uri": uri, "run.seed": 3}
    ended = lab.play(tmp_path, sets, world=1)
    assert ended.rc == 0, ended.said()
    out = tmp_path / "out"
    ended = lab.mirl("tickets", "compare", str(reference), str(tmp_path / "run"), "--out", str(out))
    assert ended.rc == 0 and "MIR-L-G" in ended.out and "note: two seeds only" in ended.out, ended.said()
    rows = list(csv.DictReader(io.StringIO((out / "tickets.csv").read_text())))
    assert {(row["method"], row["seed"]) for row in rows} == {(m, s) for m in ("dense", "MIR-L-G") for s in "03"}
    assert "MIR-L-G" in (out / "tickets.html").read_text() and "\\toprule" in (out / "tickets.tex").read_text()
    stored, tracked = (
        json.loads(lab.mirl("tickets", "compare", *reference_, "--json").out)
        for reference_ in ((str(tmp_path / "run"),), ("mlflow:experiment:mirl_dist", "--uri", uri))
    )
    assert [t["scores"] for t in stored] == [t["scores"] for t in tracked]
    assert [t["digest"] for t in stored] == [t["digest"] for t in tracked] != []
    one = json.loads(lab.mirl("tickets", "compare", str(packed), f"{reference}/rounds/00", "--json").out)
    assert [t["round"] for t in one] == [2, 0]


@pytest.mark.long
def test_a_judgement_trains_the_controls_that_are_missing_once(lab: Any, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "one.yaml").write_text("num_processes: 1\nnum_machines: 1\n")
    ended = lab.start("tickets", "judge", "run", cwd=tmp_path).wait()
    assert ended.rc == 0 and "3 controls were not trained" in ended.out, ended.said()
    ended = lab.start("tickets", "judge", "run", "--train", "one.yaml", cwd=tmp_path).wait(200)
    assert ended.rc == 0 and "were not trained" not in ended.out, ended.said()
    written = "run/controls/*/rounds/00/*/ticket.json"
    trained = {p.parents[3].name: p.stat().st_mtime_ns for p in tmp_path.glob(written)}
    assert sorted(trained) == ["02-random_global", "02-random_layer", "02-reinit"]
    ended = lab.start("tickets", "judge", "run", "--train", "one.yaml", "--json", cwd=tmp_path).wait()
    told = json.loads(ended.out)
    (judgement,) = told["judgements"]
    assert told["controls_missing"] == [] and any("one seed" in note for note in told["notes"])
    verdicts = {c["kind"]: c["verdict"] for c in judgement["controls"]}
    assert verdicts.keys() == {"reinit", "random_layer", "random_global"} and "not run" not in verdicts.values()
    assert {p.stat().st_mtime_ns for p in tmp_path.glob(written)} == set(trained.values())
    (tmp_path / "run/controls/02-reinit").rename(tmp_path / "aside")
    shutil.copytree(tmp_path / "aside", tmp_path / "run/controls/01-reinit")
    ended = lab.start("tickets", "judge", "run", "--round", "1", cwd=tmp_path).wait()
    assert ended.rc == 2 and "01-reinit holds a control of another ticket" in ended.err, ended.said()


def test_several_protocols_score_in_one_pass_and_the_table_holds_every_image(
    lab: Any, reference: Path, tmp_path: Path
) -> None:
    table = tmp_path / "images.csv"
    ended = lab.mirl(
        *("evaluate", str(reference), "--json", "--table", str(table)),
        *("--protocol", "basicsr_y", "--protocol", "promptir", "--tile", "64"),
    )
    assert ended.rc == 0, ended.said()
    told, own = json.loads(ended.out), lab.tickets(reference)[2]["scores"]["dehaze/haze"]["psnr"]
    again = told["also"]["promptir"]["dehaze/haze"]["psnr"]
    assert again == pytest.approx(own, abs=1e-4), "images smaller than a tile are restored whole"
    assert told["measured"]["tile"].startswith("64 pixels") and "scikit-image" in told["versions"]
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert {row["protocol"] for row in rows} == {"basicsr_y", "promptir"} and len(rows) == 6


def test_a_ticket_file_is_scored_as_its_run_on_shards_that_its_user_names(
    lab: Any, reference: Path, packed: Path
) -> None:
    assert str(reference) not in json.dumps(opening.open_ticket(str(packed)).config.dump())
    ended = lab.mirl("evaluate", str(packed), "--json", "--shards", str(lab.shards))
    assert ended.rc == 0, ended.said()
    told, wanted = json.loads(ended.out), lab.tickets(reference)[2]
    assert told["manifest_digest"] == wanted["manifest_digest"]
    for name, score in wanted["scores"].items():
        assert told["scores"][name]["psnr"] == pytest.approx(score["psnr"], abs=1e-4)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (("tickets", "compare", "nowhere"), "nowhere holds no run"),
        (("tickets", "compare", "RUN", "RUN"), "twice"),
        (("tickets", "compare", "mlflow:experiment:none", "--uri", "sqlite:///none.db"), "none"),
        (("tickets", "show", "mlflow:abc"), "only `tickets compare` reads MLflow"),
        (("tickets", "judge", "RUN", "--round", "9"), "finished rounds are 0, 1, 2"),
        (("tickets", "pack", "RUN/rounds/09", "--out", "x.ticket"), "finished rounds are 0, 1, 2"),
        (("tickets", "export", "RUN", "--out", "x.onnx"), "whose extension names no format"),
        (("tickets", "export", "RUN", "--out", "x.safetensors", "--compact"), "never compressed"),
        (("tickets", "verify", "tiny.txt"), "tiny.txt"),
        (("tickets", "pictures", "FILE", "--out", "x.png"), "holds no pictures"),
        (("evaluate", "FILE"), "a ticket file, which does not say where shards are. Name the shards with --shards"),
        (("evaluate", "RUN", "--protocol", "psnr"), "--protocol: found 'psnr'. Use promptir,"),
        (("evaluate", "RUN", "--precision", "fp16"), "Use fp32 or bf16"),
        (("evaluate", "RUN", "--tile", "8"), "--tile: found 8"),
    ],
)
def test_what_is_mistyped_is_told_in_one_line(
    lab: Any, reference: Path, packed: Path, tmp_path: Path, command: tuple[str, ...], text: str
) -> None:
    (tmp_path / "tiny.txt").write_text("no ticket")
    words = [w.replace("RUN", str(reference)).replace("FILE", str(packed)) for w in command]
    ended = lab.start(*words, cwd=tmp_path).wait()
    assert ended.rc == 2 and "Traceback" not in ended.err, ended.said()
    assert text in ended.err and len(ended.err.strip().splitlines()) == 1, ended.said()
