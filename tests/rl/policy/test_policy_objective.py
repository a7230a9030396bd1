"""The whole objective: against a slow version of separate trajectories, over packs, with a loss of the user's own."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_forests import credits_of, gradients, numbers, objective_of, packed, slow_objective, totals_of
from policy_trees import PairedTree, forests, grown, paired
from torch import Tensor
from torch.testing import assert_close

from conf.errors import ConfigError
from conf.schema import Aggregation, Correction, CriticConfig, CriticKind, LossConfig, LossKind
from rl.metrics import declared
from rl.policy.custom import TrajectoryView
from rl.policy.model import EdgeOutputs
from rl.policy.objective import Totals, finished, objective
from rl.policy.pack import plan_packs
from rollout.tree import ROOT

KINDS = [kind for kind in LossKind if kind is not LossKind.custom]
PER_TOKEN = [LossKind.ppo_clip, LossKind.cispo, LossKind.reinforce]


def loss_config(kind: LossKind = LossKind.ppo_clip, **changes: object) -> LossConfig:
    return LossConfig(**{"kind": kind, "dual_clip": 1.5, "correction_min": 0.7, "correction_max": 1.4, **changes})


configs = st.builds(
    loss_config,
    st.sampled_from(KINDS),
    aggregation=st.sampled_from(list(Aggregation)),
    correction=st.sampled_from(list(Correction)),
    kl_coef=st.sampled_from([0.0, 0.1]),
    entropy_coef=st.sampled_from([0.0, 0.01]),
)


def fork(seed: int = 0) -> PairedTree:
    """A shared step, three continuations of it, and a short trajectory beside them."""
    rng = random.Random(seed)
    return paired(grown([ROOT, 0, 0, 0, ROOT], [(3, 2), (4, 0), (2, 0), (3, 0), (1, 0)], rng), rng)


@settings(max_examples=20, deadline=None)
@given(forests(), configs)
def test_a_packed_forest_has_the_loss_and_gradient_of_its_separate_trajectories(forest, cfg):
    table = numbers([each.tree for each in forest])
    credits = credits_of(forest, cfg.aggregation)
    found = objective_of([credits], table, cfg, totals_of(credits))
    expected = slow_objective(forest, table, cfg)
    assert_close(found.loss, expected)
    for grad, wanted in zip(gradients(found.loss, table), gradients(expected, table), strict=True):
        assert_close(grad, wanted)
    assert found.parts["loss/total"] == pytest.approx(expected.item())


@settings(max_examples=20, deadline=None)
@given(forests(), configs, st.integers(1, 60), st.booleans())
def test_packs_change_neither_loss_nor_gradient_and_metrics_by_no_more_than_a_split_clip(
    forest, cfg, pack_tokens, has_critic
):
    table = numbers([each.tree for each in forest])
    credits = credits_of(forest, cfg.aggregation, critic=table if has_critic else None)
    measured = {"measures_gap": True}
    whole = objective_of([credits], table, cfg, totals_of(credits), **measured)
    parts = objective_of(plan_packs(credits, pack_tokens), table, cfg, totals_of(credits), **measured)
    assert_close(parts.loss, whole.loss)
    for grad, wanted in zip(gradients(parts.loss, table), gradients(whole.loss, table), strict=True):
        assert_close(grad, wanted)
    # a token whose trajectories lie in several packs is clipped in those where an advantage of that sign is
    clips = {name for name in whole.parts if name.startswith(("loss/clip_share", "loss/clip_low_share"))}
    assert {name: parts.parts[name] for name in parts.parts.keys() - clips} == pytest.approx(
        {name: whole.parts[name] for name in whole.parts.keys() - clips}, abs=1e-9
    )
    for name in clips:
        assert parts.parts[name] <= whole.parts[name] + 1e-9
    assert parts.maxima == pytest.approx(whole.maxima)


@settings(max_examples=10, deadline=None)
@given(forests(), st.sampled_from(PER_TOKEN), st.sampled_from(list(Aggregation)), st.integers(1, 60))
def test_sums_over_trajectories_are_enough_for_losses_of_tokens(forest, kind, aggregation, pack_tokens):
    cfg = loss_config(kind, aggregation=aggregation, correction=Correction.token_mask)
    table = numbers([each.tree for each in forest])
    credits = credits_of(forest, aggregation)
    without_paths = [replace(credit, paths=[]) for credit in credits]
    whole = objective_of([credits], table, cfg, totals_of(credits))
    parts = objective_of(plan_packs(without_paths, pack_tokens), table, cfg, totals_of(without_paths))
    assert_close(parts.loss, whole.loss)
    assert_close(gradients(parts.loss, table), gradients(whole.loss, table))


@settings(max_examples=5, deadline=None)
@given(forests(max_trees=4), configs, st.randoms(use_true_random=False))
def test_the_order_of_trees_changes_nothing(forest, cfg, rng):
    table = numbers([each.tree for each in forest])
    credits = credits_of(forest, cfg.aggregation)
    found = objective_of([credits], table, cfg, totals_of(credits))
    shuffled = rng.sample(credits, len(credits))
    again = objective_of([shuffled], table, cfg, totals_of(shuffled))
    assert_close(again.loss, found.loss)
    assert_close(gradients(again.loss, table), gradients(found.loss, table))


def test_a_long_trajectory_weighs_by_its_tokens_or_as_one():
    # REINFORCE at log p = -1 and advantage 1: every token's loss is 1, in one trajectory of 1 token and one of 3.
    forest = [PairedTree(grown([ROOT, ROOT], [(1, 0), (3, 0)], random.Random(0)), {(0, 0): (1, 1), (1, 1): (1, -1)})]
    table = numbers([forest[0].tree])
    table.logprob = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    expected = {
        "token_mean": -0.5,
        "seq_mean_token_mean": 0.0,
        "seq_mean_token_sum": -1,
        "seq_mean_token_sum_norm": -0.2,
    }
    for mode, loss in expected.items():  # (1 - 3) / 4; (1 - 3/3) / 2; (1 - 3) / 2; the same / 5
        cfg = LossConfig(kind=LossKind.reinforce, aggregation=Aggregation(mode))
        credits = credits_of(forest, cfg.aggregation, horizon=5)
        assert objective_of([credits], table, cfg, totals_of(credits)).loss.item() == pytest.approx(loss)


def test_every_part_is_declared_once_finished():
    forest = [fork()]
    table = numbers([forest[0].tree])
    cfg = loss_config(
        kl_coef=0.1, correction=Correction.token_mask, critic=CriticConfig(kind=CriticKind.value_head, clip=0.1)
    )
    credits = credits_of(forest, critic=table)
    found = objective_of([credits], table, cfg, totals_of(credits), measures_gap=True)
    metrics = finished(found.parts) | found.maxima
    assert [name for name in metrics if declared(name) is None] == []
    names = {name.removeprefix("loss/") for name in metrics}
    assert names == {
        *("total", "policy", "kl", "entropy_nats", "clip_share", "clip_low_share", "approx_kl_nats", "ratio_max"),
        *("correction_cut_share", "logprob_gap_nats"),
        *("mismatch_kl_nats", "mismatch_effective_share", "mismatch_ratio_max"),
        *("value", "value_clip_share", "value_explained_share"),
        *("clip_share_depth_1", "clip_share_depth_2"),
    }


def test_statistics_by_hand():
    # One trajectory of four one-token steps; ratios 2, 1/2, 1/2, 1, weights 1, 1, 2, 4, advantages 1, 1, -1, 0.
    steps = grown([ROOT, 0, 1, 2], [(1, 0)] * 4, random.Random(0))
    forest = [PairedTree(steps, {(0, 3): (1, 1), (1, 3): (1, 1), (2, 3): (2, -1), (3, 3): (4, 0)})]
    table = numbers([steps])
    table.logprob = table.old + torch.tensor([2, 0.5, 0.5, 1], dtype=torch.float64).log()
    table.entropy = torch.tensor([1, 1, 2, 0], dtype=torch.float64)
    cfg, credits = LossConfig(), credits_of(forest)
    found = objective_of([credits], table, cfg, totals_of(credits))
    # Clipped: praise at ratio 2 (weight 1) and blame at 1/2 (weight 2); praise at 1/2 is not.
    assert found.parts["loss/clip_share"] == pytest.approx(3 / 8)
    assert found.parts["loss/clip_low_share"] == pytest.approx(2 / 8)
    by_depth = [finished(found.parts)[f"loss/clip_share_depth_{depth}"] for depth in (1, 2, 3, 4)]
    assert by_depth == pytest.approx([1, 0, 1, 0])
    assert found.parts["loss/entropy_nats"] == pytest.approx(6 / 8)
    assert found.maxima["loss/ratio_max"] == pytest.approx(2.0)
    # r - 1 - log r: 1 - log 2 once; -1/2 + log 2 three times; 0
    assert found.parts["loss/approx_kl_nats"] == pytest.approx((1 - math.log(2) + 3 * (math.log(2) - 0.5)) / 8)
    # -(1 * 1.28 + 1 * 0.5 - 2 * 0.8) / 8
    assert found.parts["loss/policy"] == pytest.approx(-0.18 / 8)


def test_cispo_counts_every_cut_ratio_and_reinforce_none():
    steps = grown([ROOT, 0], [(1, 0)] * 2, random.Random(0))
    forest = [PairedTree(steps, {(0, 1): (1, -1), (1, 1): (3, 1)})]
    table = numbers([steps])
    table.logprob = table.old + torch.tensor([2, 0.5], dtype=torch.float64).log()
    credits = credits_of(forest)
    cispo = objective_of([credits], table, LossConfig(kind=LossKind.cispo), totals_of(credits)).parts
    assert (cispo["loss/clip_share"], cispo["loss/clip_low_share"]) == (1.0, 0.75)
    assert (
        "loss/clip_share"
        not in objective_of([credits], table, LossConfig(kind=LossKind.reinforce), totals_of(credits)).parts
    )


def test_steps_below_the_deepest_measured_are_counted_with_it():
    # A chain of 17 one-token steps; the ratio of the last is 2, so of depths 16 and 17 together half is clipped.
    steps = grown([ROOT, *range(16)], [(1, 0)] * 17, random.Random(0))
    forest = [PairedTree(steps, {(row, 16): (1, 1) for row in range(17)})]
    table = numbers([steps])
    table.logprob = table.old + torch.tensor([1] * 16 + [2], dtype=torch.float64).log()
    credits = credits_of(forest)
    metrics = finished(objective_of([credits], table, LossConfig(), totals_of(credits)).parts)
    assert metrics["loss/clip_share_depth_16"] == pytest.approx(1 / 2)
    assert "loss/clip_share_depth_17" not in metrics and "loss/weight_depth_16" not in metrics


def test_gspo_clips_whole_trajectories():
    # Ratios 4 and 1 are 2 together: praise of both tokens is clipped, though one of them never moved.
    steps = grown([ROOT, 0], [(1, 0)] * 2, random.Random(0))
    forest = [PairedTree(steps, {(0, 1): (1, 1), (1, 1): (1, 1)})]
    table = numbers([steps])
    table.logprob = (table.old + torch.tensor([4, 1], dtype=torch.float64).log()).requires_grad_()
    credits = credits_of(forest)
    found = objective_of([credits], table, LossConfig(kind=LossKind.gspo), totals_of(credits))
    assert found.parts["loss/clip_share"] == 1.0
    assert found.loss.item() == pytest.approx(-1.28)
    assert not gradients(found.loss, table)[0].any()


def test_a_token_rejected_by_the_correction_keeps_its_place_in_the_mean():
    # Two tokens, advantage 1, log p = -1, so REINFORCE gives 1 each; the first one's importance weight is e.
    steps = grown([ROOT, 0], [(1, 0)] * 2, random.Random(0))
    forest = [PairedTree(steps, {(0, 1): (1, 1), (1, 1): (1, 1)})]
    table = numbers([steps])
    table.logprob = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    table.old = table.engine + torch.tensor([1.0, 0.0])
    cfg = LossConfig(kind=LossKind.reinforce, correction=Correction.token_mask)
    credits = credits_of(forest)
    found = objective_of([credits], table, cfg, totals_of(credits))
    assert found.loss.item() == pytest.approx(1 / 2)
    assert found.parts["loss/correction_cut_share"] == pytest.approx(1 / 2)
    # Their product is e too, so as a sequence both are rejected; truncated, both weigh 2.
    cfg.correction = Correction.sequence_mask
    rejected = objective_of([credits], table, cfg, totals_of(credits))
    assert (rejected.loss.item(), rejected.parts["loss/correction_cut_share"]) == (0.0, 1.0)
    cfg.correction = Correction.sequence_truncate
    assert objective_of([credits], table, cfg, totals_of(credits)).loss.item() == pytest.approx(2.0)


def test_the_gap_to_the_engine_is_measured_when_asked():
    forest = [fork()]
    table = numbers([forest[0].tree])
    table.logprob = table.engine + math.log(2)
    credits = credits_of(forest)
    assert "loss/logprob_gap_nats" not in objective_of([credits], table, LossConfig(), totals_of(credits)).parts
    found = objective_of([credits], table, LossConfig(), totals_of(credits), measures_gap=True)
    metrics = finished(found.parts)
    assert metrics["loss/logprob_gap_nats"] == pytest.approx(math.log(2))
    assert metrics["loss/mismatch_kl_nats"] == pytest.approx(1 - math.log(2))
    assert metrics["loss/mismatch_effective_share"] == pytest.approx(1.0)  # all ratios are 2
    assert found.maxima["loss/mismatch_ratio_max"] == pytest.approx(2.0)


@pytest.mark.parametrize("kind, coefficient", [(CriticKind.value_head, 0.25), (CriticKind.model, 1.0)])
def test_a_critic_with_an_optimiser_of_its_own_has_no_coefficient(kind: CriticKind, coefficient: float):
    forest = [fork()]
    table = numbers([forest[0].tree])
    cfg = LossConfig(critic=CriticConfig(kind=kind, value_coef=0.25, clip=0.0))
    credits = credits_of(forest, critic=table)
    found = objective_of([credits], table, cfg, totals_of(credits))
    weight = {row: sum(weight for (step, _), (weight, _) in forest[0].pairs.items() if step == row) for row in range(5)}
    trained = [(weight[row], place) for row in range(5) for place in table.places(forest[0].tree, row) if weight[row]]
    value = sum(w * (table.value[p] - table.target[p]) ** 2 / 2 for w, p in trained) / sum(w for w, _ in trained)
    assert found.parts["loss/value"] == pytest.approx(value.item())
    assert found.parts["loss/total"] - found.parts["loss/policy"] == pytest.approx(coefficient * value.item())


def test_a_critic_that_warms_up_moves_nothing_but_values():
    forest = [fork()]
    table = numbers([forest[0].tree])
    cfg = loss_config(kl_coef=0.1, entropy_coef=0.1, critic=CriticConfig(kind=CriticKind.value_head))
    credits = credits_of(forest, critic=table)
    found = objective_of([credits], table, cfg, totals_of(credits), trains_policy=False)
    logprob, entropy, value = gradients(found.loss, table)
    assert not logprob.any()
    assert not entropy.any()
    assert value.any()
    assert "loss/policy" not in found.parts


def test_variance_that_a_critic_explains():
    # Targets 0 and 2; the critic said 0 and 1: errors 0 and 1, so 1 - (1/4) / 1.
    steps = grown([ROOT], [(2, 0)], random.Random(0))
    table = numbers([steps])
    table.target, table.old_value = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0])
    credits = credits_of([PairedTree(steps, {(0, 0): (1, 1)})], critic=table)
    found = objective_of([credits], table, LossConfig(), totals_of(credits))
    assert finished(found.parts)["loss/value_explained_share"] == pytest.approx(0.75)
    table.target[:] = 1.0
    credits = credits_of([PairedTree(steps, {(0, 0): (1, 1)})], critic=table)
    found = objective_of([credits], table, LossConfig(), totals_of(credits))
    assert "loss/value_explained_share" not in finished(found.parts)


def test_a_model_in_float32_gets_float32_gradients_of_sums_in_float64():
    forest = [fork()]
    table = numbers([forest[0].tree])
    credits = credits_of(forest)
    batch, outputs = packed(credits, table, LossConfig())
    narrow_E = outputs.logprob_E.detach().float().requires_grad_()
    narrow = EdgeOutputs(narrow_E, outputs.entropy_E.float())
    for kind in KINDS:
        found = objective(narrow, batch, LossConfig(kind=kind), totals_of(credits))
        wide = objective(outputs, batch, LossConfig(kind=kind), totals_of(credits))
        assert found.loss.dtype == torch.float64
        assert found.loss.item() == pytest.approx(wide.loss.item(), rel=1e-5)
        assert torch.autograd.grad(found.loss, narrow_E)[0].dtype == torch.float32


def my_ppo(view: TrajectoryView) -> Tensor:
    ratio_M = (view.logprob_M - view.old_logprob_M).exp()
    surrogate_M = torch.minimum(ratio_M * view.advantage_M, ratio_M.clamp(0.8, 1.28) * view.advantage_M)
    return -(view.weight_M * surrogate_M).sum()


@settings(max_examples=10, deadline=None)
@given(forests(), st.sampled_from(list(Aggregation)), st.sampled_from(list(Correction)))
def test_ppo_written_as_a_custom_loss_is_the_built_in_one(forest, aggregation, correction):
    table = numbers([each.tree for each in forest])
    credits = credits_of(forest, aggregation)
    built_in = LossConfig(aggregation=aggregation, correction=correction)
    mine = replace(built_in, kind=LossKind.custom)
    wanted = objective_of([credits], table, built_in, totals_of(credits))
    found = objective_of([credits], table, mine, totals_of(credits), custom=my_ppo)
    assert_close(found.loss, wanted.loss)
    assert_close(gradients(found.loss, table), gradients(wanted.loss, table))


def implicit_reward_loss(view: TrajectoryView) -> Tensor:
    """Cross-entropy of whether a trajectory did well, with beta * (log-ratio to the reference) summed as its logit."""
    assert view.reference_logprob_M is not None
    logit_K = 0.05 * view.path_sums(view.logprob_M - view.reference_logprob_M)
    last_M = torch.cat([view.path_M[1:] != view.path_M[:-1], torch.tensor([True])])
    did_well_K = (view.advantage_M[last_M] > 0).to(logit_K.dtype)
    return torch.nn.functional.binary_cross_entropy_with_logits(logit_K, did_well_K, reduction="sum")


def test_a_custom_loss_may_sum_over_trajectories():
    forest = [fork()]
    table = numbers([forest[0].tree])
    cfg = LossConfig(kind=LossKind.custom, aggregation=Aggregation.seq_mean_token_sum, kl_coef=1e-9)
    credits = credits_of(forest, cfg.aggregation)
    found = objective_of([credits], table, cfg, totals_of(credits), custom=implicit_reward_loss)
    expected = 0.0
    for leaf in (1, 2, 3, 4):
        places = [place for row in forest[0].tree.path(leaf) for place in table.places(forest[0].tree, row)]
        logit = 0.05 * sum((table.logprob[place] - table.reference[place]).item() for place in places)
        chance = 1 / (1 + math.exp(-logit))
        expected -= math.log(chance if forest[0].pairs[leaf, leaf][1] > 0 else 1 - chance) / 4
    assert found.parts["loss/policy"] == pytest.approx(expected)
    assert gradients(found.loss, table)[0].all()  # every token is in some trajectory


@pytest.mark.parametrize(
    "custom, message",
    [
        (lambda view: view.logprob_M, r"returned a tensor of shape \[.*\], and a gradient"),
        (lambda view: 1.0, "returned float, and a gradient"),
        (lambda view: view.logprob_M.sum() * math.inf, "returned -inf: every weight"),
        (lambda view: view.logprob_M.detach().sum(), "does not depend on the policy"),
    ],
)
def test_a_custom_loss_that_nothing_can_be_learned_from_is_refused(custom, message):
    forest = [fork()]
    table = numbers([forest[0].tree])
    credits = credits_of(forest)
    with pytest.raises(ConfigError, match=message):
        objective_of([credits], table, LossConfig(kind=LossKind.custom), totals_of(credits), custom=custom)


def test_totals_of_other_ranks_only_scale():
    forest = [fork()]
    table = numbers([forest[0].tree])
    credits = credits_of(forest)
    alone = objective_of([credits], table, LossConfig(), totals_of(credits))
    with_others = Totals(denominator=2 * totals_of(credits).denominator, weight=2 * totals_of(credits).weight)
    found = objective_of([credits], table, LossConfig(), with_others)
    assert found.parts == pytest.approx({name: part / 2 for name, part in alone.parts.items()})
