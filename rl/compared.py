"""Runs to compare: read from their folders, grouped where only the seed differs, and what keeps groups apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from conf.errors import ConfigError, DataError
from rl.curves import TOKENS, Curve, curve_of, value_at
from rl.metrics import read_metrics
from rl.outcomes import PromptOutcome, read_outcomes
from rl.run_folder import RunFolder
from rl.sweeps.record import FILE, MemberRecord, Status, SweepRecord, read_record

SEED = "seed"
UNIMPORTANT = (
    *("run.name", "run.dir", "run.resume", "run.keep_checkpoints", "run.checkpoint_every_steps"),
    *("run.record_every_steps", "model.warm_start.cache_dir", "model.warm_start.num_threads"),
    *("sweep.", "tracker.", "cluster."),
)
"""Settings that change where a run writes or where it runs, not what it learns; those with a dot are sections."""
MEASURE = ("task.", "model.", "run.eval_prompts", "run.eval_samples", "run.eval_temperature", "run.eval_top_p")
"""Settings that must agree, or success is of something else. The training data of a task may differ."""
TRAINING_DATA = "task.train."
MAX_LABEL_KEYS = 3


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One run."""

    folder: Path
    settings: Mapping[str, Any]
    """Dotted key -> value, those that do not matter left out."""
    curve: Curve
    evaluated: list[tuple[float, Path]]
    """Tokens or steps, and the file of what each held-out prompt came to then."""
    label: str = ""
    """What a sweep says that it varies, without the seed."""
    name: str = ""
    """run.name"""

    @property
    def seed(self) -> Any:
        """Its seed."""
        return self.settings.get(SEED)

    @property
    def without_seed(self) -> dict[str, Any]:
        """What makes it one of its group."""
        return {key: value for key, value in self.settings.items() if key != SEED}

    def value_at(self, place: float) -> float:
        """The metric at a point that the run has reached."""
        found = value_at(self.curve, place)
        assert found is not None, "the point is one that all runs have reached"
        return found

    def outcomes_at(self, place: float) -> dict[str, float]:
        """Success of each held-out prompt at a point, between two evaluations on a straight line as the metric is."""
        before = [each for each in self.evaluated if each[0] <= place]
        after = [each for each in self.evaluated if each[0] >= place]
        if not before or not after:
            return {}
        (start, first), (end, last) = before[-1], after[0]
        share = (place - start) / (end - start) if end > start else 0.0
        low = shares_of(read_outcomes(first))
        if not share:
            return low
        high = shares_of(read_outcomes(last))
        return {name: low[name] + share * (high[name] - low[name]) for name in low if name in high}


def shares_of(outcomes: Iterable[PromptOutcome]) -> dict[str, float]:
    """Prompt -> success share, those of which something is known."""
    return {each.prompt: each.success_share for each in outcomes if each.known}


@dataclass(slots=True)
class Group:
    """Runs that differ by their seed alone."""

    label: str
    runs: list[ComparedRun] = field(default_factory=list)

    @property
    def seeds(self) -> list[Any]:
        """Seeds of its runs."""
        return [run.seed for run in self.runs]


def find_runs(paths: Sequence[Path], metric: str, *, by_steps: bool) -> tuple[list[ComparedRun], list[str]]:
    """The runs that were named, and what is to be said of those that are left out.

    Args:
        paths: run folders, and folders of sweeps, of which every member that was trained counts.
    Raises: ConfigError for a folder that is neither; DataError for a damaged one.
    """
    runs, notes = [], []
    for path in paths:
        if (path / FILE).exists():
            record = read_record(path)
            for member in record.members:
                if member.status is not Status.finished:
                    notes.append(f"{member.name} is left out: it is {_said(member)}")
                    continue
                runs.append(_run(record.folder(member), metric, by_steps=by_steps, label=label_of(record, member)))
        elif RunFolder(path).metrics.exists():
            runs.append(_run(RunFolder(path), metric, by_steps=by_steps))
        else:
            raise ConfigError(
                f"{path} is neither a run's folder (metrics.jsonl) nor a sweep's ({FILE}): there is nothing to "
                f"compare. Runs lie under runs/, sweeps under runs/sweeps/."
            )
    for run in runs:
        if not run.curve:
            notes.append(f"{run.folder} is left out: it has no {metric}")
    return [run for run in runs if run.curve], notes


