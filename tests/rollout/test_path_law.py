"""In every shipped task that calls tools, and every template: a path's tokens are what the engine was given, and acting
a path again gives the same. Worlds have the same laws in tests of their own (test_world, test_textworld,
test_reasoning_gym, test_verifiers)."""

from __future__ import annotations

import asyncio
import copy
import json
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from templates import LLAMA, QWEN2, QWEN3, byte_tokenizer
from worlds import ChatEngine

from conf.schema import (
    ColumnsConfig,
    CorpusConfig,
    ExpanderKind,
    Isolation,
    McpServerConfig,
    OnMalformed,
    PythonToolConfig,
    RolloutConfig,
    TaskConfig,
    ToolFormat,
)
from rl.tiny import tiny_tokenizer
from rollout.chat import ToolEnvironment
from rollout.envs.hop_search import HopSearchRows, parse_world
from rollout.expand import build_expander
from rollout.grow import complete_path, grow_tree
from rollout.toolbox import task_tools
from rollout.tree import Tree
from rollout.types import Prompt, StepKind, StopReason

PUBLISHED = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "llama3_2")
"""Templates that TRL ships as their models have them."""
GROWN = RolloutConfig(
    expander=ExpanderKind.random_expand,
    num_trees=3,
    expand_nodes=4,
    max_steps=4,
    max_turn_tokens=400,
    max_context_tokens=4096,
    keep_leaves=0,
)


@dataclass
class Case:
    """A task, and what a policy may write in it: a call that returns, one that is refused, one that is broken."""

    task: TaskConfig
    texts: list[str]
    tokenizer: Any
    end: str = "<|im_end|>"
    data: dict[str, Any] = field(default_factory=dict)


def hermes(name: str, **arguments: Any) -> str:
    return f"<think>\nhm\n</think>\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def chat(task: TaskConfig, good: str, refused: str, tokenizer: Any = None) -> Case:
    broken = '<tool_call>{"name": </tool_call>'
    return Case(task, [good, good + refused, refused, broken, "So\n#### 4"], tokenizer or byte_tokenizer(QWEN2))


def calculator(template: str = QWEN2, chat_template: str = "") -> Case:
    tokenizer = byte_tokenizer(template)
    if chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = chat_template
    dated = {"date_string": "26 Jul 2024"}
    tools = ["rollout.envs.gsm8k:calculator"]
    if template != LLAMA:
        return chat(
            TaskConfig(tools=tools, template_arguments=dated),
            hermes("calculator", expression="2 + 2"),
            hermes("calculator", expression="two"),
            tokenizer,
        )
    good, refused = (
        json.dumps({"name": "calculator", "parameters": {"expression": each}}) for each in ("2 + 2", "two")
    )
    task = TaskConfig(tools=tools, tool_format=ToolFormat.llama, template_arguments=dated)
    return Case(task, [good, f"{good}; {refused}", refused, '{"name": ', "So 4"], tokenizer, "<|eot_id|>")


def retrieval(folder: Path) -> Case:
    passages = [{"title": "Oak", "text": "The oak bears acorns."}, {"title": "Pine", "text": "The pine keeps needles."}]
    path = folder / "passages.jsonl"
    path.write_text("\n".join(map(json.dumps, passages)))
    corpus = CorpusConfig(path=str(path), cache_dir=str(folder / "cache"))
    task = TaskConfig(tools=["rollout.envs.retrieval:search"], corpus=corpus)
    return chat(task, hermes("search", query="acorns"), hermes("search", query=3))


def python(folder: Path) -> Case:
    jail = PythonToolConfig(isolation=Isolation.preferred)
    task = TaskConfig(tools=["rollout.envs.python_tool:python"], python=jail, tool_timeout_s=60.0)
    return chat(task, hermes("python", code="print(2 + 2)"), hermes("python", code="1 / 0"))


