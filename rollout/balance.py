"""Which worker gets the next piece of work: the one with the least to do, or the one that holds its prefix already."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.seeds import derive_seed


def least_busy(expected: Sequence[Sequence[float]], most: int) -> int | None:
    """The worker of which the fewest tokens are still expected, of equal ones that with the fewest trees.

    Args:
        expected: for each worker, the tokens expected of each tree that it is growing.
        most: trees that a worker grows at a time.
    Returns: its place; None while all have as many trees as they may.
    """
    free = [place for place, trees in enumerate(expected) if len(trees) < most]
    return min(free, key=lambda place: (sum(expected[place]), len(expected[place]), place), default=None)


def at_home(name: str, running: Sequence[float], slack: int) -> int:
    """The worker that holds what was computed behind a prompt: the same for all that goes on from it.

    Args:
        name: of the prompt.
        running: for each worker, requests under way; infinite for one that is gone.
        slack: so many more than the least busy worker's may be under way there; beyond that, the least busy is asked,
            which computes the prefix once more.
    """
    home = derive_seed("home", name) % len(running)
    least = min(range(len(running)), key=running.__getitem__)
    return home if running[home] <= running[least] + slack else least
