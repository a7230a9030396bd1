"""Are calls worth making? Facts about a step and the steps before it; repeats are cheap to spot and costly to allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollout.tree import Node


def repeated_call(step: Node, trajectory: Sequence[Node]) -> float | None:
    """Share of the step's calls that were made before on its path, same tool and same arguments; None without a call.

    Give it a negative weight. A call that was refused counts too: asking again in the same words is no progress.

    Args:
        step: the step.
        trajectory: steps from the first to `step`.
    """
    calls = _calls(step)
    if not calls:
        return None
    seen = [call for earlier in trajectory[:-1] for call in _calls(earlier)]
    repeated = 0
    for call in calls:
        repeated += call in seen
        seen.append(call)
    return repeated / len(calls)


def new_observation(step: Node, trajectory: Sequence[Node]) -> float | None:
    """1 when the environment said something that it had not said before on the path, else 0; None when it said nothing.

    Args:
        step: the step.
        trajectory: steps from the first to `step`.
    """
    if not step.observation_text:
        return None
    return float(all(step.observation_text != earlier.observation_text for earlier in trajectory[:-1]))


def _calls(step: Node) -> list[tuple[str, dict[str, Any]]]:
    facts = step.facts
    if facts.tool_ok is None:
        return []
    return [(facts.tool, facts.arguments), *((each["tool"], each["arguments"]) for each in facts.later_calls)]
