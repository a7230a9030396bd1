from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from tiny_prms import write_causal

from conf.errors import ConfigError
from conf.schema import ModelKind, RewardModelConfig
from rewards.models.actor import ActorModel, build_model, start_model
from rewards.models.base import MarkedText, ModelError
from rewards.models.hf_model import TransformersModel

TEXT = MarkedText(question="two plus two ?", steps=("two is 2", "so four"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal(tmp_path_factory.mktemp("model") / "causal")


def record(folder: Path, **settings: Any) -> RewardModelConfig:
    return RewardModelConfig(kind=ModelKind.transformers, path=str(folder), family="math_shepherd", **settings)


def slow(**settings: Any) -> tuple[Any, ActorModel]:
    """An actor, and the client that asks it. Its class is a local one: Ray's workers cannot import a test."""

    class SlowModel:
        """Stands where the actor is: waits as long as it is told, and counts."""

        def __init__(self) -> None:
            self.running = self.most_running = self.num_cancelled = 0

        async def choose(self, messages: Any, choices: list[str]) -> dict[str, float]:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                await asyncio.sleep(float(choices[0]))
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
            finally:
                self.running -= 1
            return {choices[0]: 0.0}

        async def score_steps(self, texts: list[Any]) -> list[list[float]]:
            return [[0.5] for _ in texts]

        async def chat(self, messages: Any, options: dict[str, Any]) -> Any:
            raise OSError("no room left")

        async def counts(self) -> tuple[int, int]:
            return self.most_running, self.num_cancelled

    handle = ray.remote(SlowModel).options(num_cpus=0, max_concurrency=100).remote()
    return handle, ActorModel("slow", handle, RewardModelConfig(**settings), "slow")


@pytest.mark.ray
def test_an_actor_answers_as_the_model_it_carries_and_dies_alone(cluster: None, folder: Path, tmp_path: Path):
    model = start_model("prm", record(folder, timeout_s=60), tmp_path, place={})
    identity = ray.get(model.ready(), timeout=120)
    here = TransformersModel(record(folder))
    expected = asyncio.run(here.score_steps([TEXT]))
    assert identity == model.identity == here.identity
    assert asyncio.run(model.score_steps([TEXT])) == [pytest.approx(each, abs=1e-6) for each in expected]
    assert pickle.loads(pickle.dumps(model)).identity == identity
    with pytest.raises(ModelError, match='the choice "one two"'):
        asyncio.run(model.choose([{"role": "user", "content": "one"}], ["one two"]))
    assert (tmp_path / "model_prm.log").is_file()

    ray.kill(model.handle)
    with pytest.raises(ModelError, match=r"the process of rewards.models.prm is dead, see logs/model_prm.log"):
        asyncio.run(model.score_steps([TEXT]))


@pytest.mark.ray
def test_a_model_that_cannot_be_loaded_says_so_when_it_is_awaited(cluster: None, folder: Path, tmp_path: Path):
    model = start_model("prm", RewardModelConfig(path=str(folder)), tmp_path, place={})
    with pytest.raises(ConfigError, match=r"rewards.models.prm.kind=endpoint runs somewhere else"):
        ray.get(model.ready(), timeout=120)


@pytest.mark.ray
def test_a_late_answer_is_a_time_out_and_its_request_is_cancelled(cluster: None):
    handle, model = slow(timeout_s=0.3)
    ray.get(handle.counts.remote())
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"rewards.models.slow did not answer within timeout_s=0.3"):
        asyncio.run(model.choose([], ["30"]))
    assert time.monotonic() - started < 5
    deadline = time.monotonic() + 10
    while ray.get(handle.counts.remote())[1] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ray.get(handle.counts.remote())[1] == 1
    ray.kill(handle)


@pytest.mark.ray
def test_so_many_requests_are_on_their_way_at_once_and_waiting_is_not_late(cluster: None):
    handle, model = slow(timeout_s=2.0, max_concurrent=3)
    ray.get(handle.counts.remote())

    async def ask() -> None:
        await asyncio.gather(*(model.choose([], ["0.5"]) for _ in range(15)))  # five rounds: 2.5 s

    asyncio.run(ask())
    assert ray.get(handle.counts.remote()) == (3, 0)
    asyncio.run(ask())  # another event loop
    ray.kill(handle)


@pytest.mark.ray
def test_scores_of_another_number_than_the_steps_and_strange_errors_are_model_errors(cluster: None):
    handle, model = slow(timeout_s=30.0)
    with pytest.raises(ModelError, match=r"rewards.models.slow gave 1 scores for 2 steps"):
        asyncio.run(model.score_steps([TEXT]))
    with pytest.raises(ModelError, match=r"rewards.models.slow: OSError\('no room left'\)"):
        asyncio.run(model.chat([]))
    ray.kill(handle)


def test_an_endpoint_needs_no_process():
    with pytest.raises(ConfigError, match="no process is started for it"):
        build_model("judge", RewardModelConfig())
