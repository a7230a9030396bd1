"""The words of the rollout: prompts, sampled tokens, and what the environment says of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class StopReason(StrEnum):
    """Why a step ended. Every reason but `continues` ends its trajectory."""

    continues = "continues"
    """The environment replied and the next step may follow."""
    answered = "answered"
    """The policy gave its final answer."""
    call_budget = "call_budget"
    """The episode's tool calls are used up."""
    malformed = "malformed"
    """The turn was neither a call nor an answer, and the task ends an episode there."""
    turn_tokens = "turn_tokens"
    """The turn hit its token limit before a stop token."""
    context = "context"
    """The path would outgrow the model's context."""
    max_steps = "max_steps"
    """The tree reached its depth limit."""
    tool_crashed = "tool_crashed"
    """A tool raised or hung: the world failed, not the policy, so the trajectory trains nothing."""
    deadline = "deadline"
    """The turn's time was up, or the tree's; the trajectory trains nothing. A turn that the engine had not answered by
    then has no tokens."""
    not_chosen = "not_chosen"
    """A candidate of a step that another one won: its call was never made. It is trained, by what is said of steps, and
    its trajectory has no outcome."""


WORLD_FAILED = frozenset({StopReason.tool_crashed, StopReason.deadline})
"""Reasons that say nothing of the policy: trajectories that end so are recorded and never scored or trained."""


class StepKind(StrEnum):
    """What the policy did in a step, as the environment understood it."""

    call = "call"
    answer = "answer"
    malformed = "malformed"
    unread = "unread"
    """Nobody has read it: a part of a turn, whose facts are those of the turn's last part, or a candidate that was not
    chosen where the environment cannot read without acting."""


@dataclass(kw_only=True, slots=True)
class StepFacts:
    """What the environment knows of a step; rewards read it instead of parsing text again."""

    kind: StepKind
    tool: str = ""
    """Name the policy called; "" without a call."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the call by parameter name."""
    tool_ok: bool | None = None
    """True: the tool returned; False: it refused (ToolError, unknown tool, bad arguments); None: no call."""
    result: str | None = None
    """What the tool returned or the refusal told to the model."""
    score: float | None = None
    """Score of the world's own that the step gained; None where the world keeps none."""
    won: bool | None = None
    """Whether the world's goal was reached with this step; None where the world does not say."""
    progress: float | None = None
    """Above 0 where the step brought the world's goal nearer, below where further; None where the world cannot tell."""
    answer: str | None = None
    """The final answer's text, for an answer step."""
    error: str = ""
    """Why a turn is malformed or a tool crashed."""
    later_calls: list[dict[str, Any]] = field(default_factory=list)
    """Calls after the first in the same turn, each with tool, arguments, tool_ok and result; `tool`, `arguments`,
    `tool_ok` and `result` speak of the first."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Prompt:
    """One question, encoded once; its columns travel with it for tools and rewards."""

    id: str
    """Unique within a run, e.g. "train/17"."""
    token_ids: tuple[int, ...]
    """The prompt as the model sees it, chat template applied."""
    question: str
    """The user's text, for records and rewards."""
    answer: str
    """The reference answer; "" when the task has none."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Every column of the row it came from."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Sampling:
    """How to sample one step."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the step; the stop token is kept as the step's last token."""
    seed: int | None = None
    """Seed of this request alone, so that a re-grown tree is the same tree."""


@dataclass(kw_only=True, slots=True)
class Sampled:
    """What an engine returned for one step."""

    token_ids: list[int]
    logprobs: list[float]
    """Log-probability of each sampled token under the distribution it was drawn from."""
    stopped: bool
    """True when a stop token ended it, False when max_tokens cut it."""
    version: int
    """Weight version that sampled it."""
    context_ids: list[int]
    """The token ids the engine says it continued: the path law compares them with the tree."""
    num_cached_tokens: int = 0
    """Context tokens found in the prefix cache."""
