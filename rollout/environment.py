"""The environment: what answers a step. Forks are free because its state is a value, never a place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from rollout.types import Prompt, StepFacts, StopReason


@dataclass(kw_only=True, slots=True)
class Turn:
    """The environment's answer to one step."""

    state: Any
    """State after the step; the state before stays valid, so that siblings can act from it."""
    facts: StepFacts
    stop: StopReason
    """`continues` when another step may follow."""
    observation_ids: list[int] = field(default_factory=list)
    """Tokens the next step sees after the action; empty when the trajectory ended."""
    action_text: str = ""
    observation_text: str = ""


class Environment(Protocol):
    """One task's rules. `act` must not change the state it is given."""

    stop_token_ids: tuple[int, ...]
    """Tokens that end a step."""

    def reset(self, prompt: Prompt) -> Any:
        """State before the first step."""
        ...

    async def act(self, state: Any, action_ids: list[int], *, stopped: bool) -> Turn:
        """Answer one step; `stopped` is False when its token limit cut it."""
        ...
