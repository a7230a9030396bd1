"""What is minimised on one pack: policy loss with its correction, KL, entropy and value loss; and what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from conf.schema import Correction, CriticKind, LossConfig, LossKind
from rl.policy.custom import CustomLoss, TrajectoryView, custom_sum
from rl.policy.divergence import divergence, k3
from rl.policy.loss import (
    cispo,
    clipped,
    gspo,
    log_ratio,
    ppo_clip,
    reinforce,
    sequence_log_ratio,
    value_loss,
    weighted_mean,
)
from rl.policy.mismatch import correct, effective_share, mismatch_stats
from rl.policy.pack import PackedBatch, PathTokens

if TYPE_CHECKING:  # loads transformers
    from rl.policy.model import EdgeOutputs

RATIO_MEAN = "loss/mismatch_ratio_mean"
RATIO_SQUARE_MEAN = "loss/mismatch_ratio_square_mean"
VALUE_MOMENTS = tuple(f"loss/value_{name}_mean" for name in ("target", "target_square", "error", "error_square"))
"""Means that add up over packs, unlike the shares that `finished` makes of them."""
DEPTH_WEIGHT, DEPTH_CLIPPED = "loss/weight_depth_", "loss/clip_share_depth_"
"""With a step's depth behind: parts of all weight, of which `finished` makes the share."""
DEEPEST = 16
"""Deeper steps are counted with those of this depth, for a run of a hundred turns must not log a hundred curves."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What the sums of all packs and ranks of one mini-batch are divided by."""

    denominator: float
    """Of the losses: sum of `TreeCredit.denominator`."""
    weight: float
    """Of means over tokens: sum of w0 over all trained tokens, `TreeCredit.total_weight`."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One pack's part of its mini-batch's loss; parts of all packs and ranks add up."""

    loss: Tensor
    """float64 [], with a gradient."""
    parts: dict[str, float]
    """To be added up over packs and ranks, averaged over the mini-batches that have the name, and then `finished`."""
    maxima: dict[str, float]
    """The largest over packs, ranks and mini-batches counts."""


def objective(
    outputs: EdgeOutputs,
    batch: PackedBatch,
    cfg: LossConfig,
    totals: Totals,
    *,
    trains_policy: bool = True,
    measures_gap: bool = False,
    custom: CustomLoss | None = None,
) -> Objective:
    """The loss of one pack:

        ( policy + kl_coef * KL - entropy_coef * entropy ) / denominator  +  coefficient * value loss / weight

    Policy, KL and entropy are aggregated alike, as loss.aggregation says. The value loss is a mean over tokens in every
    mode, so that its coefficient keeps its meaning: value_coef where policy and critic share a trunk and an optimiser,
    1 for a critic with its own.

    Args:
        outputs: of the policy on this pack; value_E may be another model's.
        batch: at least one edge. reference_logprob_E adds the KL, target_E the value loss; gspo, custom and the
            corrections of sequences need its paths.
        totals: of the mini-batch.
        trains_policy: False leaves the value loss alone, while a new critic warms up.
        measures_gap: also compare the policy with the engine; only before the policy's first update of a step does that
            measure the engine and not the update.
        custom: the function of loss.fn; for kind=custom.
    Raises: ConfigError for a custom loss that is no finite scalar.
    """
    outputs = _in_float64(outputs)
    found = _Found(totals)
    loss = outputs.logprob_E.new_zeros(())
    if trains_policy:
        loss = loss + _policy_loss(outputs, batch, cfg, custom, found)
    if measures_gap:
        _measure_gap(outputs.logprob_E, batch, found)
    if outputs.value_E is not None and batch.target_E is not None:
        coefficient = cfg.critic.value_coef if cfg.critic.kind is CriticKind.value_head else 1.0
        loss = loss + coefficient * _value_loss(outputs.value_E, batch, cfg.critic.clip, found)
    found.parts["loss/total"] = loss
    return Objective(loss, _numbers(found.parts), _numbers(found.maxima))


def finished(parts: dict[str, float]) -> dict[str, float]:
    """Metrics from the parts of whole mini-batches: moments and sums become the shares they stand for, the rest stays.

    loss/mismatch_effective_share is the effective sample size of the engine's tokens as samples of the learner;
    loss/value_explained_share is 1 - variance(target - value) / variance(target) with the values before the updates,
    left out where all targets are equal; loss/clip_share_depth_<step> is left out where no step of that depth trains.
    """
    unfinished = (RATIO_MEAN, RATIO_SQUARE_MEAN, *VALUE_MOMENTS)
    metrics = {
        name: part
        for name, part in parts.items()
        if name not in unfinished and not name.startswith((DEPTH_WEIGHT, DEPTH_CLIPPED))
    }
    for name, weight in parts.items():
        if name.startswith(DEPTH_WEIGHT) and weight:
            share = name.replace(DEPTH_WEIGHT, DEPTH_CLIPPED)
            metrics[share] = parts[share] / weight
    if parts.get(RATIO_SQUARE_MEAN):  # 0 when no token could have come from the learner
        metrics["loss/mismatch_effective_share"] = effective_share(parts[RATIO_MEAN], parts[RATIO_SQUARE_MEAN])
    if VALUE_MOMENTS[0] in parts:
        target, target_square, error, error_square = (parts[name] for name in VALUE_MOMENTS)
        variance = target_square - target**2
        if variance > 1e-12 * target_square:  # below that it is rounding
            metrics["loss/value_explained_share"] = 1 - (error_square - error**2) / variance
    return metrics


