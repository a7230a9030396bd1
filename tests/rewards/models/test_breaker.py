import pytest

from rewards.models.breaker import Breaker


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def opened(clock):
    breaker = Breaker(failures=2, rest_s=30, clock=clock)
    breaker.failed()
    breaker.failed()
    return breaker


def test_failures_in_a_row_open_it_and_one_before_does_not(clock):
    breaker = Breaker(failures=2, rest_s=30, clock=clock)
    breaker.failed()
    assert breaker.admit()
    breaker.failed()
    assert not breaker.admit()
    assert breaker.is_open
    assert breaker.num_lost == 2
    assert breaker.rest_left_s == 30


def test_an_answer_between_two_failures_starts_the_count_anew(clock):
    breaker = Breaker(failures=2, rest_s=30, clock=clock)
    for _ in range(5):
        breaker.failed()
        breaker.succeeded()
    breaker.failed()
    assert breaker.admit()


def test_after_the_rest_one_request_is_tried_and_no_second_beside_it(clock):
    breaker = opened(clock)
    clock.now += 29.9
    assert not breaker.admit()
    clock.now += 0.1
    assert [breaker.admit(), breaker.admit()] == [True, False]


def test_the_one_tried_closes_it_when_answered(clock):
    breaker = opened(clock)
    clock.now += 30
    assert breaker.admit()
    breaker.succeeded()
    assert not breaker.is_open
    assert [breaker.admit(), breaker.admit()] == [True, True]


def test_the_one_tried_opens_it_for_another_rest_when_lost(clock):
    breaker = opened(clock)
    clock.now += 30
    assert breaker.admit()
    breaker.failed()
    assert breaker.rest_left_s == 30
    assert not breaker.admit()
    clock.now += 30
    assert breaker.admit()


def test_the_one_tried_makes_room_for_another_when_nobody_waits_for_it_any_more(clock):
    breaker = opened(clock)
    clock.now += 30
    assert breaker.admit()
    breaker.abandoned()
    assert breaker.admit()


def test_requests_that_were_under_way_when_it_opened_do_not_prolong_the_rest(clock):
    breaker = opened(clock)
    clock.now += 20
    breaker.failed()
    assert breaker.rest_left_s == 10


def test_a_late_answer_to_a_request_that_was_under_way_closes_it(clock):
    breaker = opened(clock)
    breaker.succeeded()
    assert breaker.admit()
