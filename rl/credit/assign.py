"""Credit: the weighted sum of terms and of what a critic says, for every pair of a step and a trajectory through it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conf.check_credit import GAE_PART, one_sided, reads_steps, term_faults
from conf.errors import ConfigError
from conf.schema import Combine, CreditConfig, GaeConfig, GaeLevel, Read, Scope, SignalUse, TermConfig, TokenWeight
from rl.credit.backup import mean_of_groups
from rl.credit.critic import CriticCredit, critic_credit, critic_values, taught_critic
from rl.credit.forest import Forest
from rl.credit.normalize import Moments, inverse_deviation, weighted_mean
from rl.credit.signals import rewards_of, somewhere_on_path
from rl.credit.terms import term_credit


@dataclass(kw_only=True, slots=True)
class Credit:
    """Advantages of a forest, per (step, trajectory) pair and summed per step. All float32, in the forest's order."""

    advantage_P: Tensor
    """Sum of the contributions, of the critic's the mean over the step's tokens; 0 where the pair is not trained."""
    weight_P: Tensor
    """How much the pair counts in the loss and in its token count; 0 where it is not trained."""
    parts: dict[str, Tensor]
    """term, or "gae" -> its weighted contribution [P]; they add up to advantage_P."""
    w_pos_N: Tensor
    """Sum over a step's pairs of weight * max(advantage, 0): what clipping from above acts on."""
    w_neg_N: Tensor
    """Sum over a step's pairs of weight * min(advantage, 0): what clipping from below acts on."""
    w0_N: Tensor
    """Sum of a step's pair weights: how often each of its tokens counts; 0 for a step that is not trained."""
    advantage_N: Tensor
    """Weighted mean advantage of a step's pairs, for records; 0 for a step that is not trained."""
    critic: CriticCredit | None = None
    """Only with GAE or a term of scope=critic: `extra_T` is added at the token to the advantage of every pair of its
    step."""
    history: dict[str, Moments] = field(default_factory=dict)
    """term with Normalizer.running -> moments of all it has seen in the run; the next step's `assign` is told."""


def assign(forest: Forest, cfg: CreditConfig, max_steps: int, history: Mapping[str, Moments] | None = None) -> Credit:
    """Advantages of every (step, trajectory) pair of a batch.

    A_(n,k) = sum over terms of weight * what the term makes of it (`rl.credit.terms`); whitened over the batch if asked
    for; plus the critic's advantage of the step or token. Rewards are summed by the signals of one term, advantages by
    terms, and what is added after returns is a term of its own beside one that takes returns, or beside GAE.
    A term that is not valid for a pair contributes nothing to it; a pair without one valid contribution of non-zero
    weight is neither trained nor counted. With GAE neither is a pair of a trajectory whose rewards are not known (see
    `gae_rewards`), whatever the terms say of it: what the critic makes of a token goes to all trajectories through it.

    Args:
        forest: the trained paths of the batch, with the critic's values where GAE is on (`with_measured`).
        cfg: terms, GAE, and how often a shared step counts.
        max_steps: depth limit of the trees (rollout.max_steps), for signals with `bound`.
        history: `Credit.history` of the step before, for terms with Normalizer.running; None at the start.
    Raises: ConfigError when a term cannot work (`conf.check_credit.term_faults`), or names no signal, one that no tree
        has, or one of the wrong level; UnscoredNode when a scaled signal overflows.
    """
    _check_terms(forest, cfg)
    num_nodes = len(forest.parent_N)
    parts: dict[str, Tensor] = {}
    seen: dict[str, Moments] = {}
    critic = None
    trained_P = torch.zeros(len(forest.pair_node_P), dtype=torch.bool)
    for name, term in cfg.terms.items():
        found = term_credit(forest, term, max_steps, (history or {}).get(name))
        parts[name] = term.weight * found.advantage_P
        if found.history is not None:
            seen[name] = found.history
        if term.weight != 0:  # a term switched off by its weight must not make a pair count
            trained_P |= found.valid_P
        if term.scope is Scope.critic:
            node_V = forest.pair_node_P[found.valid_P]
            value_N, valid_N = mean_of_groups(found.value_P[found.valid_P], torch.ones_like(node_V), node_V, num_nodes)
            critic = taught_critic(value_N, valid_N, critic_values(forest), forest.num_actions_N)
    if cfg.whiten:
        weight_P = token_weight(trained_P, forest.pair_node_P, num_nodes, cfg.shared_token_weight)
        parts = _whitened_parts(parts, weight_P * forest.num_actions_N[forest.pair_node_P])
    if cfg.gae.level is not GaeLevel.off:
        critic, valid_L = _critic_credit(forest, cfg.gae, max_steps)
        parts[GAE_PART] = critic.advantage_N.to(torch.float64)[forest.pair_node_P]
        trained_P = valid_L[forest.pair_leaf_P]
    parts = {name: torch.where(trained_P, part_P, 0) for name, part_P in parts.items()}
    weight_P = token_weight(trained_P, forest.pair_node_P, num_nodes, cfg.shared_token_weight)
    return _credit(forest, weight_P, parts, critic, seen)