@dataclass(slots=True)
class _Found:
    """Metrics as they are found; numbers only at the end, since each would stop a GPU's queue."""

    totals: Totals
    parts: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add_mean(self, name: str, value_E: Tensor, w0_E: Tensor) -> None:
        """This pack's part of a mean over tokens."""
        self.parts[name] = weighted_mean(value_E, w0_E, self.totals.weight)


def _policy_loss(
    outputs: EdgeOutputs, batch: PackedBatch, cfg: LossConfig, custom: CustomLoss | None, found: _Found
) -> Tensor:
    """Policy loss with its correction, KL and entropy terms; float []."""
    logprob_E, denominator = outputs.logprob_E, found.totals.denominator
    corrected = correct(batch, cfg)
    if cfg.correction is not Correction.none:
        found.parts["loss/correction_cut_share"] = corrected.cut_weight / found.totals.weight
    policy = _policy_sum(outputs, corrected.batch, cfg, custom) / denominator
    found.parts["loss/policy"] = policy
    _measure_movement(logprob_E.detach(), batch, corrected.batch, cfg, found)
    loss = policy
    found.add_mean("loss/entropy_nats", outputs.entropy_E, batch.w0_E)
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * weighted_mean(outputs.entropy_E, batch.w0_E, denominator)
    if batch.reference_logprob_E is not None:
        kl_E = divergence(logprob_E, batch.reference_logprob_E, cfg.kl_estimator)
        kl = weighted_mean(kl_E, batch.w0_E, denominator)
        found.parts["loss/kl"] = kl
        loss = loss + cfg.kl_coef * kl
    return loss


def _policy_sum(outputs: EdgeOutputs, batch: PackedBatch, cfg: LossConfig, custom: CustomLoss | None) -> Tensor:
    """The policy loss summed over the pack; float []."""
    logprob_E, w_pos_E, w_neg_E = outputs.logprob_E, batch.w_pos_E, batch.w_neg_E
    log_ratio_E = log_ratio(logprob_E, batch.old_logprob_E)
    match cfg.kind:
        case LossKind.ppo_clip:
            return ppo_clip(log_ratio_E, w_pos_E, w_neg_E, cfg.clip_low, cfg.clip_high, cfg.dual_clip).sum()
        case LossKind.cispo:
            return cispo(logprob_E, log_ratio_E, w_pos_E, w_neg_E, cfg.clip_low, cfg.clip_high).sum()
        case LossKind.reinforce:
            return reinforce(logprob_E, w_pos_E, w_neg_E).sum()
        case LossKind.gspo:
            paths = _paths(batch)
            ratio_M = _sequence_log_ratio(logprob_E, batch, paths)
            return gspo(ratio_M, paths.advantage_M, paths.weight_M, cfg.clip_low, cfg.clip_high).sum()
        case LossKind.custom:
            assert custom is not None, "the learner loads loss.fn"
            return custom_sum(custom, trajectory_view(outputs, batch))


def trajectory_view(outputs: EdgeOutputs, batch: PackedBatch) -> TrajectoryView:
    """The pack as its trajectories one by one; the batch must hold its paths."""
    paths = _paths(batch)
    edge_M, reference_E = paths.edge_M, batch.reference_logprob_E
    return TrajectoryView(
        logprob_M=outputs.logprob_E[edge_M],
        entropy_M=outputs.entropy_E[edge_M],
        old_logprob_M=batch.old_logprob_E[edge_M],
        engine_logprob_M=batch.engine_logprob_E[edge_M],
        reference_logprob_M=None if reference_E is None else reference_E[edge_M],
        advantage_M=paths.advantage_M,
        weight_M=paths.weight_M,
        path_M=paths.path_M,
        num_paths=paths.num_paths,
    )


def _sequence_log_ratio(logprob_E: Tensor, batch: PackedBatch, paths: PathTokens) -> Tensor:
    edge_M = paths.edge_M
    return sequence_log_ratio(logprob_E[edge_M], batch.old_logprob_E[edge_M], paths.path_M, paths.num_paths)


