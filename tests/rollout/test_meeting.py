"""Where processes meet."""

from __future__ import annotations

import ipaddress

import pytest
from torch.distributed import DistError

from rollout.meeting import LOOPBACK, interface_of, meeting_address, meeting_at, open_meeting


def test_two_meetings_do_not_share_a_port():
    first, second = open_meeting(timeout_s=5.0), open_meeting(timeout_s=5.0)
    assert meeting_address(first) != meeting_address(second)


def test_what_one_says_the_other_hears():
    meeting = open_meeting(timeout_s=5.0)
    meeting_at(meeting_address(meeting), timeout_s=5.0).set("word", "hello")
    assert meeting.get("word") == b"hello"


def test_a_meeting_that_is_over_is_not_waited_for_long():
    address = meeting_address(open_meeting(timeout_s=5.0))  # closed as soon as nobody holds it
    with pytest.raises(DistError):
        meeting_at(address, timeout_s=0.3)


def test_the_interface_of_an_address_is_the_one_whose_network_it_is_of():
    assert ipaddress.ip_address(LOOPBACK).is_loopback and interface_of(LOOPBACK) == "lo"
    assert interface_of("240.0.0.1") is None  # reserved: no network has it
