"""Generation through the pool against a bare vllm.LLM.generate of the same requests.

    python -m benchmarks.rollout

The pool grows trees with two workers: Ray calls, the environment and the tree are all in its time. The bare engine
gets the requests the pool made (same contexts, same lengths, a seed each) as one batch, in a process of its own, with
one and with two threads; the faster of the two is the yardstick. `ratio` is pool / bare in tokens per second, 1.0 the
ideal of a pool that costs nothing; two engines on two cores can beat one.
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.tables import Row, report
from conf.compose import compose
from conf.schema import Config

REPEATS = 3

SHAPES = {
    "one turn of 64 tokens": {"max_steps": 1, "max_turn_tokens": 64},
    "six turns of 8 tokens": {"max_steps": 6, "max_turn_tokens": 8},
}
"""Long turns show the engine, short turns what each request costs."""


def config(model_path: str) -> Config:
    """The demo's own settings, on a model of random weights so that no turn ends early."""
    overrides = [f"model.path={model_path}", "rollout=chains", "task.on_malformed=reply", "tracker=disabled"]
    return compose(overrides)


def pool_seconds(
    cfg: Config, model_path: str, log_dir: Path, num_prompts: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each repetition by shape, and the requests that the last one made."""
    import ray
    from transformers import AutoTokenizer

    from rollout.data import build_prompt_source
    from rollout.pool import RolloutPool

    prompts = build_prompt_source(cfg, AutoTokenizer.from_pretrained(model_path)).batch(0, num_prompts)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    pool = RolloutPool(cfg, model_path, log_dir)
    seconds: dict[str, list[float]] = {}
    requests: dict[str, Any] = {}
    try:
        for name, shape in SHAPES.items():
            rollout = replace(cfg.rollout, **shape)
            for repeat in range(REPEATS + 1):  # the first warms up
                started = time.perf_counter()
                trees = [tree for _, tree in pool.grow(prompts, repeat, rollout)]
                seconds.setdefault(name, []).append(time.perf_counter() - started)
            requests[name] = [
                (tree.path_ids(node.parent), len(node.action_ids)) for tree in trees for node in tree.nodes
            ]
    finally:
        pool.close()
        ray.shutdown()
    return {name: each[1:] for name, each in seconds.items()}, requests


def bare_seconds(cfg: Config, model_path: str, requests_path: Path, num_threads: int) -> dict[str, list[float]]:
    """Seconds of each repetition by shape, by `vllm.LLM.generate` in a fresh process."""
    from rollout.worker import worker_environment

    environment = (
        os.environ | worker_environment() | {"OMP_NUM_THREADS": str(num_threads), "VLLM_LOGGING_LEVEL": "ERROR"}
    )
    command = [sys.executable, "-m", "benchmarks.rollout", "--bare", str(requests_path), "--model", model_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        raise RuntimeError(f"the bare engine failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_bare(requests_path: Path, model_path: str) -> None:
    """The process of `bare_seconds`: generate each shape's requests as one batch and print the seconds."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from rollout.vllm_engine import engine_args

    arguments = asdict(engine_args(config(model_path), model_path))
    wanted = ("model", "dtype", "seed", "max_model_len", "max_num_seqs", "enable_prefix_caching", "logprobs_mode")
    more = ("enforce_eager", "block_size", "kv_cache_memory_bytes", "enable_chunked_prefill", "max_num_batched_tokens")
    llm = LLM(**{name: arguments[name] for name in (*wanted, *more)}, skip_tokenizer_init=True)
    seconds: dict[str, list[float]] = {}
    for name, requests in json.loads(requests_path.read_text()).items():
        prompts = [TokensPrompt(prompt_token_ids=context_ids) for context_ids, _ in requests]
        for repeat in range(REPEATS + 1):
            params = [
                SamplingParams(
                    max_tokens=length,
                    ignore_eos=True,
                    seed=repeat * len(requests) + i,
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                )
                for i, (_, length) in enumerate(requests)
            ]
            llm.reset_prefix_cache()
            started = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    print(json.dumps({name: each[1:] for name, each in seconds.items()}))


def main() -> None:
    """Measure, print, write benchmarks/out/rollout.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        run_bare(options.bare, options.model)
        return
    from rl.tiny import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model_path = str(Path(folder) / "model")
        write_tiny_model(Path(model_path), compose([]))
        cfg = config(model_path)
        pooled, requests = pool_seconds(cfg, model_path, Path(folder) / "logs", options.prompts)
        requests_path = Path(folder) / "requests.json"
        requests_path.write_text(json.dumps(requests))
        bare = {threads: bare_seconds(cfg, model_path, requests_path, threads) for threads in (1, 2)}
    report("rollout", "pool against bare LLM.generate, tokens per second", rows(pooled, bare, requests))


def rows(
    pooled: dict[str, list[float]], bare: dict[int, dict[str, list[float]]], requests: dict[str, Any]
) -> list[Row]:
    """One row for each shape, from the best repetition of each side."""
    table: list[Row] = []
    for name, made in requests.items():
        tokens = sum(length for _, length in made)
        best = {threads: tokens / min(seconds[name]) for threads, seconds in bare.items()}
        pool = tokens / min(pooled[name])
        table.append(
            {
                "name": name,
                "requests": len(made),
                "tokens": tokens,
                "pool_tokens_per_s": pool,
                "bare_1_thread_tokens_per_s": best[1],
                "bare_2_threads_tokens_per_s": best[2],
                "ratio": pool / max(best.values()),
                "ideal": 1.0,
                "efficiency": pool / max(best.values()),
            }
        )
    return table


if __name__ == "__main__":
    main()
