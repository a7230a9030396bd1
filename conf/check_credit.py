"""Rules about rewards and credit: does every signal have a source and a use, and can a term compare anything?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from conf.errors import ConfigError
from conf.keys import did_you_mean
from conf.plugin import load_object
from conf.problem import Problem
from conf.schema import Config, ExpanderKind, Level, Normalizer, Scope, Singleton, SourceConfig, TermConfig

DEFAULT_SIGNAL = {Level.step: "step", Level.trajectory: "outcome"}
STEP_ARGUMENTS = frozenset({"step", "siblings"})
SECRET_NAME = re.compile(
    r"(^|_)(api_?key|secret|password|credentials?|(auth|access|bearer|api|hf)_token)$", re.IGNORECASE
)


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [
        sources_can_be_loaded,
        source_levels,
        no_secrets_in_args,
        success_is_measured,
        terms_are_complete,
        term_signals_are_fed,
        signals_are_used,
        scopes_fit_the_tree,
        something_is_compared,
        two_siblings_have_no_zscore,
        tool_success_alone_is_hacked,
    ]


def level_of(source: SourceConfig) -> Level | None:
    """What a source scores: as configured, else as its arguments say; None when it cannot be loaded."""
    if source.level:
        return Level.__members__.get(source.level)
    try:
        plugin = _loaded(source)
        call = plugin.__call__ if inspect.isclass(plugin) else plugin
        asked = inspect.signature(call).parameters
    except (ConfigError, TypeError, ValueError, AttributeError):
        return None
    return Level.step if STEP_ARGUMENTS & asked.keys() else Level.trajectory


def signals_of(source: SourceConfig) -> set[str]:
    """Signals that a source feeds; both defaults when its level is not known."""
    if source.signal:
        return {source.signal}
    level = level_of(source)
    return {DEFAULT_SIGNAL[level]} if level else set(DEFAULT_SIGNAL.values())


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


def used_signals(cfg: Config) -> set[str]:
    """Signals that a term of non-zero weight reads."""
    return {signal for term in cfg.credit.terms.values() if term.weight != 0 for signal in term.signals}


def _loaded(source: SourceConfig) -> Any:
    return load_object(source.fn or source.target, key="fn" if source.fn else "_target_")


def sources_can_be_loaded(cfg: Config) -> list[Problem]:
    """Each source names one function or class, and importing it works."""
    found = []
    for name, source in cfg.rewards.sources.items():
        key = f"rewards.sources.{name}"
        if bool(source.fn) == bool(source.target):
            state = "both fn and _target_" if source.fn else "neither fn nor _target_"
            found.append(Problem(f'{key} has {state}: exactly one says what scores. Use {key}.fn="file.py:function".'))
            continue
        try:
            load_object(source.fn or source.target, key=f"{key}.{'fn' if source.fn else '_target_'}")
        except ConfigError as error:
            found.append(Problem(str(error)))
    return found


def source_levels(cfg: Config) -> list[Problem]:
    """A level is step, trajectory or empty."""
    return [
        Problem(
            f'rewards.sources.{name}.level="{source.level}" is no level: use step or trajectory, or leave it empty to '
            f"read it from the function's arguments.{did_you_mean(source.level, Level.__members__)}"
        )
        for name, source in cfg.rewards.sources.items()
        if source.level and source.level not in Level.__members__
    ]


def no_secrets_in_args(cfg: Config) -> list[Problem]:
    """The configuration is written to the run folder and to the tracker."""
    return [
        Problem(
            f"rewards.sources.{name}.args.{arg} looks like a secret, and the configuration is written to the run "
            f"folder and sent to the tracker. Read it from the environment in your function, and name the variable in "
            f"rewards.pass_env."
        )
        for name, source in cfg.rewards.sources.items()
        for arg, value in source.args.items()
        if SECRET_NAME.search(str(arg)) and value
    ]


def success_is_measured(cfg: Config) -> list[Problem]:
    """Held-out success is what the first trajectory source says."""
    if not cfg.rewards.sources:
        return [
            Problem(
                "rewards.sources is empty: nothing would be scored and nothing learned. Choose rewards=hop_search, or "
                "add a function of yours with rewards.sources.mine.fn=my_rewards.py:reward."
            )
        ]
    if any(level_of(source) is not Level.step for source in cfg.rewards.sources.values()):
        return []
    return [
        Problem(
            f"no source scores whole trajectories ({', '.join(cfg.rewards.sources)} score steps): held-out success "
            f"would be unknown. Add one, e.g. rewards.sources.answer.fn=rewards.sources.outcome:exact_match; with "
            f"weight=0 it is recorded and trains nothing."
        )
    ]


def terms_are_complete(cfg: Config) -> list[Problem]:
    """There are terms, and each reads a signal."""
    if not any(term.weight != 0 for term in cfg.credit.terms.values()):
        return [
            Problem(
                "credit.terms has no term of non-zero weight: every advantage would be 0 and nothing learned. Choose a "
                "recipe, e.g. credit=tree_step or credit=grpo."
            )
        ]
    return [
        Problem(
            f"credit.terms.{name}.signals is empty: the term would compare nothing. Name a signal, e.g. "
            f"'credit.terms.{name}.signals.outcome={{}}', or remove the term with ~credit.terms.{name}."
        )
        for name, term in cfg.credit.terms.items()
        if not term.signals
    ]


def term_signals_are_fed(cfg: Config) -> list[Problem]:
    """Every signal that a term reads has a source, of a level the term can use."""
    fed, found = fed_signals(cfg), []
    for key, term, signal in _uses(cfg):
        if signal not in fed:
            found.append(Problem(_unfed(cfg, key, signal, fed)))
        elif term.level is Level.trajectory and _only_steps(cfg, fed[signal]):
            found.append(
                Problem(
                    f'{key}.signals names "{signal}", which scores steps ({", ".join(fed[signal])}), but '
                    f"{key}.level=trajectory needs one value for a whole trajectory. Use {key}.level=step, or a source "
                    f"that scores trajectories."
                )
            )
    return found


def _uses(cfg: Config) -> Iterator[tuple[str, TermConfig, str]]:
    for name, term in cfg.credit.terms.items():
        for signal in term.signals:
            yield f"credit.terms.{name}", term, signal


def _only_steps(cfg: Config, names: list[str]) -> bool:
    return all(level_of(cfg.rewards.sources[name]) is Level.step for name in names)


def _unfed(cfg: Config, key: str, signal: str, fed: dict[str, list[str]]) -> str:
    silent = [
        name for name, source in cfg.rewards.sources.items() if source.weight == 0 and signal in signals_of(source)
    ]
    if silent:
        way_out = f" Only {', '.join(silent)} could feed it, with weight 0: set rewards.sources.{silent[0]}.weight=1."
    else:
        way_out = did_you_mean(signal, fed) or f" Add a source with signal: {signal}, or another credit recipe."
    return (
        f'{key}.signals names "{signal}", which no source feeds: the term could train nothing. '
        f"Fed are: {', '.join(fed) or 'none'}.{way_out}"
    )


def signals_are_used(cfg: Config) -> list[Problem]:
    """A source that trains nothing should say so by weight 0."""
    used = used_signals(cfg)
    return [
        Problem(
            f'rewards.sources.{name} feeds "{source.signal or " or ".join(sorted(signals_of(source)))}", which no term '
            f"of credit={cfg.credit.name or 'custom'} reads: it is scored and trains nothing. Add the signal to a "
            f"term, e.g. with credit=tree_step, or set rewards.sources.{name}.weight=0 to record it on purpose.",
            fatal=False,
        )
        for name, source in trained_sources(cfg).items()
        if not signals_of(source) & used
    ]


def scopes_fit_the_tree(cfg: Config) -> list[Problem]:
    """Chains fork only at the prompt, and only random_expand grows several trees."""
    expander, found = cfg.rollout.expander, []
    for name, term in cfg.credit.terms.items():
        key = f"credit.terms.{name}.scope={term.scope.name}"
        if term.scope is Scope.siblings and term.level is Level.step and expander is ExpanderKind.chains:
            text = (
                f"{key} with rollout.expander=chains: chains fork only at the prompt, so the term compares first steps "
                f"and no others. Use rollout=tree, or a term with scope=prompt."
            )
            found.append(Problem(text, fatal=False))
        if term.scope is Scope.tree and expander is not ExpanderKind.random_expand:
            alone = (
                "every chain is a tree of its own, so each value is alone"
                if expander is ExpanderKind.chains
                else ("a prompt has one tree, so the scope is the same as prompt")
            )
            text = f"{key} with rollout.expander={expander.name}: {alone}. Use rollout=tree_grpo, or scope=prompt."
            found.append(Problem(text, fatal=False))
    return found


def something_is_compared(cfg: Config) -> list[Problem]:
    """One trajectory per prompt leaves nothing to compare it with."""
    rollout = cfg.rollout
    single = rollout.expander is not ExpanderKind.random_expand and rollout.num_leaves == 1
    terms = [term for term in cfg.credit.terms.values() if term.weight != 0]
    compared = all(term.normalizer is not Normalizer.none and term.singleton is Singleton.zero for term in terms)
    if not single or not compared or any(term.level is Level.step and term.scope is Scope.prompt for term in terms):
        return []
    return [
        Problem(
            "rollout.num_leaves=1 gives each prompt one trajectory, and every credit term compares it with others: all "
            "advantages would be 0. Use rollout.num_leaves=8, or a term with normalizer=none."
        )
    ]


def two_siblings_have_no_zscore(cfg: Config) -> list[Problem]:
    """With two values a z-score keeps the sign and forgets the size."""
    rollout = cfg.rollout
    if rollout.expander is not ExpanderKind.beam_forks or rollout.max_forks != 2:
        return []
    return [
        Problem(
            f"credit.terms.{name} takes a z-score among siblings, and rollout.max_forks=2 makes most forks pairs: "
            f"below the prompt its advantage is +-0.71 (+-1 with ddof=0) however small the difference. Use "
            f"credit.terms.{name}.normalizer=center, or rollout.max_forks=4.",
            fatal=False,
        )
        for name, term in cfg.credit.terms.items()
        if term.scope is Scope.siblings and term.level is Level.step and term.normalizer is Normalizer.zscore
    ]


def tool_success_alone_is_hacked(cfg: Config) -> list[Problem]:
    """Measured on the embedded task: success of calls, paid alone, is earned by useless calls."""
    used = used_signals(cfg)
    steps = {
        name: source.fn or source.target
        for name, source in trained_sources(cfg).items()
        if level_of(source) is Level.step and signals_of(source) & used
    }
    if not steps or not all(spec.endswith("tool_success") for spec in steps.values()):
        return []
    return [
        Problem(
            f"{', '.join(steps)} is the only step reward that trains: paid alone, the success of calls was hacked "
            f"within 40k tokens on hop_search (calls that succeed and lead nowhere). Add a step reward for progress, "
            f"or set rewards.sources.{next(iter(steps))}.weight=0.",
            fatal=False,
        )
    ]
