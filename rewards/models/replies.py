"""From what a model wrote to a JSON object that satisfies a schema, or the reason why not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator

from rewards.models.base import Message, ModelError, RewardModel

FENCE = re.compile(r"```[ \t]*(?:json)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
THOUGHT_END = "</think>"
MAX_SHOWN_CHARS = 120
AGAIN_TEMPERATURE = 0.3
"""A model asked again at temperature 0 would say the same again."""


def parsed(reply_text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of a reply.

    Looked for after the model's thoughts, in this order: the whole text, the last fenced block, the last object that
    stands in the text. The first of them that is an object is held against the schema; a later one is no second chance,
    for what a model quotes on the way to its verdict is no verdict.

    Raises: ModelError, when there is no object or it does not satisfy the schema.
    """
    text = reply_text.rpartition(THOUGHT_END)[2].strip()
    if not text:
        raise ModelError("the reply is empty" if not reply_text.strip() else "the reply is all thought and no verdict")
    found = next(_objects(text), None)
    if found is None:
        raise ModelError(f"the reply holds no JSON object: {_shown(text)}")
    problem = min(Draft202012Validator(schema).iter_errors(found), key=lambda error: len(error.path), default=None)
    if problem is not None:
        place = f"{problem.json_path}: " if problem.path else ""
        raise ModelError(f"the reply does not fit its form: {place}{_short(problem.message)}")
    return found


async def ask(
    model: RewardModel,
    messages: Sequence[Message],
    schema: Mapping[str, Any],
    *,
    tries: int = 3,
    seed: int | None = None,
) -> dict[str, Any]:
    """Ask until a reply satisfies the schema; what the model itself retries is not counted here.

    The second try has the next seed, and `AGAIN_TEMPERATURE` where the model's own temperature is 0 or not known.

    Args:
        tries: most replies to ask for.
        seed: of the first one's sampling; None leaves it to the server.
    Raises: ModelError when no reply fits, with the last one's fault; whatever `model.chat` raises.
    """
    assert tries >= 1, "nothing is known without a try"
    reason = ""
    for attempt in range(tries):
        reply = await model.chat(
            messages,
            schema=schema,
            temperature=None if attempt == 0 else _again_temperature(model),
            seed=None if seed is None else seed + attempt,
        )
        try:
            return parsed(reply.text, schema)
        except ModelError as error:
            reason = str(error)
    raise ModelError(f"{reason} ({tries} tries)" if tries > 1 else reason)


def _again_temperature(model: RewardModel) -> float | None:
    configured = getattr(getattr(model, "cfg", None), "temperature", 0.0)
    return None if configured else AGAIN_TEMPERATURE


def _objects(text: str) -> Iterator[dict[str, Any]]:
    for each in (text, *reversed(FENCE.findall(text))):
        found = _loaded(each)
        if found is not None:
            yield found
    yield from _standing(text)


def _loaded(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _standing(text: str) -> Iterator[dict[str, Any]]:
    """Objects inside a text, the last first; one inside another is part of it."""
    decoder, found, end = json.JSONDecoder(parse_constant=_refused), [], 0
    for start, letter in enumerate(text):
        if letter != "{" or start < end:
            continue
        try:
            each, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        found.append(each)
    yield from reversed(found)


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _shown(text: str) -> str:
    return json.dumps(_short(text), ensure_ascii=False)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."
