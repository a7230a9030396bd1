"""Three engines and one seed law: who grows a tree, and who dies meanwhile, leaves no trace in it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray
from transformers import AutoTokenizer

from conf.compose import compose
from conf.schema import Config, ExpanderKind, RolloutConfig, Survivors
from rl.tiny import write_tiny_model
from rollout.data import build_prompt_source
from rollout.pool import RolloutPool
from rollout.tree import Node, Tree
from rollout.types import Prompt, StopReason

# A worker has no way to import this module: functions that it is to run travel whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]


@ray.remote(num_cpus=0)
class LongStepsAreGood:
    """A judge of growing trees: the more tokens, the better. It takes its time with all but the first prompt, so that
    every worker is in the middle of something when that one's tree is there."""

    async def judge(self, source: str, tree: Tree, rows: list[int]) -> list[float | None]:
        await asyncio.sleep(0.0 if tree.prompt.id.endswith("/0") else 0.2)
        return [len(tree.nodes[row].action_ids) / 24 for row in rows]


@pytest.fixture(scope="module")
def cfg() -> Config:
    deep = ["task.on_malformed=reply", "rollout.max_turn_tokens=24", "rollout.max_steps=4"]
    three = ["rollout.num_workers=3", "rollout.max_worker_restarts=0", "rollout.kv_cache_mib=64"]
    return compose(["experiment=hop_search", *deep, *three, "rollout.judge=progress"])


