"""Rules about rewards, credit and loss: does every signal have a source and a use, can a term compare anything, and do
the parts of an algorithm fit together?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator

from conf.check_expanders import OF_NUM_LEAVES, SEVERAL_TREES
from conf.check_rewards import fed_signals, level_of, outcome_source, signals_of, trained_sources
from conf.errors import ConfigError
from conf.keys import did_you_mean
from conf.plugin import load_object
from conf.problem import Problem
from conf.schema import (
    Aggregation,
    Backup,
    Combine,
    Compare,
    Config,
    Correction,
    CreditConfig,
    CriticKind,
    Degenerate,
    ExpanderKind,
    GaeLevel,
    Level,
    LossKind,
    Normalizer,
    OldLogprobs,
    PrmKind,
    Read,
    Return,
    Scope,
    SignalUse,
    TermConfig,
)

STEP_KL = "kl"
"""Signal that the learner feeds: log policy - log reference, summed over a step's sampled tokens."""
PATH_KL = "path_kl"
"""The same, summed over a trajectory."""
MEASURED_SIGNALS = {STEP_KL: Level.step, PATH_KL: Level.trajectory}
"""Signals without a source."""
GAE_PART = "gae"
"""Name of the critic's part of the credit in records."""
GSPO_CLIP = 0.05
"""The paper clips a trajectory's ratio at 3e-4 and 4e-4; a hundred times that is a clip meant for tokens."""
GROUPS_OF_TRAJECTORIES = (Scope.prompt, Scope.tree, Scope.batch)
"""Scopes in which whole trajectories can be compared."""
ANCESTORS = (Scope.ancestors, Scope.ancestors_by_size)
BASELINES = (Scope.parent_value, Scope.root_value, Scope.critic)
"""Scopes that are a value to compare with, not a group."""
BROADCASTS = (Return.broadcast, Return.broadcast_mean)
TOKEN_MEANS = (Normalizer.token_leave_one_out, Normalizer.token_leave_one_out_released)
FORGETS_SIZE = (Normalizer.zscore, Normalizer.whiten, Normalizer.rank)
"""Of two values these keep the order alone."""
TAKES_WEIGHTS = (Normalizer.center, Normalizer.zscore, Normalizer.whiten, Normalizer.center_batch_std)
SECRET_NAME = re.compile(
    r"(^|_)(api_?key|secret|password|credentials?|(auth|access|bearer|api|hf)_token)$", re.IGNORECASE
)


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [
        no_secrets_in_args,
        success_is_measured,
        terms_are_complete,
        functions_can_be_loaded,
        terms_can_work,
        term_signals_are_fed,
        both_sides_are_combined,
        signals_are_used,
        scopes_fit_the_tree,
        something_is_compared,
        two_siblings_have_no_zscore,
        turns_are_compared_fairly,
        longer_pays_the_baseline,
        renorm_pays_for_length,
        progress_telescopes,
        tool_success_alone_is_hacked,
        measured_names_are_free,
        gae_and_critic_come_together,
        gae_reads_signals,
        gspo_counts_trajectories,
        custom_loss_is_named,
        correction_can_work,
        nothing_set_is_unread,
    ]


def used_signals(cfg: Config) -> set[str]:
    """Signals that a term of non-zero weight or GAE reads."""
    terms = {signal for term in cfg.credit.terms.values() if term.weight != 0 for signal in term.signals}
    return terms | cfg.credit.gae.signals.keys() if has_gae(cfg) else terms


def has_gae(cfg: Config) -> bool:
    """Whether a critic's values make credit."""
    return cfg.credit.gae.level is not GaeLevel.off


def reads_steps(term: TermConfig) -> bool:
    """Whether signals of steps mean anything to the term."""
    return term.level is Level.step or term.returns in BROADCASTS


def has_critic_scope(cfg: CreditConfig) -> bool:
    """Whether a term compares with what a critic says."""
    return any(term.scope is Scope.critic for term in cfg.terms.values())


