"""Branches every so many tokens, inside turns."""

from __future__ import annotations

import random

from rollout.expanders.base import Expansion, Move, View
from rollout.seeds import derive_seed
from rollout.tree import ROOT, Tree
from rollout.types import StopReason


class Segments:
    """SPO-tree (arXiv 2505.23564) and TreeRPO (arXiv 2506.05183): `branches[d]` branches behind each step of depth d,
    each of `tokens` tokens; those of the last depth run to their end.

    Our reading, for trajectories of several turns: a segment ends with its turn; behind the last depth steps are whole
    turns and do not fork.
    """

    def __init__(self, branches: list[int], tokens: int) -> None:
        self._branches, self._tokens = branches, tokens

    def expand(self, view: View) -> list[Move]:
        """Each open step's branches, as soon as it has grown."""
        if not view.tree.nodes:
            return [] if view.num_growing else self._behind(view.tree, ROOT)
        return [branch for row in view.open_rows for branch in self._behind(view.tree, row)]

    def _behind(self, tree: Tree, row: int) -> list[Move]:
        depth = tree.depth(row)
        num = self._branches[depth] if depth < len(self._branches) else 1
        return [segment(depth, self._branches, self._tokens, row)] * num

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Every branch is kept."""
        return set()


class SegmentsTo:
    """TreePO (arXiv 2508.17445): segments until a prompt has `num` trajectories, no more and no fewer.

    The prompt has `branches[0]` to `first_max` branches, drawn anew for each tree. At each depth every open step goes
    on, and forks up to `branches[d]` ways, in random order, while trajectories are missing. When all have ended early,
    missing ones start behind steps drawn with replacement from those that have a successor.
    """

    def __init__(self, branches: list[int], tokens: int, num: int, first_max: int, seed: int) -> None:
        self._branches, self._tokens, self._num, self._first_max, self._seed = branches, tokens, num, first_max, seed
        self._rounds = 0

    def expand(self, view: View) -> list[Move]:
        """The next depth, once the one before has grown."""
        if view.num_growing:
            return []
        self._rounds += 1
        rng = random.Random(derive_seed(self._seed, "segments", self._rounds))
        tree = view.tree
        if not tree.nodes:
            first = rng.randint(self._branches[0], max(self._first_max, self._branches[0]))
            return [self._segment(tree, ROOT)] * min(first, self._num)
        missing = self._num - len(tree.leaves()) - len(view.open_rows)
        if view.open_rows:
            parents = list(view.open_rows)
            extra = [row for row in view.open_rows for _ in range(self._width(tree, row) - 1)]
            parents += rng.sample(extra, min(missing, len(extra)))
        else:
            inner = [row for row, node in enumerate(tree.nodes) if node.stop is StopReason.continues]
            parents = rng.choices(inner or [ROOT], k=missing)
        return [self._segment(tree, row) for row in sorted(parents)]

    def _width(self, tree: Tree, row: int) -> int:
        depth = tree.depth(row)
        return self._branches[depth] if depth < len(self._branches) else 1

    def _segment(self, tree: Tree, row: int) -> Move:
        return segment(tree.depth(row), self._branches, self._tokens, row)

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Every branch is kept."""
        return set()


def segment(depth: int, branches: list[int], tokens: int, row: int) -> Expansion:
    """A branch behind a step of this depth: the last ones of `branches` have no end but their own."""
    return Expansion(row, max_tokens=tokens if depth < len(branches) - 1 else 0)
