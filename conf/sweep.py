"""The members of a sweep: what varies, every combination of it, and a short telling name for each.

Lists (a,b), choice(), range(), glob(), interval() and tag() are Hydra's grammar, read by Hydra's parser.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep

from conf.compose import compose, parsed
from conf.errors import ConfigError
from conf.keys import entry_kind, field_kinds, group_choices, is_record, kind_of
from conf.schema import Config, SearchKind, SweepConfig

OWN = {
    "run.dir": "all members would share one folder: each has its own, in that of sweep.dir.",
    "run.resume": "the same command once more resumes what is not finished, without it.",
    "run.max_restarts": "a sweep starts members that failed again by itself: set sweep.max_retries.",
}
"""Settings that a sweep gives each member itself, and why."""
LOOSE = re.compile(r"[^A-Za-z0-9.+_-]+")
MAX_NAME = 100
"""Characters of a member's name; a folder's may have 255."""
MAX_MEMBERS = 10_000
LOG = "log"
"""The tag of an interval whose ratios count, not its differences: tag(log, interval(1e-5, 1e-3))."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Numbers between two bounds, for a search."""

    low: float
    high: float
    is_integer: bool
    is_log: bool


@dataclass(frozen=True, slots=True)
class Varied:
    """One setting that varies."""

    key: str
    """A group or a dotted key."""
    values: tuple[str, ...]
    """As they stand on a command line; empty for an interval."""
    interval: Interval | None = None
    is_group: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """One run of a sweep."""

    name: str
    """Of its folder: only what differs."""
    values: Mapping[str, str]
    """What varies, by key, in the order of the command line."""
    overrides: tuple[str, ...]
    """All settings, without those that say where it writes."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a command line asks for."""

    settings: SweepConfig
    run_name: str
    fixed: tuple[str, ...]
    """Settings that all members share."""
    varied: tuple[Varied, ...]
    config_dir: str = ""

    @property
    def folder(self) -> str:
        """Where the sweep lies."""
        if self.settings.dir:
            return self.settings.dir
        labels = _labels([each.key for each in self.varied])
        return "/".join(("runs", "sweeps", _short("-".join([self.run_name, *labels.values()]))))

    def members(self) -> list[Member]:
        """Every combination, in the order in which nested loops would come to them."""
        keys = [each.key for each in self.varied]
        combinations = itertools.product(*(each.values for each in self.varied))
        return self.named([dict(zip(keys, values, strict=True)) for values in combinations])

    def named(self, combinations: Iterable[Mapping[str, str]]) -> list[Member]:
        """Members of given values; keys that a combination lacks are not set for it. Equal ones become one."""
        unique = {tuple(values.items()): values for values in combinations}
        groups = {each.key for each in self.varied if each.is_group}
        labels = _labels([each.key for each in self.varied])
        names = [_name(values, labels, groups) for values in unique.values()]
        twice = {name for name, count in Counter(names).items() if count > 1}
        made = []
        for name, values in zip(names, unique.values(), strict=True):
            overrides = (*self.fixed, *(f"{key}={value}" for key, value in values.items()))
            name = f"{name}-{_digest(repr(values))}" if name in twice else name
            made.append(Member(name, values, overrides))
        return made


def read_sweep(words: list[str], config_dir: str = "") -> Sweep:
    """What `grove train -m` was asked for.

    Args:
        words: settings, of which some name several values.
        config_dir: a folder of the user's own groups and experiments.
    Raises: ConfigError when nothing varies, a setting cannot vary, or an interval has no search to draw from it.
    """
    overrides = parsed(words)
    own = [each.input_line or "" for each in overrides if _is_of_sweep(each) and not each.is_sweep_override()]
    base = compose(own, config_dir)
    groups = group_choices(config_dir)
    presets = parsed([f"{key}={values}" for key, values in base.sweep.vary.items()])
    given = {each.key_or_group for each in overrides}
    varied: list[Varied] = []
    fixed: list[str] = []
    for each in [*(preset for preset in presets if preset.key_or_group not in given), *overrides]:
        key = each.key_or_group
        if key in OWN:
            raise ConfigError(f'"{each.input_line}" is not for a sweep: {OWN[key]}')
        if not each.is_sweep_override():
            if not key.startswith("sweep.") and key != "sweep":
                fixed.append(each.input_line or "")
        elif key == "run.name" or key == "sweep" or key.startswith("sweep."):
            raise ConfigError(f'"{each.input_line}" lists several values, but a sweep has one {key}.')
        else:
            varied.append(_varied(each, groups))
    sweep = Sweep(base.sweep, base.run.name, tuple(fixed), tuple(varied), config_dir)
    _check(sweep)
    return sweep


def _is_of_sweep(override: Override) -> bool:
    key = override.key_or_group
    return key in ("experiment", "sweep") or key.startswith(("sweep.", "run."))