def no_secrets_in_args(cfg: Config) -> list[Problem]:
    """The configuration is written to the run folder and to the tracker."""
    args = {f"rewards.sources.{name}.args": source.args for name, source in cfg.rewards.sources.items()}
    args |= {f"rewards.models.{name}.extra_body": model.extra_body for name, model in cfg.rewards.models.items()}
    args |= {f"credit.terms.{name}.args": term.args for name, term in cfg.credit.terms.items()}
    return [
        Problem(
            f"{key}.{arg} looks like a secret, and the configuration is written to the run folder and sent to the "
            f"tracker. Read it from the environment in your function; for a reward, name the variable in "
            f"rewards.pass_env."
        )
        for key, of_function in args.items()
        for arg, value in of_function.items()
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
    """There are terms, unless GAE gives the credit, and each reads a signal."""
    if not has_gae(cfg) and not any(term.weight != 0 for term in cfg.credit.terms.values()):
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


def functions_can_be_loaded(cfg: Config) -> list[Problem]:
    """A term's function and the loss's exist, importing them works, and they take what they are called with."""
    found = []
    named = [(f"credit.terms.{name}", term.fn, term.args) for name, term in cfg.credit.terms.items() if term.fn]
    for key, fn, args in named:
        try:
            plugin = load_object(fn, key=f"{key}.fn")
            inspect.signature(plugin).bind("forest", **args)
        except ConfigError as error:
            found.append(Problem(str(error)))
        except (TypeError, ValueError) as error:
            given = ", ".join(["a forest", *args])
            found.append(Problem(f'{key}.fn="{fn}" cannot be called with {given}: {error}. See docs/new_method.md.'))
    if cfg.loss.fn and cfg.loss.kind is LossKind.custom:
        try:
            load_object(cfg.loss.fn, key="loss.fn")
        except ConfigError as error:
            found.append(Problem(str(error)))
    return found


def terms_can_work(cfg: Config) -> list[Problem]:
    """The parts of a term fit together."""
    return [Problem(text) for text in term_faults(cfg.credit)]


def term_faults(cfg: CreditConfig) -> list[str]:
    """Why terms cannot do what they say, each with a way out."""
    found = [
        f"credit.terms.{name}{text}" for name, term in cfg.terms.items() for is_so, text in _faults_of(term) if is_so
    ]
    if sum(term.scope is Scope.critic for term in cfg.terms.values()) + (cfg.gae.level is not GaeLevel.off) > 1:
        found.append(
            "credit has more than one thing that compares with the critic (terms of scope=critic, credit.gae), and it "
            "can learn the values of one alone. Keep one of them, or put their signals into one term."
        )
    if cfg.gae.combine in (Combine.gate, Combine.four_cases):
        found.append(
            f"credit.gae.combine={cfg.gae.combine.value} compares trajectories, and GAE compares with a critic. Use "
            f"credit.gae.combine=sum, overwrite or renorm, or a term."
        )
    for key, signals in [(f"credit.terms.{name}", term.signals) for name, term in cfg.terms.items()] + [
        ("credit.gae", cfg.gae.signals)
    ]:
        for signal, use in signals.items():
            if use is not None and use.best_of < 1:
                found.append(f"{key}.signals.{signal}.best_of={use.best_of} must be 1 or more: it counts tries.")
    return found


def _faults_of(term: TermConfig) -> list[tuple[bool, str]]:
    """(whether it is so, what is wrong) for every way in which the parts of a term can fail to fit."""
    is_step = term.level is Level.step
    baseline = term.scope in BASELINES
    scopes = ", ".join(scope.value for scope in GROUPS_OF_TRAJECTORIES)
    return [
        *_faults_of_function(term),
        (
            is_step and term.returns in BROADCASTS,
            f".returns={term.returns.value} gives a trajectory one value for all its steps, but level=step. Use "
            f"level=trajectory, or returns=to_go.",
        ),
        (
            not is_step and term.returns is Return.to_go,
            ".returns=to_go differs from step to step, but level=trajectory has one value. Use level=step, or "
            "returns=broadcast.",
        ),
        (
            not is_step and term.combine is not Combine.sum,
            f".combine={term.combine.value} says what steps earn, but level=trajectory. Use level=step or combine=sum.",
        ),
        (
            is_step and term.scope in ANCESTORS,
            f".scope={term.scope.value} compares whole trajectories, but level=step. Use level=trajectory, or "
            f"scope=siblings.",
        ),
        (
            not is_step and term.scope not in (*GROUPS_OF_TRAJECTORIES, *ANCESTORS),
            f".scope={term.scope.value} compares steps, but level=trajectory: whole trajectories have no place in it. "
            f"Use level=step, or scope={scopes} or ancestors.",
        ),
        (
            term.compare is Compare.rewards and (term.returns is not Return.to_go or baseline),
            f".compare=rewards takes the return of what was compared in a group, which needs returns=to_go and a scope "
            f"that is a group, not returns={term.returns.value} and scope={term.scope.value}. Use compare=returns.",
        ),
        (
            baseline and term.normalizer is not Normalizer.center,
            f".scope={term.scope.value} is one value and has no deviation, so normalizer={term.normalizer.value} means "
            f"nothing there. Use normalizer=center.",
        ),
        (
            term.scope in (Scope.parent_value, Scope.root_value) and (term.gamma != 1 or term.backup is Backup.none),
            f".scope={term.scope.value} compares values of different steps, with gamma={term.gamma} and "
            f"backup={term.backup.value}: decay would look like progress, and without backup a step has no one value. "
            f"Use gamma=1 and backup=leaf_mean or child_mean.",
        ),
        (
            term.scope in (Scope.parent_value, Scope.root_value)
            and any(use.read is not Read.score for use in term.signals.values()),
            f".scope={term.scope.value} takes the difference of two values, but a signal of the term is not read as it "
            f"is: it would be taken twice. Use read=score, or normalizer=none with scope=prompt.",
        ),
        (
            term.scope is Scope.turn_index_padded
            and (term.backup is not Backup.none or term.compare is Compare.rewards),
            f".scope=turn_index_padded counts trajectories, ended ones too, but backup={term.backup.value} and "
            f"compare={term.compare.value} count steps. Use backup=none and compare=returns.",
        ),
        (
            term.normalizer is Normalizer.center_batch_std and term.scope in (*ANCESTORS, Scope.turn_index_padded),
            f".normalizer=center_batch_std takes the deviation of all values once, but scope={term.scope.value} counts "
            f"one value in several groups. Use normalizer=zscore.",
        ),
        (
            term.normalizer in TOKEN_MEANS
            and (term.compare is not Compare.rewards or term.scope not in GROUPS_OF_TRAJECTORIES),
            f".normalizer={term.normalizer.value} is a mean reward per token of other trajectories: it needs "
            f"compare=rewards and scope={scopes}, not compare={term.compare.value} and scope={term.scope.value}.",
        ),
        (
            term.normalizer is Normalizer.running and term.scope is not Scope.batch,
            f".normalizer=running compares with all that the run has seen, not with scope={term.scope.value}. Use "
            f"scope=batch.",
        ),
        (
            term.combine is Combine.four_cases
            and (term.scope not in GROUPS_OF_TRAJECTORIES or term.returns is not Return.immediate),
            f".combine=four_cases starts from trajectories compared with each other and takes no return, but "
            f"scope={term.scope.value} and returns={term.returns.value}. Use scope={scopes} and returns=immediate.",
        ),
        (
            term.token_weighted and (baseline or term.scope in ANCESTORS or term.normalizer not in TAKES_WEIGHTS),
            f".token_weighted=true weighs the mean of a group, which scope={term.scope.value} with "
            f"normalizer={term.normalizer.value} does not take. Use token_weighted=false.",
        ),
    ]


def _faults_of_function(term: TermConfig) -> list[tuple[bool, str]]:
    """The same, of a term with a function of the user's or with arguments for one."""
    unread = [
        setting
        for setting, is_so in (
            (f"combine={term.combine.value}", term.combine is not Combine.sum),
            (f"returns={term.returns.value}", term.returns is not Return.immediate),
            (f"compare={term.compare.value}", term.compare is not Compare.returns),
            (f"gamma={term.gamma}", term.gamma != 1),
            ("a signal that is not read as it is", any(use != SignalUse() for use in term.signals.values())),
        )
        if is_so
    ]
    return [
        (
            bool(term.fn and unread),
            f'.fn="{term.fn}" gives the values itself, so {" and ".join(unread)} would change nothing. Remove that, or '
            f"do it in the function.",
        ),
        (
            bool(term.fn) and term.scope in BASELINES,
            f'.scope={term.scope.value} needs a value of the state before, which fn="{term.fn}" does not give. '
            f"Subtract it in the function, with scope=prompt and normalizer=none.",
        ),
        (bool(term.args and not term.fn), ".args are for fn, which is empty. Name a function, or remove them."),
    ]


def term_signals_are_fed(cfg: Config) -> list[Problem]:
    """Every signal that a term or GAE reads has a source or is measured, and is of a level the term can use."""
    fed, found = fed_signals(cfg), []
    for key, reads_both, signal in _uses(cfg):
        if signal not in fed and signal not in MEASURED_SIGNALS:
            found.append(Problem(_unfed(cfg, key, signal, fed)))
        elif not reads_both and _is_of_steps(cfg, signal, fed):
            feeding = ", ".join(fed.get(signal, ["measured by the learner"]))
            found.append(
                Problem(
                    f'{key}.signals names "{signal}", which scores steps ({feeding}), but {key}.level=trajectory needs '
                    f"one value for a whole trajectory. Use "
                    f"{f'{PATH_KL}, its sum over the trajectory' if signal == STEP_KL else f'{key}.level=step'}, or a "
                    f"source that scores trajectories."
                )
            )
    return found


def both_sides_are_combined(cfg: Config) -> list[Problem]:
    """What combines the scores of steps with those of trajectories reads some of each."""
    fed, found = fed_signals(cfg), []
    combining = [(f"credit.terms.{name}", term.combine, term.signals) for name, term in cfg.credit.terms.items()]
    if has_gae(cfg):
        combining.append(("credit.gae", cfg.credit.gae.combine, cfg.credit.gae.signals))
    for key, combine, signals in combining:
        known = [signal for signal in signals if signal in fed or signal in MEASURED_SIGNALS]
        sides = {_is_of_steps(cfg, signal, fed) for signal in known}
        if combine is not Combine.sum and len(known) == len(signals) and len(sides) == 1:
            found.append(Problem(one_sided(key, combine, missing_steps=sides == {False})))
    return found


def one_sided(key: str, combine: Combine, *, missing_steps: bool) -> str:
    """What is said of a combination that has nothing to combine."""
    missing = "steps" if missing_steps else "whole trajectories"
    return (
        f"{key}.combine={combine.value} combines signals of steps with those of trajectories, and {key}.signals names "
        f"none that scores {missing}: there is nothing to combine. Add one, or use combine=sum."
    )


def _uses(cfg: Config) -> Iterator[tuple[str, bool, str]]:
    """Key, whether signals of steps mean anything there, and signal."""
    for name, term in cfg.credit.terms.items():
        for signal in term.signals:
            yield f"credit.terms.{name}", reads_steps(term), signal
    if has_gae(cfg):
        for signal in cfg.credit.gae.signals:
            yield "credit.gae", True, signal


def _is_of_steps(cfg: Config, signal: str, fed: dict[str, list[str]]) -> bool:
    return MEASURED_SIGNALS[signal] is Level.step if signal in MEASURED_SIGNALS else _only_steps(cfg, fed[signal])


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
    teaches = {outcome_source(cfg)} if cfg.prm.kind is not PrmKind.none else set()
    return [
        Problem(
            f'rewards.sources.{name} feeds "{source.signal or " or ".join(sorted(signals_of(source)))}", which no term '
            f"of credit={cfg.credit.name or 'custom'} reads: it is scored and trains nothing. Add the signal to a "
            f"term, e.g. with credit=tree_step, or set rewards.sources.{name}.weight=0 to record it on purpose.",
            fatal=False,
        )
        for name, source in trained_sources(cfg).items()
        if not signals_of(source) & used and name not in teaches
    ]


def scopes_fit_the_tree(cfg: Config) -> list[Problem]:
    """Chains fork only at the prompt, and only random_expand and entropy_expand grow several trees."""
    expander, found = cfg.rollout.expander, []
    for name, term in cfg.credit.terms.items():
        key = f"credit.terms.{name}.scope={term.scope.name}"
        if term.scope is Scope.siblings and term.level is Level.step and expander is ExpanderKind.chains:
            text = (
                f"{key} with rollout.expander=chains: chains fork only at the prompt, so the term compares first steps "
                f"and no others. Use rollout=tree, or a term with scope=prompt."
            )
            found.append(Problem(text, fatal=False))
        if term.scope is Scope.tree and expander not in SEVERAL_TREES:
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
    single = rollout.expander in OF_NUM_LEAVES and rollout.num_leaves == 1
    terms = [term for term in cfg.credit.terms.values() if term.weight != 0]
    alone = (Normalizer.none, Normalizer.max_return)
    compared = all(term.normalizer not in alone and term.singleton is not Degenerate.raw for term in terms)
    with_others = (Scope.batch, Scope.critic, Scope.root_value, Scope.parent_value)
    if any(term.scope in with_others or (term.level is Level.step and term.scope is Scope.prompt) for term in terms):
        return []
    if not single or not compared or has_gae(cfg):
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
        if term.scope is Scope.siblings and term.normalizer in FORGETS_SIZE and not term.min_std
    ]