def gae_rewards(forest: Forest, cfg: GaeConfig, max_steps: int) -> tuple[Tensor, Tensor]:
    """What each step earns, and the trajectories of which all rewards are known.

    A step earns what `cfg.combine` makes of the signals; where that differs between the trajectories through it, their
    mean, because GAE is linear in the rewards. What was not scored:
    - A trajectory is not valid where one of its trajectory signals was not scored, for whatever reason, where a step
      signal of one of its steps failed or timed out, or where no signal says anything of it or of its steps.
    - A step signal that does not apply earns 0, after `scale` and `shift`.

    Returns: float64 [N], which means nothing on trajectories that are not valid; bool [L].
    """
    found = rewards_of(forest, cfg.signals, cfg.combine, cfg.gamma, max_steps)
    valid_L = found.known_L & ~somewhere_on_path(forest, found.broken_P)
    if not found.reads_ends:
        valid_L = valid_L & somewhere_on_path(forest, found.spoken_P)
    counts_P = valid_L[forest.pair_leaf_P]
    node_V = forest.pair_node_P[counts_P]
    path_N, _ = mean_of_groups(found.path_P[counts_P], torch.ones_like(node_V), node_V, len(forest.parent_N))
    return (found.own_N + path_N).index_add(0, forest.leaf_node_L, found.end_L), valid_L


def token_weight(trained_P: Tensor, pair_node_P: Tensor, num_nodes: int, rule: TokenWeight) -> Tensor:
    """How much each pair counts: with k trained trajectories through a step, each of its k pairs counts

    per_leaf 1 (the step counts k times, as k copies would), sqrt_leaf 1/sqrt(k) (TreeRL, arXiv 2506.11902),
    unique 1/k (once). Pairs that are not trained count 0 and are not among the k, as if they had not been sampled.

    Returns: float64 [P].
    """
    share_P = trained_P.to(torch.float64)
    num_trained_N = pair_node_P[trained_P].bincount(minlength=num_nodes).clamp(min=1)
    match rule:
        case TokenWeight.per_leaf:
            return share_P
        case TokenWeight.sqrt_leaf:
            return share_P / num_trained_N[pair_node_P].sqrt()
        case TokenWeight.unique:
            return share_P / num_trained_N[pair_node_P]


def _whitened_parts(parts: dict[str, Tensor], weight_P: Tensor) -> dict[str, Tensor]:
    """The parts of the whitened sum: each less its own mean, all divided by the deviation of the sum."""
    if not parts:
        return parts
    scale = inverse_deviation(torch.stack(list(parts.values())).sum(0), weight_P)
    return {name: (part_P - weighted_mean(part_P, weight_P)) * scale for name, part_P in parts.items()}


def _critic_credit(forest: Forest, cfg: GaeConfig, max_steps: int) -> tuple[CriticCredit, Tensor]:
    """What the critic makes of the forest, and the trajectories [L] it speaks for."""
    reward_N, valid_L = gae_rewards(forest, cfg, max_steps)
    num_leaves_N = forest.pair_node_P[valid_L[forest.pair_leaf_P]].bincount(minlength=len(forest.parent_N))
    critic = critic_credit(reward_N, critic_values(forest), forest.parent_N, num_leaves_N, forest.num_actions_N, cfg)
    return critic, valid_L


