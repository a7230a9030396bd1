from __future__ import annotations

import asyncio

from fakes import FakeEngine
from published import in_groups

from rollout.busy import BusyClock, TimedEngine
from rollout.patience import waited_seconds, waiting
from rollout.types import Sampling


class Hand:
    """A clock that is moved by hand."""

    at = 0.0

    def __call__(self) -> float:
        return self.at


def test_a_busy_clock_counts_work_side_by_side_once():
    now = Hand()
    clock = BusyClock(now)
    now.at = 1.0
    with clock.running():
        now.at = 2.0
        with clock.running():
            now.at = 4.0
        now.at = 5.0
        assert clock.seconds() == 4.0  # what is under way counts
    now.at = 9.0
    assert clock.seconds() == 4.0


def test_work_that_fails_ends_too():
    now = Hand()
    clock = BusyClock(now)
    try:
        with clock.running():
            now.at = 3.0
            raise ValueError
    except ValueError:
        now.at = 8.0
    assert clock.seconds() == 3.0


def test_an_engine_is_timed_while_it_samples_and_stays_what_it_is():
    inner = FakeEngine(version=3, delay_s=lambda rng: 0.01)
    engine = TimedEngine(inner)

    async def two_steps() -> None:
        sampling = Sampling(max_tokens=4, seed=1)
        await asyncio.gather(engine.sample([7], sampling), engine.sample([8], sampling))
        await engine.load_weights(in_groups(), 4)

    asyncio.run(two_steps())
    assert engine.version == 4 and [context for context, _ in inner.requests] == [[7], [8]]
    assert engine.clock.seconds() >= 0.01


def test_each_thread_counts_its_own_waiting():
    before = waited_seconds()
    with waiting():
        pass
    assert waited_seconds() > before
