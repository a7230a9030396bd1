"""A reward source as the judge of a tree that is still growing (`rollout.expanders.base.Judge`)."""

from __future__ import annotations

from dataclasses import replace

from rewards.engine import Grade
from rollout.tree import ROOT, Tree
from rollout.types import StopReason


class SourceJudge:
    """Asks a source of steps, by name, about the newest steps of a growing tree.

    A score that failed, or a source with nothing to say, is no score: the step is neither good nor bad.
    """

    def __init__(self, grade: Grade, source: str) -> None:
        """Args: `grade`: asks a configured source about a tree; `source`: the name under rewards.sources."""
        self._grade, self._source = grade, source

    async def score(self, tree: Tree, rows: list[int]) -> list[float | None]:
        """As `rollout.expanders.base.Judge.score`."""
        grown, row_of = paths_to(tree, rows)
        said = await self._grade(self._source, grown)
        scores = [said.get(row_of[row]) for row in rows]
        return [score.value if score is not None and score.is_scored else None for score in scores]


def paths_to(tree: Tree, rows: list[int]) -> tuple[Tree, dict[int, int]]:
    """The steps to some rows of a growing tree, as if trajectories ended there, so that sources are asked about them.

    Returns: a tree, whose last steps are leaves; row of `tree` -> its row there.
    """
    kept = sorted({step for row in rows for step in tree.path(row)})
    row_of = {row: number for number, row in enumerate(kept)} | {ROOT: ROOT}
    parents = {tree.nodes[row].parent for row in kept}
    found = Tree(prompt=tree.prompt)
    for row in kept:
        node = replace(tree.nodes[row], parent=row_of[tree.nodes[row].parent], kept=True)
        if row not in parents and node.stop is StopReason.continues:
            node.stop, node.observation_ids, node.is_part = StopReason.max_steps, [], False
        found.nodes.append(node)
    return found, row_of
