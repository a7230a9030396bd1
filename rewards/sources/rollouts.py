"""What is a step worth? Measured, by letting the policy go on from it and looking how that ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rewards.engine import TreeEngine
from rewards.models.base import ModelError
from rewards.types import Score
from rollout.tree import ROOT, Tree
from rollout.types import StopReason


class Value:
    """Chance of success behind each step, as the mean outcome of `num` fresh rollouts from there; the signal of VinePPO
    (arXiv 2410.01679), PAV's prover (arXiv 2410.08146) and VSRM (arXiv 2508.10293).

    V(s) = mean over k = 1..num of outcome(rollout_k from s)

    At the last step of a trajectory it is the outcome itself; the prompt has one too (row -1). A rollout that the world
    cut short, by a crashed tool or a deadline, says nothing; one whose outcome could not be scored fails the step, for
    a mean over the rest would favour what is easy to score.

    Args:
        grader: name under rewards.sources of the source of outcomes.
        num: rollouts a step; VinePPO's authors take 9, VSRM's 5, PAV's 20.
    """

    of_prompt = True

    def __init__(self, grader: str, num: int = 9) -> None:
        if num < 1:
            raise ValueError(f"num={num} rollouts measure nothing; use 1 or more")
        self._grader, self._num = grader, num

    async def __call__(self, tree: Tree, rows: Sequence[int], engine: TreeEngine) -> list[Score]:
        """One value for each of `rows`."""
        ended = await engine.grade(self._grader)
        return list(await asyncio.gather(*(self._value(tree, row, engine, ended) for row in rows)))

    async def _value(self, tree: Tree, row: int, engine: TreeEngine, ended: dict[int, Score]) -> Score:
        if row != ROOT and tree.nodes[row].stop is not StopReason.continues:
            return ended[row]
        try:
            outcomes = await engine.grade(self._grader, await engine.complete(row, self._num))
        except TimeoutError as error:
            return Score.timed_out(str(error))
        except ModelError as error:
            return Score.failed(str(error))
        for outcome in outcomes.values():
            if not outcome.is_scored:
                return outcome
        if not outcomes:
            return Score.failed(f"the world cut all {self._num} rollouts short")
        return Score(sum(outcome.value for outcome in outcomes.values()) / len(outcomes))
