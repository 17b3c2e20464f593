"""ZeRO 1, 2, 3 and FSDP2 against DDP: the same masks, the same tickets, one format of states."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from mirl_dist.distributed.engines.spec import engine_from_env
from mirl_dist.distributed.launch import launch_file
from tests.services.lab import PROGRAMS, ROOT, Lab

DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install 'mirl_dist[deepspeed]'",
)
ENGINES: dict[str, dict[str, str]] = {
    "ddp": {},
    **{f"zero{n}": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(n)} for n in (1, 2, 3)},
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}
"""What `accelerate launch` makes of a launch file; a test of the launch files sees that it does."""
OFFLOAD = ENGINES["zero2"] | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
DEALT = [
    *(pytest.param(name, marks=[DEEPSPEED, pytest.mark.long]) for name in ("zero1", "zero2", "zero3")),
    "fsdp",
]
PASSES = {"batch.forward": 1, "guard.skip_bad_batches": 2, "prune.rounds": 1}


def weights(run: Path, round_: int) -> dict[str, Any]:
    (folder,) = run.glob(f"rounds/{round_:02d}/ticket-*")
    return safetensors.torch.load_file(folder / "weights.safetensors")


def told(lab: Lab, run: Path) -> list[tuple[Any, ...]]:
    """Of each ticket what no engine may change, on the same number of ranks."""
    keys = ("round", "mask_digest", "weights_digest", "initial_digest", "alive", "threshold", "scores", "bad")
    return [tuple(ticket[key] for key in keys) for ticket in lab.tickets(run)]


@pytest.fixture(scope="module")
def with_mishaps(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds under DDP, each step in two passes, with one loss and one gradient that are not finite."""
    folder = tmp_path_factory.mktemp("mishaps")
    lab.play(folder, PASSES, fatal=mishaps()).ok()
    return folder / "run"


def mishaps() -> list[dict[str, Any]]:
    """A loss in the first of two passes, and a gradient after both, on a rank each."""
    return [
        {"rank": 0, "step": [0, 2], "do": "nan", "pass": 0},
        {"rank": 1, "step": [0, 4], "do": "inf_gradient"},
    ]


@pytest.mark.parametrize("engine", DEALT)
def test_every_engine_ends_in_the_bits_of_ddp(engine: str, lab: Lab, reference: Path, tmp_path: Path) -> None:
    ended = lab.play(tmp_path, env=ENGINES[engine]).ok()
    assert ended.err == "", ended.said()
    assert told(lab, tmp_path / "run") == told(lab, reference)


OFFLOADED = pytest.param("zero2 offload", marks=DEEPSPEED)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["fsdp", OFFLOADED])
def test_passes_are_added_and_bad_steps_left_out_on_every_engine(
    engine: str, lab: Lab, with_mishaps: Path, tmp_path: Path
) -> None:
    name, _, offload = engine.partition(" ")
    ended = lab.play(tmp_path, PASSES, fatal=mishaps(), env=OFFLOAD if offload else ENGINES[name]).ok()
    assert "The step is skipped (2 of 2 allowed in a round)" in ended.out
    mine, expected = weights(tmp_path / "run", 0), weights(with_mishaps, 0)
    apart = max(float((mine[name] - expected[name]).abs().max()) for name in expected)
    assert apart < 1e-5, "ZeRO-2, 3 and FSDP2 average after each pass, and so add in another order"
    assert [ticket["bad"] for ticket in lab.tickets(tmp_path / "run")] == [2, 0]


@pytest.mark.long
@DEEPSPEED
def test_a_run_moves_between_engines_and_numbers_of_ranks_in_mid_round(lab: Lab, tmp_path: Path) -> None:
    paths = {
        "moved": [("zero3", 2, [0, 3]), ("ddp", 1, [0, 5]), ("zero3", 2, [1, 3]), ("fsdp", 2, None)],
        "stayed": [("ddp", 2, [0, 3]), ("ddp", 1, [0, 5]), ("ddp", 2, None)],
    }
    for path, legs in paths.items():
        folder = tmp_path / path
        folder.mkdir()
        for engine, world, until in legs:
            stop = {"rank": "all", "step": until, "signal": 15} if until else {"rank": 0, "do": "keep"}
            ended = lab.play(folder, {"checkpoint.every_steps": 1}, world=world, fatal=stop, env=ENGINES[engine])
            assert ended.rc == (75 if until else 0), ended.said()
    assert told(lab, tmp_path / "moved" / "run") == told(lab, tmp_path / "stayed" / "run")