@pytest.fixture(scope="module")
def model_path(cfg: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", cfg))


@pytest.fixture(scope="module")
def prompts(cfg: Config, model_path: str) -> list[Prompt]:
    return build_prompt_source(cfg, AutoTokenizer.from_pretrained(model_path)).draw(0, 9)


@pytest.fixture(scope="module")
def pool(cfg: Config, model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutPool]:
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        running = RolloutPool(cfg, model_path, tmp_path_factory.mktemp("logs"), judge_actor=LongStepsAreGood.remote())
        yield running
        running.close()
    finally:
        ray.shutdown()


def ways_to_grow(cfg: Config) -> list[RolloutConfig]:
    """Of steps that a judge lets live, of tokens that surprise, and of a search that the judge leads."""
    return [
        replace(cfg.rollout, expander=ExpanderKind.beam_forks, num_leaves=6, survivors=Survivors.scored),
        replace(cfg.rollout, expander=ExpanderKind.entropy_expand, keep_leaves=0),
        replace(cfg.rollout, expander=ExpanderKind.mcts, search_simulations=8, max_forks=3),
    ]


def content(trees: list[tuple[int, Tree]]) -> list[list[Node]]:
    """All of every tree, down to the bits of its log-probabilities, but for what an engine happened to have cached."""
    return [[replace(node, num_cached_tokens=0) for node in tree.nodes] for _, tree in sorted(trees)]


def grown(pool: RolloutPool, prompts: list[Prompt], cfg: Config) -> list[list[list[Node]]]:
    return [content(list(pool.grow(prompts, 5, each))) for each in ways_to_grow(cfg)]


def grown_while_one_dies(pool: RolloutPool, prompts: list[Prompt], rollout: RolloutConfig) -> list[list[Node]]:
    victim, num_workers = pool.worker_pids()[0], len(pool.actors())
    growing = pool.grow(prompts, 5, rollout)
    trees = [next(growing)]
    os.kill(victim, signal.SIGKILL)
    trees += growing
    assert len(pool.actors()) == num_workers - 1, "rollout.max_worker_restarts=0: those that are left go on"
    return content(trees)


def test_the_same_seeds_give_the_same_trees_on_three_workers_with_one_killed_and_on_one(
    pool: RolloutPool, prompts: list[Prompt], cfg: Config
):
    beams, surprises, searches = grown(pool, prompts, cfg)
    assert all(len({len(nodes) for nodes in trees}) > 1 for trees in (beams, surprises)), "no two trees are alike"
    assert grown_while_one_dies(pool, prompts, ways_to_grow(cfg)[0]) == beams
    assert grown_while_one_dies(pool, prompts, ways_to_grow(cfg)[2]) == searches
    assert len(pool.actors()) == 1
    assert grown(pool, prompts, cfg) == [beams, surprises, searches]


def hang(worker: Any, context_ids: list[int]) -> None:
    """Answer nothing behind these tokens."""
    engine = worker._engine
    worker.really_sample, really_sample = engine.sample, engine.sample

    async def sample(asked_ids: list[int], *rest: Any, **options: Any) -> Any:
        if asked_ids[: len(context_ids)] == context_ids:
            await asyncio.sleep(3600)
        return await really_sample(asked_ids, *rest, **options)

    engine.sample = sample


def answer_again(worker: Any) -> None:
    worker._engine.sample = worker.really_sample


def test_a_batch_may_close_without_its_stragglers_and_the_next_one_has_them_all(
    pool: RolloutPool, prompts: list[Prompt], cfg: Config, caplog: pytest.LogCaptureFixture
):
    last = list(prompts[2].token_ids)
    ray.get([worker.__ray_call__.remote(hang, last) for worker in pool.actors()], timeout=60)
    chains = replace(cfg.rollout, expander=ExpanderKind.chains, num_leaves=2)
    impatient = replace(chains, batch_timeout_s=3.0, min_batch_share=0.6)  # of three prompts, two
    assert sorted(index for index, _ in pool.grow(prompts[:3], 7, impatient)) == [0, 1]
    assert "rollout.batch_timeout_s=3: the batch closes without 1 of its 3 trees" in caplog.text
    ray.get([worker.__ray_call__.remote(answer_again) for worker in pool.actors()], timeout=60)
    assert sorted(index for index, _ in pool.grow(prompts[:3], 7, impatient)) == [0, 1, 2]


def slow_down_and_count_aborts(worker: Any) -> None:
    engine = worker._engine._engine._served._engine
    engine.aborted, engine.ended, engine.seconds_of_a_step = [], [], 1.0
    really_abort, really_step = engine.abort_request, engine.step

    def abort(request_ids: list[str]) -> None:
        engine.aborted += request_ids
        really_abort(request_ids)

    def step() -> list[Any]:
        seconds = engine.seconds_of_a_step
        time.sleep(seconds)
        outputs = really_step()
        engine.ended += [each.request_id for each in outputs if each.finished and seconds]
        return outputs

    engine.abort_request, engine.step = abort, step


def be_quick_again(worker: Any) -> None:
    worker._engine._engine._served._engine.seconds_of_a_step = 0.0


def aborted_and_ended(worker: Any) -> tuple[list[str], list[str]]:
    engine = worker._engine._engine._served._engine
    return engine.aborted, engine.ended


def test_a_turn_whose_time_is_up_is_aborted_in_the_engine_and_the_next_one_is_not_held_up(
    pool: RolloutPool, prompts: list[Prompt], cfg: Config
):
    workers = pool.actors()
    ray.get([worker.__ray_call__.remote(slow_down_and_count_aborts) for worker in workers], timeout=60)
    hurried = replace(cfg.rollout, expander=ExpanderKind.chains, num_leaves=3, max_turn_tokens=400, turn_timeout_s=0.4)
    ((_, tree),) = pool.grow(prompts[:1], 5, hurried)
    assert [(node.action_ids, node.stop) for node in tree.nodes] == [([], StopReason.deadline)] * 3
    ray.get([worker.__ray_call__.remote(be_quick_again) for worker in workers], timeout=60)
    patient = replace(hurried, max_turn_tokens=24, turn_timeout_s=60.0)
    ((_, tree),) = pool.grow(prompts[:1], 5, patient)
    assert len(tree.trained_leaves()) == 3
    told = ray.get([worker.__ray_call__.remote(aborted_and_ended) for worker in workers], timeout=60)
    aborted = {each for its, _ in told for each in its}
    ended = {each for _, its in told for each in its}
    # of three turns none goes on: each was aborted, or had ended with the token of the step in which its time was up
    assert aborted and len(aborted | ended) == 3