def turns_are_compared_fairly(cfg: Config) -> list[Problem]:
    """Who is still there at a turn is the policy's own doing."""
    return [
        Problem(
            f"credit.terms.{name}.scope=turn_index compares the trajectories that got so far: where the policy decides "
            f"when to stop, late turns have small groups, and their advantages shrink by 1 - 1 / size (to 0 in a group "
            f"of one). Use scope=turn_index_padded with backup=none, which counts ended trajectories as 0.",
            fatal=False,
        )
        for name, term in _live_terms(cfg)
        if term.scope is Scope.turn_index and term.compare is Compare.returns
    ]


def longer_pays_the_baseline(cfg: Config) -> list[Problem]:
    """verl #7244: the number of baselines subtracted is the policy's own doing."""
    return [
        Problem(
            f"credit.terms.{name}.compare=rewards subtracts a baseline from every reward before they are summed: a "
            f"trajectory that takes one step more pays one baseline more. Where the policy decides when to stop it is "
            f"taught to stop early if rewards are positive, and late if they are negative. Use compare=returns.",
            fatal=False,
        )
        for name, term in _live_terms(cfg)
        if term.compare is Compare.rewards
    ]


def renorm_pays_for_length(cfg: Config) -> list[Problem]:
    """A sum of rewards that all have the sign of the outcome grows with the number of steps."""
    keys = [
        f"credit.terms.{name}"
        for name, term in _live_terms(cfg)
        if term.combine is Combine.renorm and term.returns is Return.to_go
    ]
    if has_gae(cfg) and cfg.credit.gae.combine is Combine.renorm:
        keys.append("credit.gae")
    return [
        Problem(
            f"{key}.combine=renorm sums rewards that all have the sign of the outcome: a right trajectory gains by "
            f"every further step that is scored well, and a wrong one loses by every one. Keep rollout.max_steps="
            f"{cfg.rollout.max_steps} tight and watch the number of steps, or use gamma below 1.",
            fatal=False,
        )
        for key in keys
    ]


