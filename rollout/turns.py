"""What a turn says: the calls or the answer in it, for each way in which models write them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from conf.schema import ToolFormat
from rollout.tools import Tool

CALL_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
PYTHON_TAG = "<|python_tag|>"
"""With which Llama begins a turn of calls, when it does."""
SHOWN_BEFORE_ERROR = 24
"""Characters shown in front of the place where JSON breaks off."""
BETWEEN_CALLS = re.compile(r"[\s;,]*")


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as the policy wrote it."""

    tool: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurn:
    """What a turn says: calls, or an answer, or neither."""

    calls: tuple[Call, ...] = ()
    answer: str | None = None
    error: str = ""
    """Why it is neither."""


class _NoCallError(Exception):
    """What stands where a call should is none; the message is for the policy."""


def parse_turn(text: str, tool_format: ToolFormat, tools: Mapping[str, Tool]) -> ParsedTurn:
    """Read a turn without its stop token (which belongs to the text in the words format only)."""
    if tool_format is ToolFormat.words:
        return parse_words(text, tools)
    return parse_llama(text) if tool_format is ToolFormat.llama else parse_hermes(text)


def parse_words(text: str, tools: Mapping[str, Tool]) -> ParsedTurn:
    """Read `<call> tool arg ... </call>` or `<answer> ... </answer>`: the turn is one of them and nothing else.

    Each parameter is one word and the last takes the rest. An unknown tool's words come back under the name "words".
    """
    words = text.split()
    if len(words) >= 3 and words[0] == "<answer>" and words[-1] == "</answer>":
        return ParsedTurn(answer=" ".join(words[1:-1]))
    if len(words) < 3 or words[0] != "<call>" or words[-1] != "</call>":
        return ParsedTurn(error="a turn is <call> tool arguments </call> or <answer> text </answer>")
    name, rest = words[1], words[2:-1]
    arguments = tools[name].arguments_from_words(rest) if name in tools else {"words": " ".join(rest)}
    return ParsedTurn(calls=(Call(name, arguments),))


def parse_hermes(text: str) -> ParsedTurn:
    """Read `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once or more; a turn without one is the answer.

    What comes before `</think>` is thought: calls in it are not made and it is no part of the answer.
    """
    said = text.rpartition("</think>")[2]
    blocks = CALL_BLOCK.findall(said)
    around = CALL_BLOCK.sub("", said)
    if "<tool_call>" in around:
        return ParsedTurn(error="a <tool_call> is not closed by </tool_call>")
    if "</tool_call>" in around:
        return ParsedTurn(error="a </tool_call> closes no <tool_call>")
    if not blocks:
        return _answer(said)
    return _calls(blocks, _only_call)


def parse_llama(text: str) -> ParsedTurn:
    """Read `{"name": ..., "parameters": {...}}`, once or more with `;` between.

    A turn that begins otherwise is the answer, unless `<|python_tag|>` announces calls in it. What comes before
    `</think>` is thought.
    """
    said = text.rpartition("</think>")[2]
    _, tag, behind = said.partition(PYTHON_TAG)
    written = (behind if tag else said).strip()
    if not tag and not written.startswith("{"):
        return _answer(said)
    return _calls(_objects(written), lambda found: found)


def _answer(said: str) -> ParsedTurn:
    answer = said.strip()
    return ParsedTurn(answer=answer) if answer else ParsedTurn(error="the turn says nothing")


def _calls(written: Any, read: Callable[[Any], Any]) -> ParsedTurn:
    calls: list[Call] = []
    try:
        for each in written:
            calls.append(_call(read(each)))
    except _NoCallError as error:
        which = f"tool call {len(calls) + 1}" if calls else "a tool call"
        rest = "; none of the turn's calls was made" if calls else ""
        return ParsedTurn(error=f"{which} cannot be read: {error}{rest}")
    return ParsedTurn(calls=tuple(calls))


def _only_call(block: str) -> Any:
    found, end = _decoded(block, len(block) - len(block.lstrip()))
    if block[end:].strip():
        raise _NoCallError(
            f"text follows the JSON object at {_place(block, end)}; "
            "write one object between <tool_call> and </tool_call>"
        )
    return found


def _objects(text: str) -> Any:
    """JSON values one after the other, each read when it is asked for."""
    place = 0
    while place < len(text) or not place:
        found, place = _decoded(text, place)
        yield found
        between = BETWEEN_CALLS.match(text, place)
        place = between.end() if between else place


def _decoded(text: str, start: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _NoCallError(f"{error.msg} at {_place(text, error.pos)}") from None
    except RecursionError:
        raise _NoCallError("it is nested too deeply") from None


def _place(text: str, position: int) -> str:
    before = text[max(0, position - SHOWN_BEFORE_ERROR) : position].lstrip()
    return f"character {position + 1}, behind {before!r}" if before else f"character {position + 1}, the beginning"


def _call(call: Any) -> Call:
    """Both names for the arguments are taken in both formats: models mix them up, and nothing else could be meant."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise _NoCallError('it must be a JSON object with "name" and "arguments"')
    key = "parameters" if "parameters" in call and "arguments" not in call else "arguments"
    arguments = call.get(key, {})
    if not isinstance(arguments, dict):
        raise _NoCallError(f'"{key}" must be a JSON object, like {{"name": "value"}}')
    return Call(call["name"], arguments)
