from __future__ import annotations

import asyncio
import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
from chatml import chatml_tokenizer, encode

from conf.errors import ConfigError, ToolError
from conf.schema import ColumnsConfig, Config, OnMalformed, TaskConfig, ToolFormat
from rl.tiny import tiny_tokenizer
from rollout.chat import ToolEnvironment, build_environment, find_stop_token_ids
from rollout.environment import Turn
from rollout.envs.hop_search import HopSearchRows, parse_world
from rollout.tools import make_tool
from rollout.turns import parse_hermes, parse_words
from rollout.types import Prompt, StepKind, StopReason


def weather(city: str, day: int = 0) -> str:
    """Tell the weather.

    Args:
        city: Where.
        day: Days from today.
    """
    if city == "Atlantis":
        raise ToolError("no such city")
    if city == "Pompeii":
        raise OSError("eruption")
    return f"sunny in {city} on day {day}"


def hermes(tools: bool = True, **settings: Any) -> ToolEnvironment:
    task = TaskConfig(tool_format=ToolFormat.hermes, **settings)
    return ToolEnvironment(task, chatml_tokenizer(), {"weather": make_tool(weather)} if tools else {})


def asking(name: str = "weather", **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def play(env: ToolEnvironment, *texts: str, data: dict[str, Any] | None = None) -> list[Turn]:
    """Feed whole turns, each written as text that ends with its stop token."""

    async def run() -> list[Turn]:
        state = env.reset(Prompt(id="train/0", token_ids=(1,), question="q", answer="a", data=data or {}))
        turns = []
        for text in texts:
            turns.append(await env.act(state, encode(env.tokenizer, text), stopped=True))
            state = turns[-1].state
        return turns

    return asyncio.run(run())


# --- hermes -----------------------------------------------------------------------------------------------------------


def test_a_conversation_grown_turn_by_turn_is_the_conversation_the_template_renders():
    env, tokenizer = hermes(), chatml_tokenizer()
    sampled = [asking(city="Rome"), asking(city="Oslo") + "\n" + asking(city="Bonn", day=2), "It is sunny."]
    messages: list[dict[str, str]] = [{"role": "user", "content": "How is the weather?"}]
    seen = encode(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    turns = play(env, *(text + "<|im_end|>" for text in sampled))
    for text, turn in zip(sampled, turns, strict=True):
        seen += encode(tokenizer, text + "<|im_end|>") + turn.observation_ids
    messages += [
        {"role": "assistant", "content": sampled[0]},
        {"role": "tool", "content": "sunny in Rome on day 0"},
        {"role": "assistant", "content": sampled[1]},
        {"role": "tool", "content": "sunny in Oslo on day 0"},
        {"role": "tool", "content": "sunny in Bonn on day 2"},
        {"role": "assistant", "content": sampled[2]},
    ]
    whole = encode(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False))
    assert seen + encode(tokenizer, "\n") == whole  # the newline that closes the last turn is nobody's to see


def test_the_observation_starts_behind_the_sampled_stop_token():
    (turn,) = play(hermes(), asking(city="Rome") + "<|im_end|>")
    assert turn.observation_text == (
        "\n<|im_start|>user\n<tool_response>\nsunny in Rome on day 0\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_closing_tokens_that_were_not_sampled_belong_to_the_observation():
    (turn,) = play(hermes(), asking(city="Rome") + "<|endoftext|>")  # stopped by another token than the template's own
    assert turn.observation_text.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>")


def test_facts_of_a_call_that_returned():
    (turn,) = play(hermes(), asking(city="Rome", day=3) + "<|im_end|>")
    assert (turn.stop, turn.facts.kind, turn.facts.tool) == (StopReason.continues, StepKind.call, "weather")
    assert (turn.facts.arguments, turn.facts.tool_ok) == ({"city": "Rome", "day": 3}, True)
    assert (turn.facts.result, turn.facts.later_calls) == ("sunny in Rome on day 3", [])
    assert turn.action_text == asking(city="Rome", day=3) + "<|im_end|>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (asking(city="Atlantis"), "no such city"),
        (asking(), 'weather needs the argument "city"'),
        (asking(city="Rome", hour=1), 'weather has no argument "hour", it takes city, day'),
        (asking("wether", city="Rome"), 'there is no tool "wether", the tools are weather; did you mean weather?'),
    ],
)
def test_a_refusal_is_told_to_the_policy_and_the_episode_goes_on(text: str, message: str):
    (turn,) = play(hermes(), text + "<|im_end|>")
    assert (turn.stop, turn.facts.tool_ok, turn.facts.result) == (StopReason.continues, False, message)
    assert f"<tool_response>\nerror: {message}\n</tool_response>" in turn.observation_text


def test_a_crashed_tool_ends_the_trajectory_by_the_worlds_fault():
    (turn,) = play(hermes(), asking(city="Pompeii") + "<|im_end|>")
    assert (turn.stop, turn.observation_ids, turn.facts.tool_ok) == (StopReason.tool_crashed, [], None)
    assert (turn.facts.tool, turn.facts.error) == ("weather", "weather raised OSError: eruption")


