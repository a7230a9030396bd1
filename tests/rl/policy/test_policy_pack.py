from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_trees import PairedTree, forests, grown, paired, paired_trees

from conf.errors import ConfigError, DataError, ShapeError
from rewards.drawn import parse_tree, row_of
from rl.policy.mask import ancestor_mask
from rl.policy.pack import PathCredit, TokenCredit, TreeCredit, pack, path_tokens, plan_packs, unique_tokens
from rollout.tree import ROOT, Tree
from rollout.types import Prompt


def weighted(tree: Tree, **w0: float) -> TreeCredit:
    """Credit by step name; a step that is not named trains nothing."""
    weights = [0.0] * len(tree.nodes)
    for name, weight in w0.items():
        weights[row_of(tree, name)] = weight
    return TreeCredit(tree=tree, w_pos=list(weights), w_neg=[0.0] * len(weights), w0=weights)


def test_children_follow_their_parent_and_positions_are_depths():
    tree = parse_tree("q -> a -> (a1 -> a2, b1)", observation_tokens=1)
    batch = pack([weighted(tree, a=2, a1=1, a2=1, b1=1)])
    #   token      q   a  obs  a1 obs a2  b1
    assert batch.input_ids_T.tolist() == [1, 10, 5, 11, 5, 12, 13]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 4, 5, 3]
    assert batch.end_T.tolist() == [7, 7, 7, 6, 6, 6, 7]
    # a from q, a1 from a's observation, a2 from a1's observation, b1 from a's observation again
    assert batch.edge_row_E.tolist() == [0, 2, 4, 2]
    assert batch.edge_token_E.tolist() == [1, 3, 5, 6]
    assert batch.edge_target_E.tolist() == [10, 11, 12, 13]
    assert batch.w0_E.tolist() == [2, 1, 1, 1]


def test_step_shared_by_two_leaves_is_trained_once():
    batch = pack([weighted(parse_tree("q -> a -> (a1, a2)"), a=2, a1=1, a2=1)])
    assert len(batch.edge_target_E) == 3  # a, a1, a2; two copied branches would give 4
    assert len(batch.traj_index_P) == 6  # q a a1, q a a2


def test_later_tokens_of_a_step_are_predicted_from_the_token_before():
    tree = grown([ROOT], [(3, 0)], random.Random(0), prompt_tokens=2)
    batch = pack([paired(tree, random.Random(0)).credit()])
    assert batch.edge_row_E.tolist() == [1, 2, 3]
    assert batch.edge_target_E.tolist() == tree.nodes[0].action_ids
    assert batch.old_logprob_E.tolist() == tree.nodes[0].action_logprobs


def test_untrained_paths_take_no_room_and_untrained_ancestors_are_context():
    tree = parse_tree("q -> (a -> (a1, a2), b -> b1)")
    batch = pack([weighted(tree, a2=1)])
    assert batch.input_ids_T.tolist() == [1, tree.nodes[row_of(tree, "a")].action_ids[0], batch.edge_target_E[0]]
    assert batch.edge_token_E.tolist() == [2]


def test_observation_behind_the_last_trained_step_is_left_out():
    tree = parse_tree("q -> a -> a1", observation_tokens=4)
    assert pack([weighted(tree, a=1)]).num_tokens == 2


def test_a_tree_that_trains_nothing_takes_no_room():
    tree = parse_tree("q -> a")
    assert unique_tokens(weighted(tree)) == 0
    assert pack([weighted(tree), weighted(tree, a=1)]).num_tokens == 2
    assert plan_packs([weighted(tree)], 10) == []


def test_padding_is_seen_by_nobody_and_sees_only_itself():
    tree = parse_tree("q -> a -> (a1, a2)")
    batch = pack([weighted(tree, a=2, a1=1, a2=1)], pad_multiple=8)
    assert (len(batch.input_ids_T), batch.num_tokens) == (8, 4)
    seen_TT = ancestor_mask(batch.end_T)
    assert torch.equal(seen_TT[4:], torch.eye(8, dtype=torch.bool)[4:])
    assert not seen_TT[:4, 4:].any()


@given(forests())
def test_trajectories_of_the_pack_are_the_paths_of_the_trees(forest: list[PairedTree]):
    batch = pack([each.credit() for each in forest])
    starts = pairwise(batch.traj_ptr)
    packed = [batch.input_ids_T[batch.traj_index_P[start:stop]].tolist() for start, stop in starts]
    paths = [each.tree.path_ids(leaf) for each in forest for leaf in sorted({leaf for _, leaf in each.pairs})]
    assert sorted(packed) == sorted(paths)


