"""Rules of the reward sources and of the models they ask."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from conf.errors import ConfigError
from conf.keys import did_you_mean
from conf.plugin import load_object
from conf.problem import Problem
from conf.schema import Config, Level, ModelKind, PrmKind, RewardModelConfig, SourceConfig
from conf.subject import Subject, argument_names, subject_of

DEFAULT_SIGNAL = {Level.step: "step", Level.trajectory: "outcome"}


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [
        sources_can_be_loaded,
        subjects_are_clear,
        models_exist,
        models_are_complete,
        parts_fit_their_signals,
        processes_can_run,
        prm_and_its_source_come_together,
    ]


def level_of(source: SourceConfig) -> Level | None:
    """What a source scores: as configured, else as its arguments say; None when it cannot be loaded."""
    subject = subject_of_source(source)
    return subject.level if subject else None


def subject_of_source(source: SourceConfig) -> Subject | None:
    """What one call of a source is about; None when its function cannot be loaded or read, or contradicts the level."""
    if source.prm:
        return Subject.steps
    try:
        return subject_of("", source.level, _arguments(source))
    except (ConfigError, TypeError, ValueError, AttributeError):
        return Subject[source.level] if source.level in Level.__members__ else None


def signals_of(source: SourceConfig) -> set[str]:
    """Signals that a source feeds, its parts' too; both defaults when its level is not known."""
    of_parts = {part.signal for part in source.parts.values() if part.signal and part.weight}
    if source.signal:
        return {source.signal} | of_parts
    level = level_of(source)
    return ({DEFAULT_SIGNAL[level]} if level else set(DEFAULT_SIGNAL.values())) | of_parts


def outcome_source(cfg: Config) -> str | None:
    """Name of the first source of trajectories, which success is read of and a process reward model learns from."""
    return next((name for name, source in cfg.rewards.sources.items() if level_of(source) is Level.trajectory), None)


def trained_sources(cfg: Config) -> dict[str, SourceConfig]:
    """Sources that add to a signal; one of weight 0 is only recorded."""
    return {name: source for name, source in cfg.rewards.sources.items() if source.weight != 0}


def fed_signals(cfg: Config) -> dict[str, list[str]]:
    """signal -> names of the sources that feed it."""
    fed: dict[str, list[str]] = {}
    for name, source in trained_sources(cfg).items():
        for signal in sorted(signals_of(source)):
            fed.setdefault(signal, []).append(name)
    return fed


def loaded_source(source: SourceConfig) -> Any:
    """The function or class of a source. Raises: as `load_object`."""
    return load_object(source.fn or source.target, key="fn" if source.fn else "_target_")


def sources_can_be_loaded(cfg: Config) -> list[Problem]:
    """Each source names one function or class, and importing it works."""
    found = []
    for name, source in cfg.rewards.sources.items():
        key = f"rewards.sources.{name}"
        if source.prm:
            if source.fn or source.target or source.model:
                found.append(
                    Problem(f"{key}.prm=true, and it names a function or a model too: which scores? Keep one.")
                )
            continue
        if bool(source.fn) == bool(source.target):
            state = "both fn and _target_" if source.fn else "neither fn nor _target_"
            found.append(Problem(f'{key} has {state}: exactly one says what scores. Use {key}.fn="file.py:function".'))
            continue
        try:
            load_object(source.fn or source.target, key=f"{key}.{'fn' if source.fn else '_target_'}")
        except ConfigError as error:
            found.append(Problem(str(error)))
    return found


def subjects_are_clear(cfg: Config) -> list[Problem]:
    """What a source scores follows from its level and its arguments."""
    found = []
    for name, source in cfg.rewards.sources.items():
        if source.prm:
            continue
        try:
            arguments = _arguments(source)
        except (ConfigError, TypeError, ValueError, AttributeError):
            continue  # it cannot be loaded or read, of which another rule and the source itself tell
        try:
            subject_of(f"rewards.sources.{name}", source.level, arguments)
        except ConfigError as error:
            found.append(Problem(str(error)))
    return found