@pytest.mark.long
@DEEPSPEED
def test_the_masks_of_one_checkpoint_do_not_depend_on_engine_or_ranks(
    lab: Lab, reference: Path, tmp_path: Path
) -> None:
    """Four ranks hold parts of unequal length, some of them none; the reference was cut by two."""
    shutil.copytree(reference, tmp_path / "run")
    for name in ("01", "02"):
        shutil.rmtree(tmp_path / "run" / "rounds" / name)
    lab.play(tmp_path, {"prune.rounds": 1}, world=4, env=ENGINES["zero3"]).ok()
    cut, expected = lab.tickets(tmp_path / "run")[1], lab.tickets(reference)[1]
    assert [cut[key] for key in ("mask_digest", "threshold", "alive")] == [
        expected[key] for key in ("mask_digest", "threshold", "alive")
    ]


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_asks_for_the_engine_that_the_launch_file_names(file: Path) -> None:
    from accelerate.commands import launch
    from accelerate.utils import launch as made

    if "zero" in file.stem and DEEPSPEED.args[0]:
        pytest.skip(DEEPSPEED.kwargs["reason"])
    said = launch_file.read(file, {"MIRL_MASTER_ADDR": "127.0.0.1", "MIRL_NODE_RANK": "0"})
    ask = launch.launch_command_parser().parse_args([*said.options(10), "-m", "mirl_dist"])
    given, defaults, _ = launch._validate_launch_command(ask)
    given.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config) if given.use_deepspeed else ""
    env = made.prepare_deepspeed_cmd_env(given)[1] if given.use_deepspeed else made.prepare_multi_gpu_env(given)
    found = engine_from_env(env)
    assert found.name == said.engine
    assert (found.offload_optimizer or found.offload_parameters) == said.offload == ("offload" in file.stem)
    assert file.stem.partition("_")[0] in (said.engine, "cpu", "gpus", "nodes", "one")


@pytest.mark.long
def test_train_launch_starts_the_engine_of_its_file(lab: Lab, reference: Path, tmp_path: Path) -> None:
    command = [*lab.train(tmp_path), "--launch", str(ROOT / "launch" / "fsdp.yaml")]
    lab.cold("python", "-m", "mirl_dist", *command, cwd=tmp_path, env={"MIRL_SEEN": "1"}).wait().ok()
    assert told(lab, tmp_path / "run") == told(lab, reference)
    assert {ticket["engine"] for ticket in lab.tickets(tmp_path / "run")} == {"fsdp"}


@pytest.mark.long
@DEEPSPEED
def test_scores_of_a_sharded_network_are_those_of_one_process(lab: Lab, tmp_path: Path) -> None:
    flow = {"prune.criterion": "synflow", "prune.synflow_steps": 2, "prune.rounds": 1, "train.epochs": 2}
    masks = []
    for engine, world in (("zero3", 2), ("ddp", 1)):
        (folder := tmp_path / engine).mkdir()
        lab.play(folder, flow, world=world, env=ENGINES[engine]).ok()
        masks.append(lab.tickets(folder / "run")[1]["mask_digest"])
    assert masks[0] == masks[1]


@pytest.mark.long
@pytest.mark.parametrize("engine", [pytest.param("zero3", marks=DEEPSPEED), "fsdp"])
def test_selection_and_rewinding_need_no_more_memory_than_the_part_of_a_rank(
    engine: str, lab: Lab, tmp_path: Path
) -> None:
    script = str(PROGRAMS / "selection_memory.py")
    lab.start(str(tmp_path), cwd=tmp_path, world=2, script=script, env=ENGINES[engine]).wait().ok()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["held"] < 0.6 * found["network"], "the rank holds a part"
        assert found["extra"] < found["held"] + found["constant"], found
        assert found["whole_extra"] > found["network"], "the measure sees a network that is gathered"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "only FSDP2 is known here"),
        (ENGINES["zero1"] | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "found zero_stage 0"),
        (ENGINES["zero3"] | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "found offload_param_device nvme"),
        (ENGINES["zero1"] | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "parameters stay with ZeRO-3 alone"),
        (ENGINES["zero1"] | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "x.json"}, "deepspeed_config_file"),
    ],
)
def test_an_engine_that_is_not_known_is_refused_in_one_line(
    env: dict[str, str], said: str, lab: Lab, tmp_path: Path
) -> None:
    ended = lab.start(*lab.train(tmp_path), cwd=tmp_path, env=env).wait()
    assert ended.rc == 2, ended.said()
    assert said in ended.err and "Traceback" not in ended.err and len(ended.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