def progress_telescopes(cfg: Config) -> list[Problem]:
    """Summed differences are the last value less the first: the steps between are forgotten."""
    uses = [
        (f"credit.terms.{name}", term.signals)
        for name, term in _live_terms(cfg)
        if term.returns is not Return.immediate
    ]
    if has_gae(cfg):
        uses.append(("credit.gae", cfg.credit.gae.signals))
    return [
        Problem(
            f"{key}.signals.{signal}.read=difference is summed over the steps that follow, where differences telescope "
            f"to the last value less the one before the step: every step is paid for what others reach. Give it a term "
            f"of its own with level=step, returns=immediate and normalizer=none, which adds it after returns (PAV).",
            fatal=False,
        )
        for key, signals in uses
        for signal, use in signals.items()
        if use is not None and use.read is Read.difference
    ]


def _live_terms(cfg: Config) -> list[tuple[str, TermConfig]]:
    return [(name, term) for name, term in cfg.credit.terms.items() if term.weight != 0]


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


def measured_names_are_free(cfg: Config) -> list[Problem]:
    """A source must not add to what the learner measures, nor a term take the name of the critic's part."""
    found = [
        Problem(
            f'rewards.sources.{name}.signal="{source.signal}" is the name of what the learner measures itself (log '
            f"policy - log reference, in nats): the two would be mixed up. Give the signal another name."
        )
        for name, source in cfg.rewards.sources.items()
        if source.signal in MEASURED_SIGNALS
    ]
    if has_gae(cfg) and GAE_PART in cfg.credit.terms:
        found.append(
            Problem(
                f"credit.terms.{GAE_PART} has the name under which records show the critic's part of the advantage "
                f"(credit.gae.level={cfg.credit.gae.level.value}): the two would be mixed up. Give the term another "
                f"name."
            )
        )
    return found


