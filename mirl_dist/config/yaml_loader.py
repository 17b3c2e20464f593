"""Loads YAML files and `--set a.b=c` into a typed pydantic tree; all faults are collected into one error."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mirl_dist.errors import UserError


class Node(BaseModel):
    """A frozen section of a config tree. Unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=False)

    def inconsistencies(self) -> list[str]:
        """Return messages about contradicting keys; each names the keys and the remedy."""
        return []


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
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' appears twice here", key.start_mark
                )
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
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}. Give a readable YAML file.") from None
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


def check_kind(tree: Mapping[str, Any], meant: str, source: str) -> None:
    """Raise UserError if the tree is a file of another known kind. meant: the expected kind, a key of _KINDS."""
    if any(key in tree for key in _KINDS[meant].keys):
        return
    for name, kind in _KINDS.items():
        if any(key in tree for key in kind.keys):
            raise UserError(f"{source} is {name}, not {meant}; {_KINDS[meant].folder} has those.")


class _Kind(NamedTuple):
    keys: tuple[str, ...]
    folder: str


_KINDS = {
    "the config of a run": _Kind(("model", "prune", "batch", "run"), "configs/"),
    "a launch file": _Kind(("num_processes", "distributed_type"), "launch/"),
    "a sweep": _Kind(("methods", "seeds"), "configs/sweeps/"),
}


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


def _node_type(annotation: Any) -> type[BaseModel] | None:
    """Return the first model class inside an annotation, searching Optional, list and dict; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        node = _node_type(inner)
        if node is not None:
            return node
    return None


def _keys_at(cls: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Return the keys allowed at a location of the tree."""
    here: type[BaseModel] | None = cls
    for part in loc:
        if isinstance(part, int) or here is None:
            continue
        fields = {(f.alias or name): f for name, f in here.model_fields.items()}
        here = _node_type(fields[part].annotation) if part in fields else None
    return sorted((f.alias or name) for name, f in here.model_fields.items()) if here else []


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
        known = _keys_at(cls, loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        offer = f"the nearest key is '{near[0]}'" if near else f"known here: {', '.join(known)}"
        return f"{key}: found an unknown key (value {value!r}); {offer}"
    if kind == "missing":
        return f"{key}: missing; give it a value"
    if kind == "tuple_type":
        return f"{key}: found {value!r}; write a list, as [0, 1]"
    if kind in ("dict_type", "model_type") and value is None:
        return f"{key}: found nothing; write {{}} for none"
    return f"{key}: found {value!r}; {message[0].lower()}{message[1:]}{_suggest_word(kind, message, value)}"


def _suggest_word(kind: str, message: str, value: Any) -> str:
    """Return a suggestion of the allowed word closest to the value, or ''."""
    if kind != "literal_error" or not isinstance(value, str):
        return ""
    words = {word.lower(): word for word in re.findall(r"'([^']+)'", message)}
    near = difflib.get_close_matches(value.lower(), words, n=1)
    return f" (the nearest is {words[near[0]]!r})" if near else ""


def _contains(part: Any, here: Any) -> bool:
    return part in here if isinstance(here, Mapping) else isinstance(here, list) and part in range(len(here))


def _existing_part(tree: Any, loc: Sequence[str | int], kind: str) -> _Location:
    """Return the part of an error location that exists in the tree; pydantic also inserts names of union branches."""
    here, keys = tree, []
    for part in loc:
        if _contains(part, here):
            here = here[part]
            keys.append(part)
    return (*keys, loc[-1]) if kind == "missing" else tuple(keys)


def _remove(tree: Any, loc: _Location) -> None:
    """Remove the value at loc from the innermost mapping on its path; a faulty list is thus removed as a whole."""
    here, holder, key = tree, {}, None
    for part in loc:
        if isinstance(here, dict):
            holder, key = here, part
        if not _contains(part, here):
            break
        here = here[part]
    holder.pop(key, None)


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
        rest = yaml.safe_load(yaml.safe_dump(tree))
        errors = [(_existing_part(tree, e["loc"], e["type"]), e) for e in error.errors(include_url=False)]
        complaints = _describe_errors(cls, errors)
        failed = [".".join(part for part in loc if isinstance(part, str)) for loc, _ in errors]
        for loc, _ in errors:
            _remove(rest, loc)
        try:  # with faulty keys at their defaults, check the remaining keys for inconsistencies
            checked = cls.model_validate(rest)
        except ValidationError:
            checked = None
    if checked is not None:
        complaints += [text for text in checked.inconsistencies() if not any(_mentions(text, key) for key in failed)]
    if complaints or checked is None:
        count = f"{len(complaints)} faults" if len(complaints) > 1 else "a fault"
        raise UserError(f"{count} in {source}:\n" + "\n".join(f"  {c}" for c in complaints))
    return checked


def read(cls: type[Tree], path: Path, sets: Sequence[str], example: str, kind: str | None = None) -> Tree:
    """Read a config from three sources in this order: defaults, the file, `--set` assignments.

    example: as for `load_file`. kind: as for `check_kind`; None skips that check."""
    tree = load_file(path, example)
    if kind is not None:
        check_kind(tree, kind, str(path))
    for assignment in sets:
        apply_set(tree, assignment)
    return build(cls, tree, str(path))
