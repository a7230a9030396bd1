"""Which settings are read: a configuration that notes the first use of each of its keys, and costs nothing afterwards.

A watched record is of its own class, a subclass of the record's that is made for its key. Each setting is noted by a
descriptor that takes itself away when Grove's code reads it; from then on the record's own slot answers. Notes are
lines of a file, so that those of other processes, to which the records are sent, come together.

Not a use: what copies, compares, prints or writes a whole record, and the rules of conf/check_*.py.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from enum import Enum, auto
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

from conf import schema
from conf.keys import ENTRY, entry_kind, field_kinds, is_record
from conf.schema import Config

FOLDER_VARIABLE = "GROVE_CONFIG_READS"
"""Environment variable with a folder: whatever is composed is watched, and all processes note their reads there."""
NOTES = "keys.txt"
"""File of a folder of notes: the key of one read setting in each line."""

NAMES = ("run.name", "task.name", "credit.name")
"""Settings for people: they name folders and pages."""
OF_OTHERS = ("launch.", "sweep.", "run.max_restarts")
"""Settings of what starts runs and watches over them."""
WHEN_IT_GOES_WRONG = ("rollout.max_worker_restarts", "rewards.max_failed_share", "select.max_refills")
"""Settings that are read when a worker dies, a score fails, or nothing is left of a prompt."""
WHEN_A_MODEL_IS_LOST = ("max_retries", "breaker_failures", "breaker_rest_s")
"""The same of an entry of rewards.models."""

FLOORS = Path(__file__).resolve().parents[1]
CODE = ("conf", "rollout", "rewards", "rl")
"""Folders of the code whose reads are uses."""
RULES = ("conf/check_", "conf/problem.py")
TEMPLATES = ("/jinja2/", "<template>")
"""Code that looks at settings for others: its reads are uses where a part of a run calls it, not where a check does."""
LOOKS_ON = ("conf/checks.py", "conf/compose.py", "conf/keys.py", "conf/reads.py", "rl/dry_run/")
"""Code that goes over settings and uses none."""

Record = TypeVar("Record")


class _Reader(Enum):
    """Who reads."""

    user = auto()
    asked = auto()
    """Somebody else wants to know, whoever calls it."""
    other = auto()


def watched(cfg: Record, folder: Path, key: str = "") -> Record:
    """The same settings, whose uses are noted in a folder that is there.

    Args:
        cfg: a record of conf/schema.py, watched already or not.
        key: the dotted key of the record; "" for the whole configuration.
    """
    return _watched(plain(cfg), str(folder), key)


def watched_if_asked(cfg: Config) -> Config:
    """Watched where the environment names a folder (`FOLDER_VARIABLE`), else as it is."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    return watched(cfg, Path(folder)) if folder else cfg


def plain(value: Record) -> Record:
    """The same settings in the records of conf/schema.py themselves, at every depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = getattr(type(value), "_record", type(value))
        values = {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
        return cast(Record, made(**values))
    if isinstance(value, dict):
        return cast(Record, {name: plain(item) for name, item in value.items()})
    return value


def note_records(folder: Path) -> None:
    """Note the first use of each field of each record in this process too, as "Record:field", whoever made the record.

    For a session of tests, most of which make their records themselves.
    """
    for record in vars(schema).values():
        if isinstance(record, type) and is_record(record):
            for name, kind in field_kinds(record).items():
                if not is_record(kind) and not is_record(entry_kind(kind)):
                    noted = _Noted(vars(record)[name], str(folder), f"{record.__name__}:{name}", name, record)
                    setattr(record, name, noted)


def record_field(pattern: str) -> str:
    """A key of `conf.keys.all_keys` as `note_records` notes it."""
    *path, name = pattern.split(".")
    kind: Any = Config
    for part in path:
        kind = field_kinds(kind)[part] if is_record(kind) else entry_kind(kind)
    return f"{kind.__name__}:{name}"


def read_keys(folder: Path) -> set[str]:
    """Keys of the settings that were read, with the names that the user chose."""
    file = folder / NOTES
    return set(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else set()


def changed(cfg: Config) -> dict[str, Any]:
    """Settings that differ from their default, by key; an entry's are compared with those of an empty entry."""
    return {
        key: value
        for key, value, default in _leaves(plain(cfg), Config(), "")
        # The default is made of other settings, so it differs as soon as it is resolved.
        if value != default and not (isinstance(default, str) and "${" in default)
    }


def unread(cfg: Config, read: Collection[str], exempt: Iterable[str] = ()) -> dict[str, Any]:
    """Settings that differ from their default and that nothing read, by key.

    Args:
        read: keys as `read_keys` gives them.
        exempt: keys that are not to be expected, or beginnings of keys, which end in ".".
    """
    not_expected = tuple(exempt)
    return {
        key: value
        for key, value in changed(cfg).items()
        if key not in read and not any(_falls_under(key, each) for each in not_expected)
    }


