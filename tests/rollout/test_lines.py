"""Weights straight from a learner's process to engines: threads of one process here, over real sockets and memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conf.errors import DamagedWeights, LineBroken
from conf.schema import WeightPath
from rollout import lines
from rollout.lines import Offer, Receiver, Sender, Sent, checksum_of
from rollout.meeting import give_up, meeting_at
from rollout.shards import Rows

CPU = torch.device("cpu")
WEIGHT = torch.arange(10.0).reshape(5, 2)
OTHER = torch.randn(7, 3, 2)
PATHS = [WeightPath.broadcast, WeightPath.ipc]

Groups = list[tuple[list[Rows], list[Tensor]]]


def rows(name: str, whole: Tensor, start: int = 0, stop: int | None = None) -> tuple[Rows, Tensor]:
    return Rows(name, str(whole.dtype).removeprefix("torch."), tuple(whole.shape), start), whole[start:stop]


def group(*given: tuple[Rows, Tensor]) -> tuple[list[Rows], list[Tensor]]:
    return [each for each, _ in given], [each for _, each in given]


def heard(receiver: Receiver, offer: Offer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for tensors in receiver.groups(offer):
        assert not found.keys() & tensors.keys(), "a tensor comes once"
        found |= tensors
    return found


class Ends:
    """Learner processes with a line each, and engines that hear all of them."""

    def __init__(
        self,
        path: WeightPath,
        num_senders: int = 1,
        num_receivers: int = 1,
        limit_s: float = 20.0,
        *,
        delta: bool = False,
    ) -> None:
        self.pool = ThreadPoolExecutor(num_senders + num_receivers)
        self.senders = [Sender(path, num_receivers, CPU, limit_s, delta=delta) for _ in range(num_senders)]
        addresses = tuple(each.address for each in self.senders)
        self.offers = [Offer(1, 1, path, addresses, number, num_receivers, limit_s) for number in range(num_receivers)]
        self.receivers = [Receiver(CPU) for _ in range(num_receivers)]

    def send(self, sending: int, of_sender: Sequence[Groups]) -> tuple[list[Sent], list[dict[str, Tensor] | Exception]]:
        sent = [
            self.pool.submit(each.send, sending, groups) for each, groups in zip(self.senders, of_sender, strict=True)
        ]
        taken = [self.pool.submit(self.take, number, sending) for number in range(len(self.receivers))]
        return [each.result() for each in sent], [each.result() for each in taken]

    def take(self, number: int, sending: int) -> Any:
        try:
            return heard(self.receivers[number], replace(self.offers[number], sending=sending))
        except (LineBroken, DamagedWeights) as error:
            return error


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_two_learner_processes_come_whole_to_two_engines_version_after_version(path: WeightPath):
    ends = Ends(path, num_senders=2, num_receivers=2)
    for sending in (1, 2):
        weight, other = WEIGHT * sending, (OTHER * sending).to(torch.bfloat16)
        first = [group(rows("w", weight, 0, 3)), group(rows("o", other, 0, 4), rows("v", weight, 0, 5))]
        second = [group(rows("w", weight, 3, 5)), group(rows("o", other, 4, 7), rows("v", weight, 5, 5))]
        sent, taken = ends.send(sending, [first, second])
        assert [each.broken for each in sent] == ["", ""]
        # 10 numbers of 4 bytes twice, and 42 of 2 bytes
        assert sum(each.size_bytes for each in sent) == 2 * 40 + 84
        for found in taken:
            assert isinstance(found, dict) and list(found) == ["w", "o", "v"]
            assert (
                torch.equal(found["w"], weight) and torch.equal(found["o"], other) and torch.equal(found["v"], weight)
            )


@pytest.mark.parametrize("path", PATHS)
def test_what_an_engine_got_stays_its_own_when_the_next_group_comes(path: WeightPath):
    ends = Ends(path)
    groups = [group(rows("a", WEIGHT)), group(rows("b", WEIGHT + 1)), group()]
    _, (found,) = ends.send(1, [groups])
    assert isinstance(found, dict) and torch.equal(found["a"], WEIGHT) and torch.equal(found["b"], WEIGHT + 1)


def test_versions_that_change_little_are_sent_as_what_changed_and_arrive_whole():
    ends = Ends(WeightPath.broadcast, num_senders=2, num_receivers=2, delta=True)
    weight = torch.randn(40, 10).to(torch.bfloat16)
    brought = []
    for sending, num_changed in enumerate((0, 20, 400, 1, 0), start=1):
        weight = weight.clone()
        weight.flatten()[torch.randperm(400)[:num_changed]] += 1
        sent, taken = ends.send(sending, [[group(rows("w", weight, 0, 20))], [group(rows("w", weight, 20, 40))]])
        assert all(isinstance(found, dict) and torch.equal(found["w"], weight) for found in taken)
        assert sum(each.size_bytes for each in sent) == 800
        brought.append(sum(each.brought_bytes for each in sent))
    # the first has no other before it; 20 of 400 words are 20 * (4 + 2) bytes; all of them are better sent whole
    assert brought == [800, 120, 800, 6, 0]


def test_changes_to_a_version_that_arrived_damaged_break_the_line(monkeypatch: pytest.MonkeyPatch):
    ends, real = Ends(WeightPath.broadcast, delta=True), checksum_of
    monkeypatch.setattr(lines, "checksum_of", lambda buffer: str(next(sums)) + real(buffer))
    sums = iter([1, 2, 3, 3])  # sent and found
    _, (first,) = ends.send(1, [[group(rows("a", WEIGHT))]])
    assert isinstance(first, DamagedWeights)
    sent, (again,) = ends.send(2, [[group(rows("a", WEIGHT))]])
    assert isinstance(again, LineBroken) and "changes came to a version that did not arrive" in str(again)
    assert sent[0].broken


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_fails_at_loading_is_not_waited_for(path: WeightPath):
    sender = Sender(path, 1, CPU, 20.0)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(sender.send, 1, [group(rows(name, WEIGHT)) for name in "ab"])
        taking = Receiver(CPU).groups(Offer(1, 1, path, (sender.address,), 0, 1, 20.0))
        next(taking)
        taking.close()
        sent = sending.result(timeout=10)
    assert sent.broken == "engine process 0 could not take the weights" or "Connection" in sent.broken


@pytest.mark.parametrize("path", PATHS)
def test_a_damaged_group_is_refused_once_everything_has_come(path: WeightPath, monkeypatch: pytest.MonkeyPatch):
    ends, made = Ends(path), []

    def first_wrong(buffer: Tensor) -> str:
        made.append(buffer)
        return "of something else" if len(made) == 1 else checksum_of(buffer)

    monkeypatch.setattr(lines, "checksum_of", first_wrong)
    sent, (found,) = ends.send(1, [[group(rows("a", WEIGHT)), group(rows("b", WEIGHT))]])
    assert isinstance(found, DamagedWeights) and "weights of a and 0 other tensors arrived with" in str(found)
    assert sent[0].broken == ""
    _, (again,) = ends.send(2, [[group(rows("a", WEIGHT))]])
    assert isinstance(again, dict) and torch.equal(again["a"], WEIGHT)


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_never_listens_breaks_the_line_and_the_learner_goes_through_all_groups(path: WeightPath):
    sender, made = Sender(path, 1, CPU, 0.3), []

    def groups() -> Iterator[tuple[list[Rows], list[Tensor]]]:
        for name in "abc":
            made.append(name)
            yield group(rows(name, WEIGHT))

    sent = sender.send(1, groups())
    assert sent.broken and made == ["a", "b", "c"]


@pytest.mark.parametrize("path", PATHS)
def test_a_learner_that_is_gone_is_told_with_the_line_and_the_version(path: WeightPath):
    sender = Sender(path, 1, CPU, 20.0)
    offer = Offer(7, 1, path, (sender.address,), 0, 1, 0.3)
    del sender
    with pytest.raises(LineBroken, match=f"cluster.weights={path.value}. broke while version 7 came"):
        heard(Receiver(CPU), offer)


def test_a_learner_that_falls_silent_is_not_waited_for_for_ever():
    sender = Sender(WeightPath.ipc, 1, CPU, 20.0)
    with pytest.raises(LineBroken):
        heard(Receiver(CPU), Offer(7, 1, WeightPath.ipc, (sender.address,), 0, 1, 0.3))


def test_a_learner_process_that_no_engine_hears_still_goes_through_its_groups():
    sender, made = Sender(WeightPath.ipc, 0, CPU, 20.0), []
    assert sender.send(1, (made.append(each) or group(rows("a", WEIGHT)) for each in range(3))) == Sent(0, 0)
    assert made == [0, 1, 2]


def test_an_offer_goes_to_another_process_in_plain_values():
    offer = Offer(7, 3, WeightPath.broadcast, ("127.0.0.1:1", "127.0.0.1:2"), 4, 5, 60.0, "127.0.0.1")
    assert Offer.from_plain(json.loads(json.dumps(offer.plain()))) == offer


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("listens", [True, False])
def test_a_learner_told_that_an_engine_is_gone_waits_no_longer(path: WeightPath, listens: bool):
    sender = Sender(path, 2, CPU, 20.0)
    offers = [Offer(1, 1, path, (sender.address,), number, 2, 20.0) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        sending = pool.submit(sender.send, 1, [group(rows("a", WEIGHT))])
        taking = pool.submit(heard, Receiver(CPU), offers[0]) if listens else None
        if listens:
            meeting_at(sender.address, 20.0).wait(["here/0"])
        give_up(sender.address, "rollout worker 1 was lost")
        assert sending.result(timeout=10) == Sent(40, 0, "rollout worker 1 was lost")
        del sender, sending
        if taking is not None:
            with pytest.raises(LineBroken):
                taking.result(timeout=10)


def test_the_checksum_is_two_sums_over_words_of_eight_bytes():
    words = torch.tensor([5, -2, 7], dtype=torch.int64)
    # 5 - 2 + 7 = 10 and 1 * 5 - 2 * 2 + 3 * 7 = 22 = 0x16
    assert checksum_of(words.view(torch.uint8)) == f"{10:016x}{22:016x}"


@given(st.binary(min_size=1, max_size=64), st.data())
def test_any_changed_byte_changes_the_checksum(given_bytes: bytes, data: st.DataObject):
    place = data.draw(st.integers(0, len(given_bytes) - 1))
    other = bytearray(given_bytes)
    other[place] ^= data.draw(st.integers(1, 255))
    before, after = (torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in (given_bytes, other))
    assert checksum_of(before) != checksum_of(after)


def test_a_checksum_of_many_chunks_is_that_of_one(monkeypatch: pytest.MonkeyPatch):
    buffer = torch.randint(0, 256, (1001,), dtype=torch.uint8)
    in_one = checksum_of(buffer)
    monkeypatch.setattr(lines, "CHUNK_WORDS", 7)
    assert checksum_of(buffer) == in_one
