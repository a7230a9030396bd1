"""Credit: the weighted sum of terms and of what a critic says, for every pair of a step and a trajectory through it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.check_credit import GAE_PART
from conf.errors import ConfigError
from conf.schema import Backup, CreditConfig, GaeConfig, GaeLevel, Level, SignalUse, TermConfig, TokenWeight
from rl.credit.critic import CriticCredit, critic_credit
from rl.credit.forest import Forest
from rl.credit.returns import leaf_max, leaf_mean
from rl.credit.scopes import group_ids, inverse_deviation, normalized, weighted_mean


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
    """Only with GAE: `extra_T` is added at the token to the advantage of every pair of its step."""


def assign(forest: Forest, cfg: CreditConfig, max_steps: int) -> Credit:
    """Advantages of every (step, trajectory) pair of a batch.

    A_(n,k) = sum over terms of weight * compared(value), where the value is the trajectory's for a trajectory term and
    the step's for a step term; whitened over the batch if asked for; plus the critic's advantage of the step or token.
    A term that is not valid for a pair (see `leaf_values` and `step_values`) contributes nothing to it; a pair without
    one valid contribution of non-zero weight is neither trained nor counted. With GAE neither is a pair of a trajectory
    whose rewards are not known (see `gae_rewards`), whatever the terms say of it: what the critic makes of a token goes
    to all trajectories through it.

    Args:
        forest: the trained paths of the batch, with the critic's values where GAE is on (`with_measured`).
        cfg: terms, GAE, and how often a shared step counts.
        max_steps: depth limit of the trees (rollout.max_steps), for signals with `bound`.
    Raises: ConfigError when a term names no signal, one that no tree has, or one of the wrong level;
        UnscoredNode when a scaled signal overflows.
    """
    _check_signals(forest, cfg)
    num_nodes = len(forest.parent_N)
    parts: dict[str, Tensor] = {}
    trained_P = torch.zeros(len(forest.pair_node_P), dtype=torch.bool)
    for name, term in cfg.terms.items():
        advantage_P, valid_P = term_advantage(forest, term, max_steps)
        parts[name] = term.weight * advantage_P
        if term.weight != 0:  # a term switched off by its weight must not make a pair count
            trained_P |= valid_P
    if cfg.whiten:
        weight_P = token_weight(trained_P, forest.pair_node_P, num_nodes, cfg.shared_token_weight)
        parts = _whitened_parts(parts, weight_P * forest.num_actions_N[forest.pair_node_P])
    critic = None
    if cfg.gae.level is not GaeLevel.off:
        critic, valid_L = _critic_credit(forest, cfg.gae, max_steps)
        parts[GAE_PART] = critic.advantage_N.to(torch.float64)[forest.pair_node_P]
        trained_P = valid_L[forest.pair_leaf_P]
    parts = {name: torch.where(trained_P, part_P, 0) for name, part_P in parts.items()}
    weight_P = token_weight(trained_P, forest.pair_node_P, num_nodes, cfg.shared_token_weight)
    return _credit(forest, weight_P, parts, critic)


def term_advantage(forest: Forest, term: TermConfig, max_steps: int) -> tuple[Tensor, Tensor]:
    """One term's advantage before its weight, given to every pair it speaks for.

    Returns: float64 [P], 0 where not valid; bool [P], pairs the term speaks for.
    """
    if term.level is Level.trajectory:
        value_X, valid_X = leaf_values(forest, term.signals, term.gamma, max_steps)
        item_P = forest.pair_leaf_P
    else:
        value_X, valid_X = step_values(forest, term, max_steps)
        item_P = forest.pair_node_P
    advantage_X = normalized(value_X, valid_X, group_ids(forest, term.level, term.scope), term)
    return advantage_X[item_P], valid_X[item_P]


def leaf_values(
    forest: Forest, signals: Mapping[str, SignalUse], gamma: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    """Sum of those of the signals that are trajectories', at each leaf.

    All of them are needed: a trajectory of which one was not scored, for whatever reason, is not valid. It is compared
    by the verdict on its whole, and a missing verdict is not a middling one.

    Returns: float64 [L], 0 where not valid; bool [L].
    """
    value_L = torch.zeros(len(forest.leaf_node_L), dtype=torch.float64)
    for name, use in signals.items():
        if name in forest.leaf_signals:
            value_L = value_L + _read(forest.leaf_signals[name], use, gamma, max_steps)
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


def gae_rewards(forest: Forest, cfg: GaeConfig, max_steps: int) -> tuple[Tensor, Tensor]:
    """What each step earns, and the trajectories of which all rewards are known.

    A step earns its step signals, and the last step of a trajectory its trajectory signals too. What was not scored:
    - A trajectory is not valid where one of its trajectory signals was not scored, for whatever reason, where a step
      signal of one of its steps failed or timed out, or where no signal says anything of it or of its steps.
    - A step signal that does not apply earns 0, after `scale` and `shift`.

    Returns: float64 [N], sums of what was scored, which mean nothing on trajectories that are not valid; bool [L].
    """
    reward_N = torch.zeros(len(forest.parent_N), dtype=torch.float64)
    broken_N, spoken_N = (torch.zeros(len(forest.parent_N), dtype=torch.bool) for _ in range(2))
    for name, use in cfg.signals.items():
        if name in forest.step_signals:
            signal_N = _read(forest.step_signals[name], use, cfg.gamma, max_steps)
            reward_N = reward_N + torch.where(signal_N.isnan(), 0, signal_N)
            broken_N = broken_N | forest.step_failed[name]
            spoken_N = spoken_N | ~signal_N.isnan()
    valid_L = ~_somewhere_on_path(forest, broken_N)
    if any(name in forest.leaf_signals for name in cfg.signals):
        value_L, known_L = leaf_values(forest, cfg.signals, cfg.gamma, max_steps)
        return reward_N.index_add(0, forest.leaf_node_L, value_L), valid_L & known_L
    return reward_N, valid_L & _somewhere_on_path(forest, spoken_N)


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
    value_L, valid_L = leaf_values(forest, term.signals, term.gamma, max_steps)
    backup = leaf_max if term.backup is Backup.max else leaf_mean
    return backup(
        value_L, valid_L, forest.length_L, forest.depth_N, forest.pair_node_P, forest.pair_leaf_P, gamma=term.gamma
    )


def _somewhere_on_path(forest: Forest, is_N: Tensor) -> Tensor:
    """Bool [L], trajectories with a step of which it is true."""
    count_L = torch.zeros_like(forest.length_L).index_add(0, forest.pair_leaf_P, is_N[forest.pair_node_P].long())
    return count_L > 0


def _whitened_parts(parts: dict[str, Tensor], weight_P: Tensor) -> dict[str, Tensor]:
    """The parts of the whitened sum: each less its own mean, all divided by the deviation of the sum."""
    if not parts:
        return parts
    scale = inverse_deviation(torch.stack(list(parts.values())).sum(0), weight_P)
    return {name: (part_P - weighted_mean(part_P, weight_P)) * scale for name, part_P in parts.items()}


def _critic_credit(forest: Forest, cfg: GaeConfig, max_steps: int) -> tuple[CriticCredit, Tensor]:
    """What the critic makes of the forest, and the trajectories [L] it speaks for."""
    assert forest.value_T is not None, "GAE needs the critic's values: `with_measured` comes first"
    reward_N, valid_L = gae_rewards(forest, cfg, max_steps)
    num_leaves_N = forest.pair_node_P[valid_L[forest.pair_leaf_P]].bincount(minlength=len(forest.parent_N))
    critic = critic_credit(reward_N, forest.value_T, forest.parent_N, num_leaves_N, forest.num_actions_N, cfg)
    return critic, valid_L


def _credit(forest: Forest, weight_P: Tensor, parts: dict[str, Tensor], critic: CriticCredit | None) -> Credit:
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
    )


def _check_signals(forest: Forest, cfg: CreditConfig) -> None:
    has_gae = cfg.gae.level is not GaeLevel.off
    if not cfg.terms and not has_gae:
        raise ConfigError(
            "credit.terms is empty: every advantage would be 0 and nothing would be learned. "
            "Choose a recipe, e.g. credit=tree_step, or add a term."
        )
    uses = [(f"credit.terms.{name}", term.level, term.signals) for name, term in cfg.terms.items()]
    if has_gae:
        assert GAE_PART not in cfg.terms, "the checks refuse a term of this name, which stands for the critic's part"
        uses.append(("credit.gae", Level.step, cfg.gae.signals))
    for key, level, signals in uses:
        if not signals:
            raise ConfigError(
                f"{key}.signals is empty: there would be nothing but zeros to give credit for. "
                f"Name a signal, e.g. signals: {{outcome: {{}}}}, or remove {key}."
            )
        for signal in signals:
            _check_signal(forest, key, level, signal)


def _check_signal(forest: Forest, key: str, level: Level, signal: str) -> None:
    of_steps, of_leaves = signal in forest.step_signals, signal in forest.leaf_signals
    if not of_steps and not of_leaves:
        if len(forest.parent_N):  # a batch without a trained trajectory has nothing to score, so nothing is missing
            raise ConfigError(_unknown_signal(forest, key, signal))
    elif level is Level.trajectory and not of_leaves:
        raise ConfigError(
            f'{key}.signals names "{signal}", which scores steps, but the term has level=trajectory and needs one '
            f"value for a whole trajectory. Use level=step, or a source with level=trajectory."
        )
    elif level is Level.step and of_steps and of_leaves:
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
