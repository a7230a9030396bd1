"""Losses of a tree that holds every token once. All are sums; who calls them divides by a global denominator.

A token in k trajectories has one ratio r and k advantages A with weights w. Clipping is linear in A as long as the sign
of A stays, so with W+ = sum w max(A, 0) and W- = sum w min(A, 0) the surrogate summed over the k copies is exactly

    W+ * min(r, 1 + clip_high) + W- * max(r, 1 - clip_low)

while clipping the summed advantage W+ + W- is another objective. An edge (E) is one trained token. Losses whose ratio
belongs to the trajectory take its tokens one by one (M): a token in k trajectories is there k times.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp(20) is already far past any clip; inf * 0 would be NaN."""

MAX_LOG_SEQUENCE_RATIO = 10.0
"""GSPO: where praise was clipped long before, and blame, which nothing clips, stops growing."""


def log_ratio(logprob_E: Tensor, old_logprob_E: Tensor) -> Tensor:
    """How much likelier the policy finds each token than when it was sampled, in nats, at most `MAX_LOG_RATIO`.

    Args:
        logprob_E: float [E], now.
        old_logprob_E: float [E], when sampled.
    """
    return (logprob_E - old_logprob_E).clamp(max=MAX_LOG_RATIO)


def ppo_clip(
    log_ratio_E: Tensor,
    w_pos_E: Tensor,
    w_neg_E: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> Tensor:
    """Negative clipped surrogate of each edge, summed over the trajectories through it; PPO, arXiv 1707.06347, eq. 7.

    min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with the two clips apart as in DAPO (arXiv 2503.14476, eq. 8).

    Args:
        log_ratio_E: float [E], from `log_ratio`.
        w_pos_E: float [E], sum of weight * max(advantage, 0), not negative.
        w_neg_E: float [E], sum of weight * min(advantage, 0), not positive.
        clip_low: the ratio earns nothing by falling below 1 - clip_low.
        clip_high: the ratio earns nothing by rising above 1 + clip_high.
        dual_clip: bound of the ratio where the advantage is negative (arXiv 1912.09729), above 1; 0 for none.
    Returns: float [E], in units of weight * advantage.
    """
    ratio_E = log_ratio_E.exp()
    blamed_E = ratio_E.clamp(min=1 - clip_low, max=dual_clip or None)
    return -(w_pos_E * ratio_E.clamp(max=1 + clip_high) + w_neg_E * blamed_E)


def cispo(
    logprob_E: Tensor,
    log_ratio_E: Tensor,
    w_pos_E: Tensor,
    w_neg_E: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p, summed over trajectories; CISPO, arXiv 2506.13585, eq. 4-5.

    The ratio only weighs: every token keeps its gradient, however far the policy has moved. The paper uses the upper
    bound alone: clip_low = 1 does that, since no ratio is below 0. The bound is 1 + clip_high, as in the paper and in
    verl; TRL takes its `epsilon_high` as the bound itself, so its 5 is clip_high = 4 here.

    Args:
        logprob_E: float [E], now; the only thing with a gradient.
        log_ratio_E, w_pos_E, w_neg_E: float [E], as in `ppo_clip`; only the sum of the two weights matters.
    Returns: float [E], in units of weight * advantage * nats.
    """
    ratio_E = log_ratio_E.detach().exp().clamp(min=1 - clip_low, max=1 + clip_high)
    return -(w_pos_E + w_neg_E) * ratio_E * logprob_E


def reinforce(logprob_E: Tensor, w_pos_E: Tensor, w_neg_E: Tensor) -> Tensor:
    """-A log p, summed over trajectories; REINFORCE (Williams 1992). Exact only before the policy has moved.

    Args:
        logprob_E: float [E], now.
        w_pos_E, w_neg_E: float [E], as in `ppo_clip`; only their sum matters.
    Returns: float [E], in units of weight * advantage * nats.
    """
    return -(w_pos_E + w_neg_E) * logprob_E


def sequence_log_ratio(logprob_M: Tensor, old_logprob_M: Tensor, path_M: Tensor, num_paths: int) -> Tensor:
    """log of GSPO's ratio at every token: one value for a trajectory, with the gradient of the token's own log p.

    log s_k = mean over the trained tokens of trajectory k of (log p - log p_old)       GSPO, arXiv 2507.18071, eq. 7
    log s_kt = sg(log s_k) + log p_t - sg(log p_t)                                     GSPO-token, eq. 14

    The mean counts each trained token of the trajectory once, whatever its weight (our reading: the ratio belongs to
    the trajectory, the weights to the average over trajectories).

    Args:
        logprob_M: float [M], now.
        old_logprob_M: float [M], when sampled.
        path_M: int64 [M], the trajectory of each entry, from 0 to num_paths - 1.
    Returns: float [M], nats, at most `MAX_LOG_SEQUENCE_RATIO`.
    """
    moved_M = (logprob_M - old_logprob_M).detach()
    mean_K = path_sums(moved_M, path_M, num_paths) / path_M.bincount(minlength=num_paths).clamp(min=1)
    return (mean_K[path_M] + logprob_M - logprob_M.detach()).clamp(max=MAX_LOG_SEQUENCE_RATIO)


def gspo(
    sequence_log_ratio_M: Tensor, advantage_M: Tensor, weight_M: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's clip, without the dual one, on the ratio of the whole trajectory; GSPO, arXiv 2507.18071, eq. 5 and 13.

    A trajectory whose steps have advantages of their own is trained as GSPO-token: one ratio, an advantage for each
    token. With one advantage for all of them both have the same gradient.

    Args:
        sequence_log_ratio_M: float [M], from `sequence_log_ratio`.
        advantage_M: float [M], of the trajectory at the token.
        weight_M: float [M].
    Returns: float [M], in units of weight * advantage.
    """
    w_pos_M, w_neg_M = weight_M * advantage_M.clamp(min=0), weight_M * advantage_M.clamp(max=0)
    return ppo_clip(sequence_log_ratio_M, w_pos_M, w_neg_M, clip_low, clip_high)


def value_loss(value_E: Tensor, old_value_E: Tensor, target_E: Tensor, clip: float) -> Tensor:
    """Half the squared error, or that of the clipped value where it is larger; PPO's value loss as in common use.

    max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2

    Args:
        value_E: float [E], now.
        old_value_E: float [E], before this step's updates.
        target_E: float [E], the return R that the critic should have said.
        clip: c; 0 for no clipping.
    Returns: float [E], reward units squared.
    """
    error_E = (value_E - target_E).square()
    if not clip:
        return error_E / 2
    near_E = old_value_E + (value_E - old_value_E).clamp(-clip, clip)
    return torch.maximum(error_E, (near_E - target_E).square()) / 2


def clipped(
    log_ratio_E: Tensor,
    w_pos_E: Tensor,
    w_neg_E: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Where the clip silences a token: from below, and from above, dual clip included; arguments as in `ppo_clip`.

    A token that some trajectories praise and others blame is silenced for the one and not for the other; it counts.

    Returns: bool [E] and bool [E].
    """
    ratio_E = log_ratio_E.detach().exp()
    below_E = (ratio_E < 1 - clip_low) & (w_neg_E < 0)
    above_E = (ratio_E > 1 + clip_high) & (w_pos_E > 0)
    if dual_clip:
        above_E |= (ratio_E > dual_clip) & (w_neg_E < 0)
    return below_E, above_E


def path_sums(value_M: Tensor, path_M: Tensor, num_paths: int) -> Tensor:
    """Sum over each trajectory's tokens: float64 [M] -> float64 [K].

    The same seed must give the same bits. On a GPU index_put sorts before it adds, where index_add adds in any order;
    on a CPU it keeps the order in float64, but not in float32.
    """
    return value_M.new_zeros(num_paths).index_put((path_M,), value_M, accumulate=True)


def weighted_mean(value_E: Tensor, w0_E: Tensor, total_weight: float) -> Tensor:
    """This micro-batch's part of the mean over a mini-batch: sum of w0 * value / total_weight.

    Args:
        value_E: float [E].
        w0_E: float [E], weight of each edge.
        total_weight: sum of w0 over all edges of the mini-batch, so that the parts add up to the mean exactly.
    """
    return (w0_E * value_E).sum() / total_weight
