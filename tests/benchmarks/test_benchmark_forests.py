"""The forests that the learner is measured on, and the operations counted for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.forests import (
    CHAINS,
    COMB,
    GRPO,
    TOOL,
    Shape,
    Work,
    candidates,
    operations,
    packed_work,
    random_forest,
    separate_work,
    widths,
)
from benchmarks.policies import MEDIUM, SMALL, TINY, random_policy
from rl.policy.pack import pack
from rollout.tree import ROOT


def test_a_step_of_each_depth_has_equally_many_children():
    assert widths(1, 2, 4) == (ROOT, 0, 0, 1, 1, 2, 2)


def test_the_first_candidate_of_each_depth_goes_on():
    assert candidates(depth=3, count=2) == (ROOT, ROOT, 0, 0, 2, 2)


@pytest.mark.parametrize(
    ("shape", "trees", "apart"),
    [
        # 15 steps of 256 tokens behind a prompt of 256; 8 paths of 5 * 256. A fork's last row predicts two steps.
        (TOOL, Work(tokens=4096, pairs=3_737_600, rows=15 * 256 - 7), Work(10_240, 8 * 1280 * 1281 // 2, 8 * 1024)),
        # 8 answers of 256 tokens to a prompt of 1024, whose last row predicts all 8.
        (GRPO, Work(tokens=3072, pairs=2_885_120, rows=8 * 256 - 7), Work(10_240, 8 * 1280 * 1281 // 2, 8 * 256)),
        # 30 candidates of 64 tokens, 5 observations of 128; at each of 6 depths one row predicts 5 candidates.
        (COMB, Work(tokens=2816, pairs=2_000_256, rows=30 * 64 - 6 * 4), Work(24_000, 11_224_800, 30 * 64)),
        (CHAINS, Work(4096, 8 * 512 * 513 // 2, 8 * 256), Work(4096, 8 * 512 * 513 // 2, 8 * 256)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_work_of_the_four_forests_is_known(shape: Shape, trees: Work, apart: Work):
    forest = random_forest(shape, vocabulary=100)
    assert packed_work(pack(forest.credits)) == trees
    assert separate_work(forest.trajectories) == apart
    assert shape.unique_tokens() == trees.tokens


@pytest.mark.parametrize(
    ("shape", "small", "medium"), [(TOOL, 2.20, 2.33), (GRPO, 2.63, 2.96), (COMB, 6.48, 7.50), (CHAINS, 1.0, 1.0)]
)
def test_ideal_ratios_are_those_of_the_research_note(shape: Shape, small: float, medium: float):
    forest = random_forest(shape, vocabulary=100)
    works = separate_work(forest.trajectories), packed_work(pack(forest.credits))
    for size, expected in ((SMALL, small), (MEDIUM, medium)):
        apart, together = (operations(work, size.config(), head_passes=4) for work in works)
        assert apart / together == pytest.approx(expected, abs=0.005)


def test_operations_by_hand():
    # TINY: 2 layers of 32 * (2 * 32 + 2 * 16 + 3 * 64) = 9216 weights, heads 32 wide, 32 * 128 in the output layer.
    config = TINY.config()
    assert operations(Work(tokens=1, pairs=0, rows=0), config, head_passes=3) == 6 * 2 * 9216
    assert operations(Work(tokens=0, pairs=1, rows=0), config, head_passes=3) == 12 * 2 * 32
    assert operations(Work(tokens=0, pairs=0, rows=1), config, head_passes=3) == 6 * 32 * 128
    assert operations(Work(tokens=0, pairs=0, rows=1), config, head_passes=4) == 8 * 32 * 128


def test_layer_weights_are_those_of_the_model():
    weights = random_policy(TINY, torch.device("cpu")).named_parameters()
    matrices = sum(weight.numel() for name, weight in weights if ".layers." in name and weight.dim() == 2)
    assert operations(Work(tokens=1, pairs=0, rows=0), TINY.config(), head_passes=3) == 6 * matrices


def test_a_resized_shape_keeps_its_proportions():
    longer = COMB.resized(4 * COMB.unique_tokens())
    assert (longer.prompt_tokens, longer.action_tokens, longer.observation_tokens) == (1024, 256, 512)
    assert longer.parents == COMB.parents


@settings(max_examples=20, deadline=None)
@given(shape=st.sampled_from([TOOL, GRPO, COMB, CHAINS]), tokens=st.integers(40, 400), seed=st.integers(0, 99))
def test_every_trajectory_is_a_path_of_the_tree_and_its_weights_add_up(shape: Shape, tokens: int, seed: int):
    forest = random_forest(shape.resized(tokens), vocabulary=50, seed=seed)
    trees = [credit.tree for credit in forest.credits]
    paths = {(*tree.path_ids(node.parent), *node.action_ids) for tree in trees for node in tree.nodes}
    for trajectory in forest.trajectories:
        assert tuple(trajectory.token_ids_T.tolist()) in paths
        assert torch.equal(trajectory.target_E(), trajectory.token_ids_T[1:][trajectory.row_E])
    packs = pack(forest.credits)
    for of_pack, name in ((packs.w_pos_E, "w_pos_E"), (packs.w_neg_E, "w_neg_E")):
        of_trajectories = sum(getattr(each, name).double().sum() for each in forest.trajectories)
        assert torch.isclose(of_pack.sum(), torch.as_tensor(of_trajectories), rtol=1e-5)


def test_a_comb_trains_every_candidate_once():
    forest = random_forest(COMB.resized(200), vocabulary=50)
    assert len(forest.trajectories) == 30
    action_tokens = COMB.resized(200).action_tokens
    assert all(len(each.row_E) == action_tokens for each in forest.trajectories)
    assert all(int(each.row_E[-1]) == len(each.token_ids_T) - 2 for each in forest.trajectories)
