"""The package TextWorld's own judgement of a command: does it bring the game nearer to its end?"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from rollout.envs.textworld import command_in, load_game, make_game, start_game, way_to_win
from rollout.tree import Node

NEARER = 1.0
NEITHER = 0.0
FURTHER = -1.0
_LOCK = threading.Lock()  # the package keeps caches of its own


def progress(step: Node, trajectory: Sequence[Node], game: str, folder: str) -> float:
    """How a command changes the number of commands that are still needed to win.

    +1 fewer are needed, or the game is won; 0 as many; -1 more, or the game is lost; -1 also for what is no command.

    Args:
        step: the step.
        trajectory: steps from the first to `step`.
        game: column of the row.
        folder: column of the row.
    """
    if not step.facts.tool_ok:
        return FURTHER
    done = [str(node.facts.arguments["action"]) for node in trajectory if node.facts.tool_ok]
    with _LOCK:
        session = start_game(load_game(make_game(game, Path(folder))))
        for action in done[:-1]:
            session.step(command_in(session, action))
        before = len(way_to_win(session))
        session.step(command_in(session, done[-1]))
        if session.state["lost"]:
            return FURTHER
        after = len(way_to_win(session))  # 0 when the game is won
    return NEARER if after < before else FURTHER if after > before else NEITHER
