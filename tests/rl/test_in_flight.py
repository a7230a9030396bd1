from __future__ import annotations

from pathlib import Path

from rewards.drawn import parse_scored, parse_tree
from rl.in_flight import Kept, read_kept, write_kept
from rollout.tree import Tree
from rollout.types import Prompt

SCORED = parse_scored("q -> (a, b)", steps={"a": 0.5, "b": -1.0}, outcomes={"a": 1.0, "b": 0.0})


def grown(version: int) -> Tree:
    return parse_tree("q -> a -> b", version=version)


def test_trees_come_back_with_their_scores_and_their_places(tmp_path: Path):
    batches = [
        Kept(step=3, scored={0: SCORED, 2: SCORED}),
        Kept(step=4, trees={1: grown(3)}, scored={0: SCORED}),
        Kept(step=5),  # it had only begun
    ]
    write_kept(tmp_path, batches)
    assert read_kept(tmp_path) == batches


def test_a_run_that_grows_nothing_ahead_keeps_nothing(tmp_path: Path):
    write_kept(tmp_path, [])
    assert list(tmp_path.iterdir()) == [] and read_kept(tmp_path) == []


def test_a_tree_of_another_prompt_is_grown_anew():
    prompts = [grown(0).prompt, Prompt(id="other", token_ids=(99,), question="", answer="")]
    kept = Kept(step=1, trees={0: grown(1), 1: grown(1), 2: grown(1)})
    assert list(kept.fitting(prompts, max_staleness=1).trees) == [0]


def test_a_tree_that_is_older_than_the_resumed_run_allows_is_grown_anew():
    # step 5 trains under version 5: a tree of version 3 is two updates behind
    prompts = [grown(3).prompt] * 3
    kept = Kept(step=5, trees={0: grown(3), 1: grown(4), 2: grown(5)})
    assert list(kept.fitting(prompts, max_staleness=1).trees) == [1, 2]
    assert list(kept.fitting(prompts, max_staleness=2).trees) == [0, 1, 2]
