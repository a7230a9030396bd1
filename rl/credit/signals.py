"""From the signals of a forest to what each step earns in each trajectory, before anything is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import Combine, Read, SignalUse
from rl.credit import reads
from rl.credit.backup import decayed
from rl.credit.forest import Forest
from rl.credit.returns import somewhere_after, to_go

PATH_READS = (Read.lookahead, Read.soft_min)
"""What a step earns by these depends on the other steps of the trajectory."""


@dataclass(kw_only=True, slots=True)
class Rewards:
    """What each step earns in each trajectory through it: own_N + path_P + end_L at the trajectory's last step.

    A step that nothing was said of earns 0; what a source broke is no number to be used.
    """

    own_N: Tensor
    """float64 [N], from signals of steps, whatever the trajectory."""
    path_P: Tensor
    """float64 [P], from signals of steps that depend on the trajectory."""
    end_L: Tensor
    """float64 [L], from signals of trajectories; 0 where not known."""
    spoken_P: Tensor
    """bool [P], where a signal of steps says something."""
    broken_P: Tensor
    """bool [P], where one of them failed or timed out."""
    known_L: Tensor
    """bool [L], trajectories of which all signals are known; True where the term reads none."""
    reads_ends: bool
    """Whether the term reads signals of trajectories."""
    varies: bool
    """Whether what a step earns may differ between the trajectories through it, their ends apart."""

    def per_pair(self, forest: Forest) -> Tensor:
        """float64 [P], what the step earns in the trajectory."""
        return self.steps_per_pair(forest) + torch.where(is_last(forest), self.end_L[forest.pair_leaf_P], 0)

    def steps_per_pair(self, forest: Forest) -> Tensor:
        """float64 [P], the same without what the trajectory earns at its end."""
        return self.own_N[forest.pair_node_P] + self.path_P

    def speaks(self, forest: Forest) -> Tensor:
        """bool [P], where something is said of the step or of the trajectory's end."""
        if not self.reads_ends:
            return self.spoken_P
        return torch.ones_like(self.spoken_P)


def rewards_of(
    forest: Forest, signals: Mapping[str, SignalUse], combine: Combine, gamma: float, max_steps: int
) -> Rewards:
    """Read the signals of a term or of GAE.

    A signal that does not apply to a step adds nothing there: it counts as 0 after `scale` and `shift`, so one whose
    middle is not 0 should be shifted there.

    Args:
        gamma: decay of the term, for `bound` and Read.max_return.
        max_steps: depth limit of the trees, for `bound`.
    """
    end_L, known_L = trajectory_values(forest, signals, gamma, max_steps)
    no_P = torch.zeros(len(forest.pair_node_P), dtype=torch.bool)
    found = Rewards(
        own_N=torch.zeros(len(forest.parent_N), dtype=torch.float64),
        path_P=torch.zeros(len(forest.pair_node_P), dtype=torch.float64),
        end_L=end_L,
        spoken_P=no_P,
        broken_P=no_P,
        known_L=known_L,
        reads_ends=any(name in forest.leaf_signals for name in signals),
        varies=combine in (Combine.renorm, Combine.gate) or any(use.read in PATH_READS for use in signals.values()),
    )
    for name, use in signals.items():
        if name in forest.step_signals:
            _add(found, forest, name, use, gamma, max_steps)
    _combine(found, forest, combine)
    return found


