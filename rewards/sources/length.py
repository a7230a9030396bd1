"""Is the trajectory too long? A penalty to add to the outcome, which by itself says nothing of length."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.tree import Node


def soft_overlong(trajectory: Sequence[Node], max_tokens: int, buffer_tokens: int, factor: float = 1.0) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476): 0 up to max_tokens - buffer_tokens, then falling in a
    straight line to -factor at max_tokens, and -factor beyond.

    Args:
        trajectory: steps from the first to the leaf; only sampled tokens count, no observation.
        max_tokens: length at which the punishment is full.
        buffer_tokens: width of the slope below it.
        factor: the full punishment.
    Raises: ValueError for a slope that is empty or longer than the whole.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens={buffer_tokens} must be above 0 and at most max_tokens={max_tokens}")
    length = sum(len(step.action_ids) for step in trajectory)
    room = max_tokens - buffer_tokens - length
    return factor * max(min(room / buffer_tokens, 0.0), -1.0)