def gae_and_critic_come_together(cfg: Config) -> list[Problem]:
    """GAE is made of a critic's values, and nothing else uses them."""
    level, kind = cfg.credit.gae.level, cfg.loss.critic.kind
    by_term = has_critic_scope(cfg.credit)
    if by_term and kind is CriticKind.none:
        return [
            Problem(
                "credit.terms has a term of scope=critic with loss.critic.kind=none: there are no values to compare "
                "with. "
                "Use loss=ppo or loss.critic.kind=value_head, or scope=prompt."
            )
        ]
    if has_gae(cfg) and kind is CriticKind.none:
        return [
            Problem(
                f"credit.gae.level={level.value} with loss.critic.kind=none: there are no values to estimate "
                f"advantages from. Use loss=ppo or loss.critic.kind=value_head, or credit.gae.level=off."
            )
        ]
    if not has_gae(cfg) and not by_term and kind is not CriticKind.none:
        return [
            Problem(
                f"loss.critic.kind={kind.value} with credit.gae.level=off: a critic would be trained and no credit "
                f"would use its values. Use credit=gae, or loss.critic.kind=none."
            )
        ]
    return []


def gae_reads_signals(cfg: Config) -> list[Problem]:
    """GAE is made of rewards."""
    if not has_gae(cfg) or cfg.credit.gae.signals:
        return []
    return [
        Problem(
            f"credit.gae.signals is empty with credit.gae.level={cfg.credit.gae.level.value}: nothing would ever be "
            f"earned, and the critic would learn to say 0. Name a signal, e.g. 'credit.gae.signals.outcome={{}}'."
        )
    ]


