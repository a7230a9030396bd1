"""Tasksets of the package verifiers: their tasks ask, their tools answer, their rewards score."""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from chatml import chatml_tokenizer, encode
from worlds import ChatEngine

from conf.errors import ConfigError, DataError
from conf.schema import ExpanderKind, RolloutConfig, TaskConfig, VerifiersConfig
from rewards.sources.world import world_total
from rollout.envs.verifiers import VerifiersRows, VerifiersWorld
from rollout.expand import build_expander
from rollout.grow import grow_tree
from rollout.types import Prompt, StopReason
from rollout.world import ThreadHost, WorldEnvironment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("verifiers") is None, reason="needs the package verifiers: pip install -r requirements/envs.txt"
    ),
]

SUMS = f"{Path(__file__).parents[2]}/examples/verifiers_taskset.py:Sums"
CONFIG = VerifiersConfig(taskset=SUMS, args={"num_tasks": 20})
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 8}}\n</tool_call>'


def prompt_of(row: dict[str, Any]) -> Prompt:
    token_ids = encode(chatml_tokenizer(), f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n")
    return Prompt(id="train/0", token_ids=tuple(token_ids), question=row["question"], answer="", data=row)


def play(*actions: str) -> list[Any]:
    world = VerifiersWorld()
    session, _ = world.reset(prompt_of(VerifiersRows(CONFIG, 0, "train").row(0)))
    return [world.act(session, action) for action in actions]


def test_a_row_asks_what_the_task_asks_and_tells_its_tools():
    question = VerifiersRows(CONFIG, 0, "train").row(0)["question"]
    assert question.startswith("What is 3 + 8?\n\n# Tools")
    told = json.loads(question.partition("<tools>\n")[2].partition("\n</tools>")[0])
    assert told["function"]["name"] == "add"
    assert told["function"]["description"] == "Add two numbers."
    assert told["function"]["parameters"]["required"] == ["a", "b"]
    assert told["function"]["parameters"]["properties"]["a"]["type"] == "integer"


def test_tools_answer_and_the_tasks_own_rewards_score_the_trace():
    called, answered = play(CALL, "It is 11")
    assert (called.text, called.done, called.score) == ("<tool_response>\n11\n</tool_response>", False, 0.0)
    assert (answered.done, answered.score, answered.answer) == (True, 1.5, "It is 11")  # right, and .5 for the tool
    assert [play(answer)[0].score for answer in ("It is 11", "It is 12")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (CALL.replace("add", "subtract"), 'there is no tool "subtract", the tools are add'),
        (CALL.replace("8", '"eight"'), "Input should be a valid integer"),
    ],
)
def test_a_call_that_fails_is_told(call: str, told: str):
    (observed,) = play(call)
    assert observed.refused
    assert told in observed.text


def test_one_task_in_so_many_is_never_trained_on():
    train, held_out = VerifiersRows(CONFIG, 0, "train"), VerifiersRows(CONFIG, 0, "eval")
    assert (train.num_rows, held_out.num_rows) == (18, 2)
    assert [held_out.row(index)["task"] for index in range(2)] == [0, 10]


def test_a_tree_holds_what_the_engine_was_given_and_siblings_share_no_state():
    cfg = RolloutConfig(
        expander=ExpanderKind.random_expand, max_steps=4, max_turn_tokens=128, max_context_tokens=8192, keep_leaves=0
    )
    engine = ChatEngine([CALL, "It is 11", "It is 12", "<tool_call>broken</tool_call>"])
    env = WorldEnvironment(TaskConfig(), chatml_tokenizer(), ThreadHost(VerifiersWorld()), VerifiersWorld.fork)
    prompt = prompt_of(VerifiersRows(CONFIG, 0, "train").row(0))
    tree = asyncio.run(grow_tree(prompt, engine, env, build_expander(cfg, 2), cfg, 2))
    assert sorted(engine.contexts) == sorted(tree.path_ids(node.parent) for node in tree.nodes)
    for leaf in tree.leaves():
        steps = [tree.nodes[each] for each in tree.path(leaf)]
        if steps[-1].stop is StopReason.answered:
            used = any(step.facts.tool_ok for step in steps[:-1])
            assert world_total(steps) == float(steps[-1].facts.answer == "It is 11") + 0.5 * used
        else:
            assert world_total(steps) == 0.0


NEEDS_MORE = """
import verifiers.v1 as vf


class Boxed(vf.Task):
    @vf.reward
    async def tested(self, trace, runtime) -> float:
        return 1.0


class Boxes(vf.Taskset[Boxed, vf.TasksetConfig]):
    def load(self):
        yield Boxed(vf.TaskData(prompt="Fix it."))
"""


def test_what_needs_a_box_of_its_own_is_refused(tmp_path: Path):
    (tmp_path / "boxes.py").write_text(NEEDS_MORE)
    with pytest.raises(ConfigError, match="needs a runtime for its reward tested, which only the package's own"):
        VerifiersRows(VerifiersConfig(taskset=f"{tmp_path}/boxes.py:Boxes"), 0, "train")


def test_what_is_no_taskset_or_cannot_be_made_is_refused():
    with pytest.raises(ConfigError, match="is no subclass of"):
        VerifiersRows(VerifiersConfig(taskset=SUMS.replace(":Sums", ":Adder")), 0, "train")
    with pytest.raises(ConfigError, match=r"could not be loaded [^\n]*\nnum_task"):
        VerifiersRows(VerifiersConfig(taskset=SUMS, args={"num_task": 3}), 0, "train")
    with pytest.raises(ConfigError, match="has 1 tasks, which leaves none for train"):
        VerifiersRows(VerifiersConfig(taskset=SUMS, args={"num_tasks": 1}), 0, "train")
    with pytest.raises(DataError, match='has no column "taskset"'):
        VerifiersWorld().reset(Prompt(id="a", token_ids=(1,), question="q", answer=""))
