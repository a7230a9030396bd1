"""What a task gives a policy that Grove makes itself: its words, how they stand in a chat, and demonstrations.

A task that makes its own questions may have a teacher; then `model.path=""` trains on it from nothing (`rl/tiny.py`,
`rl/warm_start.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from conf.errors import ConfigError
from conf.schema import TaskConfig

TEACHERS = {
    "hop_search": "rollout.envs.hop_search:HopSearchTeacher",
    "textworld": "rollout.envs.textworld_teacher:TextWorldTeacher",
}
"""Teacher of each `task.generator` that has one, made of its record in TaskConfig."""

Message = tuple[str, str]
"""Role and text."""


@dataclass(frozen=True, slots=True)
class Wording:
    """A closed vocabulary and its place in a chat."""

    words: tuple[str, ...]
    """Every word of questions, turns and replies, each once; between two of them stands a blank."""
    turn_ends: tuple[str, ...]
    """Those of the words that end a turn; the last is the end of sequence."""
    chat_template: str
    """Renders every message by itself, so that a conversation is the sum of its messages' words."""


class Teacher(Protocol):
    """Makes demonstrations of mixed quality, so that there is something left to learn by reward."""

    wording: Wording

    def settings(self) -> list[Any]:
        """What demonstrations follow from, beside their number, share and seed: part of a warm start's name."""
        ...

    def demonstrations(self, num: int, right_share: float, seed: int) -> Iterator[list[Message]]:
        """`num` conversations, each with its question first; the policy's turns are those of the assistant.

        Args:
            right_share: chance that a decision is the right one; otherwise it is drawn by lot.
        """
        ...


def has_teacher(task: TaskConfig) -> bool:
    """Whether a policy can learn this task from nothing."""
    return task.generator in TEACHERS


def teacher_of(task: TaskConfig) -> Teacher:
    """The teacher of a task.

    Raises: ConfigError for a task that makes no demonstrations, or settings with which it makes none.
    """
    if task.generator not in TEACHERS:
        raise ConfigError(
            f'model.path is empty but task.generator="{task.generator}" makes no demonstrations to warm-start a tiny '
            f"model on: give model.path a checkpoint folder or hub name, or use task={' or task='.join(TEACHERS)}."
        )
    module, _, name = TEACHERS[task.generator].partition(":")
    return getattr(import_module(module), name)(getattr(task, task.generator))