def _falls_under(key: str, exempt: str) -> bool:
    return key == exempt or (exempt.endswith(".") and key.startswith(exempt))


def excused(cfg: Config) -> list[str]:
    """Keys, and beginnings of keys, that are no mistake although a run reads none of them: names for people, what other
    commands read, what is read when something goes wrong, and what is said of a source that is only recorded."""
    cfg = plain(cfg)
    recorded = [name for name, source in cfg.rewards.sources.items() if source.weight == 0]
    found = [*NAMES, *OF_OTHERS, *WHEN_IT_GOES_WRONG, *(f"rewards.sources.{name}.signal" for name in recorded)]
    found += [f"rewards.models.{name}.{field}" for name in cfg.rewards.models for field in WHEN_A_MODEL_IS_LOST]
    return found + (["rollout.min_batch_share"] if cfg.rollout.batch_timeout_s else [])


def pattern_of(key: str) -> str:
    """The key as `conf.keys.all_keys` has it: `<name>` for each name that the user chose."""
    parts, kind = [], Config
    for part in key.split("."):
        if is_record(kind):
            kind = field_kinds(kind)[part]
            parts.append(part)
        else:
            kind = entry_kind(kind)
            parts.append(ENTRY)
    return ".".join(parts)


def _leaves(record: Any, default: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, default) of every setting of a record and of those in it."""
    for name, kind in field_kinds(type(record)).items():
        key, value, usual = f"{prefix}{name}", getattr(record, name), getattr(default, name)
        if is_record(kind):
            yield from _leaves(value, usual, f"{key}.")
        elif is_record(entry_kind(kind)):
            for entry_name, entry in value.items():
                yield from _leaves(entry, type(entry)(), f"{key}.{entry_name}.")
        else:
            yield key, value, usual


def _watched(value: Any, folder: str, key: str) -> Any:
    if is_record(type(value)):
        made = _watched_class(type(value), folder, key)
        values = {name: getattr(value, name) for name in field_kinds(type(value))}
        return made(**{name: _watched(each, folder, f"{key}.{name}" if key else name) for name, each in values.items()})
    if isinstance(value, dict):
        return {name: _watched(each, folder, f"{key}.{name}") for name, each in value.items()}
    return value


@cache
def _watched_class(record: type, folder: str, key: str) -> type:
    names: dict[str, Any] = {
        name: _Noted(vars(record)[name], folder, f"{key}.{name}" if key else name, name)
        for name, kind in field_kinds(record).items()
        if not is_record(kind) and not is_record(entry_kind(kind))
    }

    def equals(self: Any, other: object) -> bool:
        return bool(plain(self) == plain(other))

    def reduced(self: Any, _: object) -> tuple[Any, ...]:
        return watched, (plain(self), Path(folder), key)

    own = {"__slots__": (), "__eq__": equals, "__hash__": None, "__reduce_ex__": reduced, "_record": record}
    named = {"__module__": record.__module__, "__qualname__": record.__qualname__}
    return type(record.__name__, (record,), names | own | named)


class _Noted:
    """One setting that no part of a run has read in this process."""

    def __init__(self, slot: Any, folder: str, key: str, name: str, record: type | None = None) -> None:
        """Of the class it is put on; `record` where that is one of conf/schema.py, which gets its slot back."""
        self._slot, self._folder, self._key, self._name, self._record = slot, folder, key, name, record

    def __get__(self, record: Any, owner: type) -> Any:
        if record is None:
            return self
        if _is_use(sys._getframe(1)):
            self._take_away(owner)
            _note(self._folder, self._key)
        return self._slot.__get__(record, owner)

    def _take_away(self, owner: type) -> None:
        if self._record is not None:
            setattr(self._record, self._name, self._slot)
            return
        with suppress(AttributeError):  # another thread was first
            delattr(owner, self._name)

    def __set__(self, record: Any, value: Any) -> None:
        self._slot.__set__(record, value)


def _note(folder: str, key: str) -> None:
    for place in {folder, os.environ.get(FOLDER_VARIABLE, folder)}:
        # Gone when the run is over; on another machine it never was.
        with suppress(OSError), (Path(place) / NOTES).open("a", encoding="utf-8") as file:
            file.write(f"{key}\n")


def _is_use(frame: FrameType | None) -> bool:
    while frame is not None:
        reader = _reader(frame.f_code.co_filename)
        if reader is not _Reader.asked:
            return reader is _Reader.user
        frame = frame.f_back
    return False


@cache
def _reader(file: str) -> _Reader:
    if any(part in file for part in TEMPLATES):
        return _Reader.asked
    try:
        inside = Path(file).resolve().relative_to(FLOORS).as_posix()
    except ValueError:
        return _Reader.other
    if inside.partition("/")[0] not in CODE or inside.startswith(LOOKS_ON):
        return _Reader.other
    return _Reader.asked if inside.startswith(RULES) else _Reader.user
