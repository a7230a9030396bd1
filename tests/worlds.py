"""A world that counts, for tests, with every way to go wrong; and an engine that writes whole turns."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chatml import chatml_tokenizer, encode

from conf.errors import ToolError
from rollout.engine import Groups
from rollout.lines import Offer
from rollout.types import Prompt, Sampled, Sampling
from rollout.world import Fork, Observed


class Counter:
    """Adds numbers up. A stateless one forgets them again."""

    def __init__(self, fork: str = "copy", opening: str = "") -> None:
        self.fork, self.opening = Fork(fork), opening
        self.num_resets = self.num_acts = self.num_copies = self.num_closes = 0

    def reset(self, prompt: Prompt) -> tuple[Any, str]:
        self.num_resets += 1
        return {"total": 0}, self.opening

    def copy(self, session: dict[str, int]) -> dict[str, int]:
        self.num_copies += 1
        return dict(session)

    def close(self, session: dict[str, int]) -> None:
        self.num_closes += 1

    def act(self, session: dict[str, int], action: str) -> Any:
        self.num_acts += 1
        word, _, number = action.partition(" ")
        if word == "end":
            return Observed(text="bye", done=True, score=0.0, won=True, answer=action)
        if word == "hang":
            time.sleep(float(number))
        elif word == "die":
            os._exit(3)
        elif word == "hoard":
            bytearray(int(number) << 20)
        elif word == "raise":
            raise OSError("the sky fell")
        elif word == "none":
            return None
        elif word == "env":
            return Observed(text=os.environ.get(number, "hidden"))
        elif word == "draw":
            return Observed(text=f"drew {random.SystemRandom().random()}")
        elif word != "add":
            raise ToolError(f'I do not know how to "{action}"')
        gained = int(float(number))
        total = session["total"] + gained
        if self.fork is not Fork.stateless:
            session["total"] = total
        return Observed(text=f"total {total}", score=float(gained), won=False)


@dataclass
class ChatEngine:
    """Writes one of its texts as a whole turn, chosen by the request's seed, and remembers what it continued."""

    texts: list[str]
    tokenizer: Any = field(default_factory=chatml_tokenizer)
    contexts: list[list[int]] = field(default_factory=list)
    choose: Callable[[list[int], random.Random], str] | None = None
    """Another way to choose, by context."""
    end: str = "<|im_end|>"
    """What closes a turn."""
    version: int = 0

    async def sample(self, context_ids: list[int], sampling: Sampling) -> Sampled:
        self.contexts.append(list(context_ids))
        await asyncio.sleep(0)
        rng = random.Random(sampling.seed)
        text = self.choose(context_ids, rng) if self.choose else rng.choice(self.texts)
        token_ids = encode(self.tokenizer, text + self.end)
        stopped = len(token_ids) <= sampling.max_tokens
        token_ids = token_ids[: sampling.max_tokens]
        return Sampled(
            token_ids=token_ids,
            logprobs=[-1.0] * len(token_ids),
            stopped=stopped,
            version=0,
            context_ids=list(context_ids),
        )

    async def load_weights(self, groups: Groups, version: int) -> None: ...

    async def receive_weights(self, offer: Offer) -> None: ...

    async def sleep(self) -> None: ...

    async def close(self) -> None: ...


async def wait_until(true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """What happens in another thread, soon."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)