def test_several_calls_in_a_turn_run_in_order_and_later_ones_are_facts_too():
    (turn,) = play(hermes(), asking(city="Rome") + asking(city="Atlantis") + "<|im_end|>")
    assert (turn.facts.arguments, turn.facts.tool_ok) == ({"city": "Rome"}, True)
    assert turn.facts.later_calls == [
        {"tool": "weather", "arguments": {"city": "Atlantis"}, "tool_ok": False, "result": "no such city"}
    ]
    assert turn.observation_text.count("<tool_response>") == 2


def test_a_turn_without_a_call_is_the_answer_without_its_thought():
    (turn,) = play(hermes(), "<think>maybe " + asking(city="Rome") + "</think>\n\n42 <|im_end|>")
    assert (turn.stop, turn.facts.kind, turn.facts.answer) == (StopReason.answered, StepKind.answer, "42")
    assert turn.observation_ids == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>\n{broken\n</tool_call>", "a tool call cannot be read: Expecting property name"),
        ("<tool_call>[1]</tool_call>", 'it must be a JSON object with "name" and "arguments"'),
        ('<tool_call>{"name": "weather", "arguments": "Rome"}</tool_call>', '"arguments" must be a JSON object'),
        ('<tool_call>{"name": "weather"', "a <tool_call> is not closed by </tool_call>"),
        ("<think>hm</think>", "the turn says nothing"),
    ],
)
def test_malformed_turns_are_told_or_end_the_episode_as_the_task_says(text: str, error: str):
    (told,) = play(hermes(on_malformed=OnMalformed.reply), text + "<|im_end|>")
    assert (told.stop, told.facts.kind) == (StopReason.continues, StepKind.malformed)
    assert error in told.facts.error
    assert f"error: {told.facts.error}" in told.observation_text
    (ended,) = play(hermes(on_malformed=OnMalformed.end), text + "<|im_end|>")
    assert (ended.stop, ended.observation_ids, ended.facts.error) == (StopReason.malformed, [], told.facts.error)


def test_a_turn_cut_by_its_token_limit_is_not_read():
    env = hermes()
    state = env.reset(Prompt(id="train/0", token_ids=(1,), question="q", answer="a"))
    turn = asyncio.run(env.act(state, encode(env.tokenizer, asking(city="Rome")), stopped=False))
    assert (turn.stop, turn.facts.kind, turn.facts.tool) == (StopReason.turn_tokens, StepKind.malformed, "")


def test_the_call_beyond_the_budget_ends_the_episode_and_is_not_made():
    rome = asking(city="Rome") + "<|im_end|>"
    first, second, third = play(hermes(max_calls=2), rome, rome, rome)
    assert [first.stop, second.stop, third.stop] == [StopReason.continues, StopReason.continues, StopReason.call_budget]
    assert (third.facts.tool, third.facts.tool_ok) == ("weather", False)
    (both,) = play(hermes(max_calls=1), rome.removesuffix("<|im_end|>") + rome)
    assert (both.stop, both.facts.tool_ok) == (StopReason.call_budget, False)


def test_a_rows_own_budget_replaces_the_tasks():
    rome = asking(city="Rome") + "<|im_end|>"
    env = hermes(max_calls=8, columns=ColumnsConfig(max_calls="budget"))
    assert play(env, rome, rome, data={"budget": 1})[1].stop is StopReason.call_budget
    with pytest.raises(
        ConfigError, match=r'task.columns.max_calls="budget" is None in a row with the columns question'
    ):
        play(env, rome, data={"question": "q"})


def test_siblings_act_from_the_same_state():
    env = hermes(max_calls=1)
    state = env.reset(Prompt(id="train/0", token_ids=(1,), question="q", answer="a"))
    before = copy.deepcopy(state)
    action_ids = encode(env.tokenizer, asking(city="Rome") + "<|im_end|>")

    async def run() -> list[Turn]:
        return [await env.act(state, action_ids, stopped=True) for _ in range(2)]

    assert [turn.stop for turn in asyncio.run(run())] == [StopReason.continues] * 2  # neither spent the other's budget
    assert state == before


def test_stop_tokens_come_from_tokenizer_template_and_generation_config(tmp_path: Path):
    tokenizer = copy.copy(chatml_tokenizer())
    end, text_end = encode(tokenizer, "<|im_end|>") + encode(tokenizer, "<|endoftext|>")
    assert find_stop_token_ids(tokenizer, ToolFormat.hermes) == (end,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, text_end]}))
    tokenizer.name_or_path = str(tmp_path)
    assert find_stop_token_ids(tokenizer, ToolFormat.hermes) == (end, text_end)
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it, whose template still closes turns with <|im_end|>
    (tmp_path / "generation_config.json").write_text("{}")
    assert find_stop_token_ids(tokenizer, ToolFormat.hermes, closing_ids=[end, 0]) == (text_end, end)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ messages[0].content }}", "changes or drops the assistant's text"),
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
            'leaves out messages with role "tool"',
        ),
        (
            "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
            "{{ m.content }}{% endfor %}",
            "does not render a tool message after an assistant turn .no tools.",
        ),
    ],
)
def test_a_template_that_cannot_show_results_is_refused_before_the_run(template: str | None, message: str):
    tokenizer = copy.deepcopy(chatml_tokenizer())
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message):
        ToolEnvironment(TaskConfig(), tokenizer, {"weather": make_tool(weather)})


