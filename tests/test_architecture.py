"""Laws of the house: which module may import which, and who alone may use a dangerous or heavy thing."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "mirl_dist"

# From the ground up. A module imports only modules of its own floor or of lower ones.
FLOORS: dict[str, tuple[str, ...]] = {
    "words": (
        *("__init__", "faults", "slip", "stopping", "telling", "yaml_tree", "tasks"),
        *("sections", "config", "launch_file", "placeless", "destination"),
    ),
    "networks": (
        "models/__init__",
        "models/compiled",
        "models/official",
        "models/promptir",
        "models/restormer_blocks",
    ),
    "images": (
        "data/__init__",
        "data/bicubic",
        "data/blur",
        "data/chance",
        "data/crew",
        "data/digest",
        "data/degrade",
        "data/manifest",
        "data/photographs",
        "data/recipe",
        "data/sample",
        "data/source_image",
        "data/workers",
        "metrics",
        "pictures",
        "protocols",
        "tiling",
    ),
    "arithmetic": (
        "budget",
        "pruning/__init__",
        "pruning/controls",
        "pruning/criteria",
        "pruning/masks",
        "pruning/prune",
        "pruning/quantile",
        "pruning/rewind",
        "pruning/sensitivity",
        "pruning/shares",
        "pruning/synflow",
        "objective",
        "schedule",
        "strict_json",
        "ticket",
        "ticket_file",
        "ticket_seal",
        "verdict",
    ),
    "comparison": (
        "compare/__init__",
        "compare/agreement",
        "compare/charts",
        "compare/depth",
        "compare/grouping",
        "compare/judge",
        "compare/latex",
        "compare/looks",
        "compare/markup",
        "compare/overlap",
        "compare/page",
        "compare/page_figures",
        "compare/page_pictures",
        "compare/page_tables",
        "compare/page_verdicts",
        "compare/published",
        "compare/shown",
        "compare/style",
        "compare/summary",
        "compare/text",
    ),
    "order": ("data/mix", "data/order", "data/pairing", "data/plan", "data/survey"),
    "doors": (
        "agent",
        "data/bringers",
        "data/cache",
        "data/held",
        "data/probe",
        "data/shards",
        "data/stream",
        "data/supply",
        "data/verify",
        "data/window",
        *("engines/__init__", "engines/asked", "engines/fsdp", "engines/held", "engines/law"),
        "engines/needs",
        *("engines/own_gradients", "engines/replicas", "engines/zero"),
        "items",
        "journal",
        "launched",
        "meetings",
        "mlflow_reader",
        "mlflow_store",
        "outbox",
        "rank_log",
        "ranks",
        "report",
        "segments",
        "sender",
        "storage/__init__",
        "storage/folder",
        "storage/law",
        "storage/patience",
        "storage/s3",
        "storage/s3_parts",
        "storage/s3_requests",
        "storage/s3_wire",
        "storage/web",
        "tracking",
        "watch",
    ),
    "memory": ("checkpoint", "commits", "footprint", "keeper", "lease", "lease_files", "state"),
    "work": (
        "data/build",
        "data/check",
        "data/contact_sheet",
        "data/encode",
        "data/unfinished",
        "evaluate",
        "guards",
        "train",
    ),
    "stories": ("lottery", "rounds", "selecting", "showing"),
    "wiring": ("assemble", "feed", "opening", "preparing", "resuming", "starting"),
    "uses": (
        *("checks", "checks_disks", "checks_places", "comparing", "doctor", "judging", "launch_plan", "launching"),
        *("scoring", "shelf", "shipping", "sources"),
        *("sweep_board", "sweep_plan", "sweep_queue", "sweeping"),
    ),
    "front door": ("__main__", "cli", "cli_sweep", "cli_tickets"),
}

# What only the named modules may import.
DOORS: dict[str, tuple[str, ...]] = {
    "accelerate": ("agent", "ranks"),
    "torch.distributed": ("agent", "engines/fsdp", "ranks"),
    "deepspeed": ("engines/zero",),
    "webdataset": ("data/build",),
    "boto3": ("storage/s3",),
    "botocore": ("storage/s3", "storage/s3_wire"),
    "mlflow": ("mlflow_reader", "mlflow_store"),
}

# Modules that run code hidden in a file. `pickle` may be imported for the name of its error alone.
RUNS_CODE = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
HARMLESS = ("pickle.UnpicklingError",)


def trees(package: Path) -> dict[str, ast.Module]:
    """Module name ('data/order') -> syntax tree."""
    return {
        path.relative_to(package).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def imported(module: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports anywhere, inside functions too; relative imports are made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = ["mirl_dist", *module.split("/")[:-1]]
                base = ".".join([*inside[: len(inside) - node.level + 1], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def edges(modules: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    found: dict[str, set[str]] = {}
    for module, tree in modules.items():
        found[module] = set()
        for name in imported(module, tree):
            parts = name.split(".")
            if parts[0] != "mirl_dist":
                continue
            path = "/".join(parts[1:])
            parent = "/".join(parts[1:-1])
            target = next(
                (m for m in (path, f"{path}/__init__", parent, f"{parent}/__init__") if m.lstrip("/") in modules),
                "__init__",
            )
            found[module].add(target.lstrip("/"))
    return found


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    done: set[str] = set()

    def walk(module: str, above: list[str]) -> list[str]:
        if module in above:
            return above[above.index(module) :] + [module]
        if module not in done:
            done.add(module)
            for other in sorted(graph.get(module, ())):
                found = walk(other, [*above, module])
                if found:
                    return found
        return []

    for module in sorted(graph):
        found = walk(module, [])
        if found:
            return found
    return []


def dotted(node: ast.expr) -> str:
    """'torch.distributed' for the expression of that name, else ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def safe_loaders(tree: ast.Module) -> set[str]:
    """Names of YAML loaders that build plain values only: SafeLoader and this module's children of it."""
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(dotted(base) in safe for base in node.bases):
            safe.add(node.name)
    return safe


