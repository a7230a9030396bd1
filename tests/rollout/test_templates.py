"""What was sampled is what is trained, whatever a template makes of earlier turns; and Llama's way to write calls."""

from __future__ import annotations

import asyncio
import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from chatml import encode
from templates import LLAMA, QWEN2, QWEN3, byte_tokenizer

from conf.schema import OnMalformed, TaskConfig, ToolFormat
from rollout.chat import ToolEnvironment
from rollout.environment import Turn
from rollout.tools import make_tool
from rollout.turns import Call, parse_llama
from rollout.types import Prompt, StepKind, StopReason


def weather(city: str, day: int = 0) -> str:
    """Tell the weather.

    Args:
        city: Where.
        day: Days from today.
    """
    return f"sunny in {city} on day {day}"


TOOLS = {"weather": make_tool(weather)}
DATED = {"date_string": "26 Jul 2024"}


def environment(template: str, **settings: Any) -> ToolEnvironment:
    tool_format = ToolFormat.llama if template == LLAMA else ToolFormat.hermes
    arguments = DATED if template == LLAMA else {}
    task = TaskConfig(**{"tool_format": tool_format, "template_arguments": arguments} | settings)
    return ToolEnvironment(task, byte_tokenizer(template), TOOLS)


def calls(template: str, *arguments: dict[str, Any]) -> str:
    if template == LLAMA:
        return "; ".join(json.dumps({"name": "weather", "parameters": each}) for each in arguments)
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': each})}\n</tool_call>" for each in arguments
    )


def play(env: ToolEnvironment, *texts: str) -> list[Turn]:
    async def run() -> list[Turn]:
        state = env.reset(Prompt(id="train/0", token_ids=(1,), question="q", answer="a"))
        turns = []
        for text in texts:
            turns.append(await env.act(state, encode(env.tokenizer, text), stopped=True))
            state = turns[-1].state
        return turns

    return asyncio.run(run())


def rendered(env: ToolEnvironment, messages: list[dict[str, str]], *, asks: bool) -> list[int]:
    text = env.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=asks, **env.task.template_arguments
    )
    return encode(env.tokenizer, text)


@pytest.mark.parametrize("template", [QWEN2, QWEN3, LLAMA], ids=["qwen2", "qwen3", "llama"])
def test_after_every_turn_the_rendered_conversation_is_the_tokens_so_far(template: str):
    thought = "<think>\nhm\n</think>\n\n" if template == QWEN3 else ""
    grows_as_rendered(environment(template), template, thought)


def grows_as_rendered(env: ToolEnvironment, template: str, thought: str) -> None:
    """Two turns of calls, one and then two, held against the rendered conversation behind each."""
    end = env.tokenizer.eos_token
    said = [thought + calls(template, {"city": "Rome"}), calls(template, {"city": "Oslo"}, {"city": "Bonn", "day": 2})]
    results = [["sunny in Rome on day 0"], ["sunny in Oslo on day 0", "sunny in Bonn on day 2"]]
    messages = [{"role": "user", "content": "How is the weather?"}]
    seen = rendered(env, messages, asks=True)
    for text, told, turn in zip(said, results, play(env, *(text + end for text in said)), strict=True):
        assert (turn.stop, turn.facts.tool_ok) == (StopReason.continues, True)
        seen += encode(env.tokenizer, text + end) + turn.observation_ids
        messages.append({"role": "assistant", "content": text})
        messages += [{"role": "tool", "content": each} for each in told]
        assert seen == rendered(env, messages, asks=True)


@pytest.mark.parametrize("template", [QWEN2, QWEN3, LLAMA], ids=["qwen2", "qwen3", "llama"])
def test_a_turn_as_no_template_would_write_it_stays_as_it_was_sampled(template: str):
    env = environment(template)
    odd = encode(env.tokenizer, f"  {calls(template, {'city': 'Rome'})} \n{env.tokenizer.eos_token}")
    if template != LLAMA:
        odd = encode(env.tokenizer, "<think></think>\n\n\n") + odd  # which Qwen3 would render without the thought
    (turn,) = play(env, env.tokenizer.decode(odd))
    usual = play(env, calls(template, {"city": "Rome"}) + env.tokenizer.eos_token)[0]
    assert turn.observation_ids == usual.observation_ids  # what is appended does not hang on how the turn was written


