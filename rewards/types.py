"""What a score can be: a value, failed, timed out, or not applicable. Never 0 for "don't know"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from rollout.tree import Tree


class ScoreStatus(StrEnum):
    """The four outcomes of asking a source; only `scored` carries a number and only it trains."""

    scored = "scored"
    failed = "failed"
    timed_out = "timed_out"
    not_applicable = "not_applicable"


BROKEN = (ScoreStatus.failed, ScoreStatus.timed_out)
"""The source was asked and its value is unknown."""


@dataclass(frozen=True, slots=True)
class Score:
    """What one source says of one step or one trajectory."""

    value: float
    """The number; NaN unless status is `scored`."""
    status: ScoreStatus = ScoreStatus.scored
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Named parts that `value` is the plain sum of, for a source that returned some."""

    def __post_init__(self) -> None:
        if self.status is ScoreStatus.scored and not math.isfinite(self.value):
            raise ValueError(f"a score must be finite, got {self.value}; return None when there is nothing to say")

    @classmethod
    def failed(cls, reason: str) -> Score:
        """The source broke: its value is unknown and trains nothing."""
        return cls(math.nan, ScoreStatus.failed, reason)

    @classmethod
    def timed_out(cls, reason: str) -> Score:
        """The source did not answer within its limit."""
        return cls(math.nan, ScoreStatus.timed_out, reason)

    @classmethod
    def not_applicable(cls, reason: str = "") -> Score:
        """The source has nothing to say here; it neither helps nor harms."""
        return cls(math.nan, ScoreStatus.not_applicable, reason)

    @property
    def is_scored(self) -> bool:
        """True when the value is real."""
        return self.status is ScoreStatus.scored


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a source's scores come from, so that a record says what judged."""

    source: str
    """The function, as configured."""
    version: str
    """Digest of its file, its arguments and the model it asks: another version is another reward."""
    prompt_hash: str = ""
    """Digest of its prompt template, for a judge."""
    model: str = ""
    """The model it asks, as that names itself."""


@dataclass(kw_only=True, slots=True)
class Cost:
    """What asking one source about one tree took."""

    seconds: float = 0.0
    calls: int = 0
    """Calls of its function that it takes to score the tree."""
    cached_calls: int = 0
    """Of these, answered from the cache or by an equal call."""
    requests: int = 0
    """Requests to its model."""
    tries: int = 0
    """Requests with those that were repeated."""
    prompt_tokens: int = 0
    reply_tokens: int = 0
    usd: float = 0.0
    generated_tokens: int = 0
    """Tokens that the policy sampled for it, going on from steps."""

    def add_requests(self, other: Cost) -> None:
        """Add what another source asked its model on behalf of this one."""
        for name in ("requests", "tries", "prompt_tokens", "reply_tokens", "usd"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(kw_only=True, slots=True)
class ScoredTree:
    """A tree and what every source said of it, each unique step and each trajectory once."""

    tree: Tree
    step_scores: dict[str, dict[int, Score]] = field(default_factory=dict)
    """source -> row of the step -> score; only steps on a trained path are asked about."""
    leaf_scores: dict[str, dict[int, Score]] = field(default_factory=dict)
    """source -> row of the leaf -> score of the trajectory that ends there."""
    step_signals: dict[str, dict[int, Score]] = field(default_factory=dict)
    """signal -> row -> weighted sum of the sources that feed it (`rewards.blend`)."""
    leaf_signals: dict[str, dict[int, Score]] = field(default_factory=dict)
    """signal -> leaf row -> weighted sum of the trajectory sources that feed it."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """source -> what its scores come from."""
    costs: dict[str, Cost] = field(default_factory=dict)
    """source -> what asking it took."""
