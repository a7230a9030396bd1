"""Independent chains, and chains with branches at random steps."""

from __future__ import annotations

import random

from rollout.expanders.base import Expansion, Move, View, continued
from rollout.seeds import derive_seed
from rollout.tree import ROOT, Tree
from rollout.types import StopReason


class Chains:
    """`num` independent trajectories from the prompt, the group of GRPO; or on from the row `start` of a grown path."""

    def __init__(self, num: int, start: int = ROOT) -> None:
        self._num, self._start = num, start

    def expand(self, view: View) -> list[Move]:
        """Start every chain, then continue each as soon as its last step has grown."""
        if not view.tree.children(self._start) and not view.num_growing:
            return [Expansion(self._start, branch) for branch in range(self._num)]
        return [*continued(view.tree, view.open_rows)]

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Chains are all kept."""
        return set()


class RandomExpand:
    """Tree-GRPO (arXiv 2509.21240): `trees` chains, then rounds of new branches at random steps.

    In each round and tree, `nodes` places are drawn with replacement from the prompt and the tree's steps that have
    a successor, and each is continued to its end. At the end `keep` leaves of every tree are drawn without replacement
    (0 keeps all).
    """

    def __init__(self, trees: int, nodes: int, rounds: int, keep: int, seed: int) -> None:
        self._trees, self._nodes, self._rounds, self._keep, self._seed = trees, nodes, rounds, keep, seed
        self._round = 0

    def expand(self, view: View) -> list[Move]:
        """Continue open chains; when all have ended, the next round's branches."""
        tree = view.tree
        if not tree.nodes and not view.num_growing:
            return [Expansion(ROOT, branch) for branch in range(self._trees)]
        if view.open_rows or view.num_growing or self._round == self._rounds:
            return [*continued(tree, view.open_rows)]
        self._round += 1
        return [place for branch in range(self._trees) for place in self._places(tree, branch)]

    def _places(self, tree: Tree, branch: int) -> list[Expansion]:
        inner = [
            row for row, node in enumerate(tree.nodes) if node.branch == branch and node.stop is StopReason.continues
        ]
        rng = random.Random(derive_seed(self._seed, "random_expand", self._round, branch))
        return [Expansion(row, branch) for row in sorted(rng.choices([ROOT, *inner], k=self._nodes))]

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Leaves beyond `keep` in each tree."""
        return drop_leaves(tree, self._trees, self._keep, self._seed)


def drop_leaves(tree: Tree, trees: int, keep: int, seed: int) -> set[int]:
    """Leaves beyond `keep` in each of a prompt's trees, drawn; none where `keep` is 0."""
    dropped: set[int] = set()
    for branch in range(trees):
        leaves = [row for row in tree.leaves() if tree.nodes[row].branch == branch]
        rng = random.Random(derive_seed(seed, "keep_leaves", branch))
        if 0 < keep < len(leaves):
            dropped |= set(leaves) - set(rng.sample(leaves, keep))
    return dropped
