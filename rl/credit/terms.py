"""A term: values of steps or trajectories, compared within a scope, as an advantage of every pair it speaks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.check_credit import ANCESTORS, BASELINES, TOKEN_MEANS
from conf.schema import Backup, Combine, Compare, Level, Normalizer, Return, Scope, TermConfig
from rl.credit.backup import backed_up, continuation_weights, mean_of_groups
from rl.credit.cases import four_cases
from rl.credit.critic import critic_values
from rl.credit.custom import custom_values
from rl.credit.forest import Forest
from rl.credit.normalize import NOTHING_SEEN, Moments, less_token_mean, normalized, rounding, with_policy
from rl.credit.reads import best_of
from rl.credit.returns import somewhere_after, to_go
from rl.credit.scopes import ended_before, group_ids
from rl.credit.signals import (
    Rewards,
    immediate_values,
    is_last,
    known_to_go,
    prompt_score,
    rewards_of,
    scaled,
    somewhere_on_path,
    to_go_values,
    unbroken_to_go,
)


@dataclass(frozen=True, slots=True)
class TermCredit:
    """What a term makes of a forest."""

    advantage_P: Tensor
    """float64, before the term's weight; 0 where it does not speak."""
    valid_P: Tensor
    """bool, pairs the term speaks for."""
    value_P: Tensor
    """float64, what was compared; anything where it does not speak."""
    history: Moments | None = None
    """With Normalizer.running: of all that the term has seen, this batch included."""


@dataclass(frozen=True, slots=True)
class _Values:
    """What is compared: X steps, trajectories or pairs."""

    value_X: Tensor
    valid_X: Tensor
    group_X: Tensor
    tokens_X: Tensor
    """Sampled tokens of each."""
    at_P: Tensor
    """Which of them each pair belongs to."""


def term_credit(forest: Forest, term: TermConfig, max_steps: int, history: Moments | None = None) -> TermCredit:
    """One term's advantage, given to every pair it speaks for.

        signals -> what each step earns (`rewards_of`) -> return -> backup -> compared in the scope by the normaliser

    A term with a function of the user's has it in place of all that comes before the comparison. With Compare.rewards
    the comparison comes before the return: what each step earns is compared, and the return is taken of that.

    Args:
        forest: the trained paths of a batch.
        term: its weight is not read.
        max_steps: depth limit of the trees, for signals with `bound`.
        history: of a term with Normalizer.running, what it saw before this batch.
    Raises: UnscoredNode when a scaled signal overflows.
    """
    if term.fn:
        return _custom(forest, term, history)
    found = rewards_of(forest, term.signals, term.combine, term.gamma, max_steps)
    if term.combine is Combine.four_cases:
        return _four_cases(forest, term, found)
    if term.level is Level.trajectory:
        value_L, valid_L = _trajectory_values(found, forest, term.returns)
        if term.scope in ANCESTORS:
            return _among_ancestors(forest, term, value_L, valid_L)
        return _compared(forest, term, _of_leaves(forest, term, value_L, valid_L), history)
    if term.compare is Compare.rewards:
        return _rewards_compared(forest, term, found, history)
    value_P, valid_P, own_N = _pair_values(forest, term, found)
    if term.backup is Backup.none:
        value_P = value_P + own_N[forest.pair_node_P]
        values = _of_pairs(forest, term, value_P, valid_P)
    else:
        value_N, valid_N = _of_steps(forest, term, found, value_P, valid_P)
        values = _of_nodes(forest, term, torch.where(valid_N, value_N + own_N, 0), valid_N)
    if term.scope is Scope.critic:
        before_N = _before_each_step(forest)
        before_X = before_N[forest.pair_node_P] if term.backup is Backup.none else before_N
        return _less(values, before_X, torch.ones_like(values.valid_X), term)
    if term.scope in BASELINES:
        assert term.backup is not Backup.none, "the checks refuse a trajectory's own value of the step before"
        return _less(values, *_baseline(forest, term, found, values.value_X, values.valid_X, max_steps), term)
    return _compared(forest, term, values, history)


def _custom(forest: Forest, term: TermConfig, history: Moments | None) -> TermCredit:
    value_X, valid_X = custom_values(forest, term)
    if term.scope in ANCESTORS:
        return _among_ancestors(forest, term, value_X, valid_X)
    if term.level is Level.trajectory:
        values = _of_leaves(forest, term, value_X, valid_X)
    elif term.backup is Backup.none:
        values = _of_pairs(forest, term, value_X, valid_X)
    else:
        values = _of_nodes(forest, term, value_X, valid_X)
    return _compared(forest, term, values, history)


