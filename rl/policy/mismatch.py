"""The engine that sampled and the learner are not quite the same policy: how far apart they are, and what to do.

delta = log p of the learner before its update - log p of the engine, at every sampled token. exp(delta) is the
importance weight that would make the engine's samples the learner's. It is detached and multiplies the policy loss
after clipping; the KL and entropy terms stay as they are. Denominators stay as the batch was cut: a rejected token is
still counted, with a loss of 0, so dropping tokens never makes the rest louder (our reading; so does TRL).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conf.schema import Correction, LossConfig
from rl.policy.divergence import k3
from rl.policy.loss import MAX_LOG_RATIO, path_sums, weighted_mean
from rl.policy.pack import PackedBatch, PathTokens

TRUNCATES = (Correction.token_truncate, Correction.sequence_truncate)
OF_SEQUENCES = (Correction.sequence_truncate, Correction.sequence_mask)


@dataclass(frozen=True, slots=True)
class Corrected:
    """A batch with corrected weights."""

    batch: PackedBatch
    """w_pos_E, w_neg_E and the weights of the paths; w0_E is as it was."""
    cut_weight: Tensor
    """float [], summed weight of the tokens whose importance weight was out of bounds."""


def importance_weight(delta: Tensor, low: float, high: float, *, truncates: bool) -> Tensor:
    """exp(delta), and beyond [low, high] the bound itself (truncated) or 0 (masked); no gradient.

    Within the bounds both keep the ratio as the weight. Truncation above is TIS; masking is what TRL calls by that name
    and IcePop (arXiv 2510.18855) does with both bounds.

    Args:
        delta: float, any shape, nats.
    """
    ratio = delta.detach().clamp(max=MAX_LOG_RATIO).exp()
    if truncates:
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def correct(batch: PackedBatch, cfg: LossConfig) -> Corrected:
    """Multiply the weights of the policy loss with importance weights, as `cfg.correction` says.

    token: a weight for each edge. sequence: one for each trajectory, the exponential of delta summed over its trained
    tokens, so that the sums over trajectories are taken anew; the batch must hold its paths.
    """
    if cfg.correction is Correction.none:
        return Corrected(batch, batch.w0_E.new_zeros(()))
    delta_E = batch.old_logprob_E - batch.engine_logprob_E
    bounds = (cfg.correction_min, cfg.correction_max)
    truncates = cfg.correction in TRUNCATES
    paths = batch.paths
    if cfg.correction not in OF_SEQUENCES:
        weight_E = importance_weight(delta_E, *bounds, truncates=truncates)
        if paths is not None:
            paths = replace(paths, weight_M=paths.weight_M * weight_E[paths.edge_M])
        w_pos_E, w_neg_E = batch.w_pos_E * weight_E, batch.w_neg_E * weight_E
        cut_weight = (batch.w0_E * _outside(delta_E, *bounds)).sum()
    else:
        assert paths is not None, "whole trajectories are weighed, so the trees must come with their paths"
        delta_K = path_sums(delta_E[paths.edge_M], paths.path_M, paths.num_paths)
        weight_K = importance_weight(delta_K, *bounds, truncates=truncates)
        cut_weight = (paths.weight_M * _outside(delta_K, *bounds)[paths.path_M]).sum()
        paths = replace(paths, weight_M=paths.weight_M * weight_K[paths.path_M])
        w_pos_E, w_neg_E = sums_from_paths(paths, len(batch.w0_E))
    return Corrected(replace(batch, w_pos_E=w_pos_E, w_neg_E=w_neg_E, paths=paths), cut_weight)


def sums_from_paths(paths: PathTokens, num_edges: int) -> tuple[Tensor, Tensor]:
    """W+ and W- of `rl.policy.loss` from the trajectories one by one.

    Returns: float [E] and float [E].
    """
    w_pos_M = paths.weight_M * paths.advantage_M.clamp(min=0)
    w_neg_M = paths.weight_M * paths.advantage_M.clamp(max=0)
    return path_sums(w_pos_M, paths.edge_M, num_edges), path_sums(w_neg_M, paths.edge_M, num_edges)


@dataclass(frozen=True, slots=True)
class MismatchStats:
    """How far the learner is from the engine; all but the maximum are parts of weighted means, each float []."""

    gap_nats: Tensor
    """|delta|."""
    kl_nats: Tensor
    """KL(engine || learner) by `k3`, on tokens that the engine drew."""
    ratio: Tensor
    """exp(delta)."""
    ratio_square: Tensor
    """exp(2 delta)."""
    ratio_max: Tensor


def mismatch_stats(delta_E: Tensor, w0_E: Tensor, total_weight: float) -> MismatchStats:
    """Statistics of one micro-batch, before any correction.

    Args:
        delta_E: float64 [E], nats, learner - engine, at least one; float32 would lose what tells ratios from 1.
        w0_E: float [E], weight of each edge.
        total_weight: of the mini-batch, see `weighted_mean`.
    """
    delta_E = delta_E.detach()
    ratio_E = delta_E.clamp(max=MAX_LOG_RATIO).exp()

    def mean(value_E: Tensor) -> Tensor:
        return weighted_mean(value_E, w0_E, total_weight)

    return MismatchStats(
        gap_nats=mean(delta_E.abs()),
        kl_nats=mean(k3(delta_E)),
        ratio=mean(ratio_E),
        ratio_square=mean(ratio_E.square()),
        ratio_max=ratio_E.max(),
    )


def effective_share(ratio_mean: float, ratio_square_mean: float) -> float:
    """Share of the samples that as many equally weighted ones would be worth: (sum w)^2 / (n sum w^2), from 0 to 1."""
    return ratio_mean**2 / ratio_square_mean


def _outside(delta: Tensor, low: float, high: float) -> Tensor:
    ratio = delta.clamp(max=MAX_LOG_RATIO).exp()
    return (ratio < low) | (ratio > high)
