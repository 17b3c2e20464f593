"""Laws of the config: every mistake is named at once, and the fingerprint tells experiments apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from mirl_dist.config import yaml_loader
from mirl_dist.config.config import Config, differences, from_dump, read
from mirl_dist.errors import UserError

NO_TASK = "found '{}', where a task is expected"
CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def config(tree: dict[str, Any]) -> Config:
    return yaml_loader.build(Config, tree, "the test")


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def said(tree: dict[str, Any]) -> list[str]:
    """The complaints about a tree, one a line."""
    with pytest.raises(UserError) as caught:
        config(tree)
    head, *lines = str(caught.value).splitlines()
    assert head == ("a fault in the test:" if len(lines) == 1 else f"{len(lines)} faults in the test:")
    return [line.strip() for line in lines]


def file(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# -- mistakes ---------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    assert said({"prune": {"fracton": 0.3}}) == [
        "prune.fracton: found an unknown key (value 0.3); the nearest key is 'fraction'"
    ]
    assert said({"trian": {}}) == ["trian: found an unknown key (value {}); the nearest key is 'train'"]
    assert said({"batch": {"globl": 4}}) == [
        "batch.globl: found an unknown key (value 4); the nearest key is 'global'"
    ], "keys are offered as they are written in YAML"
    assert said({"rewind": {"zzz": 1}}) == ["rewind.zzz: found an unknown key (value 1); known here: step, to, what"]


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({"prune": {"fraction": "much"}}, "prune.fraction: found 'much'; input should be a valid number"),
        ({"prune": {"fraction": 1.0}}, "prune.fraction: found 1.0; input should be less than 1"),
        ({"prune": {"fraction": float("nan")}}, "prune.fraction: found nan; input should be a finite number"),
        ({"batch": {"global": 0}}, "batch.global: found 0; input should be greater than 0"),
        ({"batch": {"global_": 4}}, "batch.global_: found an unknown key (value 4); the nearest key is 'global'"),
        ({"train": {"precision": "fp8"}}, "train.precision: found 'fp8'; input should be 'fp32', 'tf32' or 'bf16'"),
        ({"run": {"folder": 5}}, "run.folder: found 5; input should be a valid string"),
        ({"run": {"folder": ""}}, "run.folder: found ''; string should have at least 1 character"),
        ({"model": {"blocks": [1, 1]}}, "model.blocks.2: missing; give it a value"),
        ({"prune": 5}, "prune: found 5; input should be a valid dictionary"),
        ({"prune": {"scope": 5}}, "prune.scope: found 5; input should be 'published' or 'all'"),
        ({"data": {"mix": {"derain": 0}}}, "data.mix.derain: found 0; input should be greater than 0"),
        ({"data": {"mix": {"derain": {"a": -1}}}}, "data.mix.derain.a: found -1; input should be greater than 0"),
        ({"checkpoint": {"keep_last": 1}}, "checkpoint.keep_last: found 1; input should be greater than or equal to 2"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_right(tree: dict[str, Any], complaint: str) -> None:
    assert said(tree)[0].startswith(complaint)


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({"data": {"mix": {}}}, "data.mix: found no task"),
        (nested("data.mix.desnoww", 1), f"data.mix: {NO_TASK.format('desnoww')}; did you mean 'desnow'? Allowed are"),
        ({"data": {"mix": {"denoise": 1}}}, f"data.mix: {NO_TASK.format('denoise')}; did you mean 'denoise_50'?"),
        ({"data": {"mix": {"derain": {}}}}, "data.mix.derain: found no set; give a number, or numbers of sets"),
        ({"data": {"mix": {"derain": 1.5}}}, "data.mix.derain: found 1.5 with mix_by repeats; use a whole number, or"),
        (
            {"data": {"mix": {"dehaze": 1, "derain": 2}, "mix_by": "balanced"}},
            "data.mix.derain: found 2 with mix_by balanced; write 1, or use mix_by: weights",
        ),
        (
            {"data": {"mix": {"derain": {"heavy": 1, "light": 0.5}}, "mix_by": "balanced"}},
            "data.mix.derain.light: found 0.5 with mix_by balanced; write 1, or use mix_by: weights",
        ),
        ({"prune": {"style": "one_shot"}}, "prune.rounds: found 15 with prune.style one_shot"),
        ({"prune": {"finetune_lr": 1e-4}}, "prune.finetune_lr: found with rewind.to initial"),
        ({"prune": {"floor": 0.1}}, "prune.floor: found 0.1, but 15 cuts of 0.2 leave 0.0352 of all weights"),
        ({"prune": {"floor": 0.01, "per": "layer"}}, "prune.floor: found with prune.per layer"),
        ({"rewind": {"to": "step"}}, "rewind.step: found nothing with rewind.to step"),
        ({"rewind": {"step": 3}}, "rewind.step: found 3 with rewind.to initial"),
        ({"evaluate": {"every_epochs": 120}}, "evaluate.every_epochs: found 120 of 120 train.epochs"),
        ({"evaluate": {"protocols": ["mioir", "mioir"]}}, "evaluate.protocols: found ['mioir', 'mioir']"),
        ({"evaluate": {"tile_pixels": 64, "tile_overlap": 64}}, "evaluate.tile_overlap: found 64 for tiles of 64"),
        ({"start": {"kind": "reinit"}}, "start.kind: found reinit without start.ticket"),
        ({"start": {"ticket": "a"}, "model": {"weights": "b"}}, "model.weights: found with start.ticket"),
        (
            {"prune": {"style": "one_shot", "rounds": 1}, "rewind": {"what": "published"}},
            "rewind.what: found 'published' with rewind.to finetune",
        ),
        ({"train": {"epochs": 15}}, "schedule.warmup_epochs: found 15 of 15 train.epochs"),
        ({"schedule": {"horizon_epochs": 100}}, "schedule.horizon_epochs: found 100.0 below train.epochs 120"),
        ({"model": {"heads": [5, 2, 4, 8]}}, "model.heads[0]: found 5 heads for a width of 48"),
        ({"model": {"prompt_dims": [63, 128, 320]}}, "model.prompt_heads: found 4 heads for a width of 159"),
        ({"batch": {"forward": 3}}, "batch.forward: found 3, which does not divide batch.global 8"),
        ({"keep": {"rounds": "best"}}, "keep.by: found nothing with keep.rounds best"),
        (
            nested("run.folder", "https://host/run"),
            "run.folder: found https://; a run is stored in a folder or under s3",
        ),
        ({"store": {"endpoint": "http://key:word@host"}}, "store.endpoint: found no plain address"),
        ({"store": {"endpoint": "host:9000"}}, "store.endpoint: found no plain address"),
        ({"ranks": {"timeout_seconds": 900}}, "ranks.timeout_seconds: found 900, not more than store.patience_seconds"),
        ({"store": {"kms_key": "k"}}, "store.kms_key: found without store.encryption aws:kms"),
    ],
)
def test_keys_that_cannot_stand_together_are_refused(tree: dict[str, Any], complaint: str) -> None:
    found = said(tree)
    assert len(found) == 1
    assert found[0].startswith(complaint)


def test_unknown_keys_wrong_values_and_contradictions_come_in_one_message() -> None:
    tree: dict[str, Any] = {"trian": {}, "batch": {"forward": 3}, "model": {"blocks": [1, 1, 0, 1]}}
    tree |= {"prune": {"fracton": 0.3, "style": "one_shot", "scope": 5}}
    found = said(tree | {"optimiser": {"lr": "fast", "betas": [0.9, "x"]}})
    for start in (
        *("trian: found an unknown key", "prune.fracton: found an unknown key", "prune.scope: found 5"),
        *("optimiser.lr: found 'fast'", "optimiser.betas.1: found 'x'", "model.blocks.2: found 0"),
        *("prune.rounds: found 15 with prune.style one_shot", "batch.forward: found 3"),
    ):
        assert any(complaint.startswith(start) for complaint in found), start


def test_all_inconsistencies_come_at_once_in_a_fixed_order() -> None:
    complaints = said(
        {
            "run": {"folder": "https://host/run"},
            "store": {"endpoint": "host:9000", "kms_key": "k"},
            "ranks": {"timeout_seconds": 900},
            "tracking": {"uri": "https://me:secret@host"},
            "keep": {"rounds": "best"},
            "batch": {"forward": 3},
            "model": {"heads": [5, 2, 4, 8], "weights": "b"},
            "start": {"ticket": "a"},
            "schedule": {"horizon_epochs": 6},
            "train": {"epochs": 10},
            "evaluate": {"every_epochs": 10, "protocols": [], "tile_pixels": 64, "tile_overlap": 64},
            "rewind": {"to": "step"},
            "prune": {"style": "one_shot", "floor": 0.9, "per": "layer", "finetune_lr": 1e-4},
            "data": {"mix": {}},
        }
    )
    within = "run.folder store.endpoint store.kms_key model.heads[0] data.mix batch.forward prune.rounds prune.floor "
    within += "evaluate.tile_overlap evaluate.protocols keep.by tracking.uri "
    between = "prune.finetune_lr rewind.step rewind.to model.weights prune.floor evaluate.every_epochs "
    between += "schedule.warmup_epochs schedule.horizon_epochs ranks.timeout_seconds"
    assert [line.partition(":")[0] for line in complaints] == (within + between).split()


def test_all_faults_of_a_mix_come_at_once_and_each_is_one_complaint() -> None:
    found = said({"data": {"mix": {"desmog": 1, "derain": {"heavy": 0.5}, "dehaze": {}}}})
    heads = ["data.mix.derain.heavy: found 0.5 with mix_by repeats", "data.mix.dehaze: found no set"]
    assert [line.split(";")[0] for line in found] == [f"data.mix: {NO_TASK.format('desmog')}", *heads]
    assert found[1].endswith("; use a whole number, or mix_by: weights")
    assert said({"data": {"mix": {"derain": {"heavy": -1}}}}) == [
        "data.mix.derain.heavy: found -1; input should be greater than 0"
    ]
    assert said({"data": {"mix": {"derain": -1}}}) == [
        "data.mix.derain: found -1; input should be greater than 0, or input should be a valid dictionary"
    ]


def test_a_mix_of_weights_takes_fractions_and_numbers_per_set() -> None:
    mix = {"derain": {"heavy": 0.25, "light": 3}, "denoise_25": 0.5, "deblur_easy": 2}
    found = config({"data": {"mix": mix, "mix_by": "weights"}})
    assert found.data.mix == mix
    assert list(found.data.mix) == list(mix), "the order of tasks is the config's"
    even = config({"data": {"mix": {"derain": {"heavy": 1, "light": 1}, "dehaze": 1}, "mix_by": "balanced"}})
    assert even.data.mix["derain"] == {"heavy": 1, "light": 1}


def test_shards_may_lie_at_any_address_that_is_no_nul() -> None:
    for address in ("shards/built", "s3://bucket/prefix", "https://host.example/path"):
        assert config({"data": {"shards": address}}).data.shards == address
    assert said({"data": {"shards": "a\0b"}})[0].startswith("run.folder, data.shards: found a NUL character")


def test_a_tracking_address_with_a_password_is_refused_and_one_without_is_not() -> None:
    found = said({"tracking": {"uri": "https://me:secret@mlflow.example.org/x"}})
    assert found == ["tracking.uri: found '@' or '?', which may hold credentials; use MLFLOW_TRACKING_URI instead"]
    assert "secret" not in "".join(found)
    for uri in ("postgresql://u:pa/ss@host/db", "postgresql://host/db?password=secret"):
        assert "tracking.uri: found '@' or '?'" in said({"tracking": {"uri": uri}})[0]
    for uri in ("https://mlflow.example.org/a", "sqlite:///mlflow.db", "http://127.0.0.1:5000"):
        assert config({"tracking": {"uri": uri}}).tracking.uri == uri


# -- files and --set --------------------------------------------------------------------------------------------


def test_set_goes_over_the_file_and_the_last_set_wins(tmp_path: Path) -> None:
    path = file(tmp_path, "prune: {fraction: 0.3, rounds: 2}\n")
    assert read(path).prune.fraction == 0.3
    found = read(path, ["prune.fraction=0.4", "prune.fraction=0.5", "run.seed=7"])
    assert (found.prune.fraction, found.prune.rounds, found.run.seed) == (0.5, 2, 7)
    assert found.batch.global_ == 8, "what neither names keeps its default"


def test_a_set_value_is_read_as_yaml(tmp_path: Path) -> None:
    path = file(tmp_path, "run: {seed: 1}\n")
    sets = ["model.blocks=[1, 2, 3, 4]", "checkpoint.every_steps=null", "tracking.enabled=false", "batch.global=16"]
    found = read(path, [*sets, "data.mix={derain: 2}", "tracking.run_name=a=b", "optimiser.lr=2e-4"])
    assert found.model.blocks == (1, 2, 3, 4)
    assert found.checkpoint.every_steps is None
    assert found.tracking.enabled is False
    assert found.data.mix == {"derain": 2}, "a mapping replaces a mapping"
    assert found.tracking.run_name == "a=b"
    assert (found.batch.global_, found.optimiser.lr) == (16, 2e-4)


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("prune.fraction", "--set 'prune.fraction' is not of the form key=value. Write for example"),
        ("=3", "--set '=3' is not of the form key=value"),
        ("prune..fraction=3", "--set 'prune..fraction=3' is not of the form key=value"),
        ("run.seed.x=1", "--set run.seed.x: 'seed' holds 3, which has no keys below it"),
        ("model.blocks=[1, 2", "--set model.blocks is not valid YAML at line 1"),
        ("data.mix={a: 1, a: 2}", "the key 'a' appears twice here"),
        ("prune.fracton=0.3", "the nearest key is 'fraction'"),
    ],
)
def test_a_set_that_means_nothing_is_refused(tmp_path: Path, assignment: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        read(file(tmp_path, "run: {seed: 3}\n"), [assignment])
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("run: {seed: 1}\nrun: {seed: 2}\n", "line 2, column 1: the key 'run' appears twice here"),
        ("run:\n  seed: 1\n  folder: a\n  seed: 2\n", "line 4, column 3: the key 'seed' appears twice here"),
        ("run: {seed: 1\n", "is not valid YAML at line 2"),
        ("? [a, b]\n: 1\n", "is not valid YAML at line 1, column 3"),
        ("- 1\n", "holds a list, not keys with values. Start from configs/demo.yaml."),
        ("", "is empty. Start from configs/demo.yaml."),
        ("run: !!python/object/apply:os.system ['true']\n", "is not valid YAML at line 1"),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    path = file(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_answered_with_its_neighbours_and_no_text_is_refused(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yaml", "notes.txt"):
        file(tmp_path, "{}", name)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "c.yaml")
    assert str(caught.value) == (f"no file at {tmp_path}/c.yaml. There are: {tmp_path}/a.yaml, {tmp_path}/b.yaml.")
    with pytest.raises(UserError, match=r"Give the path of a YAML file\."):
        read(tmp_path / "nowhere" / "c.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read .*a\.yaml"):
        read(tmp_path / "a.yaml")


# -- fingerprint ------------------------------------------------------------------------------------------------


def keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in cls.model_fields.items():
        key, inner = prefix + (field.alias or name), field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{key}.")
        else:
            yield key


def values(text: str) -> dict[str, Any]:
    """The keys of the config that a text in YAML sets, with their values."""
    found = {}
    for key in keys(Config):
        value = yaml.safe_load(text)
        for part in key.split("."):
            value = value.get(part, {})
        if value != {}:
            found[key] = value
    return found


# A value other than the default for every key.
LOCAL = values("""
store: {endpoint: "http://127.0.0.1:9000", encryption: AES256, kms_key: alias/mine, patience_seconds: 5.0,
  lease_seconds: 5.0}
