"""Every member of a sweep composed and checked before the first one starts, with all problems shown together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from conf.check_machine import num_cores, num_gpus
from conf.check_sweep import sweep_problems
from conf.checks import require_runnable
from conf.compose import compose, numbered
from conf.errors import ConfigError
from conf.keys import did_you_mean
from conf.schema import Config, Inapplicable, SearchKind
from conf.sweep import Interval, Member, Sweep, Varied, lacking_entry

UNWRITTEN = "grove-check"
"""Last part of a folder that no run has, so that a member's own begun folder is no problem."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Members that can run, and those that cannot."""

    members: list[Member]
    skipped: list[tuple[Member, str]] = field(default_factory=list)
    """With the reason."""
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """Setting that was left out -> the members, by name, that lacked its part."""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """Warning -> the members, by name, that it is about."""


def plan(sweep: Sweep) -> Plan:
    """The members of a grid, or for a search its corners, which stand for all that it may try.

    Raises: ConfigError that lists every member that cannot run, unless sweep.inapplicable lets them be left out.
    """
    check_sweep(sweep)
    if sweep.settings.search is SearchKind.optuna:
        found = _checked(sweep, sweep.named(corners(sweep.varied)), Inapplicable.refuse)
        return Plan([], warnings=found.warnings)
    return _checked(sweep, sweep.members(), sweep.settings.inapplicable)


def corners(varied: Iterable[Varied]) -> list[dict[str, str]]:
    """For each setting every choice, or both ends of its interval, with the first value of all others."""
    ends = {each.key: each.values or _ends(each.interval) for each in varied}
    first = {key: values[0] for key, values in ends.items()}
    return [{**first, key: value} for key, values in ends.items() for value in values]


def _ends(interval: Interval | None) -> tuple[str, ...]:
    assert interval is not None, "what varies has values or an interval"
    kind = int if interval.is_integer else float
    return str(kind(interval.low)), str(kind(interval.high))


def _checked(sweep: Sweep, members: list[Member], mode: Inapplicable) -> Plan:
    dropped: dict[str, list[str]] = {}
    lacking = {member.name: _lacking(sweep, member) for member in members}
    if mode is Inapplicable.drop:
        combinations = []
        for member in members:
            for key in lacking[member.name]:
                dropped.setdefault(key, []).append(member.name)
            gone = lacking[member.name]
            combinations.append({key: value for key, value in member.values.items() if key not in gone})
        members, lacking = sweep.named(combinations), {}
    good, bad = [], []
    warnings: dict[str, list[str]] = {}
    for member in members:
        reason = " ".join(lacking.get(member.name, {}).values()) or problem(sweep, member, warnings)
        if reason:
            bad.append((member, reason))
        else:
            good.append(member)
    if bad and (mode is Inapplicable.refuse or not good):
        is_search = sweep.settings.search is not SearchKind.grid
        raise ConfigError(refusal(bad, len(members), can_drop=any(lacking.values()), is_search=is_search))
    return Plan(good, bad, dropped, warnings)


def _lacking(sweep: Sweep, member: Member) -> dict[str, str]:
    """Key -> why it means nothing to a member: it is about a part, like a term, that the member's choices lack."""
    deep = {key: value for key, value in member.values.items() if "." in key}
    if not deep:
        return {}
    shallow = [f"{key}={value}" for key, value in member.values.items() if key not in deep]
    try:
        cfg = compose([*sweep.fixed, *shallow], sweep.config_dir)
    except ConfigError:
        return {}  # what is wrong without them is told by the check of the whole
    found = {}
    for key, value in deep.items():
        entry = lacking_entry(cfg, key)
        if entry:
            there = _entries(cfg, entry)
            hint = did_you_mean(entry.rpartition(".")[2], there)
            found[key] = (
                f"{key}={value} is about {entry}, which is not there (there {'is' if len(there) == 1 else 'are'} "
                f"{', '.join(there) or 'none'}): it would become a new one of this setting alone.{hint}"
            )
    return found


def _entries(cfg: Config, entry: str) -> list[str]:
    value = cfg
    for part in entry.split(".")[:-1]:
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    assert isinstance(value, Mapping), "an entry lies in a dict"
    return list(value)


def problem(sweep: Sweep, member: Member, warnings: dict[str, list[str]]) -> str:
    """Why a member cannot run; "" when it can. What it warns of is added to `warnings`."""

    def warn(text: str) -> None:
        warnings.setdefault(text, []).append(member.name)

    try:
        cfg = compose([*member.overrides, f"run.dir='{sweep.folder}/{UNWRITTEN}'"], sweep.config_dir)
        require_runnable(cfg, warn=warn)
    except ConfigError as error:
        return str(error)
    return ""


def refusal(bad: list[tuple[Member, str]], total: int, *, can_drop: bool, is_search: bool) -> str:
    """What is wrong with members, those with the same mistake together."""
    by_reason: dict[str, list[str]] = {}
    for member, reason in bad:
        by_reason.setdefault(reason, []).append(member.name)
    lines = [f"{len(bad)} of {total} members of this sweep cannot run, so none was started:"]
    for reason, names in by_reason.items():
        lines += [f"  {', '.join(names)}", *(f"    {line}" for line in reason.splitlines())]
    ways = ["Change what varies"]
    if is_search:
        return "\n".join([*lines, "These are the ends of what the search may try. Change what varies."])
    if can_drop:
        ways.append("use sweep.inapplicable=drop to leave out what a member lacks")
    if len(bad) < total:
        ways.append("use sweep.inapplicable=skip to train the others alone")
    lines.append(", or ".join(ways) + ".")
    return "\n".join(lines)


def check_sweep(sweep: Sweep) -> None:
    """What a sweep needs, members aside.

    Raises: ConfigError.
    """
    settings = sweep.settings
    if wrong := sweep_problems(settings):
        raise ConfigError(numbered([each.text for each in wrong]))
    folder = Path(sweep.folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"sweep.dir={folder} is a file; the sweep needs a folder of its own. Use another sweep.dir.")
    gpus = num_gpus()
    cfg = _first(sweep)
    if cfg is not None and not cfg.cluster.address and 0 < gpus < settings.parallel:
        raise ConfigError(
            f"sweep.parallel={settings.parallel} members at once, but there are {gpus} GPUs: members share none, for "
            f"each would plan with all of its memory. Use sweep.parallel={gpus}, or a running cluster "
            f"(cluster=existing)."
        )


def _first(sweep: Sweep) -> Config | None:
    """One member's configuration; None where it does not compose, which the check of the members tells."""
    try:
        return compose(list(sweep.named(corners(sweep.varied))[0].overrides), sweep.config_dir)
    except ConfigError:
        return None


def resource_warnings(sweep: Sweep) -> list[str]:
    """What will be slow rather than wrong."""
    cfg = _first(sweep)
    if cfg is None:
        return []
    needed, cores = sweep.settings.parallel * cfg.rollout.num_workers, num_cores()
    found = []
    if sweep.settings.parallel > 1 and not cfg.cluster.address and needed > cores:
        found.append(
            f"sweep.parallel={sweep.settings.parallel} members of rollout.num_workers={cfg.rollout.num_workers} want "
            f"{needed} cores, and there are {cores}: they will slow each other down."
        )
    if sweep.settings.search is SearchKind.optuna and not cfg.run.max_generated_tokens:
        found.append(
            "run.max_generated_tokens=0: trials are compared after equally many steps, not tokens, which favours those "
            "that sample more in a step."
        )
    return found
