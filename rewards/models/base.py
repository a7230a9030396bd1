"""What a model that rewards ask can do, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""


class ModelError(Exception):
    """The model gave no usable answer; the message is the reason of the failed score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a model answered, and what the answer cost."""

    text: str
    prompt_tokens: int = 0
    reply_tokens: int = 0
    num_tries: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkedText:
    """A problem and the steps of one trajectory, as a process reward model reads them."""

    question: str
    steps: tuple[str, ...]
    """Text of each step: what the policy said, then what the environment replied."""


class RewardModel(Protocol):
    """A judge, a process reward model, or both. A method that a kind of model lacks raises ModelError saying so."""

    @property
    def identity(self) -> str:
        """Which weights answer, as far as can be known, for the record: "gpt-5-mini at api.openai.com", a path, ..."""
        ...

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Reply:
        """Answer a conversation.

        Args:
            schema: JSON schema that the reply must satisfy. The model is asked for it where it can be; a reply is not
                validated here.
            temperature: None for the model's configured one.
            max_tokens: None for the model's configured limit.
            seed: of the sampling, where the server knows seeds.
        Raises: ModelError; TimeoutError when no try was answered in time.
        """
        ...

    async def choose(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        """Log-probability, in nats, of each choice as the next token after the conversation; each is one token.

        Raises: ModelError, also where a choice is no single token; TimeoutError.
        """
        ...

    async def score_steps(self, texts: Sequence[MarkedText]) -> list[list[float]]:
        """Score of each step of each text, in [0, 1]; as many as there are steps.

        Raises: ModelError, also where the number of scores is not the number of steps; TimeoutError.
        """
        ...
