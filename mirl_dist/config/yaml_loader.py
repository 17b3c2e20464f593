"""Loads YAML files and `--set a.b=c` into a typed pydantic tree; all faults are collected into one error."""

from __future__ import annotations

import contextlib
import copy
import difflib
import re
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from mirl_dist.errors import UserError


class Node(BaseModel):
    """A frozen section of a config tree. Unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=False)

    def inconsistencies(self) -> Iterable[str]:
        """Return messages about contradicting keys; each names the keys and the remedy."""
        return ()


Tree = TypeVar("Tree", bound=Node)
CREDENTIALS = re.compile(r"(?<=://)\S*@|(?<=\w)\?\S*=\S*")  # parts of URLs to mask in messages


class _OneValuePerKey(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys; plain YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a list or mapping as a key: rejected by the base class
            if key.value in seen:
                text = f"the key '{key.value}' appears twice here"
                raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_OneValuePerKey)  # safe: a SafeLoader, which builds plain values only
    except ValueError as error:  # an invalid date or number
        raise UserError(f"{source} is not valid YAML: {error}. Put that value in quotes, or correct it.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{source} is not valid YAML{place}: {problem}. Correct that place.") from None


def load_file(path: Path, example: str = "configs/demo.yaml") -> dict[str, Any]:
    """Return the mapping in a YAML file. Raise UserError for a missing, unreadable or malformed file.

    example: file that messages suggest as a starting point."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no file at {path}. {_list_yaml_files(path.parent)}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, where a file is needed. {_list_yaml_files(path)}") from None
    except UnicodeDecodeError as error:
        wide = path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff")
        what = "its text is UTF-16" if wide else f"it is no UTF-8 text (byte {error.start})"
        raise UserError(f"cannot read {path}: {what}. Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. Give a readable YAML file.") from None
    tree = _parse(text, str(path))
    if tree is None:
        raise UserError(f"{path} is empty. Start from {example}.")
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else "one value"
        raise UserError(f"{path} holds {kind}, not keys with values. Start from {example}.")
    return tree


def _list_yaml_files(folder: Path) -> str:
    names = sorted(str(p) for p in folder.glob("*.yaml"))[:6] if folder.is_dir() else []
    return f"There are: {', '.join(names)}." if names else "Give the path of a YAML file."


_KINDS = {
    "the config of a run": ("configs/", {"model", "prune", "batch", "run"}),
    "a launch file": ("launch/", {"num_processes", "distributed_type"}),
    "a sweep": ("configs/sweeps/", {"methods", "seeds"}),
}
"""Kind of file -> its folder, and the keys by which it is recognised."""


def check_kind(tree: Mapping[str, Any], meant: str, source: str) -> None:
    """Raise UserError if the tree is a file of another known kind. meant: the expected kind, a key of _KINDS."""
    kinds = [kind for kind, (_, keys) in _KINDS.items() if keys & tree.keys()]
    if kinds and meant not in kinds:
        raise UserError(f"{source} is {kinds[0]}, not {meant}; {_KINDS[meant][0]} has those.")


def apply_set(tree: dict[str, Any], assignment: str) -> None:
    """Apply one assignment `a.b=c` to the tree; the value is parsed as YAML (`[1, 2]`, `null`, `0.2`, text)."""
    key, equals, value = assignment.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"--set '{assignment}' is not of the form key=value. Write for example prune.fraction=0.2.")
    here = tree
    for part in path[:-1]:
        inner = here.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {key}: '{part}' holds {inner!r}, which has no keys below it. Shorten the key.")
        here = inner
    here[path[-1]] = _parse(value, f"--set {key}")


def _fields_of(annotation: Any) -> dict[str, FieldInfo]:
    """Return the fields, by key, of the first model inside an annotation (Optional, list, dict); {} without a model."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {field.alias or name: field for name, field in annotation.model_fields.items()}
    return next(filter(None, map(_fields_of, typing.get_args(annotation))), {})


def known_keys(cls: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Return the keys allowed at a location of the tree; [] where there is no section."""
    fields = _fields_of(cls)
    for part in loc:
        if isinstance(part, str):
            fields = _fields_of(fields[part].annotation) if part in fields else {}
    return sorted(fields)


_Location = tuple[str | int, ...]


