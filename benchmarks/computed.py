"""Tokens that an engine computes for a trajectory: trees against chains, and both against their unique tokens.

    python -m benchmarks.computed

Each row grows the same prompts on one engine with an empty cache. `computed` is what went through the model for one
trajectory: context tokens that were not in the prefix cache, and sampled tokens but the last of each request. `unique`
is what an engine that forgets nothing would have computed: each token of a tree once. `efficiency` is unique /
computed; `ratio` is what chains compute for a trajectory in what the row computes, `ideal` the same of unique tokens.

A cache holds whole blocks, of 32 tokens on a CPU (16 on a GPU), so every request computes the rest of the last block
of its context again, half a block on average. That is nothing beside the turn of an agent and much beside a turn of
the demo, which has a handful of words. Lengths are drawn for each turn and each reply, so that none fits the blocks.

The cached tokens that requests report are held against the engine's own counters; the run stops where they differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.tables import Row, report
from conf.compose import compose
from conf.schema import Config
from rollout.cost import measured, unique_tokens
from rollout.environment import Environment, Turn
from rollout.expand import build_expander
from rollout.grow import grow_tree
from rollout.seeds import derive_seed
from rollout.tree import Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason

TIMEOUT_S = 900


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of task and the ways to grow its trees; the first way is chains, which the others are compared with."""

    name: str
    overrides: list[str]
    ways: dict[str, list[str]]
    prompt_tokens: int = 0
    """0: the demo's own prompts and tools, with its warm-started model."""
    reply_tokens: int = 0
    """Of the longest reply; others are drawn from a quarter of it up."""


WAYS: dict[str, list[str]] = {
    "chains": ["rollout=chains", "rollout.num_leaves=8"],
    "forking beams": ["rollout=tree", "rollout.num_leaves=8"],
    "Tree-GRPO": ["rollout=tree_grpo", "rollout.keep_leaves=0", "rollout.expand_nodes=3"],
    "TreeRL": ["rollout=tree_rl", "rollout.num_trees=2", "rollout.keep_leaves=0", "rollout.answer_markers=[]"],
}
SEGMENTS = {
    "chains": ["rollout=chains", "rollout.num_leaves=16"],
    "segments": ["rollout.expander=segments", "rollout.segment_branches=[4,4]", "rollout.segment_tokens=150"],
    "TreeRL": ["rollout=tree_rl", "rollout.num_trees=4", "rollout.keep_leaves=0", "rollout.answer_markers=[]"],
}
LONG = ["rollout.max_context_tokens=4096", "model.tiny.max_position_embeddings=4096", "rollout.kv_cache_mib=1024"]
CASES = [
    Case("the demo", ["experiment=hop_search", "model.warm_start.num_steps=60"], WAYS),
    Case(
        "tools, prompt of 400, replies of 50 to 200",
        [*LONG, "rollout.max_turn_tokens=400", "rollout.max_steps=4"],
        WAYS,
        prompt_tokens=400,
        reply_tokens=200,
    ),
    Case(
        "one answer of up to 500, prompt of 150",
        [*LONG, "rollout.max_turn_tokens=500", "rollout.max_steps=1"],
        SEGMENTS,
        prompt_tokens=150,
    ),
]


