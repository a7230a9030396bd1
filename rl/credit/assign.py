"""Credit: the weighted sum of terms, an advantage for every pair of a step and a trajectory through it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.errors import ConfigError
from conf.schema import Backup, CreditConfig, Level, SignalUse, TermConfig, TokenWeight
from rl.credit.forest import Forest
from rl.credit.returns import leaf_max, leaf_mean
from rl.credit.scopes import group_ids, normalized


@dataclass(kw_only=True, slots=True)
class Credit:
    """Advantages of a forest, per (step, trajectory) pair and summed per step. All float32, in the forest's order."""

    advantage_P: Tensor
    """Sum of the terms' contributions; 0 where no term is valid."""
    weight_P: Tensor
    """How much the pair counts in the loss and in its token count; 0 where no term is valid."""
    parts: dict[str, Tensor]
    """term -> its weighted contribution [P]; they add up to advantage_P."""
    w_pos_N: Tensor
    """Sum over a step's pairs of weight * max(advantage, 0): what clipping from above acts on."""
    w_neg_N: Tensor
    """Sum over a step's pairs of weight * min(advantage, 0): what clipping from below acts on."""
    w0_N: Tensor
    """Sum of a step's pair weights: how often each of its tokens counts; 0 for a step that is not trained."""
    advantage_N: Tensor
    """Weighted mean advantage of a step's pairs, for records; 0 for a step that is not trained."""


def assign(forest: Forest, cfg: CreditConfig, max_steps: int) -> Credit:
    """Advantages of every (step, trajectory) pair of a batch.

    A_(n,k) = sum over terms of weight * compared(value), where the value is the trajectory's for a trajectory term and
    the step's for a step term. A term that is not valid for a pair (see `leaf_values` and `step_values`) contributes
    nothing to it; a pair without one valid term of non-zero weight is neither trained nor counted.

    Args:
        forest: the trained paths of the batch.
        cfg: terms, and how often a shared step counts.
        max_steps: depth limit of the trees (rollout.max_steps), for signals with `bound`.
    Raises: ConfigError when a term names no signal, one that no tree has, or one of the wrong level;
        UnscoredNode when a scaled signal overflows.
    """
    _check_terms(forest, cfg)
    parts: dict[str, Tensor] = {}
    trained_P = torch.zeros(len(forest.pair_node_P), dtype=torch.bool)
    for name, term in cfg.terms.items():
        advantage_P, valid_P = term_advantage(forest, term, max_steps)
        parts[name] = term.weight * advantage_P
        if term.weight != 0:  # a term switched off by its weight must not make a pair count
            trained_P |= valid_P
    advantage_P = torch.stack(list(parts.values())).sum(0)
    weight_P = token_weight(trained_P, forest.pair_node_P, len(forest.parent_N), cfg.shared_token_weight)
    return _credit(forest, advantage_P, weight_P, parts)


def term_advantage(forest: Forest, term: TermConfig, max_steps: int) -> tuple[Tensor, Tensor]:
    """One term's advantage before its weight, given to every pair it speaks for.

    Returns: float64 [P], 0 where not valid; bool [P], pairs the term speaks for.
    """
    if term.level is Level.trajectory:
        value_X, valid_X = leaf_values(forest, term, max_steps)
        item_P = forest.pair_leaf_P
    else:
        value_X, valid_X = step_values(forest, term, max_steps)
        item_P = forest.pair_node_P
    advantage_X = normalized(value_X, valid_X, group_ids(forest, term.level, term.scope), term)
    return advantage_X[item_P], valid_X[item_P]


def leaf_values(forest: Forest, term: TermConfig, max_steps: int) -> tuple[Tensor, Tensor]:
    """Sum of a term's trajectory signals at each leaf.

    All of them are needed: a trajectory of which one was not scored, for whatever reason, is not valid. It is compared
    by the verdict on its whole, and a missing verdict is not a middling one.

    Returns: float64 [L], 0 where not valid; bool [L].
    """
    value_L = torch.zeros(len(forest.leaf_node_L), dtype=torch.float64)
    for name, use in term.signals.items():
        if name in forest.leaf_signals:
            value_L = value_L + _read(forest.leaf_signals[name], use, term.gamma, max_steps)
    valid_L = ~value_L.isnan()
    return torch.where(valid_L, value_L, 0), valid_L


