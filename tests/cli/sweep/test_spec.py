"""Laws of a sweep: what it expands to and refuses, the commands it prints, who gets which GPU, states of its runs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mirl_dist.cli.sweep import spec, status
from mirl_dist.cli.sweep.spec import SweepPlan, SweepRun
from mirl_dist.cli.sweep.sweep import exit_code
from mirl_dist.config import config as configs
from mirl_dist.config import yaml_loader
from mirl_dist.config.config import Config
from mirl_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs" / "demo.yaml"
BASE = {"model": {"dim": 24, "heads": [1, 2, 4, 8]}, "prune": {"rounds": 3, "fraction": 0.25}}
METHODS: dict[str, Any] = {"dense": {"prune.rounds": 0}, "mirl": {}, "random": {"prune": {"criterion": "random"}}}


@pytest.fixture
def swept(tmp_path: Path) -> Any:
    """Reads a sweep of METHODS and two seeds, with some of its keys changed."""
    (tmp_path / "base.yaml").write_text(json.dumps(BASE))

    def read(sets: tuple[str, ...] = (), **more: Any) -> SweepPlan:
        tree = {"config": str(tmp_path / "base.yaml"), "folder": "runs/s", "methods": METHODS, "seeds": [0, 3]}
        (tmp_path / "trial.yaml").write_text(json.dumps({k: v for k, v in (tree | more).items() if v is not None}))
        return spec.read(tmp_path / "trial.yaml", sets)

    return read


def refused(swept: Any, *pieces: str, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        swept(**more)
    for piece in pieces:
        assert piece in str(caught.value), str(caught.value)
    return str(caught.value)


def test_every_method_is_planned_with_every_seed_all_of_the_first_seed_first(swept: Any) -> None:
    plan = swept()
    assert [(run.method, run.seed) for run in plan.runs] == [(m, s) for s in (0, 3) for m in METHODS]
    assert [run.folder for run in plan.runs][:2] == ["runs/s/dense-seed0", "runs/s/mirl-seed0"]
    by_name = {run.name: run.config for run in plan.runs}
    assert len(by_name) == 6 and {config.run.folder for config in by_name.values()} == {r.folder for r in plan.runs}
    assert by_name["dense-seed3"].prune.rounds == 0 and by_name["mirl-seed3"].prune.rounds == 3
    assert by_name["random-seed3"].run.seed == 3
    assert by_name["random-seed3"].tracking.run_name == "trial/random-seed3"


def test_a_section_written_as_a_mapping_changes_its_own_keys_and_leaves_the_others(swept: Any) -> None:
    random = next(run for run in swept().runs if run.method == "random").config
    assert (random.prune.criterion, random.prune.rounds, random.prune.fraction) == ("random", 3, 0.25)
    mixed = swept(set={"data": {"mix": {"derain": 2}, "cache.gigabytes": 1}}).runs[0].config
    assert mixed.data.mix == {"derain": 2.0}, "a key whose value is a mapping is replaced"
    assert mixed.data.cache.gigabytes == 1


def test_what_all_runs_share_yields_to_what_a_method_says(swept: Any) -> None:
    runs = swept(set={"prune.rounds": 9, "train.epochs": 30}).runs
    assert [run.config.prune.rounds for run in runs[:3]] == [0, 9, 9]
    assert {run.config.train.epochs for run in runs} == {30}


@pytest.mark.parametrize(
    ("more", "pieces"),
    [
        (
            {"slot": 2, "methods": {"a/b": {}}, "seeds": [1, 1], "folder": "https://host", "set": {"run": {"seed": 4}}},
            (
                "5 faults in ",
                "slot: found an unknown key (value 2); the nearest key is 'slots'",
                "methods: found the name 'a/b'",
                "seeds: found [1, 1]; name each once",
                "folder: found https://",
                "set: found run.seed; leave it out: write seeds",
            ),
        ),
        ({"methods": METHODS | {"Dense": {}}}, ("methods: found 'Dense' and another that differs only in case",)),
        (
            {"methods": {"a": {"prune.rounds": 1, "prune": {"rounds": 2}}}},
            ("methods.a: found prune.rounds twice; write it once",),
        ),
        ({"methods": METHODS | {"b": {"prune.rounds": 3}}}, ("a fault in ", "mirl, b: these are the same config")),
        ({"config": "nowhere.yaml"}, ("no file at nowhere.yaml",)),
        ({"methods": {}}, ("methods: found {}",)),
        ({"config": None, "seeds": []}, ("2 faults in ", "config: missing; give it a value", "seeds: found []")),
        ({"seeds": 3}, ("a fault in ", "seeds: found 3; write a list, as [0, 1]")),
        ({"seeds": [-1]}, ("a fault in ", "seeds.0: found -1; ")),
        ({"methods": {"dense": None, "b": {}}}, ("a fault in ", "methods.dense: found nothing; write {} for none")),
        ({"folder": "s3:/b/x"}, ("folder: found s3:/b/x; write s3://b/x",)),
    ],
)
def test_all_that_is_wrong_with_a_sweep_comes_at_once(swept: Any, more: Any, pieces: tuple[str, ...]) -> None:
    text = refused(swept, *pieces, **more)
    if "fault" in pieces[0]:
        assert text.startswith(pieces[0]) and text.count("\n") == len(pieces) - 1, "each fault once"


def test_all_that_is_wrong_with_runs_comes_at_once_naming_the_methods(swept: Any) -> None:
    methods = {"a": {"prune.rouds": 1}, "b": {"prune.fraction": 2, "train.epochs": 30}, "c": {"optimizer.lr": 1}}
    text = refused(
        swept,
        "nothing was started",
        "a: prune.rouds: found an unknown key (value 1); the nearest key is 'rounds'",
        "b: prune.fraction: found 2",
        "c: optimizer: found an unknown key (value {'lr': 1}); the nearest key is 'optimiser'",
        "all methods: batch.global: found 0",
        methods=methods,
        set={"batch.global": 0},
    )
    assert text.startswith("4 faults in the runs of ") and text.count("\n") == 4, "each once, not once for every seed"


def test_methods_are_told_apart_by_rounds_and_no_name_is_given_twice(swept: Any) -> None:
    assert len(swept(methods=METHODS | {"longer": {"prune.rounds": 4}}).runs) == 8
    with pytest.raises(UserError, match="the key 'mirl' appears twice here"):
        swept(("methods={mirl: {}, mirl: {}}",))


@settings(max_examples=25, deadline=None)
@given(st.sets(st.from_regex(r"[a-z0-9](-seed|[a-z0-9._-]){0,8}", fullmatch=True), min_size=1, max_size=4))
@pytest.mark.long
def test_no_two_runs_ever_share_a_folder(names: set[str]) -> None:
    methods = {name: {"optimiser.lr": number + 1} for number, name in enumerate(sorted(names))}
    sweep = spec.Sweep(config=str(DEMO), folder="f", methods=methods, seeds=(0, 1, 11))
    assert not list(sweep.inconsistencies())
    assert len({run.config.run.folder for run in spec.expand(sweep, "s", "s.yaml")}) == 3 * len(names)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)


@given(PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=3), PLAIN, max_size=2))
@example(["\n", "\U00010000", 3, None, "3", "\x85\u2028\ufeff\x00"])
def test_any_value_survives_the_command_line_in_one_line(value: Any) -> None:
    said = spec.assignment("a.b", value)
    assert len(said.splitlines()) <= 1 or said == "a.b="
    tree: dict[str, Any] = {}
    yaml_loader.apply_set(tree, said)
    assert tree == {"a": {"b": value}}


def test_a_printed_command_pasted_into_a_shell_is_that_run(swept: Any) -> None:
    said = {"tracking.experiment": "it's; $HOME & co", "evaluate.sets": ["a b", "c"], "optimiser.lr": 1e-5}
    plan = swept(set=said, folder="runs/a b", launch="launch/my file.yaml")
    for run in plan.runs:
        program, command, config, *rest = shlex.split(spec.command_line(plan, run))
        assert (program, command, rest[:2]) == ("mirl-dist", "train", ["--launch", "launch/my file.yaml"])
        sets = [text for flag, text in zip(rest[2::2], rest[3::2], strict=True) if flag == "--set"]
        assert configs.read(Path(config), sets) == run.config
        assert "\n" not in spec.command_line(plan, run)


def test_a_bucket_s_logs_lie_on_this_machine(swept: Any) -> None:
    plan = swept(folder="s3://bucket/trial/")
    assert plan.runs[0].folder == "s3://bucket/trial/dense-seed0"
    assert plan.log(plan.runs[0]) == Path("sweep-logs/trial/dense-seed0.log")
    assert swept().log(plan.runs[0]) == Path("runs/s/dense-seed0.log")


@pytest.mark.parametrize(
    ("gpus", "slots", "shares"),
    [
        ("0123", 2, ["01", "23"]),
        ("0123", 3, ["0", "1", "2"]),
        ("0123", 1, ["0123"]),
        ("57", 2, ["5", "7"]),
        ("01", 5, ["0", "1", "0", "1", "0"]),
        ("", 2, ["", ""]),
    ],
)
def test_slots_share_gpus_evenly(gpus: str, slots: int, shares: list[str]) -> None:
    assert ["".join(share) for share in spec.share_devices(list(gpus), slots)] == shares


@given(st.integers(1, 70), st.integers(1, 20))
def test_slots_have_equal_gpus_and_share_none_where_there_are_enough(gpus: int, slots: int) -> None:
    devices = [str(n) for n in range(gpus)]
    shares = spec.share_devices(devices, slots)
    assert len(shares) == slots and {len(share) for share in shares} == {max(1, gpus // slots)}
    used = [name for share in shares for name in share]
    assert len(set(used)) == min(gpus, len(used)) and set(used) <= set(devices)


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/sweeps/*.yaml")), ids=lambda p: p.stem)
def test_every_committed_sweep_can_be_expanded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = spec.read(file)
    assert plan.runs and file.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", " is empty. Start from configs/sweeps/demo.yaml."),
        ("model: {}", " is the config of a run, not a sweep; configs/sweeps/ has those."),
        ("num_processes: 2", " is a launch file, not a sweep; configs/sweeps/ has those."),
    ],
)
def test_a_file_of_another_kind_is_no_sweep(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        spec.read(tmp_path / "a.yaml")
    assert str(caught.value) == f"{tmp_path}/a.yaml{said}"


# -- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "exited", "complete", "state"),
    [
        (None, False, False, "running"),
        (None, True, False, "failed"),
        (None, True, True, "failed"),
        ("finished", False, True, "finished"),
        ("finished", False, False, "stopped"),
        ("stopped", False, True, "stopped"),
        ("failed", False, False, "failed"),
    ],
)
def test_a_finished_run_has_a_launch_that_said_so_and_a_last_ticket(
    ended: str | None, exited: bool, complete: bool, state: str
) -> None:
    holder: Any = SimpleNamespace(ended=ended, has_exited=lambda: exited)
    assert status.state_of(holder, complete) == state
    assert status.state_of(None, complete) == ("finished" if complete else "waiting"), "never launched"


@pytest.mark.parametrize(
    ("states", "asked", "code"),
    [
        (["finished", "finished"], False, 0),
        (["finished", "finished"], True, 0),
        (["finished", "failed", "stopped"], False, 1),
        (["finished", "stopped"], False, 75),
        (["failed", "waiting"], True, 75),
    ],
)
def test_a_sweep_asked_to_stop_can_be_queued_again_whatever_failed(
    states: list[status.State], asked: bool, code: int
) -> None:
    assert exit_code(states, asked=asked) == code


def test_where_a_run_stands_is_told_in_words_and_to_programs() -> None:
    run = SweepRun("mirl-seed0", "mirl", 0, "runs/s/mirl-seed0", (), Config())
    stands = status.RunStatus("running", 3, 1, 5, 36, 0.2, 17.256, "host, pid 4", b"beat")
    assert stands.cells() == ["running", "1/3", "5/36", "20.0%", "17.26"]
    assert status.RunStatus().cells() == ["waiting", "", "", "", ""]
    row = json.loads(json.dumps(stands.row(run)))
    assert row["method"] == "mirl" and row["seed"] == 0 and row["state"] == "running" and row["psnr"] == 17.256
    assert row["who"] == "host, pid 4" and "sign" not in row
