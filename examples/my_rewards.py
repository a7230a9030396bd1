"""Rewards of your own: four shapes a reward can have. Copy one and change it.

Plug one into any run, here with the weight 0.2 beside the rewards of the task:

    grove train rewards.sources.brief.fn=examples/my_rewards.py:brief rewards.sources.brief.weight=0.2

Arguments are filled by name. Return a number, or None when there is nothing to say. An exception or a time-out is a
failed score that trains nothing; it never becomes a zero.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rollout.tree import Node
from rollout.types import StepFacts, StepKind


def brief(trajectory: Sequence[Node], max_steps: int = 5) -> float:
    """1 for a trajectory of at most `max_steps` steps, falling to 0 at twice as many.

    It asks for no `step`, so it scores whole trajectories. Set `max_steps` with rewards.sources.brief.args.max_steps=3.
    """
    return max(0.0, min(1.0, 2.0 - len(trajectory) / max_steps))


def no_repeat(step: Node, trajectory: Sequence[Node]) -> float | None:
    """-1 for a call that was already made earlier on the path, 0 for a new one, None for a step without a call.

    It asks for `step`, so it scores every step: once, however many trajectories pass through it.
    """
    if step.facts.kind is not StepKind.call:
        return None
    return -1.0 if any(_call(before.facts) == _call(step.facts) for before in trajectory[:-1]) else 0.0


def _call(facts: StepFacts) -> tuple[str, dict[str, object]]:
    return facts.tool, facts.arguments


class Vocabulary:
    """Share of an answer's words that a word list knows: set-up once per process, then a call for each trajectory.

    rewards.sources.words.fn=examples/my_rewards.py:Vocabulary rewards.sources.words.args.path=words.txt
    """

    def __init__(self, path: str):
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - as a user would write it
            self.known = frozenset(file.read().lower().split())

    def __call__(self, facts: StepFacts) -> float | None:
        """Score the final answer; None without one."""
        words = (facts.answer or "").lower().split()
        return sum(word in self.known for word in words) / len(words) if words else None


async def judged(question: str, facts: StepFacts, judge_delay_s: float = 0.01) -> float | None:
    """An async judge: the scores of one tree are awaited together, so slow answers overlap."""
    if facts.answer is None:
        return None
    await asyncio.sleep(judge_delay_s)  # your client's request goes here
    return float(facts.answer.lower() not in question.lower())
