"""What a rule finds wrong with a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, why it matters and what to do."""

    text: str
    fatal: bool = True
    """False for what runs, but hardly as meant: it is logged as a warning."""


def value_of(cfg: Any, key: str) -> Any:
    """The value under a dotted key of a record."""
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg
