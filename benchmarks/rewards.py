"""How many cheap step rewards a second the reward service gives on one core, and what a call costs beside the function.

    python -m benchmarks.rewards [--trees 200] [--repeats 5]

Trees of `--steps` steps are scored by one cheap function, three ways: as a shipped source in the service's own process,
as a function of a user's file in the process where user code runs (pipes, deadline and memory limit included), and by
the standard library's `ProcessPoolExecutor` with one call a step, which is how trainers that score text by text do it.
The bare function in a loop is the ideal. Everything on one core; the best of `--repeats` passes, the first not counted.

- `per_second`: scores; `overhead_us`: microseconds a call beside the function itself; `ratio`: against the pool.
- `duplicates`: trees of which all steps but one in eight say what another says, with `cache: on`: scores for each call
  of the function.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.tables import Row, report
from conf.schema import Cache, RewardsConfig, SourceConfig
from rewards.base import Source
from rewards.service import RewardService
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason

CHEAP = """
def length(step):
    return -0.01 * len(step.action_text.split())

def of_siblings(step, siblings, trajectory, answer):
    return float(all(step.action_text != sibling.action_text for sibling in siblings)) / len(trajectory)
"""


def drawn_tree(number: int, steps: int, words: int = 24) -> Tree:
    """A tree of binary forks whose turns are as long as those of small agents."""
    rng = random.Random(number)
    prompt = Prompt(id=f"bench/{number}", token_ids=tuple(range(64)), question="q", answer="a")
    tree = Tree(prompt=prompt)
    for row in range(steps):
        is_leaf = 2 * row + 2 >= steps
        text = " ".join(rng.choice(("find", "the", "capital", "of", "france")) for _ in range(words))
        tree.add(
            Node(
                parent=ROOT if row == 0 else (row - 1) // 2,
                action_ids=[rng.randrange(30_000) for _ in range(words)],
                action_logprobs=[-rng.random() for _ in range(words)],
                observation_ids=[] if is_leaf else [rng.randrange(30_000) for _ in range(words)],
                facts=StepFacts(kind=StepKind.answer if is_leaf else StepKind.call, answer="a" if is_leaf else None),
                stop=StopReason.answered if is_leaf else StopReason.continues,
                version=0,
                action_text=text,
                observation_text="" if is_leaf else text,
            )
        )
    return tree


def with_duplicates(tree: Tree, distinct: int) -> Tree:
    """The same shape, in which only so many steps say something of their own."""
    for row, node in enumerate(tree.nodes):
        twin = tree.nodes[row % distinct]
        node.action_ids, node.action_text = twin.action_ids, twin.action_text
        node.observation_ids, node.observation_text = [], ""
        node.facts = StepFacts(kind=StepKind.call)
    return tree


def best_seconds(once: Callable[[], object], repeats: int) -> float:
    """Of `repeats` passes, after one that is not counted."""
    once()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def of_service(service: RewardService, trees: list[Tree]) -> Callable[[], object]:
    """Scores all trees, as many at once as a step of training hands over."""

    async def together() -> None:
        await asyncio.gather(*map(service.score, trees))

    return lambda: asyncio.run(together())


def main() -> None:
    """Measure, print, write benchmarks/out/rewards.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=int, default=200)
    parser.add_argument("--steps", type=int, default=63, help="of one tree")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})  # what is started inherits it
    trees = [drawn_tree(number, asked.steps) for number in range(asked.trees)]
    num_scores = asked.trees * asked.steps
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cheap.py"
        file.write_text(CHEAP)
        rows = [row for name in ("length", "of_siblings") for row in measured(file, name, trees, num_scores, asked)]
        rows.append(duplicates(file, asked))
    report("rewards", f"{num_scores:,} scores of cheap step rewards, one core", rows)


def measured(file: Path, name: str, trees: list[Tree], num_scores: int, asked: argparse.Namespace) -> list[Row]:
    """One function, bare and three ways."""
    source = Source("cheap", SourceConfig(fn=f"{file}:{name}"))
    source.set_up()
    function = source._function
    assert function is not None
    calls = [_arguments(source, tree) for tree in trees]

    def bare() -> None:
        for of_tree in calls:
            for arguments in of_tree:
                function(**arguments)

    def of_user() -> RewardService:
        return RewardService(RewardsConfig(sources={"cheap": source.cfg}, num_processes=1))

    bare_s = best_seconds(bare, asked.repeats)
    times = {}
    here = RewardService(RewardsConfig(sources={"cheap": SourceConfig(fn="rewards.sources.format:format_ok")}))
    service = of_user()
    try:
        times["in the service"] = best_seconds(of_service(here, trees), asked.repeats)
        times["in a process that can be killed"] = best_seconds(of_service(service, trees), asked.repeats)
    finally:
        here.close()
        service.close()
    few = trees[: max(1, len(trees) // 10)]
    with ProcessPoolExecutor(1) as pool:
        pool_s = asked.trees / len(few) * best_seconds(_one_by_one(pool, file, name, few), asked.repeats)
    rows: list[Row] = [{"name": f"{name}: bare loop", "per_second": round(num_scores / bare_s), "overhead_us": 0.0}]
    for how, seconds in [*times.items(), ("a process pool, one call a step", pool_s)]:
        rows.append(
            {
                "name": f"{name}: {how}",
                "per_second": round(num_scores / seconds),
                "overhead_us": (seconds - bare_s) / num_scores * 1e6,
                "ratio": pool_s / seconds,
            }
        )
    return rows


def duplicates(file: Path, asked: argparse.Namespace) -> Row:
    """Equal steps are asked about once."""
    trees = [with_duplicates(drawn_tree(number, asked.steps), asked.steps // 8) for number in range(asked.trees)]
    source = SourceConfig(fn=f"{file}:length", cache=Cache.on)
    service = RewardService(RewardsConfig(sources={"cheap": source}, num_processes=1))
    try:
        started = time.perf_counter()
        found = asyncio.run(_scored(service, trees))
        seconds = time.perf_counter() - started
    finally:
        service.close()
    costs = [each.costs["cheap"] for each in found]
    calls, asked_calls = sum(cost.calls for cost in costs), sum(cost.calls - cost.cached_calls for cost in costs)
    return {
        "name": "duplicates: scores for each call",
        "per_second": round(calls / seconds),
        "ratio": calls / asked_calls,
        "ideal": asked.steps / (asked.steps // 8),
    }


async def _scored(service: RewardService, trees: list[Tree]) -> list:
    return [await service.score(tree) for tree in trees]


def _arguments(source: Source, tree: Tree) -> list[dict]:
    from rewards.arguments import Arguments

    arguments = Arguments(tree, {}, {})
    return [arguments.of(call, source._filled(tree.prompt)) for call in source.calls(tree)]


def _one_by_one(pool: ProcessPoolExecutor, file: Path, name: str, trees: list[Tree]) -> Callable[[], object]:
    source = Source("cheap", SourceConfig(fn=f"{file}:{name}"))
    items = [arguments for tree in trees for arguments in _arguments(source, tree)]

    def once() -> None:
        futures = [pool.submit(_call, str(file), name, arguments) for arguments in items]
        for future in futures:
            future.result(10.0)

    return once


def _call(file: str, name: str, arguments: dict) -> float:
    from conf.plugin import load_object

    return load_object(f"{file}:{name}", key="fn")(**arguments)


if __name__ == "__main__":
    main()