def trajectory_values(
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
            value_L = value_L + scaled(forest.leaf_signals[name], use, gamma, max_steps)
    valid_L = ~value_L.isnan()
    return torch.where(valid_L, value_L, 0), valid_L


def scaled(signal: Tensor, use: SignalUse, gamma: float, max_steps: int) -> Tensor:
    """scale * signal + shift, then the bound: a signal in [-1, +1] ends up in +-gamma^max_steps / 2."""
    value = use.scale * signal + use.shift
    return value * (gamma**max_steps / 2) if use.bound else value


def prompt_score(forest: Forest, name: str) -> Tensor:
    """Float64 [G], what a signal of steps says of the prompts; NaN for what the learner measures of steps alone."""
    num_prompts = int(forest.prompt_N.max()) + 1 if len(forest.prompt_N) else 0
    return forest.prompt_signals.get(name, torch.full((num_prompts,), torch.nan, dtype=torch.float64))


def is_last(forest: Forest) -> Tensor:
    """Bool [P], the last step of the trajectory."""
    return forest.depth_N[forest.pair_node_P] == forest.length_L[forest.pair_leaf_P]


def somewhere_on_path(forest: Forest, is_P: Tensor) -> Tensor:
    """Bool [L], trajectories with a step of which it is true."""
    count_L = torch.zeros_like(forest.length_L).index_add(0, forest.pair_leaf_P, is_P.long())
    return count_L > 0


def _add(found: Rewards, forest: Forest, name: str, use: SignalUse, gamma: float, max_steps: int) -> None:
    """Add one signal of steps."""
    failed_N = forest.step_failed[name]
    score_N, prompt_G = (
        reads.best_of(each, use.best_of) for each in (forest.step_signals[name], prompt_score(forest, name))
    )
    failed_P = failed_N[forest.pair_node_P]
    match use.read:
        case Read.score:
            pass
        case Read.max_return:
            score_P = score_N[forest.pair_node_P]
            score_N = score_N / reads.largest_return(score_P, forest.pair_leaf_P, gamma=gamma)
        case Read.difference | Read.lookahead:
            before_N = reads.before(score_N, forest.parent_N, forest.prompt_N, prompt_G)
            score_N = score_N - before_N
            parent_failed_N = failed_N[forest.parent_N] & (forest.parent_N >= 0)
            failed_P = (failed_N | parent_failed_N)[forest.pair_node_P]
    if use.read in PATH_READS:
        score_P = score_N[forest.pair_node_P]
        if use.read is Read.lookahead:
            read_P = reads.lookahead(score_P, forest.pair_leaf_P)
        else:
            read_P = reads.soft_min(score_P, forest.pair_leaf_P, len(forest.leaf_node_L))
        value_P = scaled(read_P, use, gamma, max_steps)
        found.path_P = found.path_P + torch.where(value_P.isnan(), 0, value_P)
        # What a step earns here depends on others of the trajectory, so one of them that failed spoils all.
        failed_P = somewhere_on_path(forest, failed_P)[forest.pair_leaf_P]
        found.spoken_P = found.spoken_P | ~value_P.isnan()
    else:
        value_N = scaled(score_N, use, gamma, max_steps)
        found.own_N = found.own_N + torch.where(value_N.isnan(), 0, value_N)
        found.spoken_P = found.spoken_P | ~value_N.isnan()[forest.pair_node_P]
    found.broken_P = found.broken_P | failed_P


def _combine(found: Rewards, forest: Forest, combine: Combine) -> None:
    match combine:
        case Combine.sum | Combine.four_cases:
            return
        case Combine.gate:
            open_P = found.end_L[forest.pair_leaf_P] > 0
            found.path_P = torch.where(open_P, found.steps_per_pair(forest), 0)
            found.own_N = torch.zeros_like(found.own_N)
        case Combine.overwrite | Combine.renorm:
            last_P = is_last(forest)
            found.own_N = found.own_N.index_fill(0, forest.leaf_node_L, 0)
            found.path_P = torch.where(last_P, 0, found.path_P)
            found.spoken_P = found.spoken_P & ~last_P
            found.broken_P = found.broken_P & ~last_P
            if combine is Combine.renorm:
                found.path_P = found.path_P + torch.where(found.spoken_P, found.end_L[forest.pair_leaf_P], 0)


def immediate_values(
    found: Rewards, forest: Forest, combine: Combine, *, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A step's own reward, and what its trajectories earn at their ends, decayed over the steps between.

    With Combine.renorm the end counts at each scored step as it is, because that is what the step earns there.

    Returns: float64 [N], the part that is the same in all trajectories; float64 [P], what each trajectory adds;
        bool [P], pairs of which the value is known.
    """
    depth_P = forest.depth_N[forest.pair_node_P]
    valid_P = found.known_L[forest.pair_leaf_P] & ~found.broken_P
    if combine is Combine.renorm:
        last_P = is_last(forest)
        end_P = torch.where(last_P, found.end_L[forest.pair_leaf_P], 0)
        return found.own_N, found.path_P + end_P, valid_P & (found.spoken_P | last_P)
    end_P = decayed(found.end_L, forest.length_L, depth_P, forest.pair_leaf_P, gamma=gamma)
    return found.own_N, found.path_P + end_P, valid_P & found.speaks(forest)


def known_to_go(found: Rewards, forest: Forest) -> Tensor:
    """Bool [P], pairs of which all that is still to be earned is known, and something of it is said."""
    return unbroken_to_go(found, forest) & somewhere_after(found.speaks(forest), forest.pair_leaf_P)


def unbroken_to_go(found: Rewards, forest: Forest) -> Tensor:
    """Bool [P], pairs of which nothing that is still to be earned is missing; where one is, so are those behind it."""
    return found.known_L[forest.pair_leaf_P] & ~somewhere_after(found.broken_P, forest.pair_leaf_P)


def to_go_values(found: Rewards, forest: Forest, *, gamma: float) -> tuple[Tensor, Tensor]:
    """Return-to-go of each pair: float64 [P]; bool [P], where it is known."""
    return to_go(found.per_pair(forest), forest.pair_leaf_P, gamma=gamma), known_to_go(found, forest)