def step_values(forest: Forest, term: TermConfig, max_steps: int) -> tuple[Tensor, Tensor]:
    """Sum of a term's signals at each step; trajectory signals are summed at the leaves and backed up first.

    What was not scored:
    - Trajectories that are not valid are left out of the backup; a step with none left is not valid.
    - A step signal that failed or timed out makes the step not valid: its sum is unknown, and to take the rest for the
      whole would rank it among siblings that were fully judged.
    - A step signal that does not apply adds nothing where another signal of the term speaks for the step: it counts as
      0 after `scale` and `shift`, so a signal whose middle is not 0 should be shifted there. A step that no signal
      speaks for is not valid.

    Returns: float64 [N], 0 where not valid; bool [N].
    """
    value_N = torch.zeros(len(forest.parent_N), dtype=torch.float64)
    spoken_N = torch.zeros(len(forest.parent_N), dtype=torch.bool)
    known_N = torch.ones(len(forest.parent_N), dtype=torch.bool)
    if any(name in forest.leaf_signals for name in term.signals):
        value_N, known_N = _backed_up(forest, term, max_steps)
        spoken_N = known_N
    for name, use in term.signals.items():
        if name in forest.step_signals:
            signal_N = _read(forest.step_signals[name], use, term.gamma, max_steps)
            value_N = value_N + torch.where(signal_N.isnan(), 0, signal_N)
            spoken_N = spoken_N | ~signal_N.isnan()
            known_N = known_N & ~forest.step_failed[name]
    valid_N = spoken_N & known_N
    return torch.where(valid_N, value_N, 0), valid_N


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


def _read(signal: Tensor, use: SignalUse, gamma: float, max_steps: int) -> Tensor:
    """scale * signal + shift, then the bound: a signal in [-1, +1] ends up in +-gamma^max_steps / 2."""
    value = use.scale * signal + use.shift
    return value * (gamma**max_steps / 2) if use.bound else value


def _backed_up(forest: Forest, term: TermConfig, max_steps: int) -> tuple[Tensor, Tensor]:
    value_L, valid_L = leaf_values(forest, term, max_steps)
    backup = leaf_max if term.backup is Backup.max else leaf_mean
    return backup(
        value_L, valid_L, forest.length_L, forest.depth_N, forest.pair_node_P, forest.pair_leaf_P, gamma=term.gamma
    )


def _credit(forest: Forest, advantage_P: Tensor, weight_P: Tensor, parts: dict[str, Tensor]) -> Credit:
    def per_node(value_P: Tensor) -> Tensor:
        return value_P.new_zeros(len(forest.parent_N)).index_add(0, forest.pair_node_P, value_P)

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
    )


def _check_terms(forest: Forest, cfg: CreditConfig) -> None:
    if not cfg.terms:
        raise ConfigError(
            "credit.terms is empty: every advantage would be 0 and nothing would be learned. "
            "Choose a recipe, e.g. credit=tree_step, or add a term."
        )
    for name, term in cfg.terms.items():
        if not term.signals:
            raise ConfigError(
                f"credit.terms.{name}.signals is empty: the term would compare zeros. "
                f"Name a signal, e.g. signals: {{outcome: {{}}}}, or remove the term."
            )
        for signal in term.signals:
            _check_signal(forest, f"credit.terms.{name}", term, signal)


def _check_signal(forest: Forest, key: str, term: TermConfig, signal: str) -> None:
    of_steps, of_leaves = signal in forest.step_signals, signal in forest.leaf_signals
    if not of_steps and not of_leaves:
        if len(forest.parent_N):  # a batch without a trained trajectory has nothing to score, so nothing is missing
            raise ConfigError(_unknown_signal(forest, key, signal))
    elif term.level is Level.trajectory and not of_leaves:
        raise ConfigError(
            f'{key}.signals names "{signal}", which scores steps, but the term has level=trajectory and needs one '
            f"value for a whole trajectory. Use level=step, or a source with level=trajectory."
        )
    elif term.level is Level.step and of_steps and of_leaves:
        raise ConfigError(
            f'{key}.signals names "{signal}", which is fed by sources of steps and by sources of trajectories: the '
            f"term cannot tell which is meant. Give one of them another name with rewards.sources.<source>.signal."
        )


def _unknown_signal(forest: Forest, key: str, signal: str) -> str:
    available = sorted({*forest.step_signals, *forest.leaf_signals})
    near = difflib.get_close_matches(signal, available, n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    return (
        f'{key}.signals names "{signal}", which no tree of the batch has, so the term could train nothing. '
        f"Available: {', '.join(available) or 'none'}.{hint} Name one of these, or add a source that feeds it."
    )
