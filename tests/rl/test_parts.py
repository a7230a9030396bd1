"""The running parts together: Ray, two vLLM engines, the reward service and the learner."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from published import arrived, published
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.compose import compose
from conf.errors import DamagedWeights, StaleWeights
from conf.schema import Config, WeightPath
from rl.credit.assign import assign
from rl.credit.forest import forest_of
from rl.launch import Parts, launched
from rl.line_plan import Ends
from rl.placement import Node, plan
from rl.policy.actor import Calls, LearnerGroup
from rl.policy.tree_credits import tree_credits
from rl.policy.weights import WeightPublisher
from rl.shares import advantage_tables
from rl.tiny import write_tiny_model
from rollout.data import build_prompt_source
from rollout.meeting import LOOPBACK
from rollout.shards import Published
from rollout.tree import Tree
from rollout.types import Prompt, Sampling

DEEP = ["rollout.max_turn_tokens=24", "rollout.max_steps=5", "cluster.num_cpus=2"]
# A worker has no way to import this module: functions that it is to run travel whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.ray, pytest.mark.vllm]


@pytest.fixture(scope="module")
def cfg() -> Config:
    # a reply to malformed turns lets the untrained model's trees grow deep
    return compose(["tracker=disabled", "task.on_malformed=reply", "learner.learning_rate=0.01", *DEEP])


@pytest.fixture(scope="module")
def model_path(cfg: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(folder, cfg)
    return str(folder)


@pytest.fixture(scope="module")
def parts(cfg: Config, model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with launched(cfg, model_path, tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture(scope="module")
def prompts(cfg: Config, model_path: str) -> list[Prompt]:
    return build_prompt_source(cfg, AutoTokenizer.from_pretrained(model_path)).draw(0, 6)


def grow(parts: Parts, prompts: list[Prompt], seed: int = 0) -> list[Tree]:
    return [tree for _, tree in sorted(parts.pool.grow(prompts, seed))]


def learner_of(parts: Parts) -> LearnerGroup:
    assert parts.learner is not None
    return parts.learner


def answer(parts: Parts, calls: Calls) -> Any:
    return learner_of(parts).answer(calls, limit_s=120, what="the learner")


def same_but_for_the_cache(trees: list[Tree]) -> list[tuple[object, ...]]:
    return [(node.parent, node.action_ids, node.observation_ids, node.stop) for tree in trees for node in tree.nodes]


def test_two_workers_share_a_batch_and_repeat_it(parts: Parts, prompts: list[Prompt]):
    first, second = grow(parts, prompts), grow(parts, prompts)
    assert [tree.prompt.id for tree in first] == [prompt.id for prompt in prompts]
    assert same_but_for_the_cache(first) == same_but_for_the_cache(second)
    assert any(node.num_cached_tokens for tree in second for node in tree.nodes), "forks sit behind a cached prefix"


def test_recorded_logprobs_are_the_models_own(parts: Parts, prompts: list[Prompt], model_path: str):
    tree = grow(parts, prompts[:1])[0]
    samples = [(tree.path_ids(node.parent), node.action_ids) for node in tree.nodes]
    scored = answer(parts, learner_of(parts).score(samples))
    for node, logprobs in zip(tree.nodes, scored, strict=True):
        torch.testing.assert_close(torch.tensor(node.action_logprobs), torch.tensor(logprobs), rtol=0, atol=1e-4)


def test_a_killed_worker_costs_time_and_no_data(parts: Parts, prompts: list[Prompt]):
    expected = same_but_for_the_cache(grow(parts, prompts, seed=7))
    victim = parts.pool.worker_pids()[0]
    growing = parts.pool.grow(prompts, 7)
    regrown = [next(growing)]
    os.kill(victim, signal.SIGKILL)
    regrown += growing
    assert parts.pool.num_restarts == 1
    assert same_but_for_the_cache([tree for _, tree in sorted(regrown, key=lambda each: each[0])]) == expected


def test_engines_follow_the_learner_through_updates(
    cfg: Config, parts: Parts, prompts: list[Prompt], tmp_path: Path, model_path: str
):
    assert parts.publisher is not None
    for version in (1, 2):
        scored = parts.scoring.collect(parts.scoring.submit(parts.pool.grow(prompts, version)))
        forest = forest_of(scored)
        credit = assign(forest, cfg.credit, cfg.rollout.max_steps)
        assert len(advantage_tables(forest, credit, len(scored))) == len(prompts)
        # an untrained model earns the same everywhere, so the test pays every step to have a gradient
        grown = [each.tree for each in scored]
        credits = tree_credits(grown, forest, credit, cfg.loss, cfg.rollout.max_context_tokens)
        trees = [replace(each, w_pos=each.w0) for each in credits]
        metrics = answer(parts, learner_of(parts).update(trees, version))
        assert metrics["loss/logprob_gap_nats"] < 1e-4 and metrics["learner/grad_norm"] > 0
        assert parts.publisher.publish(version, grown)["weights/canary_gap_nats"] < 1e-4
    answer(parts, learner_of(parts).begin_save(str(tmp_path)))
    while not answer(parts, learner_of(parts).saved()).done:
        time.sleep(0.05)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    context_ids = list(prompts[0].token_ids)
    for (sampled,) in parts.pool.sample_everywhere([(context_ids, Sampling(max_tokens=12, temperature=0))]):
        greedy = trained.generate(torch.tensor([context_ids]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
        assert sampled.version == 2
        assert sampled.token_ids == greedy[0, len(context_ids) :].tolist()
    assert all(node.version == 2 for tree in grow(parts, prompts[:2]) for node in tree.nodes)


def test_the_canary_stops_a_run_whose_engines_serve_other_weights(
    parts: Parts, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    assert parts.publisher is not None
    monkeypatch.setattr(learner_of(parts), "publish", spoilt(learner_of(parts).publish))
    with pytest.raises(StaleWeights, match=r"differ from the learner's by .* another policy than the one"):
        parts.publisher.publish(3, grow(parts, prompts))


def keep_the_cache(worker: Any) -> None:
    """Break a worker's engine: it says that it has dropped its prefix cache, and has not."""
    worker._engine._engine._served._engine.reset_prefix_cache = lambda **_: True