def _credit(
    forest: Forest,
    weight_P: Tensor,
    parts: dict[str, Tensor],
    critic: CriticCredit | None,
    history: dict[str, Moments],
) -> Credit:
    def per_node(value_P: Tensor) -> Tensor:
        return value_P.new_zeros(len(forest.parent_N)).index_add(0, forest.pair_node_P, value_P)

    advantage_P = torch.stack(list(parts.values())).sum(0)
    w_pos_N = per_node(weight_P * advantage_P.clamp(min=0))
    w_neg_N = per_node(weight_P * advantage_P.clamp(max=0))
    w0_N = per_node(weight_P)
    return Credit(
        advantage_P=advantage_P.float(),
        weight_P=weight_P.float(),
        parts={name: part_P.float() for name, part_P in parts.items()},
        w_pos_N=w_pos_N.float(),
        w_neg_N=w_neg_N.float(),
        w0_N=w0_N.float(),
        # A step without a trained pair has 0 / 0; any divisor gives the 0 it should have.
        advantage_N=((w_pos_N + w_neg_N) / torch.where(w0_N > 0, w0_N, 1)).float(),
        critic=critic,
        history=history,
    )


def _check_terms(forest: Forest, cfg: CreditConfig) -> None:
    has_gae = cfg.gae.level is not GaeLevel.off
    if not cfg.terms and not has_gae:
        raise ConfigError(
            "credit.terms is empty: every advantage would be 0 and nothing would be learned. "
            "Choose a recipe, e.g. credit=tree_step, or add a term."
        )
    faults = term_faults(cfg)
    if faults:
        raise ConfigError(faults[0])
    uses: list[tuple[str, bool, TermConfig | GaeConfig]] = [
        (f"credit.terms.{name}", reads_steps(term), term) for name, term in cfg.terms.items()
    ]
    if has_gae:
        assert GAE_PART not in cfg.terms, "the checks refuse a term of this name, which stands for the critic's part"
        uses.append(("credit.gae", True, cfg.gae))
    for key, of_steps, reader in uses:
        signals = reader.signals
        if not signals:
            raise ConfigError(
                f"{key}.signals is empty: there would be nothing but zeros to give credit for. "
                f"Name a signal, e.g. signals: {{outcome: {{}}}}, or remove {key}."
            )
        for signal, use in signals.items():
            _check_signal(forest, key, of_steps, signal, use)
        sides = {signal in forest.step_signals for signal in signals}
        if reader.combine is not Combine.sum and len(sides) == 1 and len(forest.parent_N):
            raise ConfigError(one_sided(key, reader.combine, missing_steps=sides == {False}))


def _check_signal(forest: Forest, key: str, reads_both: bool, signal: str, use: SignalUse) -> None:
    of_steps, of_leaves = signal in forest.step_signals, signal in forest.leaf_signals
    if not of_steps and not of_leaves:
        if len(forest.parent_N):  # a batch without a trained trajectory has nothing to score, so nothing is missing
            raise ConfigError(_unknown_signal(forest, key, signal))
    elif not reads_both and not of_leaves:
        raise ConfigError(
            f'{key}.signals names "{signal}", which scores steps, but the term has level=trajectory and needs one '
            f"value for a whole trajectory. Use level=step, returns=broadcast to sum it over the steps, or a source "
            f"with level=trajectory."
        )
    elif of_leaves and not of_steps and (use.read is not Read.score or use.best_of != 1):
        raise ConfigError(
            f"{key}.signals.{signal} has read={use.read.value} and best_of={use.best_of}, but it scores whole "
            f"trajectories, which have no steps to read from. Use read=score and best_of=1, or a signal of steps."
        )
    elif reads_both and of_steps and of_leaves:
        raise ConfigError(
            f'{key}.signals names "{signal}", which is fed by sources of steps and by sources of trajectories: which '
            f"is meant cannot be told. Give one of them another name with rewards.sources.<source>.signal."
        )


def _unknown_signal(forest: Forest, key: str, signal: str) -> str:
    available = sorted({*forest.step_signals, *forest.leaf_signals})
    near = difflib.get_close_matches(signal, available, n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    return (
        f'{key}.signals names "{signal}", which no tree of the batch has, so the term could train nothing. '
        f"Available: {', '.join(available) or 'none'}.{hint} Name one of these, or add a source that feeds it."
    )
