"""Are calls worth making? Facts about a step and the steps before it; repeats are cheap to spot and costly to allow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rollout.tree import Node, Tree


def repeated_call(step: Node, trajectory: Sequence[Node]) -> float | None:
    """Share of the step's calls that were made before on its path, same tool and same arguments; None without a call.

    Give it a negative weight. A call that was refused counts too: asking again in the same words is no progress.

    Args:
        step: the step.
        trajectory: steps from the first to `step`.
    """
    calls = calls_of(step)
    if not calls:
        return None
    seen = [call for earlier in trajectory[:-1] for call in calls_of(earlier)]
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


class StateNovelty:
    """How rarely the environment said this in the whole tree, in (0, 1]; None for a step that it did not reply to.

    1 / sqrt(n), n the number of steps of the tree with the very same reply, this one included: the count-based bonus of
    MBIE-EB (Strehl and Littman, 2008) with the reply's text as the state. All that was generated counts, pruned steps
    too. It pays for going where the other trajectories did not go, be it right or wrong: give it a small weight.
    """

    def __init__(self) -> None:
        # Counted once for each tree and not once for each step; the tree is held, so that its identity stays its own.
        self._tree: Tree | None = None
        self._num_nodes = 0
        self._counts: Counter[str] = Counter()

    def __call__(self, step: Node, tree: Tree) -> float | None:
        """What the step is worth.

        Args:
            step: the step.
            tree: the tree it is in.
        """
        if not step.observation_text:
            return None
        if self._tree is not tree or self._num_nodes != len(tree.nodes):
            self._counts = Counter(node.observation_text for node in tree.nodes)
            self._tree, self._num_nodes = tree, len(tree.nodes)
        return 1 / math.sqrt(self._counts[step.observation_text])


def calls_of(step: Node) -> list[tuple[str, dict[str, Any]]]:
    """Tool and arguments of each call of a step in order, refused ones included; none where it made no call."""
    facts = step.facts
    if facts.tool_ok is None:
        return []
    return [(facts.tool, facts.arguments), *((each["tool"], each["arguments"]) for each in facts.later_calls)]
