"""Sources that stand for judges and reward models: numbers by the text alone, so siblings differ and runs repeat."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any


def of_step(step: Any) -> float:
    """In [-1, 1], one of nine numbers."""
    return lot(step.action_text, 9) / 4 - 1


def of_trajectory(trajectory: Any) -> float:
    """0 or 1."""
    return float(lot(" ".join(step.action_text for step in trajectory), 2))


def lot(text: str, size: int) -> int:
    return blake2b(text.encode(), digest_size=1).digest()[0] % size
