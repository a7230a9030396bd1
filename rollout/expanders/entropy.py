"""Branches inside turns, where the policy was least sure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rollout.expanders.base import Expansion, Move, View, continued
from rollout.expanders.chains import drop_leaves
from rollout.tree import ROOT, Tree

Decode = Callable[[Sequence[int]], str]
"""Text of token ids, special tokens included."""


class EntropyExpand:
    """TreeRL (arXiv 2506.11902): `trees` chains, then rounds of new branches at the most surprising tokens.

    In each round and tree, the `tokens` sampled tokens of least probability are chosen (the authors call this entropy),
    and `forks` new branches start before each, to be continued to their ends. Left out are what follows an answer
    marker in its turn, and, our reading of "the first token of a branch", the first token of every step: behind whole
    steps branches `RandomExpand`. A tree with fewer tokens than `tokens` takes them all.
    """

    def __init__(
        self,
        trees: int,
        tokens: int,
        rounds: int,
        forks: int,
        keep: int,
        seed: int,
        answer_markers: Sequence[str] = (),
        decode: Decode | None = None,
    ) -> None:
        assert decode or not answer_markers, "markers are found in text"
        self._trees, self._tokens, self._rounds, self._forks, self._keep = trees, tokens, rounds, forks, keep
        self._seed, self._markers, self._decode = seed, answer_markers, decode
        self._round = 0

    def expand(self, view: View) -> list[Move]:
        """Continue open chains; when all have ended, the next round's branches."""
        if not view.tree.nodes and not view.num_growing:
            return [Expansion(ROOT, branch) for branch in range(self._trees)]
        if view.open_rows or view.num_growing or self._round == self._rounds:
            return [*continued(view.tree, view.open_rows)]
        self._round += 1
        return [
            Expansion(row, branch, token=token)
            for branch in range(self._trees)
            for row, token in self._places(view.tree, branch)
            for _ in range(self._forks)
        ]

    def _places(self, tree: Tree, branch: int) -> list[tuple[int, int]]:
        """The most surprising tokens of one of the trees, as row and number, in the tree's order."""
        found = [
            (logprob, row, token)
            for row, node in enumerate(tree.nodes)
            if node.branch == branch
            for token, logprob in enumerate(node.action_logprobs[: self._end(tree, row)])
            if token
        ]
        return sorted((row, token) for _, row, token in sorted(found)[: self._tokens])

    def _end(self, tree: Tree, row: int) -> int:
        """Tokens of the step up to the end of the first answer marker of its turn; all, where there is none."""
        node = tree.nodes[row]
        if self._decode is None or not self._markers:
            return len(node.action_ids)
        before = [token for each in tree.turn(row)[:-1] for token in tree.nodes[each].action_ids]
        turn_ids = before + node.action_ids
        return max(marked_end(turn_ids, self._markers, self._decode) - len(before), 0)

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """Leaves beyond `keep` in each tree."""
        return drop_leaves(tree, self._trees, self._keep, self._seed)


def marked_end(token_ids: Sequence[int], markers: Sequence[str], decode: Decode) -> int:
    """The fewest first tokens whose text holds a marker; all of them, where none does."""

    def holds(size: int) -> bool:
        text = decode(token_ids[:size])
        return any(marker in text for marker in markers)

    if not holds(len(token_ids)):
        return len(token_ids)
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
