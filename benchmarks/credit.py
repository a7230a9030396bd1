"""Credit for thousands of trees on one core: seconds, and whether they grow with the nodes alone.

    python -m benchmarks.credit [--quick] [--recipes grpo tree_step ...] [--trees 4096] [--repeats 3]

Trees of 64 steps of two shapes: wide ones that fork at every depth, and chains. Scores are random, of an outcome and of
steps.

- `forest_s`: laying the scored trees out as tensors (`forest_of`); `assign_s`: the method's arithmetic; `total_s`:
  their sum.
- `linear`: seconds per node over those of a quarter of the trees; 1 is linear growth.
- `loop_s`: outcome advantages as other trainers publish them, grouped by a dictionary of prompts and normalised group
  by group, over trajectories that are tensors already; `ratio`: that over `assign_s` of grpo on the same trees.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.forests import widths
from benchmarks.tables import Row, report
from conf.compose import compose
from conf.schema import Config
from rewards.types import Score, ScoredTree
from rl.credit.assign import assign
from rl.credit.forest import Forest, forest_of
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason

CHAINS = tuple(ROOT if step % 8 == 0 else step - 1 for step in range(64))
SHAPES = {"forks, 4 x 3 x 4": widths(4, 12, 48), "8 chains of 8": CHAINS}
"""Parents of the 64 steps of a tree."""

RECIPES = ("grpo", "tree_step", "portool", "tree_rl", "tree_po", "spo_tree", "match_tir", "gigpo")
SIGNALS = ("step", "match")


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few trees: does it run?")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="files of conf/credit/")
    parser.add_argument("--trees", type=int, default=4096, help="trees of 64 steps (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest repetition counts (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    num_trees, repeats = (8, 1) if options.quick else (options.trees, options.repeats)
    rows = [
        row
        for shape, parents in SHAPES.items()
        for row in shape_rows(shape, parents, num_trees, options.recipes, repeats)
    ]
    prefix = "quick_" if options.quick else ""
    report(f"{prefix}credit", f"credit for {num_trees} trees of 64 steps, one core", rows)


def shape_rows(shape: str, parents: tuple[int, ...], num_trees: int, recipes: list[str], repeats: int) -> list[Row]:
    """Every recipe on trees of one shape."""
    scored = random_trees(parents, num_trees)
    quarter = scored[: num_trees // 4]
    forest_s, forest = fastest(lambda: forest_of(scored), repeats)
    quarter_s, quarter_forest = fastest(lambda: forest_of(quarter), repeats)
    loop_s, _ = fastest(lambda: looped_grpo(forest), repeats)
    rows: list[Row] = []
    for recipe in recipes:
        cfg = compose([f"credit={recipe}", "experiment=hop_search"])
        assign_s, _ = fastest(lambda cfg=cfg: assigned(forest, cfg), repeats)
        less_s, _ = fastest(lambda cfg=cfg: assigned(quarter_forest, cfg), repeats)
        row: Row = {"name": f"{recipe}, {shape}", "forest_s": forest_s, "assign_s": assign_s}
        row |= {"total_s": forest_s + assign_s, "linear": (forest_s + assign_s) / (4 * (quarter_s + less_s))}
        if recipe == "grpo":
            row |= {"loop_s": loop_s, "ratio": loop_s / assign_s}
        rows.append(row)
    return rows


def assigned(forest: Forest, cfg: Config) -> Any:
    """What the benchmark measures."""
    return assign(forest, cfg.credit, cfg.rollout.max_steps)


def looped_grpo(forest: Forest, eps: float = 1e-6) -> Tensor:
    """GRPO's outcome advantages group by group; float64 [P], each trajectory's at all its steps."""
    outcome_L = forest.leaf_signals["outcome"]
    groups: dict[int, list[Tensor]] = defaultdict(list)
    for leaf, prompt in enumerate(forest.prompt_L.tolist()):
        groups[prompt].append(outcome_L[leaf])
    moments = {prompt: (torch.stack(values).mean(), torch.stack(values).std()) for prompt, values in groups.items()}
    advantages = outcome_L.clone()
    for leaf, prompt in enumerate(forest.prompt_L.tolist()):
        mean, deviation = moments[prompt]
        advantages[leaf] = (advantages[leaf] - mean) / (deviation + eps)
    return advantages[forest.pair_leaf_P]


def random_trees(parents: tuple[int, ...], num_trees: int, seed: int = 0) -> list[ScoredTree]:
    """Trees with these parents, an outcome for each trajectory and a score of each step from every signal."""
    rng = random.Random(seed)
    return [_random_tree(parents, number, rng) for number in range(num_trees)]


def _random_tree(parents: tuple[int, ...], number: int, rng: random.Random) -> ScoredTree:
    tree = Tree(prompt=Prompt(id=str(number), token_ids=(1,), question="", answer=""))
    forks = set(parents)
    for row, parent in enumerate(parents):
        ended = row not in forks
        tree.add(
            Node(
                parent=parent,
                action_ids=[1, 2, 3],
                action_logprobs=[-1.0, -1.0, -1.0],
                observation_ids=[] if ended else [rng.randrange(8)],
                facts=StepFacts(kind=StepKind.answer if ended else StepKind.call),
                stop=StopReason.answered if ended else StopReason.continues,
                version=0,
            )
        )
    steps = {name: {row: Score(rng.random()) for row in range(len(parents))} for name in SIGNALS}
    outcome = {leaf: Score(float(rng.random() < 0.5)) for leaf in tree.leaves()}
    return ScoredTree(tree=tree, step_signals=steps, leaf_signals={"outcome": outcome})


def fastest(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Seconds of the fastest repetition, and what it gave."""
    best, found = float("inf"), None
    for _ in range(repeats):
        started = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - started)
    return best, found


if __name__ == "__main__":
    main()