@given(forests())
def test_edge_targets_positions_and_rows_agree_with_the_mask(forest: list[PairedTree]):
    batch = pack([each.credit() for each in forest])
    seen_TT = ancestor_mask(batch.end_T)
    assert torch.equal(batch.position_T, seen_TT.sum(1) - 1)
    assert seen_TT[batch.edge_token_E, batch.edge_row_E].all()
    assert torch.equal(batch.position_T[batch.edge_token_E], batch.position_T[batch.edge_row_E] + 1)
    trained = [
        token
        for each in forest
        for row, node in enumerate(each.tree.nodes)
        if each.credit().is_trained(row)
        for token in node.action_ids
    ]
    assert sorted(batch.edge_target_E.tolist()) == sorted(trained)


def test_a_prompt_without_tokens_is_refused_by_name():
    tree = parse_tree("q -> a")
    tree.prompt = Prompt(id="train/7", token_ids=(), question="", answer="")
    with pytest.raises(DataError, match="'train/7' has no tokens"):
        pack([weighted(tree, a=1)])


def test_weights_of_another_tree_are_refused():
    with pytest.raises(ShapeError, match="w_neg has 1 weights but the tree of 'test/0' has 2 steps"):
        TreeCredit(tree=parse_tree("q -> a -> b"), w_pos=[0.0, 0.0], w_neg=[0.0], w0=[0.0, 0.0])


def chain(num_tokens: int) -> TreeCredit:
    """A prompt of one token and one step of all the others."""
    return paired(grown([ROOT], [(num_tokens - 1, 0)], random.Random(0), prompt_tokens=1), random.Random(0)).credit()


def test_large_trees_are_placed_first_and_small_ones_fill_the_gaps():
    sizes = [3, 6, 4, 7]
    packs = plan_packs([chain(size) for size in sizes], 10)
    assert [[unique_tokens(credit) for credit in each] for each in packs] == [[7, 3], [6, 4]]


def test_a_tree_above_the_budget_is_split_between_trajectories():
    tree = parse_tree("q -> a -> (a1, a2, a3)")
    packs = plan_packs([weighted(tree, a=3, a1=1, a2=1, a3=1)], 4)
    # {q a a1 a2} trains a; {q a a3} has a as context only
    assert [[credit.w0 for credit in each] for each in packs] == [[[3, 1, 1, 0]], [[0, 0, 0, 1]]]


def test_a_path_above_the_budget_is_packed_alone():
    tree = parse_tree("q -> a -> b -> c")
    packs = plan_packs([weighted(tree, a=1, b=1, c=1), weighted(tree, a=1)], 2)
    assert [[unique_tokens(credit) for credit in each] for each in packs] == [[4], [2]]


@given(forests(), st.integers(1, 40))
def test_every_weight_lands_in_exactly_one_pack_within_the_budget(forest: list[PairedTree], budget: int):
    credits = [each.credit() for each in forest]
    packs = plan_packs(credits, budget)
    for credit in credits:
        shards = [shard for each in packs for shard in each if shard.tree is credit.tree]
        for row in range(len(credit.tree.nodes)):
            assert sum(shard.w0[row] for shard in shards) == credit.w0[row]
            assert sum(shard.is_trained(row) for shard in shards) == credit.is_trained(row)
    for each in packs:
        assert sum(map(unique_tokens, each)) <= budget or len(pack(each).traj_ptr) == 2
        assert pack(each).num_tokens == sum(map(unique_tokens, each))


@settings(max_examples=20)
@given(paired_trees())
def test_each_trajectory_is_in_exactly_one_shard(paired_tree: PairedTree):
    packs = plan_packs([paired_tree.credit()], 1)
    whole = pack([paired_tree.credit()])
    assert sum(len(pack(each).traj_index_P) for each in packs) == len(whole.traj_index_P)


def test_a_budget_without_room_is_refused():
    with pytest.raises(ConfigError, match=r"learner\.pack_tokens=0"):
        plan_packs([], 0)


# Trajectories one by one, and tokens with advantages of their own


def path(tree: Tree, leaf: str, advantage: float, weight: float = 1.0) -> PathCredit:
    steps = len(tree.path(row_of(tree, leaf)))
    return PathCredit(leaf=row_of(tree, leaf), advantage=[advantage] * steps, weight=[weight] * steps)


def summed(tree: Tree, paths: list[PathCredit], tokens: TokenCredit | None = None) -> TreeCredit:
    """A tree whose sums are those of its trajectories."""
    nothing = [0.0] * len(tree.nodes)
    empty = TreeCredit(tree=tree, w_pos=nothing, w_neg=nothing, w0=nothing)
    return replace(empty.only_paths(paths), tokens=tokens, denominator=math.nan)


