"""What a critic makes of a forest: advantages of steps or tokens, and what it should have said."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import GaeConfig, GaeLevel
from rl.credit.forest import Forest
from rl.credit.gae import tree_gae
from rl.credit.normalize import whitened
from rl.credit.shapes import check_shapes


@dataclass(kw_only=True, slots=True)
class CriticCredit:
    """Per sampled token of a forest, nodes one after the other; all float32, in reward units unless whitened."""

    advantage_N: Tensor
    """Mean advantage over a step's tokens; 0 where it trains nothing."""
    extra_T: Tensor
    """How far a token's advantage lies from that mean; exactly 0 with one advantage per step."""
    value_T: Tensor
    """What the critic said of the state before the token."""
    target_T: Tensor
    """The return that it should have said: the advantage before it was whitened, plus the value it is measured from."""
    num_actions_N: Tensor
    """int64, tokens of each node."""

    def by_node(self, value_T: Tensor) -> list[list[float]]:
        """One of the token tensors as a list for each node."""
        return [values_A.tolist() for values_A in value_T.split(self.num_actions_N.tolist())]


def critic_values(forest: Forest) -> Tensor:
    """Float64 [T], what the critic said of the state before each sampled token; a batch of nothing has none."""
    if not len(forest.parent_N):
        return torch.zeros(0, dtype=torch.float64)
    assert forest.value_T is not None, "credit needs the critic's values: `with_measured` comes first"
    return forest.value_T


def critic_credit(
    reward_N: Tensor,
    value_T: Tensor,
    parent_N: Tensor,
    num_leaves_N: Tensor,
    num_actions_N: Tensor,
    cfg: GaeConfig,
) -> CriticCredit:
    """Advantages and targets of a forest by generalised advantage estimation.

    level=token: each action token is a node of its own; a step's reward stands at its last action token, so none falls
    on an observation, where no advantage could pick it up.
    level=step: a step is worth the value before its first token, and all its tokens share its advantage. Our reading:
    the critic learns the step's return at each of its tokens, since within a step nothing is earned or discounted, so
    that from all of its states the same return lies ahead; estimates that use only first tokens stay consistent.

    Args:
        reward_N: float64 [N], earned by the step, what its trajectory earns at its end included, in reward units.
        value_T: float64 [T], value of the state before each sampled token, nodes one after the other.
        parent_N: int64 [N], row of the parent, -1 for a first step.
        num_leaves_N: int64 [N], trajectories through the step that count; 0 leaves the step out.
        num_actions_N: int64 [N], sampled tokens of the step, 1 or more.
        cfg: level, gamma, lam and whiten.
    Raises: ShapeError; UnscoredNode when a reward or value that counts is not finite.
    """
    check_shapes(reward_N=reward_N, parent_N=parent_N, num_leaves_N=num_leaves_N, num_actions_N=num_actions_N)
    assert (num_actions_N > 0).all(), "a sampled step has at least its stop token"
    assert len(value_T) == int(num_actions_N.sum()), "one value per sampled token"
    last_N = num_actions_N.cumsum(0) - 1
    first_N = last_N + 1 - num_actions_N
    if cfg.level is GaeLevel.step:
        value_N = value_T[first_N]
        step_N = tree_gae(reward_N, value_N, parent_N, num_leaves_N, gamma=cfg.gamma, lam=cfg.lam)
        advantage_T = step_N.repeat_interleave(num_actions_N)
        target_T = advantage_T + value_N.repeat_interleave(num_actions_N)
    else:
        reward_T = torch.zeros_like(value_T).scatter(0, last_N, reward_N)
        before_first_N = torch.where(parent_N >= 0, last_N[parent_N], -1)
        parent_T = (torch.arange(len(value_T)) - 1).scatter(0, first_N, before_first_N)
        leaves_T = num_leaves_N.repeat_interleave(num_actions_N)
        advantage_T = tree_gae(reward_T, value_T, parent_T, leaves_T, gamma=cfg.gamma, lam=cfg.lam)
        target_T = advantage_T + value_T
    if cfg.whiten:
        counts_T = (num_leaves_N > 0).repeat_interleave(num_actions_N)
        advantage_T = whitened(advantage_T, counts_T.to(advantage_T.dtype))
    # Measured from the first token, the mean of equal advantages is that advantage to the last bit.
    beyond_T = advantage_T - advantage_T[first_N].repeat_interleave(num_actions_N)
    node_T = torch.arange(len(parent_N)).repeat_interleave(num_actions_N)
    beyond_N = torch.zeros_like(reward_N).index_add(0, node_T, beyond_T) / num_actions_N
    return CriticCredit(
        advantage_N=(advantage_T[first_N] + beyond_N).float(),
        extra_T=(beyond_T - beyond_N[node_T]).float(),
        value_T=value_T.float(),
        target_T=target_T.float(),
        num_actions_N=num_actions_N,
    )


def taught_critic(value_N: Tensor, valid_N: Tensor, value_T: Tensor, num_actions_N: Tensor) -> CriticCredit:
    """What a critic should have said when a term compares with it, and not GAE: the step's value at each of its tokens.

    Args:
        value_N: float64 [N], value of the step that the term compared.
        valid_N: bool [N]; where the term says nothing there is nothing to learn.
        value_T: float64 [T], value of the state before each sampled token, nodes one after the other.
        num_actions_N: int64 [N], sampled tokens of the step.
    """
    check_shapes(value_N=value_N, valid_N=valid_N, num_actions_N=num_actions_N)
    target_T = torch.where(valid_N, value_N, torch.nan).repeat_interleave(num_actions_N)
    return CriticCredit(
        advantage_N=torch.zeros_like(value_N).float(),
        extra_T=torch.zeros_like(value_T).float(),
        value_T=value_T.float(),
        target_T=torch.where(target_T.isnan(), value_T, target_T).float(),
        num_actions_N=num_actions_N,
    )
