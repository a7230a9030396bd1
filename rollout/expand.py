"""Where a tree branches: pure policies over the tree so far.

An expander is asked again each time a step has grown. It sees the tree, the rows nobody has continued yet, and how
many steps are still growing; it answers which rows to continue now. When nothing is growing and it asks for nothing,
the tree is finished.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from conf.schema import ExpanderKind, RolloutConfig
from rollout.seeds import derive_seed
from rollout.tree import ROOT, Tree
from rollout.types import StopReason


@dataclass(frozen=True, slots=True)
class Expansion:
    """One new step behind `parent`, in the `branch`-th of the prompt's trees."""

    parent: int
    branch: int = 0


class Expander(Protocol):
    """Decides what grows next and, at the end, which trajectories are kept."""

    def expand(self, tree: Tree, open_rows: list[int], num_growing: int) -> list[Expansion]:
        """Steps to grow now. Rows are in canonical order whenever `num_growing` is 0."""
        ...

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Leaves of the finished tree that are recorded and not trained."""
        ...


def build_expander(cfg: RolloutConfig, seed: int) -> Expander:
    """The expander that `cfg.expander` names; `seed` drives its draws for this tree alone."""
    match cfg.expander:
        case ExpanderKind.chains:
            return Chains(cfg.num_leaves)
        case ExpanderKind.beam_forks:
            return BeamForks(cfg.num_leaves, cfg.max_forks, seed)
        case ExpanderKind.random_expand:
            return RandomExpand(cfg.num_trees, cfg.expand_nodes, cfg.expand_rounds, cfg.keep_leaves, seed)


def _continued(tree: Tree, rows: Iterable[int]) -> list[Expansion]:
    return [Expansion(row, tree.nodes[row].branch) for row in rows]


class Chains:
    """`num` independent trajectories from the prompt, the group of GRPO; or on from the row `start` of a grown path."""

    def __init__(self, num: int, start: int = ROOT) -> None:
        self._num, self._start = num, start

    def expand(self, tree: Tree, open_rows: list[int], num_growing: int) -> list[Expansion]:
        """Start every chain, then continue each as soon as its last step has grown."""
        if not tree.children(self._start) and not num_growing:
            return [Expansion(self._start, branch) for branch in range(self._num)]
        return _continued(tree, open_rows)

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Chains are all kept."""
        return set()


class BeamForks:
    """PORTool (arXiv 2510.26020): always `num` trajectories, forking as others end.

    `num` first steps; at each depth the `num - ended` places are drawn without replacement from `forks` slots of every
    open step, so that a step keeps 0 to `forks` children. Our reading: survivors are uniform, and parents are drawn
    before generating, which is the same distribution at 1 / forks of the cost. A step that keeps no child is pruned.
    """

    def __init__(self, num: int, forks: int, seed: int) -> None:
        self._num, self._forks, self._seed = num, forks, seed

    def expand(self, tree: Tree, open_rows: list[int], num_growing: int) -> list[Expansion]:
        """The next depth, once the whole depth before has grown."""
        if num_growing:
            return []
        if not tree.nodes:
            return [Expansion(ROOT)] * self._num
        deepest = max(map(tree.depth, range(len(tree.nodes))))
        slots = [row for row in open_rows if tree.depth(row) == deepest for _ in range(self._forks)]
        places = self._num - len(tree.leaves())
        rng = random.Random(derive_seed(self._seed, "beam_forks", deepest))
        return _continued(tree, sorted(rng.sample(slots, min(places, len(slots)))))

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Every trajectory that ended is kept."""
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

    def expand(self, tree: Tree, open_rows: list[int], num_growing: int) -> list[Expansion]:
        """Continue open chains; when all have ended, the next round's branches."""
        if not tree.nodes and not num_growing:
            return [Expansion(ROOT, branch) for branch in range(self._trees)]
        if open_rows or num_growing or self._round == self._rounds:
            return _continued(tree, open_rows)
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
        pruned: set[int] = set()
        for branch in range(self._trees):
            leaves = [row for row in tree.leaves() if tree.nodes[row].branch == branch]
            rng = random.Random(derive_seed(self._seed, "keep_leaves", branch))
            if 0 < self._keep < len(leaves):
                pruned |= set(leaves) - set(rng.sample(leaves, self._keep))
        return pruned
