"""What a world says of a step and of an episode (`task.world`): its score, its progress, and whether it was won."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.tree import Node


def world_score(step: Node) -> float | None:
    """Score that the step gained in the world; None where the world gave none, as for a turn that said nothing."""
    return step.facts.score


def world_progress(step: Node) -> float | None:
    """How much nearer the step brought the world's goal; None where the world cannot tell."""
    return step.facts.progress


def world_total(trajectory: Sequence[Node]) -> float:
    """Score of a whole episode: what its steps gained together; 0 where no turn reached the world.

    Raises: ValueError for a world that keeps no score, which is a failed score and not a bad episode.
    """
    gained = [step.facts.score for step in trajectory if step.facts.score is not None]
    if not gained and any(step.facts.tool_ok for step in trajectory):
        raise ValueError("the world keeps no score; score the trajectory with world_won, or with a source of your own")
    return float(sum(gained))


def world_won(trajectory: Sequence[Node]) -> float:
    """1 when the episode reached the world's goal, else 0; 0 where no turn reached the world.

    Raises: ValueError for a world that never says, which is a failed score and not a lost episode.
    """
    said = [step.facts.won for step in trajectory if step.facts.won is not None]
    if not said and any(step.facts.tool_ok for step in trajectory):
        raise ValueError("the world never says whether its goal is reached; score the trajectory with world_total")
    return float(bool(said) and said[-1])
