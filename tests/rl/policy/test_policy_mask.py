from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from policy_trees import PairedTree, forests

from rl.policy.mask import ancestor_mask, ancestor_ranges, segments
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


@given(forests())
def test_the_mask_is_the_ancestors_found_by_walking_up(forest: list[PairedTree]):
    batch = pack([each.credit() for each in forest])
    assert torch.equal(ancestor_mask(batch.end_T), brute_force_ancestors(token_parents(forest)))


@given(forests())
def test_segments_with_their_ancestors_are_the_mask(forest: list[PairedTree]):
    end_T = pack([each.credit() for each in forest]).end_T
    seen_TT = torch.zeros(len(end_T), len(end_T), dtype=torch.bool)
    for (start, stop), ranges in zip(segments(end_T), ancestor_ranges(end_T), strict=True):
        for first, last in ranges:
            seen_TT[start:stop, first:last] = True
        seen_TT[start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
    assert torch.equal(seen_TT, ancestor_mask(end_T))