def test_a_trajectory_lists_its_trained_tokens_in_order():
    tree = parse_tree("q -> a -> (a1, a2)")
    batch = pack([summed(tree, [path(tree, "a1", 0.5, 2.0), path(tree, "a2", -1.0)])])
    paths = batch.paths
    assert paths is not None and paths.num_paths == 2
    assert paths.edge_M.tolist() == [0, 1, 0, 2]  # a a1, a a2
    assert paths.path_M.tolist() == [0, 0, 1, 1]
    assert paths.advantage_M.tolist() == [0.5, 0.5, -1.0, -1.0]
    assert paths.weight_M.tolist() == [2.0, 2.0, 1.0, 1.0]
    # a is in both: 2 * 0.5 of the one, 1 * -1 of the other
    assert (batch.w_pos_E[0], batch.w_neg_E[0], batch.w0_E[0]) == (1.0, -1.0, 3.0)


def test_steps_of_weight_zero_are_no_tokens_of_their_trajectory():
    tree = parse_tree("q -> a -> a1")
    only_last = PathCredit(leaf=1, advantage=[9.0, 1.0], weight=[0.0, 1.0])
    batch = pack([summed(tree, [only_last])])
    assert batch.paths is not None
    assert batch.paths.edge_M.tolist() == [0]
    assert batch.edge_target_E.tolist() == tree.nodes[1].action_ids


def test_an_advantage_of_a_token_adds_to_that_of_every_trajectory_through_it():
    tree = parse_tree("q -> a -> (a1, a2)")
    paths = [path(tree, "a1", 1.0), path(tree, "a2", -1.0)]
    tokens = TokenCredit(advantage=[[0.5], [0.0], [2.0]], value=[[0.1], [0.2], [0.3]], target=[[1.0], [2.0], [3.0]])
    batch = pack([summed(tree, paths, tokens)])
    # a: 1.5 and -0.5; a1: 1; a2: -1 + 2 = 1
    assert batch.w_pos_E.tolist() == [1.5, 1.0, 1.0]
    assert batch.w_neg_E.tolist() == [-0.5, 0.0, 0.0]
    assert batch.value_E is not None and batch.value_E.tolist() == [0.1, 0.2, 0.3]
    assert batch.target_E is not None and batch.target_E.tolist() == [1.0, 2.0, 3.0]
    assert batch.paths is not None and batch.paths.advantage_M.tolist() == [1.5, 1.0, -0.5, 1.0]


def test_trained_steps_name_the_edges():
    first, second = parse_tree("q -> a -> (a1, a2)"), parse_tree("q -> b")
    batch = pack([weighted(first, a=1, a2=1), weighted(second), weighted(second, b=1)])
    # rows 0 and 2 of the first tree; the second entry trains nothing; row 0 of the third
    assert batch.trained_steps == [(0, 0), (0, 2), (2, 0)]


@settings(max_examples=30, deadline=None)
@given(paired_trees(), st.integers(1, 40))
def test_shards_of_trajectories_add_up_to_the_tree(drawn: PairedTree, budget: int):
    leaves = sorted({leaf for _, leaf in drawn.pairs})
    paths = [
        PathCredit(
            leaf=leaf,
            advantage=[drawn.pairs[row, leaf][1] for row in drawn.tree.path(leaf)],
            weight=[drawn.pairs[row, leaf][0] for row in drawn.tree.path(leaf)],
        )
        for leaf in leaves
    ]
    credit = summed(drawn.tree, paths)
    shards = [shard for packed in plan_packs([credit], budget) for shard in packed]
    assert sorted(path.leaf for shard in shards for path in shard.paths) == leaves  # each whole, in one shard
    for name in ("w_pos", "w_neg", "w0"):
        totals = [sum(parts) for parts in zip(*(getattr(shard, name) for shard in shards), strict=True)]
        assert totals == pytest.approx(getattr(credit, name))
    for shard in shards:
        assert len(shard.paths) == 1 or unique_tokens(shard) <= budget


@settings(max_examples=20, deadline=None)
@given(paired_trees(), st.integers(1, 60))
def test_packs_for_trajectories_apart_count_every_copy(drawn: PairedTree, budget: int):
    packs = plan_packs([drawn.credit()], budget, counts_copies=True)
    for packed in packs:
        batch = pack(packed)
        assert sum(path_tokens(credit) for credit in packed) == len(batch.traj_index_P)
        assert len(batch.traj_index_P) <= budget or len(batch.traj_ptr) == 2  # or one trajectory alone