def test_a_template_that_would_drop_earlier_thoughts_changes_nothing_of_the_path():
    env = environment(QWEN3)
    said = f"<think>\nhm\n</think>\n\n{calls(QWEN3, {'city': 'Rome'})}"
    (turn,) = play(env, said + "<|im_end|>")
    asked = [{"role": "user", "content": "How is the weather?"}]
    path = rendered(env, asked, asks=True) + encode(env.tokenizer, said + "<|im_end|>") + turn.observation_ids
    told = [*asked, {"role": "assistant", "content": said}, {"role": "tool", "content": "sunny in Rome on day 0"}]
    assert path == rendered(env, told, asks=True)
    later = rendered(env, [*told, {"role": "assistant", "content": "Sunny."}, *asked], asks=True)
    assert (
        path[: len(path) // 2] != later[: len(path) // 2]
    )  # the template drops the thought once another question comes
    assert "hm" not in env.tokenizer.decode(later)  # the thought is dropped once another question comes


PUBLISHED = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "llama3_2")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_render_what_was_grown(name: str):
    found = find_spec("trl")
    file = Path(found.origin or "").with_name("chat_templates") / f"{name}.jinja" if found else Path("nowhere")
    if not file.is_file():
        pytest.skip(f"this TRL ships no template {name}")
    base = LLAMA if name.startswith("llama") else QWEN2
    tokenizer = copy.deepcopy(byte_tokenizer(base))
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    tool_format = ToolFormat.llama if base == LLAMA else ToolFormat.hermes
    env = ToolEnvironment(TaskConfig(tool_format=tool_format, template_arguments=DATED), tokenizer, TOOLS)
    grows_as_rendered(env, base, thought="<think>\nhm\n</think>\n\n" if name == "qwen3" else "")


def test_a_template_takes_the_tasks_arguments():
    thinks = play(environment(QWEN3), calls(QWEN3, {"city": "Rome"}) + "<|im_end|>")[0]
    answers = play(
        environment(QWEN3, template_arguments={"enable_thinking": False}),
        calls(QWEN3, {"city": "Rome"}) + "<|im_end|>",
    )[0]
    assert answers.observation_text == thinks.observation_text + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("template", [QWEN2, LLAMA], ids=["qwen2", "llama"])
def test_a_result_cannot_end_its_own_message(template: str):
    env = environment(template)
    end = env.tokenizer.eos_token
    (turn,) = play(env, calls(template, {"city": f"{end}Rome"}) + end)
    (usual,) = play(env, calls(template, {"city": "Rome"}) + end)
    (end_id,) = encode(env.tokenizer, end)
    assert turn.observation_ids.count(end_id) == usual.observation_ids.count(end_id)
    assert "Rome" in turn.observation_text


def test_llama_stops_at_the_end_of_a_turn_and_of_a_message():
    env = environment(LLAMA)
    eot, eom = encode(env.tokenizer, "<|eot_id|><|eom_id|>")
    assert set(env.stop_token_ids) == {eot, eom}
    by_turn, by_message = (play(env, calls(LLAMA, {"city": "Rome"}) + each)[0] for each in ("<|eot_id|>", "<|eom_id|>"))
    assert by_turn.observation_ids == by_message.observation_ids  # either closes the turn: nothing is closed twice
    assert by_turn.observation_text == (
        '<|start_header_id|>ipython<|end_header_id|>\n\n"sunny in Rome on day 0"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"name": "a", "parameters": {"x": 1}}', [Call("a", {"x": 1})]),
        ('<|python_tag|>{"name": "a", "parameters": {}}', [Call("a", {})]),
        ('I look it up. <|python_tag|>{"name": "a"}', [Call("a", {})]),
        ('{"type": "function", "name": "a", "arguments": {"x": 1}}', [Call("a", {"x": 1})]),
        ('{"name": "a", "parameters": {"x": "; }"}}; {"name": "b"}', [Call("a", {"x": "; }"}), Call("b", {})]),
        ('<|python_tag|>{"name": "a"}\n{"name": "b"};', [Call("a", {}), Call("b", {})]),
    ],
)  # fmt: skip
def test_calls_as_llama_writes_them(text: str, wanted: list[Call]):
    assert list(parse_llama(text).calls) == wanted


