"""Batches that grow ahead: in order, never further than allowed, and their errors come where they are asked for."""

from __future__ import annotations

import threading
import time

import pytest

from conf.check_machine import staleness_can_be_kept
from conf.compose import compose
from conf.errors import WaitTimeout
from conf.schema import Correction, OldLogprobs
from conf.settle import settled
from rewards.drawn import parse_tree
from rl.ahead import Ahead, Grown
from rl.batch_metrics import staleness_metrics


class Grower:
    """Grows at once, and notes what was grown when."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.begun: list[int] = []
        self.seconds = seconds
        self.busy = threading.Event()

    def __call__(self, batch: Grown) -> None:
        self.begun.append(batch.step)
        self.busy.set()
        time.sleep(self.seconds)
        self.busy.clear()
        batch.calls[batch.step] = f"call {batch.step}"


def settle(seen: list[int], length: int) -> list[int]:
    """What was begun once nothing more comes."""
    deadline = time.monotonic() + 5
    while len(seen) < length and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    return list(seen)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_at_most_depth_batches_are_begun_before_a_step_is_updated(depth: int):
    grower = Grower()
    ahead = Ahead(grower, 5, depth)
    assert settle(grower.begun, depth + 1) == list(range(5, 5 + depth + 1))
    for step in range(5, 9):
        assert ahead.next(5.0).calls == {step: f"call {step}"}
        assert settle(grower.begun, 0)[-1] <= step + depth  # trained at version v, begun at v - depth or later
        ahead.advance()
        assert settle(grower.begun, step - 5 + depth + 2)[-1] == step + depth + 1
    ahead.close()


def test_what_is_in_flight_is_every_batch_that_is_not_trained_yet():
    gate = threading.Event()

    def grow(batch: Grown) -> None:
        batch.calls[0] = "call"
        if batch.step == 6:
            gate.wait(5)

    ahead = Ahead(grow, 5, 1)
    ahead.next(5.0)
    while len(ahead.in_flight()) < 2:
        time.sleep(0.001)
    # batch 5 is in the hands of a step that has not been updated, batch 6 grows
    assert [(batch.step, batch.calls) for batch in ahead.in_flight()] == [(5, {0: "call"}), (6, {0: "call"})]
    ahead.advance()
    assert ahead.in_flight()[0].step == 6
    gate.set()
    ahead.close()


def test_nothing_grows_while_it_is_paused():
    grower = Grower(seconds=0.05)
    ahead = Ahead(grower, 0, 1)
    grower.busy.wait(5)
    with ahead.paused(limit_s=30):
        assert not grower.busy.is_set()  # it waited for the batch that grew
        begun = len(grower.begun)
        time.sleep(0.1)
        assert len(grower.begun) == begun
    assert settle(grower.begun, 2) == [0, 1]
    ahead.close()


def test_an_error_comes_where_the_batch_is_asked_for():
    def grow(batch: Grown) -> None:
        if batch.step == 1:
            raise RuntimeError("no worker is left")

    ahead = Ahead(grow, 0, 1)
    ahead.next(5.0)
    with pytest.raises(RuntimeError, match="no worker is left"):
        ahead.next(5.0)


def test_a_batch_that_never_comes_is_a_time_out():
    gate = threading.Event()
    ahead = Ahead(lambda batch: batch.calls.update({0: gate.wait(5)}), 0, 1)
    with pytest.raises(WaitTimeout, match="the next batch to grow did not come within 0 s"):
        ahead.next(0.05)
    gate.set()
    ahead.close()


def test_staleness_is_counted_in_tokens_behind_the_version_that_learns():
    # two tokens of version 3, one of version 4, for an update of version 4
    old, new = parse_tree("q -> a -> b", version=3), parse_tree("q -> c", version=4)
    found = staleness_metrics([old, new], 4)
    assert found == {
        "rollout/staleness_mean": pytest.approx(2 / 3),
        "rollout/staleness_max": 1,
        "rollout/stale_share": pytest.approx(2 / 3),
    }
    assert staleness_metrics([], 4) == {}


def test_stale_data_is_corrected_unless_the_user_says_how():
    loss = settled(compose(["rollout.max_staleness=1"])).loss
    assert (loss.old_logprobs, loss.correction) == (OldLogprobs.recompute, Correction.token_truncate)
    own = settled(
        compose(["rollout.max_staleness=1", "loss.old_logprobs=recompute", "loss.correction=token_mask"])
    ).loss
    assert own.correction is Correction.token_mask
    left = settled(compose(["rollout.max_staleness=1", "loss.corrects_stale=false"])).loss
    assert (left.old_logprobs, left.correction) == (OldLogprobs.engine, Correction.none)
    assert settled(compose([])) == compose([])


def test_a_batch_that_grew_ahead_cannot_be_refilled():
    (problem,) = staleness_can_be_kept(compose(["rollout.max_staleness=2", "select=dapo", "select.max_refills=3"]))
    assert "rollout.max_staleness=2 with select.max_refills=3" in problem.text