def _trajectory_values(found: Rewards, forest: Forest, returns: Return) -> tuple[Tensor, Tensor]:
    """What a trajectory is worth: its own signals, and with a broadcast what its steps earn, as a sum or a mean.

    A trajectory is not valid where one of its own signals was not scored, where one of a step's failed, or where
    nothing says anything of it.

    Returns: float64 [L], 0 where not valid; bool [L].
    """
    if returns is Return.immediate:
        return found.end_L, found.known_L
    steps_P = found.steps_per_pair(forest)
    steps_L = found.end_L.new_zeros(len(found.end_L)).index_add(0, forest.pair_leaf_P, steps_P)
    spoken_L = torch.zeros_like(forest.length_L).index_add(0, forest.pair_leaf_P, found.spoken_P.long())
    if returns is Return.broadcast_mean:
        steps_L = steps_L / spoken_L.clamp(min=1)
    valid_L = found.known_L & ~somewhere_on_path(forest, found.broken_P)
    if not found.reads_ends:
        valid_L = valid_L & (spoken_L > 0)
    return torch.where(valid_L, found.end_L + steps_L, 0), valid_L


def _pair_values(forest: Forest, term: TermConfig, found: Rewards) -> tuple[Tensor, Tensor, Tensor]:
    """Value of each pair [P], where it is known [P], and what is to be added for the step alone [N]."""
    if term.returns is Return.to_go:
        value_P, valid_P = to_go_values(found, forest, gamma=term.gamma)
        return value_P, valid_P, torch.zeros_like(found.own_N)
    own_N, path_P, valid_P = immediate_values(found, forest, term.combine, gamma=term.gamma)
    return path_P, valid_P, own_N


def _of_steps(
    forest: Forest, term: TermConfig, found: Rewards, value_P: Tensor, valid_P: Tensor
) -> tuple[Tensor, Tensor]:
    """The backup of each step: float64 [N]; bool [N]."""
    weight_P = _backup_weights(forest, term, found)
    return backed_up(term.backup, value_P, valid_P, weight_P, forest.pair_node_P, len(forest.parent_N))


def _backup_weights(forest: Forest, term: TermConfig, found: Rewards) -> Tensor:
    """Weights [P] of the trajectories through each step. A return-to-go needs all that follows; a step's own reward,
    whatever other steps earn, the end of the trajectory alone."""
    if term.backup is not Backup.child_mean:
        return torch.ones_like(found.path_P)
    taken_P = unbroken_to_go(found, forest) if term.returns is Return.to_go else found.known_L[forest.pair_leaf_P]
    return continuation_weights(taken_P, forest.pair_node_P, forest.pair_leaf_P, forest.parent_N)


def _of_leaves(forest: Forest, term: TermConfig, value_L: Tensor, valid_L: Tensor) -> _Values:
    tokens_L = torch.zeros_like(value_L).index_add(
        0, forest.pair_leaf_P, forest.num_actions_N[forest.pair_node_P].to(value_L.dtype)
    )
    group_L = group_ids(forest, Level.trajectory, term.scope)
    return _Values(value_L, valid_L, group_L, tokens_L, forest.pair_leaf_P)


def _of_nodes(forest: Forest, term: TermConfig, value_N: Tensor, valid_N: Tensor) -> _Values:
    return _Values(value_N, valid_N, _groups(forest, term), forest.num_actions_N.to(value_N.dtype), forest.pair_node_P)


def _of_pairs(forest: Forest, term: TermConfig, value_P: Tensor, valid_P: Tensor) -> _Values:
    tokens_P = forest.num_actions_N[forest.pair_node_P].to(value_P.dtype)
    return _Values(value_P, valid_P, _groups(forest, term)[forest.pair_node_P], tokens_P, torch.arange(len(value_P)))


def _groups(forest: Forest, term: TermConfig) -> Tensor:
    """Int64 [N]; what is compared with one value is in no group."""
    if term.scope in BASELINES:
        return torch.zeros_like(forest.prompt_N)
    return group_ids(forest, Level.step, term.scope)