class Replies:
    """An environment of a given size: it answers every turn with tokens drawn from the turn."""

    def __init__(self, stop_token_ids: tuple[int, ...], longest: int, num_words: int) -> None:
        self.stop_token_ids, self._longest, self._num_words = stop_token_ids, longest, num_words

    def reset(self, prompt: Prompt) -> int:
        """State: the number of turns."""
        return 0

    async def act(self, state: int, action_ids: list[int], *, stopped: bool) -> Turn:
        """A reply of its own length for each turn; without replies, the turn was the answer."""
        if not self._longest:
            return Turn(state=state, facts=StepFacts(kind=StepKind.answer), stop=StopReason.answered)
        rng = random.Random(derive_seed(state, *action_ids))
        reply = [rng.randrange(self._num_words) for _ in range(rng.randint(self._longest // 4, self._longest))]
        facts = StepFacts(kind=StepKind.call, tool="tool", tool_ok=True)
        return Turn(state=state + 1, facts=facts, stop=StopReason.continues, observation_ids=reply)


def made_prompts(case: Case, num: int, num_words: int) -> list[Prompt]:
    """Prompts of about the case's length, none like another."""
    found = []
    for number in range(num):
        rng = random.Random(derive_seed(case.name, number))
        size = rng.randint(case.prompt_tokens * 3 // 4, case.prompt_tokens * 5 // 4)
        token_ids = tuple(rng.randrange(num_words) for _ in range(size))
        found.append(Prompt(id=f"train/{number}", token_ids=token_ids, question="", answer=""))
    return found


async def grown(case: Case, cfg: Config, model_path: str, num_prompts: int) -> tuple[list[Tree], dict[str, int]]:
    """Trees of one engine that starts empty, and the engine's own account."""
    from transformers import AutoTokenizer

    from rollout.chat import build_environment
    from rollout.data import build_prompt_source
    from rollout.vllm_engine import VllmEngine

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    environment: Environment = build_environment(cfg, tokenizer)
    if case.prompt_tokens:
        environment = Replies(environment.stop_token_ids, case.reply_tokens, len(tokenizer))
        prompts = made_prompts(case, num_prompts, len(tokenizer))
    else:
        prompts = build_prompt_source(cfg, tokenizer).draw(0, num_prompts)
    engine = VllmEngine(cfg, model_path, counts_tokens=True)
    share = asyncio.Semaphore(max(1, cfg.rollout.max_running_requests // 16))

    async def one(prompt: Prompt, seed: int) -> Tree:
        async with share:
            expander = build_expander(cfg.rollout, derive_seed(seed, "expander"), tokenizer.decode)
            return await grow_tree(prompt, engine, environment, expander, cfg.rollout, seed)

    try:
        trees = await asyncio.gather(*(one(prompt, seed) for seed, prompt in enumerate(prompts)))
        counts = engine.token_counts()
    finally:
        await engine.close()
    return trees, {each.name: getattr(counts, each.name) for each in fields(counts)}


def figures(trees: list[Tree], counts: dict[str, int]) -> dict[str, float]:
    """What a trajectory cost, by the trees; the engine's own account must agree."""
    cost = measured(trees)
    told = {"context": cost.prefilled + cost.cached, "cached": cost.cached, "generated": cost.generated}
    if told != counts:
        raise RuntimeError(f"the requests tell of {told}, the engine of {counts}")
    unique = sum(unique_tokens(tree) for tree in trees)
    return {
        "trajectories": cost.trajectories,
        "tokens_per_request": (cost.prefilled + cost.generated) / cost.steps,
        "cached_share": cost.cached / (cost.cached + cost.prefilled),
        "computed": cost.computed / cost.trajectories,
        "unique": unique / cost.trajectories,
        "efficiency": unique / cost.computed,
    }


def measured_apart(case: int, way: str, model_path: str, num_prompts: int) -> dict[str, float]:
    """The figures of one way, from an engine in a process of its own."""
    from rollout.process import engine_environment

    command = [sys.executable, "-m", "benchmarks.computed", "--case", str(case), "--way", way, "--model", model_path]
    done = subprocess.run(
        [*command, "--prompts", str(num_prompts)],
        env=os.environ | engine_environment() | {"VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"{CASES[case].name}, {way}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(case: int, model_path: str, num_prompts: int) -> list[Row]:
    """One row for each way to grow."""
    found: list[Row] = []
    for way in CASES[case].ways:
        seen: Row = {"name": f"{CASES[case].name}: {way}"} | measured_apart(case, way, model_path, num_prompts)
        chains = found[0] if found else seen
        found.append(
            seen | {"ratio": chains["computed"] / seen["computed"], "ideal": chains["unique"] / seen["unique"]}
        )
    return found


def print_figures(case: Case, way: str, model_path: str, num_prompts: int) -> None:
    """What the process of `measured_apart` does."""
    cfg = compose([*case.overrides, *case.ways[way], "rollout.judge="])
    print(json.dumps(figures(*asyncio.run(grown(case, cfg, model_path, num_prompts)))))


def run(num_prompts: int) -> None:
    """Measure, print, write benchmarks/out/computed.json."""
    from rl.tiny import write_tiny_model
    from rl.warm_start import warm_started_model

    with tempfile.TemporaryDirectory() as temporary:
        rows: list[Row] = []
        for number, case in enumerate(CASES):
            cfg, path = compose(case.overrides), Path(temporary) / str(number)
            model = write_tiny_model(path, cfg) if case.prompt_tokens else warm_started_model(cfg).resolve()
            rows += rows_of(number, str(model), num_prompts)
    report("computed", "tokens that the engine computes for a trajectory", rows, own_memory=False)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print_figures(CASES[options.case], options.way, options.model, options.prompts)
    else:
        run(options.prompts)


if __name__ == "__main__":
    main()
