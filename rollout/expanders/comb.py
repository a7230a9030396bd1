"""Candidates of each step, of which one is chosen before any of them acts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from rollout.expanders.base import Act, Ask, Expansion, Move, View
from rollout.seeds import derive_seed
from rollout.tree import ROOT, Tree

EPSILON = 1e-6
"""Beside the deviation, as in SLATE's code."""


class Comb:
    """SLATE (arXiv 2602.23440): one path, at each step of which `num` candidates are sampled and judged; one of them is
    drawn from softmax(z / eta) of their z-scores and acts, so that only its tool is called.

    The others are leaves that were not chosen, and are trained as it is. Our reading: a candidate without a score
    cannot be chosen while another has one; without any score all are alike.
    """

    def __init__(self, num: int, eta: float, seed: int) -> None:
        self._num, self._eta, self._seed = num, eta, seed

    def expand(self, view: View) -> list[Move]:
        """Candidates behind the open step; then their scores; then the choice."""
        if view.num_growing:
            return []
        if not view.drafts:
            behind = view.open_rows if view.tree.nodes else [ROOT]
            return [Expansion(row, drafted=True) for row in behind for _ in range(self._num)]
        if unasked := [row for row in view.drafts if row not in view.scores]:
            return [Ask(tuple(unasked))]
        chances = choice_chances([view.scores[row] for row in view.drafts], self._eta)
        rng = random.Random(derive_seed(self._seed, "comb", view.tree.depth(view.drafts[0])))
        return [Act(rng.choices(view.drafts, chances)[0])]

    def pruned_leaves(self, tree: Tree) -> set[int]:
        """All candidates train."""
        return set()


def choice_chances(scores: Sequence[float | None], eta: float) -> list[float]:
    """Chance of each candidate to be chosen: softmax over z / eta, z the z-score with n - 1; SLATE, step 5.

    Args:
        scores: of the candidates; None where there is none: chance 0, unless there is no score at all.
        eta: 0 or less gives all to the best, in equal parts where several are.
    Returns: chances that sum to 1; equal ones where all scores are equal.
    """
    known = [score for score in scores if score is not None]
    if not known:
        return [1 / len(scores)] * len(scores)
    mean = sum(known) / len(known)
    spread = math.sqrt(sum((score - mean) ** 2 for score in known) / max(len(known) - 1, 1)) + EPSILON
    best = max(known)
    weights = [
        0.0 if score is None else float(score == best) if eta <= 0 else math.exp((score - best) / spread / eta)
        for score in scores
    ]
    return [weight / sum(weights) for weight in weights]
