"""Turns of the demo's task, cut in two, with its own tokenizer, tools and environment."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conf.compose import compose
from conf.schema import Config
from rewards.types import ScoredTree
from rl.record import RecordedTree, read_trees, write_records
from rl.tiny import tiny_tokenizer
from rollout.chat import build_environment
from rollout.engine import Groups
from rollout.envs.hop_search import HopSearchRows, demonstration
from rollout.expand import build_expander
from rollout.grow import complete_path, grow_tree
from rollout.lines import Offer
from rollout.tree import Tree
from rollout.types import Prompt, Sampled, Sampling, StepKind, StopReason

TOKENIZER = tiny_tokenizer()


@dataclass
class Demonstrator:
    """Goes on with the next token of the demonstration, whatever a branch said before; its log-probs are drawn."""

    said: list[list[int]]
    results: int
    version: int = 0
    requests: list[list[int]] = field(default_factory=list)

    async def sample(self, context_ids: list[int], sampling: Sampling) -> Sampled:
        self.requests.append(list(context_ids))
        turns = self.said
        number = context_ids.count(self.results)
        rng, turn, drawn = random.Random(sampling.seed), turns[min(number, len(turns) - 1)], []
        # Tokens of this turn that are in the context already.
        done = next(size for size in range(len(turn), -1, -1) if context_ids[len(context_ids) - size :] == turn[:size])
        while len(drawn) < sampling.max_tokens and (drawn[-1:] or [-1])[0] not in sampling.stop_token_ids:
            drawn.append(turn[done + len(drawn)])
        return Sampled(
            token_ids=drawn,
            logprobs=[-rng.random() for _ in drawn],
            stopped=drawn[-1] in sampling.stop_token_ids,
            version=0,
            context_ids=list(context_ids),
        )

    async def load_weights(self, groups: Groups, version: int) -> None: ...

    async def receive_weights(self, offer: Offer) -> None: ...

    async def sleep(self) -> None: ...

    async def close(self) -> None: ...


def encoded(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def grown(cfg: Config, row: dict[str, Any]) -> tuple[Tree, Demonstrator]:
    prompt = Prompt(
        id="train/0",
        token_ids=tuple(encoded(row["question"])),
        question=row["question"],
        answer=row["answer"],
        data=row,
    )
    said = [encoded(text) for role, text in demonstration(row, 1.0, random.Random(0)) if role == "assistant"]
    engine = Demonstrator(said, encoded("</result>")[0])
    expander = build_expander(cfg.rollout, 0, TOKENIZER.decode)
    environment = build_environment(cfg, TOKENIZER)
    return asyncio.run(grow_tree(prompt, engine, environment, expander, cfg.rollout, 0)), engine


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout=spo_tree", "rollout.segment_branches=[2,2]", "rollout.segment_tokens=2"],
        ["rollout=tree_rl", "rollout.num_trees=2", "rollout.answer_markers=['<answer>']"],
    ],
    ids=["segments", "entropy"],
)
def test_parts_are_answered_as_one_turn(overrides: list[str], tmp_path: Path):
    cfg = compose(["experiment=hop_search", "rollout.max_turn_tokens=12", *overrides])
    row = HopSearchRows(cfg.task.hop_search, 0, "train").row(0)
    tree, engine = grown(cfg, row)
    parts = [number for number, node in enumerate(tree.nodes) if node.is_part]
    assert parts
    for leaf in tree.leaves():
        assert tree.nodes[leaf].stop is StopReason.answered
        assert tree.nodes[leaf].facts.answer == row["answer"]
        calls = [tree.nodes[step].facts for step in tree.path(leaf) if tree.nodes[step].facts.kind is StepKind.call]
        assert len(calls) == 3 and all(call.tool_ok for call in calls)
        assert TOKENIZER.decode(tree.path_ids(leaf)).count("<call>") == 3
    for part in parts:
        assert tree.nodes[part].facts.kind is StepKind.unread
        assert all(tree.nodes[child].action_text for child in tree.children(part) if not tree.nodes[child].is_part)

    write_records(tmp_path / "trees.jsonl", [RecordedTree(scored=ScoredTree(tree=tree))])
    assert read_trees(tmp_path / "trees.jsonl")[0].scored.tree == tree

    steps = [tree.nodes[each] for each in tree.path(parts[-1])]
    found = asyncio.run(
        complete_path(tree.prompt, steps, 2, engine, build_environment(cfg, TOKENIZER), cfg.rollout, seed=1)
    )
    assert [found.nodes[leaf].facts.answer for leaf in found.leaves()] == [row["answer"]] * 2
