"""What whoever asks for a checkpoint knows of its files, without the libraries that write them."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "model"
"""Folder of the policy inside a checkpoint; loads in transformers and vLLM as it is."""
PRM = "prm"
"""Folder of the run's own process reward model inside a checkpoint; not there where the run has none."""


@dataclass(frozen=True, slots=True)
class Written:
    """How far a rank is with the files of a checkpoint."""

    done: bool
    error: str = ""
    """What went wrong, with the name of its class; "" where nothing did."""
    by_system: bool = False
    """The system refused, as a disk does."""