def _said(member: MemberRecord) -> str:
    return f"{member.status.value}" + (f" ({member.reason})" if member.reason else "")


def label_of(record: SweepRecord, member: MemberRecord) -> str:
    """What a sweep varies, as its members are named, e.g. "portool weight=0.3"."""
    parts = []
    for key in record.keys:
        if key != SEED and key in member.values:
            name = key.rpartition(".")[2]
            parts.append(member.values[key] if "." not in key else f"{name}={member.values[key]}")
    return " ".join(parts)


def _run(folder: RunFolder, metric: str, *, by_steps: bool, label: str = "") -> ComparedRun:
    try:
        config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{folder.config} cannot be read ({error}): what the run was is not known.") from error
    rows = read_metrics(folder.metrics) if folder.metrics.exists() else []
    places = {row["step"]: row["step"] if by_steps else row.get(TOKENS) for row in rows}
    evaluated = []
    for file in folder.evaluation_files():
        place = places.get(int(file.stem.removeprefix("step_")))
        if place is not None:
            evaluated.append((float(place), file))
    settings = {key: value for key, value in flat(config).items() if not _is_under(key, UNIMPORTANT)}
    name = str(config.get("run", {}).get("name", folder.path.name))
    return ComparedRun(
        folder.path, settings, curve_of(folder.metrics, metric, by_steps=by_steps), evaluated, label, name
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _is_under(key: str, names: Iterable[str]) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def groups_of(runs: Sequence[ComparedRun]) -> list[Group]:
    """Runs that differ by their seed alone together, in the order they were named, each group called what it is."""
    groups: list[tuple[dict[str, Any], Group]] = []
    for run in runs:
        found = next((group for settings, group in groups if settings == run.without_seed), None)
        if found is None:
            found = Group("")
            groups.append((run.without_seed, found))
        found.runs.append(run)
    for (settings, group), label in zip(groups, _labels(groups), strict=True):
        del settings
        group.label = label
    return [group for _, group in groups]


def _labels(groups: Sequence[tuple[dict[str, Any], Group]]) -> list[str]:
    """By what a sweep varies, by run.name, or by the settings that differ: the first of these that tells all apart."""
    ways = (
        [group.runs[0].label for _, group in groups],
        [group.runs[0].name for _, group in groups],
        _differences([settings for settings, _ in groups]),
        [str(group.runs[0].folder) for _, group in groups],
    )
    return next(way for way in ways if all(way) and len(set(way)) == len(way))


def _differences(settings: Sequence[dict[str, Any]]) -> list[str]:
    keys = differing(settings)
    if "credit.name" in keys:  # a recipe's name stands for its terms
        keys = ["credit.name", *(key for key in keys if not key.startswith("credit."))]
    return [" ".join(f"{key}={each.get(key)}" for key in keys[:MAX_LABEL_KEYS]) for each in settings]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that not all have with the same value."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


def incomparable(one: Group, other: Group) -> str:
    """Why success of two groups is not of the same thing; "" when it is."""
    settings = [one.runs[0].settings, other.runs[0].settings]
    keys = [key for key in differing(settings) if _is_under(key, MEASURE) and not key.startswith(TRAINING_DATA)]
    shown = [f"{key} is {settings[0].get(key)} and {settings[1].get(key)}" for key in keys[:MAX_LABEL_KEYS]]
    more = f", and {len(keys) - len(shown)} more settings differ" if len(keys) > len(shown) else ""
    return "; ".join(shown) + more
