"""How well predicted tool calls match a reference's: the step reward of MatchTIR (arXiv 2601.10712).

A call is a name and its parameters by name. Each predicted call is worth its similarity to the reference call that it
is matched with; a step is worth the mean over its calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Call = tuple[str, Mapping[str, Any]]
"""Name of the tool, and its arguments by name."""

SINKHORN_REGULARIZATION = 0.1
SINKHORN_ROUNDS = 200
"""Enough that row and column sums agree with the marginals to 1e-6 for matrices of tens of calls."""


def similarity(predicted: Sequence[Call], reference: Sequence[Call]) -> Tensor:
    """How like each predicted call is to each reference call, in [0, 1].

    S_ij = (1 + J + E) / (2 + |params_j|) where the names agree in any case, else 0; J is the Jaccard index of the
    parameter names, E the number of the reference's parameters that have the very same value.

    Returns: float64 [predicted, reference].
    """
    rows = [[_similarity_of_two(one, other) for other in reference] for one in predicted]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(predicted), len(reference))


def assigned(similarity_PR: Tensor) -> Tensor:
    """Reward of each predicted call: its similarity to its own reference call, in the best one-to-one assignment.

    What has no partner gets 0. The authors say "Kuhn-Munkres" and this is it; their code is `assigned_greedily`.

    Args:
        similarity_PR: float [predicted, reference].
    Returns: float [predicted].
    """
    rows, columns = linear_sum_assignment(similarity_PR.numpy(), maximize=True)
    return _of_pairs(similarity_PR, list(zip(rows.tolist(), columns.tolist(), strict=True)))


def assigned_greedily(similarity_PR: Tensor) -> Tensor:
    """The same as MatchTIR's released code has it: the most similar pair first, then the most similar of what is left.

    Never more in all than `assigned`: with similarities .9 .8 / .8 0 it takes .9 + 0 where .8 + .8 can be had.
    """
    num_columns = similarity_PR.shape[1]
    pairs: list[tuple[int, int]] = []
    for place in similarity_PR.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, num_columns)
        if all(row != taken and column != with_it for taken, with_it in pairs):
            pairs.append((row, column))
    return _of_pairs(similarity_PR, pairs)


def transported(similarity_PR: Tensor) -> Tensor:
    """Reward of each predicted call by optimal transport: r_i = sum_j T_ij * S_ij, T the entropic plan (Sinkhorn).

    All calls of a side have the same mass and all masses add up to 1, so that rewards are about 1 / |predicted| of
    those of `assigned`, as in the authors' code.

    Args and returns: as `assigned`; zeros where a side has no call.
    """
    num_rows, num_columns = similarity_PR.shape
    if not num_rows or not num_columns:
        return similarity_PR.new_zeros(num_rows)
    log_kernel = similarity_PR / SINKHORN_REGULARIZATION
    row_mass = similarity_PR.new_full((num_rows,), 1 / num_rows).log()
    column_mass = similarity_PR.new_full((num_columns,), 1 / num_columns).log()
    row, column = torch.zeros_like(row_mass), torch.zeros_like(column_mass)
    for _ in range(SINKHORN_ROUNDS):
        row = row_mass - (log_kernel + column).logsumexp(1)
        column = column_mass - (log_kernel + row[:, None]).logsumexp(0)
    plan = (log_kernel + row[:, None] + column).exp()
    return (plan * similarity_PR).sum(1)


def step_rewards(call_reward_P: Tensor, step_P: Sequence[int], num_steps: int) -> list[float | None]:
    """Mean reward of the calls of each step; None, which is "not applicable", for a step without a call.

    Args:
        call_reward_P: float [P], of all calls of a trajectory.
        step_P: the step that each call is in.
        num_steps: steps of the trajectory.
    """
    found: list[float | None] = []
    for step in range(num_steps):
        rewards = [reward for reward, of in zip(call_reward_P.tolist(), step_P, strict=True) if of == step]
        found.append(sum(rewards) / len(rewards) if rewards else None)
    return found


def _similarity_of_two(predicted: Call, reference: Call) -> float:
    (name, arguments), (wanted, parameters) = predicted, reference
    if name.lower() != wanted.lower():
        return 0.0
    union = len(arguments.keys() | parameters.keys())
    jaccard = len(arguments.keys() & parameters.keys()) / union if union else 1.0
    exact = sum(key in arguments and arguments[key] == value for key, value in parameters.items())
    return (1 + jaccard + exact) / (2 + len(parameters))


def _of_pairs(similarity_PR: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    reward_P = similarity_PR.new_zeros(len(similarity_PR))
    for row, column in pairs:
        reward_P[row] = similarity_PR[row, column]
    return reward_P
