"""Laws of what guards a step: losses and gradients that are not finite, and losses that jump."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mirl_dist.data.sample import Batch
from mirl_dist.training.guards import SpikeDetector, StepLosses
from mirl_dist.training.progress import Progress
from tests.services.outcomes import expect

NONE = torch.zeros(0)
SETS = {"prune.rounds": 0, "ranks.slow_factor": 1e9}  # one round of six steps; a busy machine slows ranks

HERE = re.escape(f"({platform.node()})")


# -- losses that jump -------------------------------------------------------------------------------------------


class SomeRanks:
    """What all ranks say, given what the others say; `met` counts the meetings."""

    def __init__(self, *others: Any) -> None:
        self._others, self.met = others, 0
        self.is_main, self.names = True, ["rank 0 (here)", "rank 1 (there)"]

    def gather_objects(self, item: Any, *, what: str) -> list[Any]:
        self.met += 1
        return [item, *self._others]


def seen(*losses: float) -> StepLosses:
    """Passes of two samples each, with these losses."""
    found = StepLosses()
    for first in range(0, len(losses), 2):
        pair = torch.tensor(losses[first : first + 2])
        keys = tuple(f"derain:{first + i}" for i in range(len(pair)))
        found.add(pair, Batch(NONE, NONE, NONE, keys))
    return found


def looked(spikes: SpikeDetector, ranks: Any, *losses: float) -> None:
    for loss in losses:
        spikes.check(loss, seen(loss, loss), Progress(round=1, epoch=2, step=3), ranks)


def test_a_loss_that_jumps_is_told_with_the_samples_that_lost_most_on_any_rank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spikes, ranks = SpikeDetector(10.0), SomeRanks([(7.5, "dehaze:far"), (0.1, "dehaze:near")])
    looked(spikes, ranks, *[0.2] * 25, *[0.1] * 25)
    assert ranks.met == 0, "ranks meet for spikes alone"
    spikes.check(1.75, seen(0.5, 9.0, 1.0, 0.25), Progress(round=1, epoch=2, step=3), ranks)
    assert ranks.met == 1
    assert capsys.readouterr().out == (
        "warning: the loss at round 1, epoch 2, step 3 is 1.75, 12 times the median 0.15 of the 50 steps before. "
        "Highest: derain:1 (9, rank 0 (here)), dehaze:far (7.5, rank 1 (there)), derain:2 (1, rank 0 (here)).\n"
    )


@pytest.mark.parametrize(
    ("factor", "losses", "jumps"),
    [
        (10.0, [0.1] * 49 + [99.0], 0),
        (10.0, [0.1] * 50 + [99.0], 1),
        (10.0, [0.1] * 50 + [1.0], 0),
        (10.0, [0.1] * 50 + [1.01], 1),
        (10.0, [0.1] * 50 + [0.0], 0),
        (10.0, [0.0] * 50 + [0.5], 1),
        (10.0, [0.1] * 50 + [5.0] * 60 + [0.1], 25),  # until half of those remembered are high
        (None, [0.1] * 60 + [1e9], 0),
    ],
)
def test_a_loss_jumps_when_it_is_many_times_the_median_of_fifty_steps(
    capsys: pytest.CaptureFixture[str], factor: float | None, losses: list[float], jumps: int
) -> None:
    for is_main in (True, False):
        ranks = SomeRanks()
        ranks.is_main = is_main
        looked(SpikeDetector(factor), ranks, *losses)
        assert ranks.met == jumps, "all ranks meet, one tells"
        told = capsys.readouterr().out
        assert told.count("warning: the loss at") == jumps * is_main
        assert ("inf times the median 0 of" in told) == (losses[0] == 0 and is_main)


# -- losses and gradients that are not finite -------------------------------------------------------------------


def nan(step: int) -> dict[str, Any]:
    return {"rank": 1, "step": [0, step], "do": "nan"}


def inf_gradient(step: int) -> dict[str, Any]:
    return {"rank": 1, "step": [0, step], "do": "inf_gradient"}


def newest_commits(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob("rounds/00/steps/*/COMPLETE.json"))


@pytest.mark.parametrize(
    ("fatal", "problem", "advice"),
    [
        (
            nan(3),
            rf"loss is not finite at round 0, epoch 1, step 0, samples as task:key: rank 1 {HERE}: "
            r"(denoise_25|derain|dehaze):\S+",
            r"Check those samples, or lower optimiser\.lr or optimiser\.clip_norm",
        ),
        pytest.param(
            inf_gradient(3),
            r"gradient is not finite at round 0, epoch 1, step 0 though every loss was; samples: "
            rf"rank 0 {HERE}: \S+, \S+; rank 1 {HERE}: \S+, \S+",
            r"Lower optimiser\.lr, or train in fp32,",
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_is_not_finite_stops_all_ranks_before_the_step_with_advice(
    lab: Any, tmp_path: Path, fatal: dict[str, Any], problem: str, advice: str
) -> None:
    ended = expect((2, 2), lab.play(tmp_path, SETS, fatal=fatal))
    allow = r"in a new run\.folder, or allow some with guard\.skip_bad_batches=10 and go on from the last commit\."
    text = rf"mirl-dist: the {problem}\. Nothing of this step was applied\. {advice} {allow}\n"
    assert re.fullmatch(text, ended.err), "all ranks know, one says it"
    assert newest_commits(tmp_path / "run") == ["00000002-0001"]


@pytest.fixture(scope="module")
def left_out(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that left out the step after three, since a loss was not finite."""
    folder = tmp_path_factory.mktemp("left-out")
    ended = lab.play(folder, SETS | {"guard.skip_bad_batches": 2}, fatal=nan(3))
    return folder / "run", ended


