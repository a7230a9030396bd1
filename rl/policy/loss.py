"""PPO-clip on a tree, with every token once. Means are sums over edges divided by a global weight that is passed in.

A token in k trajectories has one ratio r and k advantages A with weights w. Clipping is linear in A as long as the sign
of A stays, so with W+ = sum w max(A, 0) and W- = sum w min(A, 0) the surrogate summed over the k copies is exactly

    W+ * min(r, 1 + clip_high) + W- * max(r, 1 - clip_low)

while clipping the summed advantage W+ + W- is another objective. An edge is one trained token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp(20) is already far past any clip; inf * 0 would be NaN."""


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


def k3_divergence(logprob_E: Tensor, reference_E: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference): e^d - d - 1 with d = reference - policy; unbiased and never negative.

    Args:
        logprob_E: float [E], of the policy.
        reference_E: float [E], of the frozen reference.
    Returns: float [E], nats.
    """
    difference_E = (reference_E - logprob_E).clamp(max=MAX_LOG_RATIO)
    return difference_E.exp() - difference_E - 1


def weighted_mean(value_E: Tensor, w0_E: Tensor, total_weight: float) -> Tensor:
    """This micro-batch's part of the mean over a mini-batch: sum of w0 * value / total_weight.

    Args:
        value_E: float [E].
        w0_E: float [E], weight of each edge.
        total_weight: sum of w0 over all edges of the mini-batch, so that the parts add up to the mean exactly.
    """
    return (w0_E * value_E).sum() / total_weight


@dataclass(kw_only=True, slots=True)
class UpdateStats:
    """How far the policy moved since the tokens were sampled; all but the maximum are parts of weighted means."""

    clip_share: float
    """Share of trained tokens with an advantage that the clip silences."""
    approx_kl_nats: float
    """KL(sampler || policy) by `k3_divergence`, on tokens that the sampler drew."""
    entropy_nats: float
    ratio_max: float


@torch.no_grad()
def update_stats(
    log_ratio_E: Tensor,
    entropy_E: Tensor,
    w_pos_E: Tensor,
    w_neg_E: Tensor,
    w0_E: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    total_weight: float,
) -> UpdateStats:
    """Statistics of one micro-batch; arguments as in `ppo_clip` and `weighted_mean`, at least one edge."""
    ratio_E = log_ratio_E.exp()
    clipped_E = (ratio_E > 1 + clip_high) & (w_pos_E > 0) | (ratio_E < 1 - clip_low) & (w_neg_E < 0)
    if dual_clip:
        clipped_E |= (ratio_E > dual_clip) & (w_neg_E < 0)

    def mean(value_E: Tensor) -> float:
        return weighted_mean(value_E, w0_E, total_weight).item()

    return UpdateStats(
        clip_share=mean(clipped_E.to(w0_E.dtype)),
        approx_kl_nats=mean(ratio_E - 1 - log_ratio_E),
        entropy_nats=mean(entropy_E),
        ratio_max=ratio_E.max().item(),
    )
