"""A fixed number of trajectories that fork as others end, with survivors drawn or ranked."""

from __future__ import annotations

import random

from rollout.expanders.base import Ask, Expansion, Move, Prune, View, by_score, continued
from rollout.seeds import derive_seed
from rollout.tree import ROOT, Tree
from rollout.types import StopReason


class BeamForks:
    """PORTool (arXiv 2510.26020): always `num` trajectories, forking as others end.

    `num` first steps; at each depth the `num - ended` places are drawn without replacement from `forks` slots of every
    open step, so that a step keeps 0 to `forks` children. Our reading: survivors are uniform, and parents are drawn
    before generating, which is the same distribution at 1 / forks of the cost. A step that keeps no child is pruned.
    """

    def __init__(self, num: int, forks: int, seed: int) -> None:
        self._num, self._forks, self._seed = num, forks, seed

    def expand(self, view: View) -> list[Move]:
        """The next depth, once the whole depth before has grown."""
        tree = view.tree
        if view.num_growing:
            return []
        if not tree.nodes:
            return [Expansion(ROOT)] * self._num
        deepest = max(map(tree.depth, range(len(tree.nodes))))
        slots = [row for row in view.open_rows if tree.depth(row) == deepest for _ in range(self._forks)]
        places = self._num - len(tree.leaves())
        rng = random.Random(derive_seed(self._seed, "beam_forks", deepest))
        return [*continued(tree, sorted(rng.sample(slots, min(places, len(slots)))))]

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Every trajectory that ended is kept."""
        return set()


class ScoredBeam:
    """Every open step grows `forks` successors, and the judge's best `num - ended` of them all go on.

    Trajectories that ended leave the beam and shrink it; one that ended among the candidates must be among the best to
    stay. What is not kept is pruned: recorded, never trained. A candidate without a score ranks last, so a judge that
    says nothing keeps the first ones, and a beam in which nothing ends is ended by the depth limit.

    `first` steps begin it: `num` for PORTool's forks, `num * forks` for a beam that a process reward model guides
    (candidates are ranked by what it says of the newest step).
    """

    def __init__(self, num: int, forks: int, first: int) -> None:
        self._num, self._forks, self._first = num, forks, first

    def expand(self, view: View) -> list[Move]:
        """Grow a whole depth, have it judged, prune it."""
        tree = view.tree
        if view.num_growing:
            return []
        if not tree.nodes:
            return [Expansion(ROOT)] * self._first
        deepest = max(map(tree.depth, range(len(tree.nodes))))
        newest = [row for row in range(len(tree.nodes)) if tree.depth(row) == deepest]
        if unasked := [row for row in newest if row not in view.scores]:
            return [Ask(tuple(unasked))]
        ended = sum(tree.nodes[row].kept and row not in newest for row in tree.leaves())
        ranked = by_score(view, newest)
        kept = ranked[: self._num - ended]
        going_on = [row for row in sorted(kept) if tree.nodes[row].stop is StopReason.continues]
        moves: list[Move] = [Prune(row) for row in ranked[len(kept) :]]
        return moves + [step for step in continued(tree, going_on) for _ in range(self._forks)]

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Those pruned on the way are marked already."""
        return set()