def test_llamas_other_turns_are_answers():
    assert parse_llama(" It is {sunny}. ").answer == "It is {sunny}."
    assert parse_llama(" ").error == "the turn says nothing"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"name": "a", "parameters": {"x" 1}}', 'delimiter at character 34, behind \'"a", "parameters": {"x"'),
        ('{"name": "a"}; {"name"', "tool call 2 cannot be read: Expecting ':' delimiter at character 23"),
        ('{"name": "a"}; {"name"', "none of the turn's calls was made"),
        ("<|python_tag|>", "a tool call cannot be read: Expecting value at character 1, the beginning"),
        ("<|python_tag|>print(1)", "a tool call cannot be read: Expecting value at character 1"),
        ('{"answer": 4}', 'it must be a JSON object with "name" and "arguments"'),
        ('{"name": "a", "parameters": "x"}', '"parameters" must be a JSON object, like {"name": "value"}'),
        ('{"a":' * 100_000, "it is nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_no_call_says_what_is_wrong_and_where(text: str, error: str):
    assert error in parse_llama(text).error


@pytest.mark.parametrize("template", [QWEN2, LLAMA], ids=["qwen2", "llama"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, 'weather needs the argument "city"'),
        ({"cty": "Rome"}, 'weather has no argument "cty", it takes city, day; did you mean city?'),
        ({"city": "Rome", "day": "today"}, 'weather: "day" must be integer, not "today"'),
    ],
)
def test_arguments_that_do_not_fit_are_told_in_both_formats(template: str, arguments: dict[str, Any], told: str):
    (turn,) = play(environment(template), calls(template, arguments) + byte_tokenizer(template).eos_token)
    assert (turn.stop, turn.facts.tool_ok, turn.facts.result) == (StopReason.continues, False, told)


@pytest.mark.parametrize("template", [QWEN2, LLAMA], ids=["qwen2", "llama"])
def test_a_broken_call_is_answered_in_band_and_the_next_one_is_read(template: str):
    env = environment(template, on_malformed=OnMalformed.reply)
    end, good = env.tokenizer.eos_token, calls(template, {"city": "Rome"})
    broken, repaired = play(env, good.replace('"city"', "city") + end, good + end)
    assert (broken.facts.kind, broken.stop) == (StepKind.malformed, StopReason.continues)
    assert "Expecting property name enclosed in double quotes at character" in broken.observation_text
    assert repaired.facts.tool_ok is True


def test_calls_of_a_turn_run_side_by_side_and_are_told_in_order():
    begun: list[str] = []
    both = asyncio.Event()

    async def wait(name: str) -> str:
        """Wait for the other.

        Args:
            name: Who waits.
        """
        begun.append(name)
        if len(begun) == 2:
            both.set()
        await asyncio.wait_for(both.wait(), 5)
        return name

    env = ToolEnvironment(TaskConfig(), byte_tokenizer(QWEN2), {"wait": make_tool(wait)})
    text = "".join(
        f'<tool_call>{{"name": "wait", "arguments": {{"name": "{each}"}}}}</tool_call>' for each in ("first", "second")
    )
    (turn,) = play(env, text + "<|im_end|>")
    assert (turn.facts.result, turn.facts.later_calls[0]["result"]) == ("first", "second")
    assert turn.observation_text.index("first") < turn.observation_text.index("second")
