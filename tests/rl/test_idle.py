from __future__ import annotations

import json
from pathlib import Path

from rl.idle import PARTS, IdleMeter, Span, write_stage_trace
from rl.metrics import declared


class World:
    """Processes that work by hand."""

    def __init__(self) -> None:
        self.busy: dict[str, dict[str, float]] = {}
        self.waited = self.now = 0.0

    def meter(self) -> IdleMeter:
        return IdleMeter(
            lambda: {name: dict(parts) for name, parts in self.busy.items()}, lambda: self.waited, self.clock
        )

    def clock(self) -> float:
        return self.now


def test_idle_is_what_is_left_of_the_step_in_the_mean_over_processes():
    world = World()
    world.busy = {"worker 0": {"rollout": 5.0, "engine": 4.0}, "worker 1": {"rollout": 7.0, "engine": 7.0}}
    meter = world.meter()
    meter.start()
    world.now, world.waited = 10.0, 9.0
    world.busy = {"worker 0": {"rollout": 11.0, "engine": 6.0}, "worker 1": {"rollout": 9.0, "engine": 9.0}}
    # workers had trees for 6 and 2 of 10 s, their engines samples for 2 and 2; the driver waited for 9
    assert meter.shares() == {"rollout": 0.6, "engine": 0.8, "driver": 0.9}


def test_a_process_that_was_replaced_counts_from_nothing_and_one_that_is_gone_not_at_all():
    world = World()
    world.busy = {"worker 0": {"rollout": 500.0}, "worker 1": {"rollout": 500.0}}
    meter = world.meter()
    meter.start()
    world.now, world.busy = 10.0, {"worker 1": {"rollout": 505.0}, "worker 2": {"rollout": 1.0}}
    assert meter.shares()["rollout"] == 0.7  # 5 and 1 of 10 s


def test_shares_stay_shares_whatever_the_clocks_say():
    world = World()
    meter = world.meter()
    meter.start()
    assert meter.shares() == {}, "no time has passed"
    world.now, world.waited, world.busy = 1.0, 1.001, {"a": {"learner": 1.001}}
    assert meter.shares() == {"learner": 0.0, "driver": 1.0}


def test_every_part_has_a_declared_metric():
    assert all(declared(f"time/{part}_idle_share") for part in PARTS)


def test_stages_are_written_as_a_trace_that_viewers_read(tmp_path: Path):
    file = tmp_path / "profile" / "driver_step_000002.json"
    write_stage_trace(file, [Span("grow", 100.0, 2.0), Span("update", 102.5, 1.0)], step=2)
    events = json.loads(file.read_text())["traceEvents"]
    assert [(event["name"], event["ts"], event["dur"]) for event in events] == [
        ("grow", 100e6, 2e6),
        ("update", 102.5e6, 1e6),
    ]
    assert all(event["ph"] == "X" and event["args"] == {"step": 2} for event in events)
