"""Scopes: who a value is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from conf.errors import ConfigError
from conf.schema import Level, Scope
from rl.credit.forest import Forest
from rl.credit.shapes import check_shapes


def group_ids(forest: Forest, level: Level, scope: Scope) -> Tensor:
    """The group each step or trajectory is compared within.

    Returns: int64 [N] for Level.step, [L] for Level.trajectory; equal ids are one group, ids may have gaps.
    Raises: ConfigError for scopes that are no groups of such values.
    """
    match level, scope:
        case Level.step, Scope.prompt:
            return forest.prompt_N
        case Level.step, Scope.tree:
            return forest.branch_N
        case Level.step, Scope.siblings:
            return sibling_groups(forest.parent_N, forest.prompt_N)
        case Level.step, Scope.turn_index | Scope.turn_index_padded:
            return turn_groups(forest.depth_N, forest.prompt_N)
        case Level.step, Scope.state_key:
            return forest.state_N
        case Level.step, Scope.batch:
            return torch.zeros_like(forest.prompt_N)
        case Level.trajectory, Scope.prompt:
            return forest.prompt_L
        case Level.trajectory, Scope.tree:
            return forest.branch_L
        case Level.trajectory, Scope.batch:
            return torch.zeros_like(forest.prompt_L)
        case _:
            things = "steps" if level is Level.step else "whole trajectories"
            raise ConfigError(
                f"a credit term has level={level.value} and scope={scope.value}, which does not group {things}: "
                f"siblings, turns and states are of steps, ancestors of trajectories. Use "
                f"level={'trajectory' if level is Level.step else 'step'}, or scope=prompt, tree or batch."
            )


def sibling_groups(parent_N: Tensor, prompt_N: Tensor) -> Tensor:
    """One id per fork: steps with the same parent; first steps are siblings within their prompt.

    Args:
        parent_N: int64 [N], row of the parent, -1 for a first step.
        prompt_N: int64 [N], prompt of the step.
    Returns: int64 [N], from 0 without gaps.
    """
    check_shapes(parent_N=parent_N, prompt_N=prompt_N)
    # A first step has no parent row to tell prompts apart by, so it takes a negative id of its prompt's own.
    fork_N = torch.where(parent_N >= 0, parent_N, -1 - prompt_N)
    return fork_N.unique(return_inverse=True)[1]


def turn_groups(depth_N: Tensor, prompt_N: Tensor) -> Tensor:
    """One id per prompt and depth.

    Args:
        depth_N: int64 [N], 1 for a first step.
        prompt_N: int64 [N], prompt of the step, from 0.
    Returns: int64 [N], may have gaps.
    """
    check_shapes(depth_N=depth_N, prompt_N=prompt_N)
    return prompt_N * (int(depth_N.max()) + 1) + depth_N if len(depth_N) else depth_N


def ended_before(forest: Forest) -> tuple[Tensor, Tensor]:
    """Every turn that a trajectory does not have and another one of the batch has.

    Returns: two int64 tensors of one size, the trajectory and the group of `turn_groups` the turn belongs to. Groups
        that no step is in are harmless.
    """
    deepest = int(forest.depth_N.max()) if len(forest.depth_N) else 0
    missing_L = deepest - forest.length_L
    leaf = torch.arange(len(missing_L)).repeat_interleave(missing_L)
    first = missing_L.cumsum(0) - missing_L  # place of each trajectory's first missing turn
    depth = torch.arange(len(leaf)) - first[leaf] + forest.length_L[leaf] + 1
    return leaf, forest.prompt_L[leaf] * (deepest + 1) + depth