def drop_the_cache(worker: Any) -> None:
    del worker._engine._engine._served._engine.reset_prefix_cache


def test_the_canary_stops_a_run_whose_engines_kept_what_older_weights_had_cached(
    parts: Parts, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    assert parts.publisher is not None
    with monkeypatch.context() as other:
        other.setattr(learner_of(parts), "publish", spoilt(learner_of(parts).publish))
        parts.publisher.publish(4, [])
    trees = grow(parts, prompts)  # behind contexts that are cached now, by other weights
    for change, version in ((keep_the_cache, 5), (drop_the_cache, 6)):
        ray.get([actor.__ray_call__.remote(change) for actor in parts.pool.actors()], timeout=60)
        if change is keep_the_cache:
            with pytest.raises(StaleWeights, match="differ from the learner's"):
                parts.publisher.publish(version, trees)
        else:  # nothing else was wrong
            assert parts.publisher.publish(version, trees)["weights/canary_gap_nats"] < 1e-4


def test_weights_that_are_damaged_on_their_way_are_sent_again_and_once_only(
    parts: Parts, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
):
    assert parts.publisher is not None
    publish, trees = learner_of(parts).publish, grow(parts, prompts[:2])
    monkeypatch.setattr(learner_of(parts), "publish", damaged(publish, times=1))
    assert parts.publisher.publish(7, trees)["weights/canary_gap_nats"] < 1e-4
    monkeypatch.setattr(learner_of(parts), "publish", damaged(publish, times=2))
    with pytest.raises(DamagedWeights, match="arrived with checksum"):
        parts.publisher.publish(8, trees)
    monkeypatch.setattr(learner_of(parts), "publish", publish)
    assert parts.publisher.publish(9, trees)["weights/canary_gap_nats"] < 1e-4, "the engines waited for better ones"


@pytest.mark.parametrize("path", [WeightPath.broadcast, WeightPath.ipc])
def test_a_worker_that_dies_while_weights_come_straight_costs_time_alone(
    cfg: Config, parts: Parts, prompts: list[Prompt], path: WeightPath, caplog: pytest.LogCaptureFixture
):
    chosen = replace(cfg, cluster=replace(cfg.cluster, weights=path))
    found = plan(chosen, [Node("here", LOOPBACK, 2, is_driver=True)])
    publisher = WeightPublisher(chosen, learner_of(parts), parts.pool, Ends(path, lambda: found))
    trees = grow(parts, prompts[:2])
    assert publisher.publish(10, trees)["weights/canary_gap_nats"] < 1e-4
    os.kill(parts.pool.worker_pids()[1], signal.SIGKILL)  # nobody has noticed when the next version is sent
    metrics = publisher.publish(11, trees)
    assert metrics["weights/canary_gap_nats"] < 1e-4 and metrics["weights/lay_out_seconds"] > 0
    assert "the learner could not send version 11 to all engines" in caplog.text
    assert caplog.text.count("it goes by the object store") == 1
    metrics = publisher.publish(12, trees)  # by lines made anew, to the new worker too
    assert metrics["weights/canary_gap_nats"] < 1e-4 and "weights/lay_out_seconds" not in metrics
    assert caplog.text.count("it goes by the object store") == 1
    assert {node.version for tree in grow(parts, prompts) for node in tree.nodes} == {12}


def spoilt(publish: Callable[..., Published]) -> Callable[..., Published]:
    """Other weights than the learner's, sent with a checksum of their own."""

    def other(version: int, limit_s: float) -> Published:
        weights = arrived(publish(version, limit_s=limit_s), in_shared_memory)
        return published(
            {name: each + 0.05 * torch.randn_like(each) for name, each in weights.items()}, version, ray.put
        )

    return other


def damaged(publish: Callable[..., Published], times: int) -> Callable[..., Published]:
    """The last tensors are not what was sent, so many times."""
    left = iter([True] * times)

    def other(version: int, limit_s: float) -> Published:
        found = publish(version, limit_s=limit_s)
        weights = arrived(found, in_shared_memory)
        sent = published(weights, version, ray.put)
        if not next(left, False):
            return sent
        *before, (last,) = sent.groups
        return Published(version, (*before, (replace(last, checksum="of what was sent"),)))

    return other


async def in_shared_memory(ref: Any) -> Any:
    return ray.get(ref)
