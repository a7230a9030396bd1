from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_trees import grown, save_whole, tiny
from torch import Tensor
from transformers import PreTrainedModel

from conf.errors import CheckpointError
from conf.schema import Config, LearnerConfig, PrmConfig, PrmKind
from rl.policy.load import load_causal_lm
from rl.policy.model import TreePolicy
from rl.policy.prm import ProcessRewardModel
from rl.policy.prm_metrics import calibration_error, order_accuracy, prm_metrics, sigmoid
from rollout.tree import ROOT, Tree

CPU = torch.device("cpu")
SHAPE = [ROOT, 0, 0, 1, 1, 2, 2, ROOT]
"""A fork at the prompt, two below it, four below these: leaves 3 to 7."""
OUTCOMES = {3: 1.0, 4: 0.0, 5: 1.0, 6: 1.0, 7: 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("start")
    tiny("qwen3").save_pretrained(path)
    return str(path)


def prm(
    folder: str, kind: PrmKind = PrmKind.implicit, pack_tokens: int = 8192, **changes: object
) -> ProcessRewardModel:
    cfg = Config(
        prm=PrmConfig(kind=kind, **{"learning_rate": 3e-3, "head_learning_rate": 3e-2, "beta": 0.5, **changes}),
        learner=LearnerConfig(pack_tokens=pack_tokens, num_threads=1),
    )
    return ProcessRewardModel(cfg, folder, CPU)


def trees(num: int = 3) -> list[Tree]:
    rng = random.Random(0)
    return [grown(SHAPE, [(3, 2)] * len(SHAPE), rng, name=f"test/{number}") for number in range(num)]


def logprobs_of_step(model: PreTrainedModel, tree: Tree, row: int) -> Tensor:
    """Of each action token of a step, from its path alone as a plain sequence."""
    before = tree.path_ids(tree.nodes[row].parent)
    actions = tree.nodes[row].action_ids
    logits = model(torch.tensor([before + actions])).logits[0].double()
    return logits.log_softmax(-1)[len(before) - 1 : -1].gather(1, torch.tensor(actions)[:, None])[:, 0]


def sum_of_path(scores: dict[int, float], tree: Tree, leaf: int) -> float:
    return sum(scores[row] for row in tree.path(leaf))


def test_an_implicit_model_that_has_learnt_nothing_says_0_of_every_step(folder):
    (scores,) = prm(folder).score(trees(1))
    assert scores == dict.fromkeys(range(8), 0.0)


def test_a_score_is_beta_times_the_log_ratio_of_the_steps_own_tokens(folder, tmp_path):
    model, batch = prm(folder), trees()
    for step in range(3):
        model.update(batch, [OUTCOMES] * 3, step)
    trained = model.model.module
    assert isinstance(trained, TreePolicy)
    trained.model.save_pretrained(tmp_path)  # plain copies read plain sequences, one step at a time
    now, first = (load_causal_lm(path, "float32").eval() for path in (str(tmp_path), folder))
    for tree, scores in zip(batch, model.score(batch), strict=True):
        assert scores.keys() == set(range(8))
        for row, score in scores.items():
            with torch.no_grad():
                ratio = logprobs_of_step(now, tree, row) - logprobs_of_step(first, tree, row)
            assert score == pytest.approx(0.5 * ratio.sum().item(), abs=1e-5)
            assert score != 0


def test_the_first_loss_of_an_implicit_model_is_the_log_of_two(folder):
    # r = 0, so each trajectory costs -log sigmoid(0) whatever its outcome
    metrics = prm(folder).update(trees(), [OUTCOMES] * 3, 0)
    assert metrics["prm/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["prm/order_accuracy"] == 0.5
    assert metrics["prm/error"] == pytest.approx(0.5)
    assert metrics["prm/drift"] > 0


def test_the_loss_is_the_cross_entropy_of_each_trajectorys_sum(folder):
    model, batch = prm(folder), trees()
    model.update(batch, [OUTCOMES] * 3, 0)
    scores = model.score(batch)
    costs = []
    for tree, its in zip(batch, scores, strict=True):
        for leaf, outcome in OUTCOMES.items():
            chance = sigmoid(sum_of_path(its, tree, leaf))
            costs.append(-(outcome * math.log(chance) + (1 - outcome) * math.log(1 - chance)))
    found = model.update(batch, [OUTCOMES] * 3, 1)
    assert found["prm/loss"] == pytest.approx(sum(costs) / len(costs), abs=1e-6)


def test_packs_and_mini_batches_of_one_tree_change_no_loss_and_no_gradient(folder):
    whole, split = prm(folder), prm(folder, pack_tokens=16)
    for step in range(2):
        one, other = (model.update(trees(), [OUTCOMES] * 3, step) for model in (whole, split))
        assert one["prm/loss"] == pytest.approx(other["prm/loss"], abs=1e-6)
        assert one["prm/grad_norm"] == pytest.approx(other["prm/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", [PrmKind.implicit, PrmKind.progress])
def test_it_learns_which_trajectories_end_well(folder, kind):
    model, batch = prm(folder, kind), trees()
    first = model.update(batch, [OUTCOMES] * 3, 0)
    for step in range(1, 25):
        last = model.update(batch, [OUTCOMES] * 3, step)
    assert last["prm/order_accuracy"] == 1.0
    assert last["prm/loss"] < first["prm/loss"] / 2
    assert last["prm/error"] < first["prm/error"] / 2


def test_contributions_sum_to_the_outcome_in_the_end(folder):
    model, batch = prm(folder, PrmKind.progress), trees(1)
    start = model.update(batch, [OUTCOMES], 0)
    assert start["prm/loss"] == pytest.approx(3 / 5)  # a head of zeros says 0: (1 + 0 + 1 + 1 + 0) / 5
    for step in range(1, 60):
        model.update(batch, [OUTCOMES], step)
    (scores,) = model.score(batch)
    for leaf, outcome in OUTCOMES.items():
        assert sum_of_path(scores, batch[0], leaf) == pytest.approx(outcome, abs=0.3)


def test_a_trajectory_without_an_outcome_teaches_nothing(folder):
    model, other = prm(folder), prm(folder)
    some = {leaf: outcome for leaf, outcome in OUTCOMES.items() if leaf != 7}
    assert model.update(trees(1), [{}], 0) == {}
    assert model.score(trees(1)) == other.score(trees(1))
    metrics = model.update(trees(1), [some], 0)
    assert metrics["prm/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert set(model.score(trees(1))[0]) == set(range(8))  # and is scored all the same


def test_a_tree_of_which_nothing_trains_is_scored_nothing(folder):
    (tree,) = trees(1)
    for node in tree.nodes:
        node.kept = False
    assert prm(folder).score([tree]) == [{}]


@pytest.mark.parametrize("kind", [PrmKind.implicit, PrmKind.progress])
def test_what_was_saved_goes_on_as_if_it_had_never_stopped(folder, tmp_path, kind):
    model, later = prm(folder, kind), prm(folder, kind)
    model.update(trees(), [OUTCOMES] * 3, 0)
    save_whole(model, tmp_path)
    later.load(tmp_path)
    assert later.update(trees(), [OUTCOMES] * 3, 1) == model.update(trees(), [OUTCOMES] * 3, 1)
    assert later.score(trees()) == model.score(trees())


def test_a_checkpoint_without_one_is_refused(folder, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"holds no prm/: the run was not training"):
        prm(folder).load(tmp_path)


def test_order_accuracy_is_1_on_primes_example_and_weighs_pairs_by_their_difference():
    # process rewards [.2,-.1,.5] [-.3,.1] [0,.4,.2] [-.6], outcomes 1 0 1 0: sums .6 -.2 .6 -.6
    said = [(0, 0.6, 1.0), (0, -0.2, 0.0), (0, 0.6, 1.0), (0, -0.6, 0.0)]
    assert order_accuracy(said) == 1.0
    # pairs (1, 0): right, weight 1; (1, .5): wrong, weight .5; (0, .5): right, weight .5
    assert order_accuracy([(0, 0.4, 1.0), (0, 0.1, 0.0), (0, 0.5, 0.5)]) == pytest.approx(1.5 / 2)
    assert math.isnan(order_accuracy([(0, 0.4, 1.0), (1, 0.5, 0.0)]))


def test_calibration_error_is_the_gap_of_chance_and_outcome_in_each_bin():
    # bin .7: chances .7 .75, outcomes 1 0, gap |1.45 - 1| = .45; bin .1: chance .1, outcome 0, gap .1
    assert calibration_error([(0.7, 1.0), (0.75, 0.0), (0.1, 0.0)]) == pytest.approx(0.55 / 3)
    assert calibration_error([(1.0, 1.0), (0.0, 0.0)]) == 0.0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-5, 5), st.sampled_from([0.0, 0.5, 1.0])), max_size=9))
def test_a_shift_of_all_scores_changes_no_order(said):
    one, other = order_accuracy(said), order_accuracy([(group, score + 8, outcome) for group, score, outcome in said])
    assert one == other or (math.isnan(one) and math.isnan(other))


def test_a_metric_without_a_number_is_left_out():
    assert prm_metrics([], is_logit=True) == {}