def mcp(folder: Path) -> Case:
    pytest.importorskip("mcp", reason="needs the extra mcp: requirements/envs.txt")
    server = McpServerConfig(command=[sys.executable, str(Path(__file__).with_name("mcp_server.py"))])
    task = TaskConfig(mcp_servers={"tiny": server}, tool_timeout_s=60.0)
    return chat(task, hermes("add", a=2, b=2), hermes("fail", why="no"))


def hop_search(folder: Path) -> Case:
    tools = [f"rollout.envs.hop_search:{name}" for name in ("office", "school", "family", "clinic")]
    task = TaskConfig(
        generator="hop_search",
        columns=ColumnsConfig(max_calls="max_calls"),
        tools=tools,
        tool_format=ToolFormat.words,
        on_malformed=OnMalformed.reply,
    )
    row = HopSearchRows(task.hop_search, 0, "train").row(0)
    tool = parse_world(row["world"]).tool_of(row["relations"][0])
    good = f"<call> {tool} {row['relations'][0]} {row['people'][0]} </call>"
    texts = [good, "<call> city boss Anna Reed </call>", "Anna Reed </answer>", f"<answer> {row['answer']} </answer>"]
    return Case(task, texts, tiny_tokenizer(), "", row)


def grown(case: Case, seed: int) -> tuple[Tree, ToolEnvironment, ChatEngine]:
    environment = ToolEnvironment(case.task, case.tokenizer, task_tools(case.task))
    engine = ChatEngine(case.texts, tokenizer=case.tokenizer, end=case.end)
    prompt = Prompt(id="train/0", token_ids=(5, 6, 7), question="q", answer="4", data=case.data)
    return (
        asyncio.run(grow_tree(prompt, engine, environment, build_expander(GROWN, seed), GROWN, seed)),
        environment,
        engine,
    )


def holds(case: Case, seed: int = 0) -> None:
    tree, environment, engine = grown(case, seed)
    kinds = {node.facts.kind for node in tree.nodes}
    assert {StepKind.call, StepKind.answer} <= kinds and any(node.facts.tool_ok for node in tree.nodes)
    assert StopReason.tool_crashed not in {node.stop for node in tree.nodes}
    assert sorted(engine.contexts) == sorted(tree.path_ids(node.parent) for node in tree.nodes)
    assert grown(case, seed)[0] == tree
    # Acting a path again gives what it gave, or `complete_path` would refuse to go on from there.
    inner = [row for row, node in enumerate(tree.nodes) if node.stop is StopReason.continues]
    steps = [tree.nodes[row] for row in tree.path(max(inner, key=tree.depth))]
    again = asyncio.run(complete_path(tree.prompt, steps, 2, engine, environment, GROWN, seed))
    assert [node.observation_ids for node in again.nodes[: len(steps)]] == [node.observation_ids for node in steps]


@pytest.mark.parametrize("template", [QWEN2, QWEN3, LLAMA], ids=["qwen2", "qwen3", "llama"])
def test_a_path_is_what_the_engine_was_given_with_a_calculator_in_every_family_of_templates(template: str):
    holds(calculator(template))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_path_is_what_the_engine_was_given_in_every_published_template(name: str):
    found = find_spec("trl")
    file = Path(found.origin or "").with_name("chat_templates") / f"{name}.jinja" if found else Path("nowhere")
    if not file.is_file():
        pytest.skip(f"this TRL ships no template {name}")
    holds(calculator(LLAMA if name.startswith("llama") else QWEN2, file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("made", [hop_search, retrieval], ids=lambda made: made.__name__)
def test_a_path_is_what_the_engine_was_given_with_every_tool(made: Any, tmp_path: Path):
    holds(made(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("made", [python, mcp], ids=lambda made: made.__name__)
def test_a_path_is_what_the_engine_was_given_with_every_tool_that_starts_a_process(made: Any, tmp_path: Path):
    holds(made(tmp_path))
