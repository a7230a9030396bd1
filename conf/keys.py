"""What can be configured: every key with its type, default and docstring, and every choice of a group.

Needs only the standard library, so that a shell completion answers at once.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from conf import schema

CONFIG_DIR = Path(__file__).resolve().parent
ENTRY = "<name>"
"""Stands for a name that the user chooses, as in rewards.sources.<name>.weight."""


@dataclass(frozen=True, slots=True)
class Key:
    """One setting."""

    name: str
    """Dotted, with `<name>` where the user chooses a name."""
    kind: Any
    """Its Python type."""
    default: str
    """As it would be written on the command line."""
    doc: str
    """The docstring that follows the field in conf/schema.py; "" when it has none."""


def is_record(kind: Any) -> bool:
    """True for a type with named fields of its own."""
    return dataclasses.is_dataclass(kind)


def entry_kind(kind: Any) -> Any | None:
    """Type of the entries of a dict-valued key, None for any other key."""
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None


@cache
def field_kinds(record: type) -> dict[str, Any]:
    """Type of each field of a record, by name."""
    return typing.get_type_hints(record)


def kind_of(key: str) -> Any | None:
    """Type of a dotted key, None when there is no such key. Names in dict-valued keys may be any."""
    kind: Any = schema.Config
    for part in key.split("."):
        if is_record(kind):
            kind = field_kinds(kind).get(part)
        else:
            kind = Any if kind is Any else entry_kind(kind)
        if kind is None:
            return None
    return kind


@cache
def all_keys() -> tuple[Key, ...]:
    """Every setting, in the order of the schema."""
    return tuple(_record_keys(schema.Config, ""))


def _record_keys(record: type, prefix: str) -> Iterable[Key]:
    docs = _field_docs().get(record.__name__, {})
    for field in dataclasses.fields(record):
        name, kind = f"{prefix}{field.name}", field_kinds(record)[field.name]
        if is_record(kind):
            yield from _record_keys(kind, f"{name}.")
        elif is_record(entry_kind(kind)):
            yield from _record_keys(typing.cast(type, entry_kind(kind)), f"{name}.{ENTRY}.")
        else:
            yield Key(name, kind, _default_text(field), docs.get(field.name, ""))


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        default = field.default
    if isinstance(default, Enum):
        return default.name
    if isinstance(default, bool):
        return str(default).lower()
    return str(default) if default != "" else '""'


@cache
def _field_docs() -> dict[str, dict[str, str]]:
    """record -> field -> the string that follows it in the source."""
    module = ast.parse(inspect.getsource(schema))
    return {node.name: _docs_in(node.body) for node in module.body if isinstance(node, ast.ClassDef)}


def _docs_in(body: list[ast.stmt]) -> dict[str, str]:
    docs = {}
    for field, after in itertools.pairwise(body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[field.target.id] = inspect.cleandoc(str(after.value.value))
    return docs


def type_name(kind: Any) -> str:
    """A type as `grove config --keys` shows it, e.g. "int" or "chains|random_expand|beam_forks"."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(enum_choices(kind))
    if kind is Any:
        return "any"
    return kind.__name__ if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) else str(kind)


def expected(kind: Any) -> str:
    """A type in words, to follow "expected"."""
    words: dict[Any, str] = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a text",
        list[int]: "a list of integers, e.g. [3,5]",
        list[float]: "a list of numbers, e.g. [0.9,0.95]",
        list[str]: "a list of texts, e.g. [a,b]",
    }
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(enum_choices(kind))}"
    if is_record(kind):
        return f"settings by name ({', '.join(field_kinds(kind))})"
    return "settings by name" if entry_kind(kind) is not None else words.get(kind, str(kind))


def enum_choices(kind: Any) -> list[str]:
    """Names of an Enum's members; empty for any other type."""
    return list(kind.__members__) if isinstance(kind, type) and issubclass(kind, Enum) else []


def group_choices(config_dir: str = "") -> dict[str, list[str]]:
    """group -> its choices: the YAML files in conf/ and in the user's own folder."""
    choices: dict[str, set[str]] = {}
    for root in filter(None, (CONFIG_DIR, config_dir and Path(config_dir))):
        for file in Path(root).glob("*/**/*.yaml"):
            group, *rest = file.relative_to(root).with_suffix("").parts
            choices.setdefault(group, set()).add("/".join(rest))
    return {group: sorted(names) for group, names in sorted(choices.items())}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the nearest known word, or the one that begins so, else ""."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1) or [each for each in words if word and each.startswith(word)]
    return f' Did you mean "{near[0]}"?' if near else ""


def nearest_keys(key: str) -> list[str]:
    """Known keys that an unknown one may have meant, best first, at most three.

    A key is near by its last word and as a whole, each for a half: "num_leaves" finds rollout.num_leaves, and
    "lerner.learning_rate" finds the learner's rather than the warm start's.
    """
    word = key.rpartition(".")[2]
    scored = []
    for name in _all_names():
        name = _with_names_of(key, name)
        score = (_likeness(word, name.rpartition(".")[2]) + _likeness(key, name)) / 2
        scored.append((score, name))
    best = max(score for score, _ in scored)
    near = [pair for pair in scored if pair[0] >= max(0.65, best - 0.05)]
    return [name for _, name in sorted(near, key=lambda pair: -pair[0])[:3]]


def _likeness(word: str, other: str) -> float:
    return difflib.SequenceMatcher(None, word, other).ratio()


@cache
def _all_names() -> tuple[str, ...]:
    """Every setting and every section that holds some."""
    names: dict[str, None] = {}
    for key in all_keys():
        parts = key.name.split(".")
        names |= {".".join(parts[:size]): None for size in range(1, len(parts) + 1)}
    return tuple(name for name in names if not name.endswith(ENTRY))


def _with_names_of(key: str, name: str) -> str:
    """`name` with the names that the user chose in `key` in the places of `<name>`."""
    mine, known = key.split("."), name.split(".")
    if len(mine) != len(known):
        return name
    return ".".join(own if part == ENTRY else part for own, part in zip(mine, known, strict=True))
