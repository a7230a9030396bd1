"""What a reward may ask of the policy's own engines: to go on from a step, and how such trajectories end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from rewards.models.base import ModelError
from rewards.types import Cost, Score
from rollout.tree import Tree


class Completer(Protocol):
    """Grows trajectories on from a step, with the weights that grew the tree."""

    async def complete(self, tree: Tree, row: int, num: int) -> Tree:
        """The steps to `row`, and `num` independent ends of the trajectory behind them.

        The same tree, row and weights give the same ends.

        Args:
            row: a step that may be continued, or `rollout.tree.ROOT` for the prompt.
        Raises: ModelError when no worker could do it.
        """
        ...


Grade = Callable[[str, Tree], Awaitable[dict[int, Score]]]
"""Asks a configured source, by name, about a tree."""


class TreeEngine:
    """The argument `engine` of a reward: bound to the tree that is scored."""

    def __init__(self, tree: Tree, completer: Completer | None, grade: Grade, cost: Cost) -> None:
        self._tree, self._completer, self._grade, self._cost = tree, completer, grade, cost

    async def complete(self, row: int, num: int) -> Tree:
        """As `Completer.complete`, of the tree that is scored."""
        if self._completer is None:
            raise ModelError("there are no engines here to go on from a step with; they are part of a training run")
        found = await self._completer.complete(self._tree, row, num)
        known = sum(len(self._tree.nodes[each].action_ids) for each in self._tree.path(row))
        self._cost.generated_tokens += found.num_generated_tokens() - known
        return found

    async def grade(self, source: str, tree: Tree | None = None) -> dict[int, Score]:
        """What another source of the run says of a tree; None for the tree that is scored.

        Args:
            source: its name under rewards.sources.
        Returns: row -> score.
        """
        return await self._grade(source, self._tree if tree is None else tree)