def _describe_errors(cls: type[BaseModel], errors: Sequence[tuple[_Location, Any]]) -> list[str]:
    """Return one message per location. Errors of several union branches for one value are joined.

    A branch that rejects the value's type is omitted if another branch accepted it and found an error inside.
    """
    complaints: dict[_Location, str] = {}
    for loc, error in errors:
        inside = any(len(other) > len(loc) and other[: len(loc)] == loc for other, _ in errors)
        if inside and (error["type"].endswith("_type") or error["type"] == "too_short"):
            continue  # too_short only follows from the invalid items inside
        word_allowed = any(other == loc and e["type"] == "literal_error" for other, e in errors)
        if word_allowed and error["type"].startswith("bool") and isinstance(error["input"], str):
            continue  # a string was given, so the literal error is the relevant one
        text = _describe_error(cls, loc, error["type"], error["msg"], error["input"])
        first, other = complaints.get(loc, text), text.rpartition("; ")[2]
        complaints[loc] = first if other in first else f"{first}, or {other}"
    return list(complaints.values())


def _describe_error(cls: type[BaseModel], loc: _Location, kind: str, message: str, value: Any) -> str:
    key = ".".join(str(part) for part in loc)
    value = CREDENTIALS.sub("***", value) if isinstance(value, str) else value
    if kind == "extra_forbidden":
        known = known_keys(cls, loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        offer = f"the nearest key is '{near[0]}'" if near else f"known here: {', '.join(known)}"
        return f"{key}: found an unknown key (value {value!r}); {offer}"
    if kind == "missing":
        return f"{key}: missing; give it a value"
    if kind == "tuple_type":
        return f"{key}: found {value!r}; write a list, as [0, 1]"
    if kind in ("dict_type", "model_type") and value is None:
        return f"{key}: found nothing; write {{}} for none"
    text = f"{key}: found {value!r}; {message[0].lower()}{message[1:]}"
    if kind == "literal_error" and isinstance(value, str):
        words = {word.lower(): word for word in re.findall(r"'([^']+)'", message)}
        near = difflib.get_close_matches(value.lower(), words, n=1)
        text += f" (the nearest is {words[near[0]]!r})" if near else ""
    return text


def _locate(tree: Any, loc: _Location, kind: str) -> tuple[_Location, dict[Any, Any], Any]:
    """Return the part of an error location that exists in the tree, and the innermost mapping on it with its key.

    pydantic also inserts names of union branches into locations. A missing key belongs to no mapping.
    """
    here, path, holder, key = tree, list[str | int](), dict[Any, Any](), None
    for part in loc:
        if isinstance(here, dict) and part in here:
            holder, key = here, part
        elif not isinstance(here, list) or part not in range(len(here)):
            continue
        here = here[part]
        path.append(part)
    if kind != "missing":
        return tuple(path), holder, key
    return (*path, loc[-1]), {} if isinstance(here, dict) else holder, key


def _mentions(inconsistency: str, key: str) -> bool:
    """Whether an inconsistency names a key or concerns a section that contains it."""
    section = inconsistency.partition(":")[0]
    return re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", inconsistency) is not None or key.startswith(f"{section}.")


def build(cls: type[Tree], tree: dict[str, Any], source: str) -> Tree:
    """Validate a raw tree. Raise UserError that lists all unknown keys, wrong values and inconsistencies."""
    complaints: list[str] = []
    failed: list[str] = []
    checked: Tree | None = None
    try:
        checked = cls.model_validate(tree)
    except ValidationError as error:
        rest = copy.deepcopy(tree)
        located = [(_locate(rest, e["loc"], e["type"]), e) for e in error.errors(include_url=False)]
        complaints = _describe_errors(cls, [(loc, e) for (loc, _, _), e in located])
        for (loc, holder, key), _ in located:
            failed.append(".".join(part for part in loc if isinstance(part, str)))
            holder.pop(key, None)  # a faulty list is removed as a whole
        with contextlib.suppress(ValidationError):  # faulty keys at their defaults: check the rest for inconsistencies
            checked = cls.model_validate(rest)
    if checked is not None:
        complaints += [text for text in checked.inconsistencies() if not any(_mentions(text, key) for key in failed)]
    raise_complaints(complaints, f"in {source}")
    assert checked is not None  # a tree that cannot be checked has complaints
    return checked


def raise_complaints(complaints: Sequence[str], where: str) -> None:
    """Raise UserError that lists the complaints, if there are any."""
    if complaints:
        count = f"{len(complaints)} faults" if len(complaints) > 1 else "a fault"
        raise UserError(f"{count} {where}:\n" + "\n".join(f"  {text}" for text in complaints))


def read(cls: type[Tree], path: Path, sets: Sequence[str], example: str, kind: str | None = None) -> Tree:
    """Read a config from three sources in this order: defaults, the file, `--set` assignments.

    example: as for `load_file`. kind: as for `check_kind`; None skips that check."""
    tree = load_file(path, example)
    if kind is not None:
        check_kind(tree, kind, str(path))
    for assignment in sets:
        apply_set(tree, assignment)
    return build(cls, tree, str(path))
