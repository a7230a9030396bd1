"""Scores for a source whose model a dry run does not ask: any number in [0, 1], the same for the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollout.seeds import derive_seed


def step_score(step: Any, parts: Sequence[str] = ()) -> float | dict[str, float]:
    """Of one step; of each of its named parts, where the source returns some."""
    return _score(step.action_text, parts)


def trajectory_score(trajectory: Sequence[Any], parts: Sequence[str] = ()) -> float | dict[str, float]:
    """Of one trajectory."""
    return _score("\n".join(step.action_text for step in trajectory), parts)


def _score(text: str, parts: Sequence[str]) -> float | dict[str, float]:
    if parts:
        return {part: _number(part, text) for part in parts}
    return _number("", text)


def _number(part: str, text: str) -> float:
    return derive_seed("stand-in score", part, text) % 1001 / 1000
