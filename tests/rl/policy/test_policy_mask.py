from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_trees import PairedTree, forests
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import sliding_window_causal_mask_function

from rl.policy.mask import ancestor_mask, ancestor_ranges, block_table, depths, last_tokens, segments
from rl.policy.pack import pack

# q q -> a -> (b b, c -> (d, e)): one fork after a, one after c
END_T = torch.tensor([8, 8, 8, 5, 5, 8, 7, 8])


def test_a_token_sees_its_path_and_nothing_else():
    seen = [torch.nonzero(row).flatten().tolist() for row in ancestor_mask(END_T)]
    assert seen == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 5],
        [0, 1, 2, 5, 6],
        [0, 1, 2, 5, 7],
    ]


def test_segments_end_where_a_path_forks_or_stops():
    # The last child shares its parent's end and so continues its run only where it follows directly.
    assert segments(END_T) == [(0, 3), (3, 5), (5, 6), (6, 7), (7, 8)]
    assert segments(END_T[:0]) == []


def test_ancestors_are_ranges_and_touching_ranges_are_one():
    assert ancestor_ranges(END_T) == [[], [(0, 3)], [(0, 3)], [(0, 3), (5, 6)], [(0, 3), (5, 6)]]
    assert ancestor_ranges(torch.tensor([4, 4, 3, 4])) == [[], [(0, 2)], [(0, 2)]]


def test_a_window_counts_the_token_itself():
    # q q -> a -> (b b, c -> (d, e)): the last token sees itself and c, not a
    seen = [torch.nonzero(row).flatten().tolist() for row in ancestor_mask(END_T, window=2)]
    assert seen == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [2, 5], [5, 6], [5, 7]]
    assert torch.equal(ancestor_mask(END_T, window=5), ancestor_mask(END_T))


@pytest.mark.parametrize("window", [1, 3, 9])
def test_on_a_chain_the_window_is_that_of_transformers(window: int):
    theirs = sliding_window_causal_mask_function(window)
    index_T = torch.arange(9)
    expected = [[bool(theirs(0, 0, query, key)) for key in index_T] for query in index_T]
    assert ancestor_mask(torch.full((9,), 9), window).tolist() == expected


def test_the_last_tokens_of_a_path_may_end_inside_a_range():
    ranges = [(0, 3), (5, 6), (9, 12)]
    assert last_tokens(ranges, 5) == [(2, 3), (5, 6), (9, 12)]
    assert last_tokens(ranges, 2) == [(10, 12)]
    assert last_tokens(ranges, 0) == []
    assert last_tokens(ranges, 99) == ranges


def brute_force_ancestors(parent: list[int]) -> torch.Tensor:
    """bool [T, T] by walking up from every token."""
    seen_TT = torch.zeros(len(parent), len(parent), dtype=torch.bool)
    for token in range(len(parent)):
        above = token
        while above >= 0:
            seen_TT[token, above] = True
            above = parent[above]
    return seen_TT


def token_parents(forest: list[PairedTree]) -> list[int]:
    """Index of the token before each token on its path, read off the trajectories."""
    batch = pack([each.credit() for each in forest])
    parent = [-1] * len(batch.input_ids_T)
    for start, stop in pairwise(batch.traj_ptr):
        path = batch.traj_index_P[start:stop].tolist()
        for before, token in pairwise(path):
            parent[token] = before
    return parent


@settings(max_examples=25, deadline=None)
@given(forests())
def test_the_mask_is_the_ancestors_found_by_walking_up(forest: list[PairedTree]):
    batch = pack([each.credit() for each in forest])
    assert torch.equal(ancestor_mask(batch.end_T), brute_force_ancestors(token_parents(forest)))


@settings(max_examples=25, deadline=None)
@given(forests())
def test_segments_with_their_ancestors_are_the_mask(forest: list[PairedTree]):
    end_T = pack([each.credit() for each in forest]).end_T
    seen_TT = torch.zeros(len(end_T), len(end_T), dtype=torch.bool)
    for (start, stop), ranges in zip(segments(end_T), ancestor_ranges(end_T), strict=True):
        for first, last in ranges:
            seen_TT[start:stop, first:last] = True
        seen_TT[start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
    assert torch.equal(seen_TT, ancestor_mask(end_T))


@settings(max_examples=25, deadline=None)
@given(forests())
def test_depths_are_the_positions(forest: list[PairedTree]):
    batch = pack([each.credit() for each in forest], pad_multiple=4)
    assert torch.equal(depths(batch.end_T), batch.position_T)


def blocks_that(holds: str, seen_TT: Tensor, block: int) -> Tensor:
    """Blocks of the written-out mask of which "any" or "all" is True."""
    tiles = seen_TT.unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2).flatten(2)
    return getattr(tiles, holds)(-1)


@settings(max_examples=30, deadline=None)
@given(forests(max_steps=14), st.sampled_from([2, 4, 16]))
def test_the_block_table_is_that_of_the_written_out_mask(forest: list[PairedTree], block: int):
    end_T = pack([each.credit() for each in forest], pad_multiple=block).end_T
    seen_BB, whole_BB = block_table(end_T, block)
    assert torch.equal(seen_BB, blocks_that("any", ancestor_mask(end_T), block))
    assert torch.equal(whole_BB, blocks_that("all", ancestor_mask(end_T), block))


@settings(max_examples=10, deadline=None)
@given(forests(max_steps=14))
def test_the_block_table_is_that_of_torch(forest: list[PairedTree]):
    end_T = pack([each.credit() for each in forest], pad_multiple=16).end_T
    theirs = create_block_mask(
        lambda batch, head, query, key: (key <= query) & (query < end_T[key]),
        B=1,
        H=1,
        Q_LEN=len(end_T),
        KV_LEN=len(end_T),
        device="cpu",
        BLOCK_SIZE=16,
    )
    seen_BB, whole_BB = block_table(end_T, 16)
    assert torch.equal(theirs.to_dense()[0, 0].bool(), seen_BB)
    assert theirs.full_kv_num_blocks is not None
    assert torch.equal(theirs.full_kv_num_blocks[0, 0], whole_BB.sum(1, dtype=torch.int32))


@settings(max_examples=30, deadline=None)
@given(forests(max_steps=14), st.sampled_from([2, 4, 16]), st.integers(1, 12))
def test_with_a_window_the_block_table_misses_nothing_and_calls_nothing_whole_that_is_not(
    forest: list[PairedTree], block: int, window: int
):
    end_T = pack([each.credit() for each in forest], pad_multiple=block).end_T
    seen_BB, whole_BB = block_table(end_T, block, window)
    seen_TT = ancestor_mask(end_T, window)
    assert (seen_BB | ~blocks_that("any", seen_TT, block)).all()
    assert (blocks_that("all", seen_TT, block) | ~whole_BB).all()
    assert (seen_BB | ~whole_BB).all()


def test_on_a_chain_a_window_leaves_a_band_of_blocks():
    # 64 tokens in blocks of 8, a window of 8: a block sees itself and the one before
    seen_BB, whole_BB = block_table(torch.full((64,), 64), 8, window=8)
    assert torch.equal(seen_BB, torch.ones(8, 8, dtype=torch.bool).tril().triu(-1))
    assert not whole_BB.any()
