"""DAPO's dynamic sampling in the loop: prompts that teach nothing are replaced, and the data goes on behind them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from conf.check_select import refills_can_happen
from conf.compose import compose
from rewards.blend import blend
from rewards.drawn import parse_scored
from rewards.types import ScoredTree
from rl.launch import Parts, Scoring
from rl.metrics import read_metrics
from rl.progress import Progress
from rl.run import Run
from rl.run_folder import open_run_folder, settings
from rl.tracker import Tracker
from rollout.data import PromptSource
from rollout.pool import RolloutPool
from rollout.tree import Tree
from rollout.types import Prompt


class NumberedPrompts:
    """Prompt number n of the run has the id "n"."""

    def draw(self, first: int, num: int) -> list[Prompt]:
        return [Prompt(id=str(place), token_ids=(1,), question="q", answer="") for place in range(first, first + num)]


class TwoAnswers:
    """Pool and scoring in one: each prompt gets two answers; of prompts in `mixed` one is right, of others none."""

    num_restarts = 0

    def __init__(self, mixed: set[str]) -> None:
        self.mixed, self.seeds, self.batches = mixed, [], []
        self.rewards = compose(OVERRIDES).rewards

    def grow(self, prompts: list[Prompt], seed: int) -> Iterator[tuple[int, Tree]]:
        self.seeds.append(seed)
        self.batches.append([prompt.id for prompt in prompts])
        return ((index, self._scored(prompt.id).tree) for index, prompt in enumerate(prompts))

    def actors(self) -> list[Any]:
        return []

    def submit(self, trees: Iterator[tuple[int, Tree]]) -> dict[int, Tree]:
        return dict(trees)

    def collect(self, calls: dict[int, Tree]) -> list[ScoredTree]:
        return [self._scored(tree.prompt.id) for tree in calls.values()]

    def _scored(self, prompt_id: str) -> ScoredTree:
        right = float(prompt_id in self.mixed)
        scored = parse_scored("q -> (a, b)", outcomes={"a": right, "b": 0.0}, prompt_id=prompt_id)
        scored.leaf_scores = {"answer": scored.leaf_scores["outcome"]}
        return blend(scored, self.rewards)


OVERRIDES = [
    *("experiment=hop_search_grpo", "select=dapo", "rollout.prompts_per_step=3", "tracker=disabled"),
    "~rewards.sources.progress",
    "~rewards.sources.tool_success",
]


def opened(folder: Path, world: TwoAnswers, *overrides: str) -> Run:
    cfg = compose([*OVERRIDES, *overrides])
    parts = Parts(cast(RolloutPool, world), cast(Scoring, world), None, None)
    run_folder = open_run_folder(folder / "run", settings(cfg))
    tracker = Tracker(cfg.tracker, run_folder.path, "refill", settings(cfg))
    run = Run(cfg, run_folder, cast(PromptSource, NumberedPrompts()), parts, Progress(cfg), tracker)
    run.restore()
    return run


def step(run: Run) -> Any:
    """One step of the loop, up to the update."""
    scored = run.score(run.grow(run.next_prompts()))
    found = run.assign(scored)
    while prompts := run.refill(found):
        scored = run.score(run.grow(prompts))
        found = run.assign(scored)
    return scored, found


def test_prompts_that_teach_nothing_are_replaced_until_the_batch_is_full(tmp_path: Path):
    world = TwoAnswers(mixed={"1", "4", "6"})
    scored, found = step(opened(tmp_path, world))
    # of 0, 1, 2 one teaches; of 3, 4 one; 5 does not; 6 does
    assert world.batches == [["0", "1", "2"], ["3", "4"], ["5"], ["6"]]
    assert len(set(world.seeds)) == 4
    assert [tree.tree.prompt.id for tree in scored] == list("0123456")
    kept = [tree.tree.prompt.id for tree in found.selection.trees if tree.tree.trained_leaves()]
    assert kept == ["1", "4", "6"]


def test_refills_end_and_the_metrics_say_what_is_missing(tmp_path: Path):
    world = TwoAnswers(mixed={"1"})
    run = opened(tmp_path, world, "select.max_refills=2")
    step(run)
    assert world.batches == [["0", "1", "2"], ["3", "4"], ["5", "6"]]
    run._emit()
    (row,) = read_metrics(run.folder.metrics)
    assert (row["select/refills"], row["select/missing_prompts"]) == (2, 2)
    assert row["rollout/generated_tokens"] == 14  # two one-token answers of all seven prompts


def test_without_refills_a_step_draws_once(tmp_path: Path):
    world = TwoAnswers(mixed=set())
    step(opened(tmp_path, world, "select.max_refills=0"))
    assert world.batches == [["0", "1", "2"]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["select.max_refills=-1"], "must be 0 or more"),
        (["select.max_refills=3"], "changes nothing"),
        (["select=dapo"], ""),
        (["select=accuracy_band", "select.max_refills=3"], ""),
    ],
)
def test_refills_that_cannot_happen_are_told(overrides: list[str], message: str):
    found = refills_can_happen(compose(["experiment=hop_search", *overrides]))
    assert [message in problem.text for problem in found] == ([True] if message else [])