ranks: {timeout_seconds: 5000.0, logs: logs, restarts: 0, slow_factor: 2.0}
preempt: {deadline_seconds: 5.0}
guard: {skip_bad_batches: 3, spike_factor: 3.0, same_step_failures: 5}
evaluate: {pictures: 1}
run: {folder: elsewhere}
data: {shards: elsewhere, damage: skip, cache: {folder: /fast/shards, gigabytes: 200}, workers: 0}
batch: {forward: 2}
train: {device: cpu}
prune: {rounds: 3, target_sparsity: 0.5}
keep: {rounds: best, by: [psnr/*/a]}
checkpoint: {every_steps: 5, keep_last: 9}
tracking: {enabled: false, uri: "sqlite:///other.db", experiment: other, run_name: other, tags: {sweep: other},
  every_steps: 3, journal: elsewhere}
""")
TELLING = values("""
run: {seed: 1}
model: {dim: 64, blocks: [4, 6, 6, 9], refinement_blocks: 3, heads: [2, 2, 4, 8], ffn_expansion: 2.0, prompt_length: 6,
  prompt_dims: [64, 128, 324], prompt_sizes: [64, 32, 8], prompt_heads: 2, weights: w.safetensors}
data: {mix: {denoise_15: 3, denoise_25: 3, denoise_50: 3, derain: 120, dehaze: 2}, mix_by: weights, patch_pixels: 128,
  augment: all, steps_per_epoch: 3}
batch: {global: 16}
optimiser: {name: adam, lr: 0.0001, betas: [0.9, 0.99], eps: 1.0e-7, weight_decay: 0, clip_norm: 1.0}
schedule: {by: step, warmup_epochs: 14, horizon_epochs: 150}
train: {epochs: 121, precision: bf16, compile: true}
start: {ticket: run/rounds/03, kind: reinit}
prune: {style: one_shot, fraction: 0.3, criterion: random, per: layer, scope: all, output_layers: [output.*],
  output_factor: 1.0, finetune_epochs_fraction: 0.1, finetune_lr: 0.00001, criterion_batches: 2, synflow_steps: 5,
  floor: 0.01}
rewind: {to: rate, step: 5, what: published}
evaluate: {sets: [a], seed: 1, protocols: [basicsr_y], every_epochs: 1, curve_images: 1, tile_pixels: 128,
  tile_overlap: 16, precision: bf16, compile: true}
""")
NEEDED: dict[str, dict[str, Any]] = {
    "prune.style": {"rounds": 1},
    "prune.finetune_lr": {"style": "one_shot", "rounds": 1},
    "start.kind": {"ticket": TELLING["start.ticket"]},
    "rewind.step": {"to": "step"},
    "store.kms_key": {"encryption": "aws:kms"},
    "keep.rounds": {"by": ["psnr/*/b"]},
}
"""What stands beside a key in its section."""


def with_value(key: str, value: Any) -> Config:
    tree = nested(key, value)
    tree[key.partition(".")[0]] |= NEEDED.get(key, {})
    return config(tree)


def test_every_key_of_the_config_is_either_telling_or_local() -> None:
    assert sorted(keys(Config)) == sorted([*LOCAL, *TELLING, "model.name"]), "place a new key in one of the tables"
    assert not LOCAL.keys() & TELLING.keys()


@pytest.mark.parametrize("key", TELLING)
def test_a_key_that_changes_the_numbers_changes_the_fingerprint(key: str) -> None:
    changed = with_value(key, TELLING[key])
    assert from_dump(changed.dump(), "a dump") == changed
    without = {
        "prune.finetune_lr": with_value("prune.style", "one_shot"),
        "start.kind": with_value("start.ticket", TELLING["start.ticket"]),
    }.get(key, Config())
    assert changed.fingerprint() != without.fingerprint()
    assert any(text.startswith(f"{key}: ") or text.startswith(f"{key}.") for text in differences(changed, without))


@pytest.mark.parametrize("key", LOCAL)
def test_a_local_key_leaves_the_fingerprint(key: str) -> None:
    changed = with_value(key, LOCAL[key])
    assert changed != Config() and from_dump(changed.dump(), "a dump") == changed
    assert changed.fingerprint() == Config().fingerprint()
    assert differences(changed, Config()) == []


def test_all_telling_changes_have_different_fingerprints() -> None:
    found = [with_value(key, value).fingerprint() for key, value in TELLING.items()]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("tree", "other"),
    [
        (Config().dump(), {}),
        ({"optimiser": {"lr": 0.0002}, "schedule": {"warmup_epochs": 15}}, {"schedule": {"warmup_epochs": 15.0}}),
        (nested("data.mix", {"derain": 2, "dehaze": 1}), nested("data.mix", {"dehaze": 1, "derain": 2})),
        (nested("data.mix.derain", {"heavy": 2, "light": 1}), nested("data.mix.derain", {"light": 1, "heavy": 2})),
    ],
)
def test_the_order_of_keys_and_defaults_spelled_out_leave_the_fingerprint(
    tree: dict[str, Any], other: dict[str, Any]
) -> None:
    assert config(tree).fingerprint() == config(other).fingerprint()
    assert differences(config(tree), config(other)) == []