def _varied(override: Override, groups: Mapping[str, list[str]]) -> Varied:
    key, value = override.key_or_group, cast(Any, override._value)
    is_group = key in groups
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None, "Hydra's grammar wants both bounds"
        return Varied(key, (), Interval(float(value.start), float(value.end), kind_of(key) is int, LOG in value.tags))
    if getattr(value, "shuffle", False):
        raise ConfigError(
            f'"{override.input_line}" would shuffle anew each time, and a sweep that is resumed must find its members '
            f"again. Leave shuffle() out."
        )
    if isinstance(value, Glob):
        values = value.filter(groups.get(key, []))
    elif isinstance(value, RangeSweep):
        values = _range(override, value)
    else:
        values = list(override.sweep_string_iterator())
    if not values:
        known = f" There are {', '.join(groups[key])}." if is_group else " Give at least one value."
        raise ConfigError(f'"{override.input_line}" stands for no value at all: nothing would be trained.{known}')
    return Varied(key, tuple(dict.fromkeys(values)), is_group=is_group)


def _range(override: Override, value: RangeSweep) -> list[str]:
    """start, start + step, ... below stop, as one writes them: Hydra's own sum of binary fractions drifts past stop."""
    start, stop, step = (Decimal(str(each)) for each in (value.start, value.stop, value.step))
    if step == 0:
        raise ConfigError(f'"{override.input_line}" never ends: the step of a range must not be 0.')
    size = max(0, math.ceil((stop - start) / step))
    return [str(start + place * step) for place in range(size)]


def _check(sweep: Sweep) -> None:
    if not sweep.varied:
        raise ConfigError(
            "nothing varies, and a sweep of one run is a run: give several values, e.g. seed=1,2,3, or a preset that "
            "does, e.g. sweep=seeds. To train once leave out -m."
        )
    keys = Counter(each.key for each in sweep.varied)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ConfigError(f"{twice[0]} varies twice: which of the two counts would be a guess. Name its values once.")
    intervals = [each.key for each in sweep.varied if each.interval is not None]
    if intervals and sweep.settings.search is SearchKind.grid:
        raise ConfigError(
            f"{intervals[0]} is an interval: a grid would need endless members. Use sweep=optuna to search it, or "
            f"name its values, e.g. {intervals[0]}=0.1,0.2."
        )
    for each in sweep.varied:
        if each.interval is not None and not each.interval.low < each.interval.high:
            raise ConfigError(f"{each.key} varies from {each.interval.low:g} to {each.interval.high:g}: nothing.")
        if each.interval is not None and each.interval.is_log and each.interval.low <= 0:
            raise ConfigError(f"{each.key} varies by ratios (log) from {each.interval.low:g}: it must begin above 0.")
        if each.key == "seed" and each.interval is not None:
            raise ConfigError("seed is no setting to search for: the best seed is luck. Name some, e.g. seed=0,1,2.")
    size = 1
    for each in sweep.varied:
        size *= max(1, len(each.values))
    if size > MAX_MEMBERS and sweep.settings.search is SearchKind.grid:
        raise ConfigError(f"{size:,} combinations are more than the {MAX_MEMBERS:,} that one sweep may have.")


# What a member lacks


def lacking_entry(cfg: Config, key: str) -> str:
    """The named part that a dotted key is about and that the configuration lacks, e.g. "credit.terms.fork"; "" if none.

    Such a key would make a new part of one setting, like a term that is nothing but a weight.
    """
    parts = key.split(".")
    value: Any = cfg
    kind: Any = Config
    for place, part in enumerate(parts[:-1]):
        if is_record(kind):
            if part not in field_kinds(kind):
                return ""
            kind, value = field_kinds(kind)[part], getattr(value, part)
        elif is_record(entry_kind(kind)):
            if part not in value:
                return ".".join(parts[: place + 1])
            kind, value = entry_kind(kind), value[part]
        else:
            return ""
    return ""


# Names


def _labels(keys: list[str]) -> dict[str, str]:
    """The shortest ends of dotted keys that tell them apart: learner.learning_rate is learning_rate."""
    labels = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-size:]) for size in range(1, len(parts) + 1)]
        others = [other for other in keys if other != key]
        labels[key] = next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))
    return labels


def _name(values: Mapping[str, str], labels: Mapping[str, str], groups: set[str]) -> str:
    """E.g. "portool-weight0.3-seed1": a choice of a group speaks for itself, a number follows its key's name."""
    parts = []
    for key, value in values.items():
        shown = LOOSE.sub("_", value).strip("_") or _digest(value)
        glue = "" if shown.lstrip("-")[:1].isdigit() else "_"
        parts.append(shown if key in groups else f"{labels[key]}{glue}{shown}")
    return _short("-".join(parts)) or "all"


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