def dangers(tree: ast.Module) -> Iterator[str]:
    """Everything in a module that could run code from a file."""
    allowed = {id(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and dotted(n) in HARMLESS}
    inside_allowed = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and id(n) in allowed}
    safe = safe_loaders(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUNS_CODE:
            yield f"from {node.module} import"
        if isinstance(node, ast.Import):
            yield from (f"import {a.name} as {a.asname}" for a in node.names if a.name in RUNS_CODE and a.asname)
        if isinstance(node, ast.Name) and node.id in RUNS_CODE and id(node) not in inside_allowed:
            yield f"use of {node.id}"
        if isinstance(node, ast.Call):
            yield from _danger_of_call(node, safe)


def _danger_of_call(node: ast.Call, safe: set[str]) -> Iterator[str]:
    name = dotted(node.func)
    given = {k.arg: k.value for k in node.keywords}

    def says(key: str, value: bool) -> bool:
        found = given.get(key)
        return isinstance(found, ast.Constant) and found.value is value

    if name in ("eval", "exec", "__import__", "compile"):
        yield name
    if name in ("yaml.load", "yaml.load_all"):
        loader = given.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
        if loader is None or dotted(loader) not in safe:
            yield f"{name} without a SafeLoader"
    if name.startswith("yaml.") and name.endswith(("full_load", "unsafe_load", "full_load_all", "unsafe_load_all")):
        yield name
    if name == "torch.load" and not says("weights_only", True):
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and not says("allow_pickle", False):
        yield f"{name} without allow_pickle=False"
    if says("allow_pickle", True):
        yield f"{name} with allow_pickle=True"


def complaints(package: Path, floors: Mapping[str, tuple[str, ...]] = FLOORS) -> list[str]:
    """Every law that the modules of a package break."""
    modules = trees(package)
    graph = edges(modules)
    level = {module: at for at, names in enumerate(floors.values()) for module in names}
    title = list(floors)
    found = [f"{m}: on no floor; give it a place in FLOORS" for m in modules if m not in level]
    found += [f"{m}: has a floor, but does not exist" for m in level if m not in modules]
    for module, others in graph.items():
        for other in sorted(others):
            here, there = level.get(module), level.get(other)
            if here is not None and there is not None and there > here:
                found.append(f"{module} ({title[here]}) imports {other} ({title[there]}), which is above it")
    ring = cycle(graph)
    if ring:
        found.append(f"modules import each other: {' -> '.join(ring)}")
    for module, tree in modules.items():
        used = set(imported(module, tree)) | {dotted(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        for thing, allowed in DOORS.items():
            if module not in allowed and any(f"{name}.".startswith(f"{thing}.") for name in used):
                found.append(f"{module} uses {thing}; only {', '.join(allowed)} may")
        found += [f"{module}: {danger}" for danger in dangers(tree)]
    return found


def test_every_module_keeps_its_floor_its_doors_and_runs_no_code_from_files() -> None:
    assert complaints(PACKAGE) == []


def test_no_module_stands_on_two_floors() -> None:
    named = [module for names in FLOORS.values() for module in names]
    assert len(named) == len(set(named))


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A package of three floors that keeps all laws, to be spoilt."""
    package = tmp_path / "mirl_dist"
    (package / "data").mkdir(parents=True)
    for name in ("__init__", "data/__init__"):
        (package / f"{name}.py").write_text("")
    (package / "low.py").write_text("import json\n")
    (package / "data/middle.py").write_text("from mirl_dist.low import x\nfrom mirl_dist import low\n")
    (package / "ranks.py").write_text("import torch.distributed\nfrom mirl_dist.data import middle\n")
    return package


SMALL = {"low": ("__init__", "data/__init__", "low"), "middle": ("data/middle",), "high": ("ranks",)}


@pytest.mark.parametrize(
    ("module", "text", "said"),
    [
        ("low", "from mirl_dist.distributed.ranks import Ranks\n", "low (low) imports ranks (high), which is above it"),
        ("low", "from mirl_dist import ranks\n", "low (low) imports ranks (high), which is above it"),
        ("low", "def f():\n    import mirl_dist.data.middle\n", "low (low) imports data/middle (middle)"),
        ("low", "from .data.middle import x\n", "low (low) imports data/middle (middle)"),
        ("data/middle", "from ..ranks import x\n", "data/middle (middle) imports ranks (high)"),
        ("data/middle", "from .. import ranks\n", "data/middle (middle) imports ranks (high)"),
        ("__init__", "def f():\n    from mirl_dist import low\n", ""),
        ("stranger", "x = 1\n", "stranger: on no floor; give it a place in FLOORS"),
        (
            "data/middle",
            "def f():\n    import mlflow\n",
            "data/middle uses mlflow; only mlflow_reader, mlflow_store may",
        ),
        ("data/middle", "from mlflow.tracking import MlflowClient\n", "data/middle uses mlflow"),
        ("data/middle", "from torch import distributed\n", "data/middle uses torch.distributed; only agent, "),
        ("data/middle", "import torch\ntorch.distributed.barrier()\n", "data/middle uses torch.distributed"),
        ("data/middle", "import webdataset as w\n", "only data/build may"),
        ("data/middle", "from accelerate import Accelerator\n", "data/middle uses accelerate"),
        ("low", "from botocore import config\n", "low uses botocore; only storage/s3, storage/s3_wire may"),
        ("low", "import boto3\n", "low uses boto3; only storage/s3 may"),
        ("low", "import pickle\npickle.loads(b'')\n", "low: use of pickle"),
        ("low", "from pickle import loads\n", "low: from pickle import"),
        ("low", "import pickle as p\n", "low: import pickle as p"),
        ("low", "import pickle\ntry: ...\nexcept pickle.UnpicklingError: ...\n", ""),
        ("low", "import yaml\nyaml.load('', Loader=yaml.Loader)\n", "low: yaml.load without a SafeLoader"),
        ("low", "import yaml\nyaml.load('')\n", "low: yaml.load without a SafeLoader"),
        ("low", "import yaml\nclass L(yaml.SafeLoader): ...\nyaml.load('', Loader=L)\n", ""),
        ("low", "import yaml\nclass L(yaml.Loader): ...\nyaml.load('', Loader=L)\n", "without a SafeLoader"),
        ("low", "import torch\ntorch.load('x')\n", "low: torch.load without weights_only=True"),
        ("low", "import torch\ntorch.load('x', weights_only=False)\n", "torch.load without weights_only=True"),
        ("low", "import torch\ntorch.load('x', weights_only=True)\n", ""),
        ("low", "import numpy as np\nnp.load('x', allow_pickle=True)\n", "np.load without allow_pickle=False"),
        ("low", "eval('1')\n", "low: eval"),
    ],
)
def test_the_check_finds_what_is_wrong(bad: Path, module: str, text: str, said: str) -> None:
    assert complaints(bad, SMALL) == []
    (bad / f"{module}.py").write_text(text)
    found = complaints(bad, SMALL)
    if said:
        assert any(said in complaint for complaint in found), found
    else:
        assert found == []


def test_a_ring_of_imports_on_one_floor_is_found_even_inside_functions(bad: Path) -> None:
    floors = {**SMALL, "low": (*SMALL["low"], "other")}
    (bad / "other.py").write_text("from mirl_dist import low\n")
    assert complaints(bad, floors) == []
    (bad / "low.py").write_text("def late():\n    from mirl_dist.other import x\n")
    assert complaints(bad, floors) == ["modules import each other: low -> other -> low"]


def test_a_module_that_vanished_leaves_no_entry_behind(bad: Path) -> None:
    (bad / "low.py").unlink()
    assert "low: has a floor, but does not exist" in complaints(bad, SMALL)


@pytest.mark.parametrize("module", ["mirl_dist.cli", "mirl_dist.config", "mirl_dist.data.building.recipe"])
def test_the_front_door_opens_without_the_heavy_libraries(module: str) -> None:
    heavy = ("torch", "mlflow", "accelerate", "webdataset", "skimage", "matplotlib", "boto3", "deepspeed")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def ruff(root: Path) -> list[str]:
    """'file:thing' of every banned import that ruff finds below `root`, which holds our pyproject.toml."""
    program = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("ruff is not installed: pip install -e '.[dev]'")
    options = ["--config", "pyproject.toml", "--select", "TID251", "--no-cache", "--output-format", "concise"]
    ran = subprocess.run([program, "check", *options, "."], cwd=root, capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 1), ran.stderr
    return sorted(f"{line.split(':')[0]}:{line.split('`')[1]}" for line in ran.stdout.splitlines() if "TID251" in line)


def test_ruff_refuses_what_belongs_behind_a_door_and_lets_the_doors_have_it(tmp_path: Path) -> None:
    for folder in {Path(door).parent for doors in DOORS.values() for door in doors}:
        (tmp_path / "mirl_dist" / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for thing in DOORS:
        for door in DOORS[thing]:
            with (tmp_path / f"mirl_dist/{door}.py").open("a") as file:
                file.write(f"import {thing}\n")
    assert ruff(tmp_path) == [], "each door may import its own"
    train = (PACKAGE / "train.py").read_text()
    (tmp_path / "mirl_dist/training/loop.py").write_text(train)
    assert ruff(tmp_path) == []
    (tmp_path / "mirl_dist/training/loop.py").write_text(train + "\n\ndef late() -> None:\n    import mlflow\n")
    assert ruff(tmp_path) == ["mirl_dist/training/loop.py:mlflow"], "inside a function too"
    (tmp_path / "mirl_dist/training/loop.py").write_text("".join(f"import {thing}\n" for thing in DOORS))
    assert ruff(tmp_path) == sorted(f"mirl_dist/training/loop.py:{thing}" for thing in DOORS)