def test_numbers_per_set_change_the_fingerprint_and_differences_tell_both_values() -> None:
    whole, parts = config({"data": {"mix": {"derain": 2}}}), config({"data": {"mix": {"derain": {"a": 2, "b": 2}}}})
    assert whole.fingerprint() != parts.fingerprint()
    other = config({"data": {"mix": {"derain": {"a": 2, "b": 3}}}})
    assert differences(parts, other) == ["data.mix.derain.b: 2.0 here, 3.0 there"]
    found = differences(config({"prune": {"fraction": 0.3}}), config({"run": {"seed": 4}}))
    assert found == ["prune.fraction: 0.3 here, 0.2 there", "run.seed: 0 here, 4 there"]


# -- what is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_loads_and_comes_back_from_its_dump(path: Path) -> None:
    found = read(path)
    again = from_dump(yaml.safe_load(yaml.safe_dump(found.dump())), "a dump")
    assert again == found
    assert again.fingerprint() == found.fingerprint()


def test_a_dump_of_another_version_is_refused_with_its_place() -> None:
    with pytest.raises(UserError, match=r"a fault in runs/a/run\.json:\n  prune\.colour: found an unknown key"):
        from_dump(Config().dump() | {"prune": Config().dump()["prune"] | {"colour": 1}}, "runs/a/run.json")


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 3  # type: ignore[misc]
