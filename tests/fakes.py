"""Fakes that tests share: an engine that follows a script and an environment that reads letters."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from rollout.engine import Groups
from rollout.environment import Turn
from rollout.lines import Offer
from rollout.types import Prompt, Sampled, Sampling, StepFacts, StepKind, StopReason

GO, END, CRASH = 1, 2, 3
"""One-token steps: the environment replies, the trajectory ends, the tool breaks."""
REPLY = 9


def prompt(*token_ids: int, name: str = "train/0") -> Prompt:
    return Prompt(id=name, token_ids=token_ids or (7, 8), question="q", answer="a")


@dataclass
class FakeEngine:
    """Chooses a token from the request's seed, after a delay of its own, and remembers every request."""

    choose: Callable[[random.Random], int] = lambda rng: rng.choice([GO, GO, END])
    delay_s: Callable[[random.Random], float] = lambda rng: 0.0
    version: int = 0
    requests: list[tuple[list[int], Sampling]] = field(default_factory=list)
    corrupt_context: bool = False

    async def sample(self, context_ids: list[int], sampling: Sampling) -> Sampled:
        self.requests.append((list(context_ids), sampling))
        await asyncio.sleep(self.delay_s(random.Random(str(sampling.seed))))
        token = self.choose(random.Random(sampling.seed))
        seen = [0, *context_ids[1:]] if self.corrupt_context else list(context_ids)
        return Sampled(token_ids=[token], logprobs=[-1.0], stopped=True, version=self.version, context_ids=seen)

    async def load_weights(self, groups: Groups, version: int) -> None:
        self.version = version

    async def receive_weights(self, offer: Offer) -> None:
        self.version = offer.version

    async def sleep(self) -> None: ...

    async def close(self) -> None: ...


class LetterEnvironment:
    """State is the number of steps so far."""

    stop_token_ids = (GO, END, CRASH)

    def reset(self, prompt: Prompt) -> int:
        return 0

    async def act(self, state: int, action_ids: list[int], *, stopped: bool) -> Turn:
        token = action_ids[-1]
        stop = {GO: StopReason.continues, END: StopReason.answered, CRASH: StopReason.tool_crashed}[token]
        kind = StepKind.answer if token == END else StepKind.call
        facts = StepFacts(kind=kind, tool="" if token == END else "tool", tool_ok=token == GO, answer="a")
        return Turn(state=state + 1, facts=facts, stop=stop, observation_ids=[REPLY], action_text=str(token))
