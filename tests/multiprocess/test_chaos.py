"""The experiment of benchmarks/chaos.py, short: each victim is killed once, on bad networks, and nothing is lost."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("mlflow", reason="MLflow is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import chaos


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_run_survives_the_death_of_any_of_its_parts_and_ends_as_if_undisturbed() -> None:
    # In a folder with a short name: sockets that loader processes are started through lie in it.
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    lines: list[str] = []
    result = chaos.try_it(folder, kills=len(chaos.DECK), seed=1, minutes=6, say=lines.append)
    said = "\n".join([*lines, *chaos.table(result)])
    assert result.held, said
    promises = {check.name[:3] for check in result.checks if check.name.startswith("(")}
    assert promises == {"(a)", "(b)", "(c)", "(d)"}, said
    assert result.figures["tracebacks"] == 0, said
    assert set(result.figures["victims"]) >= {"one rank", "all ranks", "the launcher", "the MLflow server"}, said
    shutil.rmtree(folder)  # what failed stays, to be looked at