def gspo_counts_trajectories(cfg: Config) -> list[Problem]:
    """GSPO has one ratio for each trajectory, and a trajectory counts once."""
    loss, found = cfg.loss, []
    if loss.kind is not LossKind.gspo:
        return []
    if loss.aggregation is not Aggregation.seq_mean_token_mean:
        found.append(
            Problem(
                f"loss.aggregation={loss.aggregation.value} with loss.kind=gspo: a trajectory's one ratio would count "
                f"once for each of its tokens, so that long trajectories outweigh short ones. Use "
                f"loss.aggregation=seq_mean_token_mean."
            )
        )
    if max(loss.clip_low, loss.clip_high) > GSPO_CLIP:
        found.append(
            Problem(
                f"loss.clip_low={loss.clip_low} and loss.clip_high={loss.clip_high} with loss.kind=gspo: the ratio of "
                f"a trajectory is a mean over its tokens and moves far less than theirs, so it would hardly ever be "
                f"clipped. Use loss=gspo, which clips at 0.0003 and 0.0004.",
                fatal=False,
            )
        )
    return found


def custom_loss_is_named(cfg: Config) -> list[Problem]:
    """A function is named exactly where it is used."""
    kind, fn = cfg.loss.kind, cfg.loss.fn
    if (kind is LossKind.custom) == bool(fn):
        return []
    if not fn:
        text = "loss.kind=custom, and loss.fn names no function to compute it. Set loss.fn=my_loss.py:loss."
    else:
        text = f'loss.fn="{fn}" with loss.kind={kind.value} is never called. Use loss.kind=custom, or leave it empty.'
    return [Problem(text)]