def _compared(forest: Forest, term: TermConfig, values: _Values, history: Moments | None) -> TermCredit:
    """Compare with a group."""
    value_X, valid_X, group_X, tokens_X = values.value_X, values.valid_X, values.group_X, values.tokens_X
    before = history or NOTHING_SEEN
    if term.scope is Scope.turn_index_padded:
        ended, group_E = ended_before(forest)
        value_X = torch.cat([value_X, value_X.new_zeros(len(ended))])
        valid_X = torch.cat([valid_X, _counts(forest, values)[ended]])
        group_X, tokens_X = torch.cat([group_X, group_E]), torch.cat([tokens_X, tokens_X.new_ones(len(ended))])
    weight_X = tokens_X if term.token_weighted else None
    advantage_X, speaks_X = normalized(value_X, valid_X, group_X, term, weight_N=weight_X, history=before)
    after = before.including(value_X, valid_X) if term.normalizer is Normalizer.running else None
    return TermCredit(advantage_X[values.at_P], speaks_X[values.at_P], values.value_X[values.at_P], after)


def _counts(forest: Forest, values: _Values) -> Tensor:
    """Bool [L], trajectories of which some step's value is known: an ended one was sampled, and earned nothing more."""
    return somewhere_on_path(forest, values.valid_X[values.at_P])


def _rewards_compared(forest: Forest, term: TermConfig, found: Rewards, history: Moments | None) -> TermCredit:
    """Compare what each step earns, then take the return of it; not where none of the rewards could be compared."""
    known_P = known_to_go(found, forest)
    speaks_P = found.spoken_P | (is_last(forest) & found.reads_ends)
    reward_P = found.per_pair(forest)
    valid_P = known_P & speaks_P
    if term.normalizer in TOKEN_MEANS:
        # The mean is over all tokens of a trajectory: a step that nothing was said of earned 0 with its own.
        values = _of_pairs(forest, term, reward_P, known_P)
        group_L = group_ids(forest, Level.trajectory, term.scope)
        compared_P, speaks_P = less_token_mean(reward_P, known_P, values.tokens_X, forest.pair_leaf_P, group_L, term)
    else:
        values = _of_pairs(forest, term, reward_P, valid_P)
        if not found.varies:  # what is the same in all trajectories through a step is compared once
            node_V = forest.pair_node_P[valid_P]
            reward_N, valid_N = mean_of_groups(reward_P[valid_P], torch.ones_like(node_V), node_V, len(forest.parent_N))
            values = _of_nodes(forest, term, reward_N, valid_N)
        compared = _compared(forest, term, values, history)
        compared_P, speaks_P, history = compared.advantage_P, compared.valid_P & valid_P, compared.history
    value_P = to_go(torch.where(speaks_P, compared_P, 0), forest.pair_leaf_P, gamma=term.gamma)
    known_P = known_P & somewhere_after(speaks_P, forest.pair_leaf_P)
    if term.backup is Backup.none:
        return TermCredit(torch.where(known_P, value_P, 0), known_P, reward_P, history)
    value_N, valid_N = _of_steps(forest, term, found, value_P, known_P)
    return TermCredit(value_N[forest.pair_node_P], valid_N[forest.pair_node_P], reward_P, history)


def _before_each_step(forest: Forest) -> Tensor:
    """Float64 [N], what the critic said of the state before the step's first token."""
    return critic_values(forest)[forest.num_actions_N.cumsum(0) - forest.num_actions_N]


def _among_ancestors(forest: Forest, term: TermConfig, value_L: Tensor, valid_L: Tensor) -> TermCredit:
    """Compare a trajectory with those through each of its steps, and with its prompt's; one mean over these groups.

        A_k = mean over d of (R_k - mean{R_j : j below k's ancestor at depth d}), d = 0 the prompt     TreePO
        (arXiv 2508.17445); groups of one below the prompt say nothing and are in no mean

    With Scope.ancestors_by_size each group counts as often as it has trajectories.
    """
    node_P, leaf_P = forest.pair_node_P, forest.pair_leaf_P
    of_prompt_L, speaks_L = normalized(value_L, valid_L, forest.prompt_L, term)
    below_P, counts_P = normalized(value_L[leaf_P], valid_L[leaf_P], node_P, term)
    size_N = node_P[valid_L[leaf_P]].bincount(minlength=len(forest.parent_N))
    counts_P = counts_P & (size_N[node_P] > 1)
    if term.scope is Scope.ancestors_by_size:
        num_prompts = int(forest.prompt_L.max()) + 1 if len(forest.prompt_L) else 0
        size_L = forest.prompt_L[valid_L].bincount(minlength=num_prompts)[forest.prompt_L]
        share_L, share_P = speaks_L * size_L, counts_P * size_N[node_P]
    else:
        share_L, share_P = speaks_L, counts_P
    share_L, share_P = share_L.to(value_L.dtype), share_P.to(value_L.dtype)
    sum_L = (share_L * of_prompt_L).index_add(0, leaf_P, share_P * below_P)
    share_L = share_L.index_add(0, leaf_P, share_P)
    advantage_L = sum_L / torch.where(share_L > 0, share_L, 1)
    return TermCredit(advantage_L[leaf_P], (share_L > 0)[leaf_P], value_L[leaf_P])