def test_words_format_needs_its_words_in_the_vocabulary():
    with pytest.raises(ConfigError, match=r"task.tool_format=words needs </call> and </answer>.*has no </call>"):
        ToolEnvironment(TaskConfig(tool_format=ToolFormat.words), chatml_tokenizer(), {})


# --- words ------------------------------------------------------------------------------------------------------------


def hop_config() -> Config:
    tools = [f"rollout.envs.hop_search:{name}" for name in ("office", "school", "family", "clinic")]
    columns = ColumnsConfig(max_calls="max_calls")
    words, end = ToolFormat.words, OnMalformed.end
    return Config(
        task=TaskConfig(generator="hop_search", columns=columns, tools=tools, tool_format=words, on_malformed=end)
    )


def hop_environment() -> ToolEnvironment:
    return build_environment(hop_config(), tiny_tokenizer())


def test_a_hop_walked_with_the_right_tools_is_answered_in_few_tokens():
    row = HopSearchRows(hop_config().task.hop_search, 0, "train").row(0)
    world = parse_world(row["world"])
    calls = [
        f"<call> {world.tool_of(relation)} {relation} {person} </call>"
        for relation, person in zip(row["relations"], row["people"], strict=False)
    ]
    turns = play(hop_environment(), *calls, f"<answer> {row['answer']} </answer>", data=row)
    assert [turn.facts.result for turn in turns[:-1]] == row["people"][1:]
    assert [turn.observation_text for turn in turns[:-1]] == [
        f"<result> {name} </result>" for name in row["people"][1:]
    ]
    assert (turns[-1].stop, turns[-1].facts.answer) == (StopReason.answered, row["answer"])
    assert [len(encode(tiny_tokenizer(), text)) for text in calls] == [6, 6, 6]
    assert [len(turn.observation_ids) for turn in turns] == [4, 4, 4, 0]
    assert turns[0].facts.arguments == {"relation": row["relations"][0], "person": row["people"][0]}


def test_a_closed_vocabulary_is_told_error_and_the_facts_say_why():
    row = HopSearchRows(hop_config().task.hop_search, 0, "train").row(0)
    wrong = next(
        name for name in ("office", "school") if name != parse_world(row["world"]).tool_of(row["relations"][0])
    )
    call = f"<call> {wrong} {row['relations'][0]} {row['people'][0]} </call>"
    turns = play(hop_environment(), call, "<call> city boss Anna Reed </call>", "<call> office boss </call>", data=row)
    assert [turn.observation_text for turn in turns] == ["<result> error </result>"] * 3
    assert turns[0].facts.result == f'the {wrong} does not know about "{row["relations"][0]}"'
    assert turns[1].facts.result == 'there is no tool "city", the tools are office, school, family, clinic'
    assert turns[2].facts.result == 'office needs the argument "person"'


def test_hops_and_spare_calls_are_allowed_and_one_more_ends_the_episode():
    row = HopSearchRows(hop_config().task.hop_search, 0, "train").row(0)
    turns = play(hop_environment(), *["<call> office boss Anna Reed </call>"] * 6, data=row)
    assert [turn.stop for turn in turns] == [StopReason.continues] * 5 + [StopReason.call_budget]  # 3 hops + 2 spare


@pytest.mark.parametrize(
    "text",
    ["", "<call> </call>", "<answer> </answer>", "Anna Reed </answer>", "<call> office boss Anna Reed </answer>"],
)
def test_words_that_are_neither_call_nor_answer_are_malformed(text: str):
    assert parse_words(text, {}).error == "a turn is <call> tool arguments </call> or <answer> text </answer>"


def test_every_turn_is_exactly_one_of_call_answer_or_malformed():
    for parsed in (
        parse_words("<answer> a b </answer>", {}),
        parse_words("<call> x y </call>", {}),
        parse_words("", {}),
    ):
        assert sum([bool(parsed.calls), parsed.answer is not None, bool(parsed.error)]) == 1
    for parsed in (parse_hermes("a"), parse_hermes(asking(city="Rome")), parse_hermes(" ")):
        assert sum([bool(parsed.calls), parsed.answer is not None, bool(parsed.error)]) == 1


def test_a_step_costs_well_under_two_milliseconds():
    row = HopSearchRows(hop_config().task.hop_search, 0, "train").row(0)
    env = hop_environment()
    state = env.reset(Prompt(id="train/0", token_ids=(1,), question="q", answer="a", data=row))
    action_ids = encode(env.tokenizer, "<call> office boss Anna Reed </call>")

    async def run() -> float:
        started = time.process_time()
        for _ in range(200):
            await env.act(state, action_ids, stopped=True)
        return (time.process_time() - started) / 200

    assert asyncio.run(run()) < 2e-3