def test_a_bad_step_that_is_allowed_is_left_out_on_every_rank_and_said_and_counted(lab: Any, left_out: Any) -> None:
    run, ended = left_out
    assert ended.rc == 0, ended.said()
    (told,) = [line for line in ended.out.splitlines() if line.startswith("warning: ")]
    at = "round 0, epoch 1, step 0, samples as task:key: "
    assert told.startswith(f"warning: the loss is not finite at {at}rank 1 ({platform.node()}): ")
    assert told.endswith(". The step is skipped (1 of 2 allowed in a round).")
    (ticket,) = lab.tickets(run)
    assert (ticket["bad"], ticket["updates"], ticket["samples"]) == (1, 6, 24)
    assert all(score["psnr"] > 0 for score in ticket["scores"].values()), "no weight became nan"


@pytest.mark.long
def test_a_run_that_is_killed_after_a_step_was_left_out_ends_in_the_same_ticket(
    lab: Any, left_out: Any, tmp_path: Path
) -> None:
    sets = SETS | {"guard.skip_bad_batches": 2}
    ended = lab.play(tmp_path, sets, fatal=[nan(3), {"rank": 1, "step": [0, 4]}])
    assert -9 in ended.codes, ended.said()
    assert newest_commits(tmp_path / "run") == ["00000002-0001", "00000004-0001"]
    expect(0, lab.play(tmp_path, sets), "resuming: round 0, after step 4")
    assert lab.digests(tmp_path / "run") == lab.digests(left_out[0])


@pytest.mark.long
def test_a_step_is_left_out_alike_whether_a_loss_or_the_gradient_was_not_finite(
    lab: Any, left_out: Any, tmp_path: Path
) -> None:
    ended = expect(0, lab.play(tmp_path, SETS | {"guard.skip_bad_batches": 2}, fatal=inf_gradient(3)))
    assert f"step 0 though every loss was; samples: rank 0 ({platform.node()}): " in ended.out
    assert ". The step is skipped (1 of 2 allowed in a round)." in ended.out
    assert lab.digests(tmp_path / "run") == lab.digests(left_out[0])


@pytest.mark.long
def test_no_more_bad_steps_are_left_out_than_are_allowed(lab: Any, tmp_path: Path) -> None:
    texts = (
        "(1 of 1 allowed in a round)",
        "the gradient is not finite at round 0, epoch 1, step 0",
        " 1 such batches were skipped before (guard.skip_bad_batches). ",
        "guard.skip_bad_batches=10 and go on",
    )
    one = SETS | {"guard.skip_bad_batches": 1}
    expect((2, 2), lab.play(tmp_path, one, fatal=[nan(1), inf_gradient(3)]), *texts)
    allowed = SETS | {"guard.skip_bad_batches": 10}
    texts = ("resuming: round 0, after step 2", "(2 of 10 allowed in a round")  # the one before was remembered
    expect(0, lab.play(tmp_path, allowed, fatal=inf_gradient(3)), *texts)
    assert lab.tickets(tmp_path / "run")[0]["bad"] == 2


@pytest.mark.long
def test_a_step_of_several_passes_is_left_out_whole_whichever_of_them_was_bad(lab: Any, tmp_path: Path) -> None:
    sets = SETS | {"guard.skip_bad_batches": 1, "batch.forward": 1}
    digests = []
    for number in (0, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        ended = expect(0, lab.play(folder, sets, fatal=nan(2) | {"pass": number}))
        assert ended.out.count("The step is skipped (1 of 1 allowed") == 1
        assert lab.tickets(folder / "run")[0]["bad"] == 1
        digests.append(lab.digests(folder / "run"))
    assert digests[0] == digests[1]
