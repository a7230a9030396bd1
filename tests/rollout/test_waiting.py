from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
import ray

from conf.errors import ConfigError, WaitTimeout
from rollout.waiting import wait_all

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@ray.remote
def after(seconds: float, value: int) -> int:
    time.sleep(seconds)
    return value


@ray.remote
def refuse(message: str) -> None:
    raise ConfigError(message)


def test_values_come_in_the_order_of_the_calls():
    assert wait_all([after.remote(0.3, 1), after.remote(0.0, 2)], limit_s=30, what="both") == [1, 2]


def test_a_wait_has_a_limit_and_says_what_it_waited_for():
    # a worker of its own first, so that the limit is not spent on its start
    wait_all([after.remote(0.0, 0)], limit_s=30, what="a start")
    with pytest.raises(WaitTimeout, match=r"the slow one .* did not come within"):
        wait_all([after.remote(5.0, 1)], limit_s=0.5, what="the slow one")


def test_our_own_error_keeps_its_words_across_processes():
    with pytest.raises(ConfigError) as raised:
        wait_all([refuse.remote("seed=x is no number.")], limit_s=30, what="it")
    assert str(raised.value) == "seed=x is no number."
