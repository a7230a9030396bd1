"""Completions of a step, by whichever rollout worker is there; the workers are fakes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import RayActorError

import rewards.actor
from conf.schema import RolloutConfig
from rewards.actor import WorkerCompleter
from rewards.drawn import parse_tree
from rewards.models.base import ModelError
from rollout.tree import Tree


@dataclass(eq=False)
class Worker:
    """What a handle looks like to who asks it: `worker.complete.remote(...)` can be awaited."""

    is_dead: bool = False
    delay_s: float = 0.0
    asked: list[Any] = field(default_factory=list)

    @property
    def complete(self) -> Worker:
        return self

    async def remote(self, prompt: Any, *rest: Any) -> Tree:
        self.asked.append(rest[-1])
        await asyncio.sleep(self.delay_s)
        if self.is_dead:
            raise RayActorError()
        return Tree(prompt=prompt)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards.actor, "RESTART_PAUSE_S", 0.0)


TREE = parse_tree("q -> (a -> (a1, a2), b)")


def complete(workers: list[Worker], rows: list[int]) -> None:
    async def together() -> None:
        completer = WorkerCompleter(workers, RolloutConfig(tree_timeout_s=5))
        await asyncio.gather(*(completer.complete(TREE, row, 3) for row in rows))

    asyncio.run(together())


def test_all_steps_of_a_tree_are_gone_on_from_where_their_prefixes_are():
    workers = [Worker(), Worker(), Worker()]
    complete(workers, [0, 1, 2, 3])
    assert sorted(len(worker.asked) for worker in workers) == [0, 0, 4]


def test_who_has_nothing_to_do_helps_out():
    workers = [Worker(delay_s=0.01), Worker(delay_s=0.01)]
    complete(workers, [0] * 30)
    assert min(len(worker.asked) for worker in workers) == (30 - rewards.actor.HOME_SLACK) // 2


def test_a_worker_that_died_is_asked_no_more_and_its_completions_keep_their_seeds():
    alive = [Worker(), Worker()]
    complete(alive, [0, 1])
    seeds = sorted(seed for worker in alive for seed in worker.asked)
    dead = [Worker(is_dead=bool(each.asked)) for each in alive]
    complete(dead, [0, 1])
    assert [len(worker.asked) for worker in dead if not worker.is_dead] == [2]
    assert sorted(seed for worker in dead if not worker.is_dead for seed in worker.asked) == seeds


def test_where_nobody_is_left_there_is_no_answer():
    with pytest.raises(ModelError, match="no rollout worker was left"):
        complete([Worker(is_dead=True)] * 2, [0])