def models_exist(cfg: Config) -> list[Problem]:
    """A source that asks a model names one, and one that is named is asked."""
    found = []
    for name, source in cfg.rewards.sources.items():
        if source.model and source.model not in cfg.rewards.models:
            hint = did_you_mean(source.model, cfg.rewards.models)
            found.append(
                Problem(
                    f'rewards.sources.{name}.model="{source.model}" is not under rewards.models, which has '
                    f"{', '.join(cfg.rewards.models) or 'none'}: there is nobody to ask. Describe it there, e.g. "
                    f"rewards.models.{source.model}={{url: http://127.0.0.1:8000/v1, path: the-model}}.{hint}"
                )
            )
    return found


def models_are_complete(cfg: Config) -> list[Problem]:
    """An endpoint has an address, other kinds have weights."""
    found = []
    for name, model in cfg.rewards.models.items():
        key = f"rewards.models.{name}"
        if not model.path:
            what = "the model's name at the server" if model.kind is ModelKind.endpoint else "a folder or hub name"
            found.append(Problem(f"{key}.path is empty: no model answers. Set it to {what}."))
        if model.kind is ModelKind.endpoint and urlsplit(model.url).scheme not in ("http", "https"):
            found.append(Problem(f'{key}.url="{model.url}" is no address. Give the base address, as https://host/v1.'))
        found += [Problem(f"{key}.{text}") for text in _unfit_numbers(model)]
    return found


def _unfit_numbers(model: RewardModelConfig) -> list[str]:
    least = {"timeout_s": 0.001, "max_concurrent": 1, "max_tokens": 1, "max_context_tokens": 1, "breaker_failures": 1}
    least |= {"requests_per_minute": 0, "max_retries": 0, "temperature": 0, "breaker_rest_s": 0}
    return [
        f"{name}={getattr(model, name)} is below {smallest:g}: no question could be asked so. Raise it."
        for name, smallest in least.items()
        if getattr(model, name) < smallest
    ]


def parts_fit_their_signals(cfg: Config) -> list[Problem]:
    """A signal is fed by scores of steps, or by scores of trajectories."""
    found = []
    homes: dict[str, tuple[str, Level]] = {}
    for name, source in cfg.rewards.sources.items():
        level = level_of(source)
        if level is None or source.weight == 0:
            continue
        named = {part.signal for part in source.parts.values() if part.signal}
        for signal in sorted(signals_of(source) | named):
            first, its_level = homes.setdefault(signal, (name, level))
            if its_level is not level and signal in named:
                found.append(
                    Problem(
                        f'a part of rewards.sources.{name}, which scores a {level.value}, feeds the signal "{signal}", '
                        f"and so does rewards.sources.{first}, which scores a {its_level.value}: the two cannot be "
                        f"added. Give the part a signal of another name."
                    )
                )
    return found


def processes_can_run(cfg: Config) -> list[Problem]:
    """A user's function needs a process with room to import Python."""
    rewards = cfg.rewards
    if 0 < rewards.memory_limit_mib < 128:
        return [
            Problem(
                f"rewards.memory_limit_mib={rewards.memory_limit_mib} is less than Python and a reward's imports take: "
                f"every score would fail. Use 512 or more, or 0 for no limit."
            )
        ]
    return []


def prm_and_its_source_come_together(cfg: Config) -> list[Problem]:
    """A process reward model of the run's own is trained to score, and one source carries its scores."""
    named = [f"rewards.sources.{name}" for name, source in cfg.rewards.sources.items() if source.prm]
    kind = cfg.prm.kind
    if kind is PrmKind.none:
        return [
            Problem(f"{each}.prm=true, but prm.kind=none: there is no model to score. Choose prm=implicit or progress.")
            for each in named
        ]
    found = []
    if len(named) != 1:
        found.append(
            Problem(
                f"prm.kind={kind.value}, and {len(named)} sources carry its scores ({', '.join(named) or 'none'}): it "
                f"takes one with prm: true. `prm={kind.value}` as a choice brings it."
            )
        )
    if cfg.prm.reference_path and kind is not PrmKind.implicit:
        found.append(
            Problem(
                f'prm.reference_path="{cfg.prm.reference_path}" changes nothing: prm.kind={kind.value} compares '
                f"with no reference.",
                fatal=False,
            )
        )
    return found


def _arguments(source: SourceConfig) -> list[str]:
    plugin = loaded_source(source)
    parameters = inspect.signature(plugin.__call__ if inspect.isclass(plugin) else plugin).parameters
    return list(argument_names(parameters).values())
