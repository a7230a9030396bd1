"""Questions of reasoning-gym: made from seeds, scored by the package, tried again."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import Any

import pytest
from chatml import chatml_tokenizer, encode
from worlds import ChatEngine

from conf.errors import ConfigError, DataError
from conf.schema import ExpanderKind, ReasoningGymConfig, RolloutConfig, TaskConfig
from rewards.sources.world import world_total, world_won
from rollout.envs.reasoning_gym import AGAIN, ReasoningGym, ReasoningGymRows
from rollout.expand import build_expander
from rollout.grow import grow_tree
from rollout.types import Prompt, StepKind, StopReason
from rollout.world import Fork, ThreadHost, WorldEnvironment

pytestmark = pytest.mark.skipif(
    find_spec("reasoning_gym") is None, reason="needs the package reasoning-gym: pip install -r requirements/envs.txt"
)
SUMS = ReasoningGymConfig(dataset="chain_sum", args={"min_terms": 2, "max_terms": 2}, num_tries=3)
GROW = RolloutConfig(
    expander=ExpanderKind.random_expand, max_steps=4, max_turn_tokens=64, max_context_tokens=2048, keep_leaves=0
)


def prompt_of(row: dict[str, Any]) -> Prompt:
    token_ids = encode(chatml_tokenizer(), f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n")
    return Prompt(id="train/0", token_ids=tuple(token_ids), question=row["question"], answer="", data=row)


def test_the_packages_scorer_decides_and_a_wrong_answer_may_be_tried_again():
    row = ReasoningGymRows(SUMS, 0, "train").row(0)
    world = ReasoningGym()
    session, opening = world.reset(prompt_of(row))
    wrong = world.act(session, "<answer>no idea</answer>")
    right = world.act(session, f"It is <answer>0</answer>, no: <answer> {row['answer']} </answer>")
    assert opening == row["question"]
    assert (wrong.text, wrong.done, wrong.won) == (AGAIN, False, False)
    assert (right.done, right.won, right.answer) == (True, True, row["answer"])
    assert (wrong.score or 0) + (right.score or 0) == 1.0


def test_an_answer_that_the_scorer_cannot_read_is_wrong_and_breaks_nothing():
    world = ReasoningGym()
    session, _ = world.reset(
        prompt_of(ReasoningGymRows(ReasoningGymConfig(dataset="prime_factorization"), 0, "train").row(0))
    )
    assert (world.act(session, "a x b").score, world.act(session, "").won) == (0.0, False)


def test_the_last_try_ends_the_episode():
    world = ReasoningGym()
    session, _ = world.reset(prompt_of(ReasoningGymRows(SUMS, 0, "train").row(0)))
    assert [world.act(session, "none").done for _ in range(3)] == [False, False, True]


def test_seeds_make_the_questions_and_held_out_ones_are_never_trained_on():
    def asked(seed: int, split: str) -> list[str]:
        rows = ReasoningGymRows(ReasoningGymConfig(dataset="countdown"), seed, split)
        return [rows.row(index)["question"] for index in range(5)]

    assert asked(0, "train") == asked(0, "train")
    assert asked(0, "eval") == asked(1, "eval")
    assert not set(asked(0, "train")) & set(asked(1, "train"))
    assert not set(asked(0, "train")) & set(asked(0, "eval"))


@pytest.mark.parametrize(
    "name", ["countdown", "mini_sudoku", "spell_backward", "graph_color", "word_ladder", "gsm_symbolic"]
)
def test_a_tree_holds_what_the_engine_was_given_and_pays_what_the_package_says(name: str):
    config = ReasoningGymConfig(dataset=name, num_tries=3)
    row = ReasoningGymRows(config, 0, "train").row(1)
    engine = ChatEngine(["<answer>1</answer>", f"<answer>{row['answer']}</answer>"[:400], "<think>hm</think> "])
    env = WorldEnvironment(TaskConfig(), chatml_tokenizer(), ThreadHost(ReasoningGym()), Fork.copy)
    cfg = RolloutConfig(
        expander=ExpanderKind.random_expand, max_steps=4, max_turn_tokens=512, max_context_tokens=8192, keep_leaves=0
    )
    tree = asyncio.run(grow_tree(prompt_of(row), engine, env, build_expander(cfg, 0), cfg, 0))
    assert sorted(engine.contexts) == sorted(tree.path_ids(node.parent) for node in tree.nodes)
    for leaf in tree.leaves():
        steps = [tree.nodes[each] for each in tree.path(leaf)]
        right = bool(row["answer"]) and any(step.facts.answer == row["answer"] for step in steps)
        assert 0 <= world_total(steps) <= 1
        assert world_won(steps) == (right if row["answer"] else world_won(steps))
        assert steps[-1].stop in (StopReason.answered, StopReason.max_steps)
        assert all(step.facts.kind in (StepKind.answer, StepKind.malformed) for step in steps)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (ReasoningGymConfig(dataset="chain_sums"), 'Did you mean "chain_sum"'),
        (ReasoningGymConfig(args={"min_termz": 1}), "refuses its parameters .TypeError.*min_termz"),
        (ReasoningGymConfig(args={"min_terms": 5, "max_terms": 1}), "refuses its parameters"),
        (ReasoningGymConfig(args={"seed": 1}), "gives seed=1, which follows from the run"),
    ],
)
def test_what_the_package_refuses_is_told(config: ReasoningGymConfig, why: str):
    with pytest.raises(ConfigError, match=why):
        ReasoningGymRows(config, 0, "train")


def test_a_row_of_another_task_is_refused():
    with pytest.raises(DataError, match='has no column "dataset"'):
        ReasoningGym().reset(Prompt(id="a", token_ids=(1,), question="q", answer=""))
