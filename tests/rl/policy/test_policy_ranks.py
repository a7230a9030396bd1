from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_trees import forests, grown, paired, tiny

from conf.errors import WaitTimeout
from conf.schema import Layout
from rewards.drawn import parse_tree
from rl.policy.model import TreePolicy
from rl.policy.pack import TreeCredit, pack
from rl.policy.ranks import (
    TOKENS_PER_PAIR,
    Ranks,
    dummy_batch,
    is_dummy,
    join,
    pack_cost,
    share_packs,
)
from rollout.meeting import meeting_address, open_meeting

CPU = torch.device("cpu")


def packs_costing(costs: list[float]) -> tuple[list[list[TreeCredit]], dict[int, float]]:
    """Packs told apart by identity, and what each costs."""
    tree = parse_tree("q -> a", logprob=-1.0)
    packs = [[TreeCredit(tree=tree, w_pos=[1.0], w_neg=[0.0], w0=[1.0])] for _ in costs]
    return packs, {id(pack): cost for pack, cost in zip(packs, costs, strict=True)}


def shared_costs(costs: list[float], size: int) -> list[list[float]]:
    """Cost of each rank's packs; 0 for a dummy."""
    packs, cost_of = packs_costing(costs)
    shares = share_packs(packs, size, cost=lambda pack: cost_of[id(pack)])
    return [[cost_of.get(id(pack), 0.0) for pack in share] for share in shares]


def test_packs_of_like_cost_are_computed_at_the_same_time():
    assert shared_costs([9, 1, 8, 2], size=2) == [[9, 1], [8, 2]]


def test_a_rank_without_a_pack_gets_a_dummy():
    assert shared_costs([4, 4, 4], size=2) == [[4, 4], [4, 0]]
    assert shared_costs([4], size=3) == [[4], [0], [0]]


def test_one_rank_gets_every_pack_and_none_gets_none():
    assert shared_costs([1, 3, 2], size=1) == [[3, 2, 1]]
    assert share_packs([], size=2) == [[], []]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=9), st.integers(1, 4))
def test_every_pack_goes_to_one_rank_and_all_ranks_make_equally_many_calls(costs: list[int], size: int):
    shares = shared_costs([float(cost) for cost in costs], size)
    assert sorted(cost for share in shares for cost in share if cost) == sorted(costs)
    assert {len(share) for share in shares} == {-(-len(costs) // size)}


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_no_other_sharing_ends_sooner(costs: list[int]):
    """Ranks wait for each other at every pack, so a step takes the sum over rounds of the costliest in each."""

    def seconds(shares: list[list[float]]) -> float:
        return sum(max(round_) for round_ in zip(*shares, strict=True))

    padded = [*costs, 0] if len(costs) % 2 else costs
    half = len(padded) // 2
    best = min(seconds([list(order[:half]), list(order[half:])]) for order in itertools.permutations(padded))
    assert seconds(shared_costs([float(cost) for cost in costs], size=2)) == best


def test_the_cost_of_a_chain_is_its_tokens_and_a_share_of_its_pairs():
    credit = TreeCredit(tree=parse_tree("q -> a -> b", logprob=-1.0), w_pos=[0.0, 1.0], w_neg=[0.0] * 2, w0=[0.0, 1.0])
    assert len(credit.tree.path_ids(1)) == 3
    assert pack_cost([credit]) == pytest.approx(3 + 6 * TOKENS_PER_PAIR)  # 1 + 2 + 3 pairs
    assert pack_cost([credit, credit]) == pytest.approx(2 * pack_cost([credit]))


@settings(max_examples=10, deadline=None)
@given(forests(max_trees=2))
def test_cost_counts_the_pairs_that_the_mask_lets_through(trees: list):
    credits = [each.credit() for each in trees]
    batch = pack(credits)
    index_T = torch.arange(len(batch.end_T))
    pairs = ((index_T[:, None] >= index_T) & (index_T[:, None] < batch.end_T)).sum().item()
    assert pack_cost(credits) == pytest.approx(batch.num_tokens + TOKENS_PER_PAIR * pairs)


def test_a_tree_that_trains_nothing_costs_nothing():
    assert pack_cost([TreeCredit(tree=parse_tree("q -> a", logprob=-1.0), w_pos=[0], w_neg=[0], w0=[0])]) == 0


@pytest.mark.parametrize("layout", [Layout.segments, Layout.trajectories])
def test_a_dummy_has_finite_outputs_and_no_gradient_to_the_last_bit(layout: Layout):
    policy = TreePolicy(tiny("qwen3"), 1.0, has_value_head=True).train()
    batch = dummy_batch(pad_multiple=4)
    assert is_dummy(batch) and len(batch.input_ids_T) == 4
    outputs = policy(batch, layout)
    assert outputs.value_E is not None and batch.paths is not None
    everything = (outputs.logprob_E + outputs.entropy_E + outputs.value_E) * (
        batch.w0_E + batch.w_pos_E + batch.w_neg_E
    )
    assert batch.paths.weight_M.tolist() == [0.0] and torch.isfinite(outputs.logprob_E).all()
    everything.sum().backward()
    assert all((weight.grad == 0).all() for weight in policy.parameters() if weight.grad is not None)
    assert policy.model.get_input_embeddings().weight.grad is not None


def test_a_pack_of_trees_is_no_dummy():
    rng = random.Random(0)
    assert not is_dummy(pack([paired(grown([-1], [(2, 0)], rng), rng).credit()]))


def test_a_rank_alone_sums_to_its_own_numbers():
    alone = Ranks.alone(CPU)
    assert alone.sum({"a": 1.5}) == alone.max({"a": 1.5}) == {"a": 1.5}
    assert alone.gather("part") == ["part"]
    alone.close()


def test_a_rank_that_nobody_joins_stops_waiting_and_says_where_to_look():
    if dist.is_initialized():  # an earlier test's group of this process alone
        dist.destroy_process_group()
    meeting = open_meeting(timeout_s=5.0)
    with pytest.raises(WaitTimeout, match=r"(?s)rank 1 waited 0 s for the 1 other .* learner\*\.log"):
        join(1, 2, meeting_address(meeting), CPU, timeout_s=0.3)
