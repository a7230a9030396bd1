"""Generation through the pool against a bare vllm.LLM.generate of the same requests.

    python -m benchmarks.rollout

The pool grows trees with two workers: Ray calls, the environment and the tree are all in its time. The bare engine
gets the requests the pool made (same contexts, same lengths, a seed each) as one batch, in a process of its own, with
one and with two threads; the faster of the two is the yardstick. `ratio` is pool / bare in tokens per second, 1.0 the
ideal of a pool that costs nothing; two engines on two cores can beat one.

Long turns show the engine. The demo's own trees, five turns of a handful of tokens each behind a tool, show what a
request costs; there the bare batch has it easier than any agent can, since it need not wait for a tool's reply.

Behind it comes `benchmarks.computed`: the tokens that an engine computes for trees and for chains.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import computed
from benchmarks.tables import Row, report
from conf.compose import compose
from conf.schema import Config

REPEATS = 5

LONG_TURNS = ["rollout=chains", "rollout.max_steps=1", "rollout.max_turn_tokens=96"]
DEMO_TREES = ["experiment=hop_search"]

Requests = list[tuple[list[int], int]]
"""(context ids, number of tokens sampled behind them)."""


def pool_run(cfg: Config, model_path: str, log_dir: Path, num_prompts: int) -> tuple[list[float], Requests]:
    """Seconds of each repetition, and the requests that the last one made."""
    import ray
    from transformers import AutoTokenizer

    from rollout.data import build_prompt_source
    from rollout.pool import RolloutPool

    prompts = build_prompt_source(cfg, AutoTokenizer.from_pretrained(model_path)).draw(0, num_prompts)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    pool = RolloutPool(cfg, model_path, log_dir)
    seconds: list[float] = []
    try:
        for repeat in range(REPEATS + 1):  # the first warms up
            started = time.perf_counter()
            trees = [tree for _, tree in pool.grow(prompts, repeat)]
            tokens = sum(tree.num_generated_tokens() for tree in trees)
            seconds.append((time.perf_counter() - started) / tokens)
    finally:
        pool.close()
        ray.shutdown()
    made = [(tree.path_ids(node.parent), len(node.action_ids)) for tree in trees for node in tree.nodes]
    total = sum(length for _, length in made)
    return [each * total for each in seconds[1:]], made


def bare_run(model_path: str, overrides: list[str], requests_path: Path, num_threads: int) -> list[float]:
    """Seconds of each repetition by `vllm.LLM.generate` in a fresh process."""
    from rollout.process import engine_environment

    quiet = {"OMP_NUM_THREADS": str(num_threads), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "benchmarks.rollout", "--bare", str(requests_path), "--model", model_path]
    done = subprocess.run(
        [*command, *overrides],
        env=os.environ | engine_environment() | quiet,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(f"the bare engine failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_bare_seconds(requests: Requests, model_path: str, overrides: list[str]) -> None:
    """What the process of `bare_run` does: generate the requests as one batch, several times."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from rollout.vllm_engine import engine_args

    arguments = asdict(engine_args(compose(overrides), model_path))
    wanted = ("model", "dtype", "seed", "max_model_len", "max_num_seqs", "enable_prefix_caching", "logprobs_mode")
    more = ("enforce_eager", "block_size", "kv_cache_memory_bytes", "enable_chunked_prefill", "max_num_batched_tokens")
    llm = LLM(**{name: arguments[name] for name in (*wanted, *more)}, skip_tokenizer_init=True)
    prompts = [TokensPrompt(prompt_token_ids=context_ids) for context_ids, _ in requests]
    common: dict[str, Any] = {"ignore_eos": True, "logprobs": 0, "flat_logprobs": True, "detokenize": False}
    seconds: list[float] = []
    for repeat in range(REPEATS + 1):
        seeds = range(repeat * len(requests), (repeat + 1) * len(requests))
        params = [
            SamplingParams(max_tokens=length, seed=seed, **common)
            for seed, (_, length) in zip(seeds, requests, strict=True)
        ]
        llm.reset_prefix_cache()
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds[1:]))


def measured_row(name: str, overrides: list[str], model_path: str, folder: Path, num_prompts: int) -> Row:
    """One comparison, from the best repetition of each side."""
    pooled, requests = pool_run(compose(overrides), model_path, folder / "logs", num_prompts)
    path = folder / "requests.json"
    path.write_text(json.dumps(requests))
    tokens = sum(length for _, length in requests)
    bare = {threads: tokens / min(bare_run(model_path, overrides, path, threads)) for threads in (1, 2)}
    pool = tokens / min(pooled)
    return {
        "name": name,
        "requests": len(requests),
        "tokens": tokens,
        "pool_tok_s": pool,
        "bare_1_thread_tok_s": bare[1],
        "bare_2_threads_tok_s": bare[2],
        "ratio": pool / max(bare.values()),
        "ideal": 1.0,
        "efficiency": pool / max(bare.values()),
    }


def main() -> None:
    """Measure, print, write benchmarks/out/rollout.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print_bare_seconds(json.loads(options.bare.read_text()), options.model, options.overrides)
        return
    from rl.tiny import write_tiny_model
    from rl.warm_start import warm_started_model

    cfg = compose(DEMO_TREES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tiny_model(folder / "random", cfg)
        warm = str(warm_started_model(cfg).resolve())
        rows = [
            measured_row("long turns", LONG_TURNS, str(folder / "random"), folder, options.prompts),
            measured_row("the demo's trees", DEMO_TREES, warm, folder, options.prompts),
        ]
    report("rollout", "pool against bare LLM.generate, tokens per second", rows)
    computed.run(num_prompts=16)


if __name__ == "__main__":
    main()
