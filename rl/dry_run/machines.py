"""What the user says of the machines that a run is to go to."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT = "default"
"""How a setting that the user left alone is shown."""


@dataclass(frozen=True, slots=True)
class Machines:
    """Equal machines."""

    num: int
    gpus: int
    """Of each."""
    cores: int
    """Of each."""
