"""In which order vLLM is asked to sleep, to wake up and to take weights; no model is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from published import in_groups
from torch import Tensor

from conf.errors import DamagedWeights
from conf.schema import Config

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

WEIGHT = torch.ones(1)


class Recorder:
    """Stands where vLLM is served, and notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*arguments: Any) -> bool:
            shown = [",".join(each) if isinstance(each, dict) else str(each) for each in arguments if each is not None]
            self.calls.append(" ".join([name, *shown]))
            return True

        return call


@dataclass
class Arguments:
    """Stands for vLLM's, which look for the model."""

    disable_log_stats: bool = True


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr("rollout.vllm_engine.serve", lambda *_, **__: recorder)
    monkeypatch.setattr("rollout.vllm_engine.engine_args", lambda *_: Arguments())
    return recorder


def turn(served: Recorder, *, sleeps: bool, groups: Callable[[], AsyncIterator[dict[str, Tensor]]]) -> list[str]:
    from rollout.vllm_engine import VllmEngine

    async def run() -> None:
        engine = VllmEngine(Config(), "model")
        if sleeps:
            await engine.sleep()
        await engine.load_weights(groups(), 3)
        assert engine.version == 3

    asyncio.run(run())
    return served.calls


def two() -> AsyncIterator[dict[str, Tensor]]:
    return in_groups({"a": WEIGHT}, {"b": WEIGHT, "c": WEIGHT})


UPDATE = ["begin_update", "receive a", "receive b,c", "end_update 3"]


def test_an_engine_that_slept_has_room_for_weights_first_and_for_its_cache_last(served: Recorder):
    slept = ["sleep", "init_transfer", "wake_up weights", *UPDATE, "wake_up kv_cache", "go_on"]
    assert turn(served, sleeps=True, groups=two) == slept


def test_an_engine_that_did_not_sleep_is_not_woken(served: Recorder):
    assert turn(served, sleeps=False, groups=two) == ["init_transfer", *UPDATE, "go_on"]


async def broken() -> AsyncIterator[dict[str, Tensor]]:
    yield {"a": WEIGHT}
    raise DamagedWeights("a flipped bit")


def test_an_update_that_breaks_off_is_ended_and_the_engine_does_not_go_on(served: Recorder):
    with pytest.raises(DamagedWeights):
        turn(served, sleeps=False, groups=broken)
    assert served.calls == ["init_transfer", "begin_update", "receive a", "end_update"]
