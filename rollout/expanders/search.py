"""Search that the judge's scores lead: the best step first, and Monte-Carlo tree search."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout.expanders.base import Ask, Expansion, Move, View, by_score
from rollout.search import puct, step_prior
from rollout.tree import ROOT, Tree
from rollout.types import StopReason

Key = tuple[int, ...]
"""Child numbers from the prompt: the name of a step that no later step changes."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a tree may hold. A step is started only where its whole turn fits."""

    max_nodes: int
    max_tokens: int
    turn_tokens: int
    """Most tokens of one step."""

    def room(self, tree: Tree, wanted: int) -> int:
        """How many of `wanted` steps may start now; 0 in `max_nodes` or `max_tokens` is no limit."""
        if self.max_nodes:
            wanted = min(wanted, self.max_nodes - len(tree.nodes))
        if self.max_tokens:
            wanted = min(wanted, (self.max_tokens - tree.num_generated_tokens()) // self.turn_tokens)
        return max(wanted, 0)


class BestFirst:
    """The open step that the judge scored best gets `width` successors, again and again, until `num` trajectories have
    ended, or the budget is spent, or nothing is open. Steps on no ended trajectory are pruned."""

    def __init__(self, num: int, width: int, budget: Budget) -> None:
        self._num, self._width, self._budget = num, width, budget

    def expand(self, view: View) -> list[Move]:
        """Have the newest steps judged, then go on from the best."""
        tree = view.tree
        if view.num_growing or len(tree.leaves()) >= self._num:
            return []
        if unasked := [row for row in view.open_rows if row not in view.scores]:
            return [Ask(tuple(unasked))]
        places = by_score(view, view.open_rows)[:1] if tree.nodes else [ROOT]
        return [Expansion(row) for row in places for _ in range(self._budget.room(tree, self._width))]

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Every trajectory that ended is kept, those beyond `num` of the last expansion too."""
        return set()


@dataclass(slots=True)
class _Visits:
    """What the walks through a step came to."""

    num: int = 0
    num_valued: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.num_valued if self.num_valued else 0.0


@dataclass(slots=True)
class Mcts:
    """AlphaMath (arXiv 2405.03553): walks from the prompt, at each step to the child of the greatest PUCT.

    A walk ends at a step that nobody has continued, or that ended. Its score by the judge is the walk's value, counted
    undiscounted at every step passed; an open one then gets `width` successors, which are judged. The search ends
    after `simulations` walks, or when a walk finds the budget spent. Our reading: a step without a score counts the
    visit and no value.
    """

    simulations: int
    width: int
    c: float
    budget: Budget
    _visits: dict[Key, _Visits] = field(default_factory=dict)
    _num_walks: int = 0
    _is_spent: bool = False

    def expand(self, view: View) -> list[Move]:
        """Have new steps judged; then walk until a walk asks for new steps."""
        tree = view.tree
        if view.num_growing:
            return []
        if unasked := [row for row in range(len(tree.nodes)) if row not in view.scores]:
            return [Ask(tuple(unasked))]
        children, keys = _children(tree), _keys(tree)
        while self._num_walks < self.simulations and not self._is_spent:
            self._num_walks += 1
            row = self._walk(tree, children, keys)
            self._count(tree, row, keys, view.scores.get(row))
            if row == ROOT or tree.nodes[row].stop is StopReason.continues:
                num = self.budget.room(tree, self.width)
                self._is_spent = num < self.width
                return [Expansion(row)] * num
        return []

    def _walk(self, tree: Tree, children: dict[int, list[int]], keys: dict[int, Key]) -> int:
        row = ROOT
        while children[row]:
            num_parent = self._of(keys[row]).num

            def worth(child: int, num_parent: int = num_parent) -> float:
                seen = self._of(keys[child])
                return puct(seen.mean, step_prior(tree.nodes[child].action_logprobs), num_parent, seen.num, self.c)

            row = max(children[row], key=worth)
        return row

    def _count(self, tree: Tree, row: int, keys: dict[int, Key], value: float | None) -> None:
        for passed in [ROOT, *tree.path(row)]:
            seen = self._of(keys[passed])
            seen.num += 1
            if value is not None:
                seen.num_valued, seen.total = seen.num_valued + 1, seen.total + value

    def _of(self, key: Key) -> _Visits:
        return self._visits.setdefault(key, _Visits())

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Every trajectory that ended is kept."""
        return set()


def _children(tree: Tree) -> dict[int, list[int]]:
    children: dict[int, list[int]] = {row: [] for row in range(ROOT, len(tree.nodes))}
    for row, node in enumerate(tree.nodes):
        children[node.parent].append(row)
    return children


def _keys(tree: Tree) -> dict[int, Key]:
    keys: dict[int, Key] = {ROOT: ()}
    count: dict[int, int] = {}
    for row, node in enumerate(tree.nodes):
        number = count.get(node.parent, 0)
        count[node.parent] = number + 1
        keys[row] = (*keys[node.parent], number)
    return keys
