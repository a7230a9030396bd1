"""What was said of a step while its tree grew."""

from __future__ import annotations

from rollout.tree import Node


def judged(step: Node) -> float | None:
    """The score by which `rollout.judge` chose between this step and its siblings; None where it gave none.

    All candidates of a step were judged before one of them acted, so what their calls returned is in no score. A source
    that is asked about the finished tree sees the result of the one that was chosen, and of no other.
    """
    return step.judged
