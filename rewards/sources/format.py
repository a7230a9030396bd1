"""Can the turn be read, and did its call work? Cheap to earn: weigh these beside a source that knows the task."""

from __future__ import annotations

from rollout.tree import Node
from rollout.types import StepKind


def format_ok(step: Node) -> float:
    """1 for a well-formed call or answer, 0 for a malformed turn."""
    return float(step.facts.kind is not StepKind.malformed)


def tool_success(step: Node) -> float | None:
    """1 when the tool returned, 0 when it refused, None for a step without a call."""
    return None if step.facts.tool_ok is None else float(step.facts.tool_ok)