def _baseline(
    forest: Forest, term: TermConfig, found: Rewards, value_N: Tensor, valid_N: Tensor, max_steps: int
) -> tuple[Tensor, Tensor]:
    """The value of the step before, or of the prompt, that a step is compared with; and where it is known; [N] both."""
    prompt_G, known_G = _prompt_values(forest, term, found, max_steps)
    from_prompt_N, known_N = prompt_G[forest.prompt_N], known_G[forest.prompt_N]
    if term.scope is Scope.root_value:
        return from_prompt_N, known_N
    has_parent_N = forest.parent_N >= 0
    baseline_N = torch.where(has_parent_N, value_N[forest.parent_N], from_prompt_N)
    return baseline_N, torch.where(has_parent_N, valid_N[forest.parent_N], known_N)


def _prompt_values(forest: Forest, term: TermConfig, found: Rewards, max_steps: int) -> tuple[Tensor, Tensor]:
    """Value of each prompt [G] and where it is known: the backup of its first steps, as of a step with these children.

    A signal of steps that speaks of the prompt itself is taken at its word; one that does not, as the mean over the
    first steps.
    """
    value_P, valid_P, own_N = _pair_values(forest, term, found)
    first_P = forest.depth_N[forest.pair_node_P] == 1
    group_P = forest.prompt_N[forest.pair_node_P]
    num_prompts = int(forest.prompt_N.max()) + 1 if len(forest.prompt_N) else 0
    weight_P = _backup_weights(forest, term, found)
    value_G, known_G = backed_up(term.backup, value_P, valid_P & first_P, weight_P, group_P, num_prompts)
    first_V = forest.pair_node_P[valid_P & first_P].unique()
    mean_G, _ = mean_of_groups(own_N[first_V], torch.ones_like(first_V), forest.prompt_N[first_V], num_prompts)
    told_G = torch.zeros_like(mean_G)
    for name, use in term.signals.items():
        if name in forest.step_signals:
            score_G = best_of(prompt_score(forest, name), use.best_of)[:num_prompts]
            told_G = told_G + scaled(score_G, use, term.gamma, max_steps)
    return value_G + torch.where(told_G.isnan(), mean_G, told_G), known_G


def _less(values: _Values, baseline_X: Tensor, known_X: Tensor, term: TermConfig) -> TermCredit:
    """Compare with one value; the two being equal is the zero variance of such a scope."""
    value_X, valid_X = values.value_X, values.valid_X & known_X
    largest_X = torch.maximum(value_X.abs(), baseline_X.abs())
    gap_X = torch.where(valid_X, value_X - baseline_X, 0)
    equal_X = valid_X & (gap_X.abs() <= rounding(largest_X))
    gap_X, valid_X = with_policy(gap_X, valid_X, value_X, equal_X, term.zero_variance)
    return TermCredit(gap_X[values.at_P], valid_X[values.at_P], value_X[values.at_P])


def _four_cases(forest: Forest, term: TermConfig, found: Rewards) -> TermCredit:
    group_L = group_ids(forest, Level.trajectory, term.scope)
    compared_L, speaks_L = normalized(found.end_L, found.known_L, group_L, term)
    is_right_L = found.known_L & (found.end_L > 0)
    num_groups = int(group_L.max()) + 1 if len(group_L) else 0
    group_V = group_L[found.known_L]
    right_V = is_right_L[found.known_L].to(compared_L.dtype)
    right_G, _ = mean_of_groups(right_V, torch.ones_like(group_V), group_V, num_groups)
    leaf_P = forest.pair_leaf_P
    advantage_P = four_cases(
        compared_L[leaf_P], is_right_L[leaf_P], right_G[group_L][leaf_P], found.steps_per_pair(forest)
    )
    valid_P = speaks_L[leaf_P] & ~found.broken_P
    return TermCredit(torch.where(valid_P, advantage_P, 0), valid_P, found.end_L[leaf_P])
