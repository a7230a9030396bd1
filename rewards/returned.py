"""From what a user's function returned, or raised, to scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

from conf.subject import Subject
from rewards.arguments import Call
from rewards.models.base import ModelError
from rewards.types import Score, ScoreStatus

MAX_REASON_CHARS = 500
"""A reason travels with every failed score: a page of model output inside it would fill the records."""
MAX_PARTS = 64


def scores_of(reply: Any, call: Call, subject: Subject) -> list[Score]:
    """What one call said of each of its rows.

    Args:
        reply: what the function returned; a `Score` speaks of all rows.
    Returns: one score per row of the call; failed ones where the reply is not what such a call gives.
    """
    if isinstance(reply, Score):
        return [score_of(reply)] * len(call.rows)
    if subject.is_batch:
        return _scores_of_batch(reply, call, subject)
    if subject is Subject.tree and isinstance(reply, Mapping) and not any(isinstance(key, str) for key in reply):
        return _scores_of_leaves(reply, call)
    return [score_of(reply)] * len(call.rows)


def failed_call(error: BaseException, call: Call) -> list[Score]:
    """Scores of a call that raised: timed out for a TimeoutError, else failed."""
    score = Score.timed_out(told(error)) if isinstance(error, TimeoutError) else Score.failed(told(error))
    return [score] * len(call.rows)


def score_of(reply: Any) -> Score:
    """What a function says of one thing: a number, None, a `Score`, or a mapping of named parts."""
    if reply is None:
        return Score.not_applicable()
    if isinstance(reply, Score):
        return _plain(reply)
    if isinstance(reply, Mapping):
        return _score_of_parts(reply)
    if not isinstance(reply, Real):
        return Score.failed(f"it returned a {type(reply).__name__}; a reward is a number, None, a Score or named parts")
    try:
        value = float(reply)
    except OverflowError as error:
        return Score.failed(told(error))
    if not math.isfinite(value):
        return Score.failed(f"it returned {value}; return None when there is nothing to say")
    return Score(value)


def told(error: BaseException) -> str:
    """The error in one line, with the line of the user's function it came through."""
    if isinstance(error, ModelError):
        return _short(str(error))  # written to be read alone
    inner = error.__traceback__.tb_next if error.__traceback__ else None
    where = f" ({Path(inner.tb_frame.f_code.co_filename).name}:{inner.tb_lineno})" if inner else ""
    return _short(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) + where


def _plain(score: Score) -> Score:
    """The same of plain values: what a user put in need not fit through a pipe or into a record."""
    try:
        parts = {str(name): float(value) for name, value in score.parts.items()}
        status = ScoreStatus(score.status)
        value = float(score.value) if status is ScoreStatus.scored else math.nan
        return Score(value, status, _short(str(score.reason)), parts)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        return Score.failed(_short(f"it returned a Score that is none: {error}"))


def _score_of_parts(reply: Mapping[Any, Any]) -> Score:
    if len(reply) > MAX_PARTS:
        return Score.failed(f"it returned {len(reply)} named parts; {MAX_PARTS} are the most")
    parts = {}
    for name, value in reply.items():
        if not isinstance(name, str):
            return Score.failed(f"it returned a mapping with the key {_short(repr(name))}; parts are named by text")
        score = score_of(value)
        if score.parts:
            return Score.failed(f'its part "{name}" has parts of its own; parts are numbers')
        if score.is_scored:
            parts[name] = score.value
        elif score.reason:
            return replace(score, reason=_short(f'part "{name}": {score.reason}'))
    if not parts:
        return Score.not_applicable()
    total = math.fsum(parts.values())
    return Score(total, parts=parts) if math.isfinite(total) else Score.failed("the sum of its parts overflows")


def _scores_of_batch(reply: Any, call: Call, subject: Subject) -> list[Score]:
    if reply is None:
        return [Score.not_applicable()] * len(call.rows)
    if not isinstance(reply, Sequence) or isinstance(reply, str | bytes):
        what = f"it returned a {type(reply).__name__}; a reward of all {subject} returns a list"
        return [Score.failed(what)] * len(call.rows)
    if len(reply) != len(call.rows):
        what = f"it returned {len(reply)} scores for {len(call.rows)} {subject}: which is whose would be a guess"
        return [Score.failed(what)] * len(call.rows)
    return [score_of(each) for each in reply]


def _scores_of_leaves(reply: Mapping[Any, Any], call: Call) -> list[Score]:
    strange = [row for row in reply if row not in call.rows]
    if strange:
        what = f"it returned a score of row {_short(repr(strange[0]))}, which is no trajectory's end"
        return [Score.failed(what)] * len(call.rows)
    return [score_of(reply.get(row)) for row in call.rows]


def _short(text: str) -> str:
    return text[:MAX_REASON_CHARS]