def _measure_movement(
    logprob_E: Tensor, batch: PackedBatch, corrected: PackedBatch, cfg: LossConfig, found: _Found
) -> None:
    """How far the policy has moved from the old log-probabilities, and what the clip makes of that.

    A token whose trajectories were split between packs counts as clipped in those packs alone where one of the
    trajectories is; so the share, unlike the loss, can be smaller than in one pack.
    """
    log_ratio_E = log_ratio(logprob_E, batch.old_logprob_E)
    found.add_mean("loss/approx_kl_nats", k3(log_ratio_E), batch.w0_E)
    found.maxima["loss/ratio_max"] = log_ratio_E.max().exp()
    w_pos, w_neg, weight, depth, dual_clip = corrected.w_pos_E, corrected.w_neg_E, batch.w0_E, batch.depth_E, 0.0
    match cfg.kind:
        case LossKind.ppo_clip:
            dual_clip = cfg.dual_clip
        case LossKind.cispo:  # clips praise and blame on both sides
            w_pos, w_neg = w_pos - w_neg, w_neg - w_pos
        case LossKind.gspo:
            paths, corrected_paths = _paths(batch), _paths(corrected)
            log_ratio_E = _sequence_log_ratio(logprob_E, batch, paths)
            w_pos = corrected_paths.weight_M * paths.advantage_M.clamp(min=0)
            w_neg = corrected_paths.weight_M * paths.advantage_M.clamp(max=0)
            weight, depth = paths.weight_M, batch.depth_E[paths.edge_M]
        case _:  # no clip of ours
            return
    below, above = clipped(log_ratio_E, w_pos, w_neg, cfg.clip_low, cfg.clip_high, dual_clip)
    found.add_mean("loss/clip_share", (below | above).to(weight.dtype), weight)
    found.add_mean("loss/clip_low_share", below.to(weight.dtype), weight)
    _measure_depths((below | above).to(weight.dtype), weight, depth.clamp(max=DEEPEST), found)


def _measure_depths(clipped_X: Tensor, weight_X: Tensor, depth_X: Tensor, found: _Found) -> None:
    """What the clip does to early and to late steps."""
    zeros_D = weight_X.new_zeros(DEEPEST + 1)
    whole_D = zeros_D.index_add(0, depth_X, weight_X) / found.totals.weight
    clipped_D = zeros_D.index_add(0, depth_X, weight_X * clipped_X) / found.totals.weight
    for depth in range(1, DEEPEST + 1):
        found.parts[f"{DEPTH_WEIGHT}{depth}"] = whole_D[depth]
        found.parts[f"{DEPTH_CLIPPED}{depth}"] = clipped_D[depth]


def _measure_gap(logprob_E: Tensor, batch: PackedBatch, found: _Found) -> None:
    """How far the learner, not yet updated, is from the engine."""
    stats = mismatch_stats(logprob_E - batch.engine_logprob_E, batch.w0_E, found.totals.weight)
    found.parts["loss/logprob_gap_nats"] = stats.gap_nats
    found.parts["loss/mismatch_kl_nats"] = stats.kl_nats
    found.parts[RATIO_MEAN] = stats.ratio
    found.parts[RATIO_SQUARE_MEAN] = stats.ratio_square
    found.maxima["loss/mismatch_ratio_max"] = stats.ratio_max


def _value_loss(value_E: Tensor, batch: PackedBatch, clip: float, found: _Found) -> Tensor:
    """Mean over tokens; float []."""
    old_value_E, target_E = batch.value_E, batch.target_E
    assert old_value_E is not None and target_E is not None, "a pack has both or none"
    loss_E = value_loss(value_E, old_value_E, target_E, clip)
    loss = weighted_mean(loss_E, batch.w0_E, found.totals.weight)
    found.parts["loss/value"] = loss
    if clip:
        far_E = (value_E.detach() - old_value_E).abs() > clip
        silenced_E = far_E & (loss_E.detach() > (value_E.detach() - target_E).square() / 2)
        found.add_mean("loss/value_clip_share", silenced_E.to(loss_E.dtype), batch.w0_E)
    error_E = target_E - old_value_E
    for name, value in zip(VALUE_MOMENTS, (target_E, target_E.square(), error_E, error_E.square()), strict=True):
        found.add_mean(name, value, batch.w0_E)
    return loss


def _paths(batch: PackedBatch) -> PathTokens:
    assert batch.paths is not None, "a loss of whole trajectories, so the trees must come with their paths"
    return batch.paths


def _in_float64(outputs: EdgeOutputs) -> EdgeOutputs:
    """Sums of many small numbers: float32 would round them, and its index_put on a CPU adds in any order."""
    value_E = None if outputs.value_E is None else outputs.value_E.double()
    return replace(outputs, logprob_E=outputs.logprob_E.double(), entropy_E=outputs.entropy_E.double(), value_E=value_E)


def _numbers(tensors: dict[str, Tensor]) -> dict[str, float]:
    """All at once: one wait for the device."""
    if not tensors:  # a warm-up of the critic has no maxima
        return {}
    values = torch.stack([tensor.detach() for tensor in tensors.values()])
    return dict(zip(tensors, values.tolist(), strict=True))