def correction_can_work(cfg: Config) -> list[Problem]:
    """The mismatch is known from the learner's own log-probs, and where there is none the weight is 1."""
    loss, found = cfg.loss, []
    if loss.correction is Correction.none:
        return []
    if loss.old_logprobs is not OldLogprobs.recompute:
        found.append(
            Problem(
                f"loss.correction={loss.correction.value} with loss.old_logprobs={loss.old_logprobs.value}: the ratio "
                f"of the loss is taken against the engine and holds the mismatch already, so it would be corrected "
                f"twice. Use loss.old_logprobs=recompute, or loss.correction=none."
            )
        )
    if not loss.correction_min <= 1 <= loss.correction_max:
        found.append(
            Problem(
                f"loss.correction_min={loss.correction_min} and loss.correction_max={loss.correction_max} leave out 1, "
                f"the weight of a token on which engine and learner agree: all of the batch would be cut. Use e.g. "
                f"loss.correction_min=0 and loss.correction_max=2."
            )
        )
    return found


def nothing_set_is_unread(cfg: Config) -> list[Problem]:
    """A switch that another one turns off does nothing."""
    loss, gae = cfg.loss, cfg.credit.gae
    unread = [
        (
            f"loss.dual_clip={loss.dual_clip}",
            f"loss.kind={loss.kind.value} has no dual clip",
            "loss.kind=ppo_clip, or loss.dual_clip=0",
            loss.dual_clip and loss.kind is not LossKind.ppo_clip,
        ),
        (
            f"loss.horizon_tokens={loss.horizon_tokens}",
            f"loss.aggregation={loss.aggregation.value} divides by no horizon",
            "loss.aggregation=seq_mean_token_sum_norm, or loss.horizon_tokens=0",
            loss.horizon_tokens and loss.aggregation is not Aggregation.seq_mean_token_sum_norm,
        ),
        (
            f'loss.critic.path="{loss.critic.path}"',
            f"loss.critic.kind={loss.critic.kind.value} loads no model",
            "loss.critic.kind=model, or leave it empty",
            loss.critic.path and loss.critic.kind is not CriticKind.model,
        ),
        (
            f"credit.gae.signals={{{', '.join(gae.signals)}}}",
            "credit.gae.level=off reads none",
            "credit.gae.level=step or token, or take them away",
            gae.signals and not has_gae(cfg),
        ),
        (
            "credit.whiten=true",
            "credit.terms is empty, and the critic's part has credit.gae.whiten",
            "credit.whiten=false, or add a term",
            cfg.credit.whiten and not cfg.credit.terms,
        ),
    ]
    return [
        Problem(f"{setting} changes nothing: {why}. Use {what}.", fatal=False)
        for setting, why, what, is_so in unread
        if is_so
    ]
