"""How bytes go from one process to another: two threads here where waiting is told of, real processes for the rest."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor

from conf.schema import WeightPath
from rollout.carriers import Broadcast
from rollout.lines import Offer, Receiver, Sender, Sent
from rollout.meeting import GIVEN_UP, LOOPBACK, meeting_address, meeting_at, open_meeting
from rollout.shards import Rows

LIMIT_S = 60.0
SOON_S = 20.0
"""Long enough to notice what is told, and far below the limit of what is not."""
WAYS = [
    pytest.param(WeightPath.broadcast, "cpu", "cpu", False, id="gloo"),
    pytest.param(WeightPath.broadcast, "cpu", "cpu", True, id="gloo, changes alone"),
    pytest.param(WeightPath.ipc, "cpu", "cpu", False, id="shared memory"),
    pytest.param(WeightPath.broadcast, "cuda:0", "cuda:1", False, id="NCCL", marks=pytest.mark.gpu(2)),
    pytest.param(WeightPath.broadcast, "cuda:0", "cuda:1", True, id="NCCL, changes alone", marks=pytest.mark.gpu(2)),
    pytest.param(WeightPath.ipc, "cuda:0", "cuda:0", False, id="CUDA IPC", marks=pytest.mark.gpu),
]


def test_who_brings_a_broadcast_waits_no_longer_once_it_is_given_up():
    meeting = open_meeting(LIMIT_S)
    other = meeting_at(meeting_address(meeting), LIMIT_S)
    with ThreadPoolExecutor(2) as pool:
        made = [
            pool.submit(Broadcast, store, rank, 2, torch.device("cpu"), LOOPBACK, 5.0)
            for rank, store in enumerate((meeting, other))
        ]
        learner, _ = [each.result() for each in made]
        giving = pool.submit(learner.give, "1/0", torch.ones(8, dtype=torch.uint8))
        with pytest.raises(TimeoutError):
            giving.result(timeout=0.3)  # the other takes nothing
        other.set(GIVEN_UP, "rollout worker 1 was lost")
        with pytest.raises(RuntimeError, match="rollout worker 1 was lost"):
            giving.result(timeout=2.0)


def versions(device: str) -> list[dict[str, Tensor]]:
    """Of a tensor that grows, so that a buffer must too, and of one of which four numbers change."""
    first = {
        "small": torch.arange(6.0, device=device),
        "large": torch.zeros(100_000, dtype=torch.bfloat16, device=device),
    }
    second = {name: tensor.clone() for name, tensor in first.items()}
    second["large"][::25_000] = 1.0
    third = {"small": torch.arange(300_000.0, device=device), "large": second["large"] + 1}
    return [first, second, third]


def groups(tensors: dict[str, Tensor]) -> list[tuple[list[Rows], list[Tensor]]]:
    return [
        ([Rows(name, str(of.dtype).removeprefix("torch."), tuple(of.shape), 0)], [of]) for name, of in tensors.items()
    ]


def engine(offer: Offer, device: str, connection: Connection) -> None:
    """What an engine's process does: takes every sending that it is told of, and says what arrived."""
    receiver = Receiver(torch.device(device))
    while True:
        sending, found = connection.recv(), dict[str, Tensor]()
        for tensors in receiver.groups(offer.of(sending, sending)):
            found |= {name: tensor.clone() for name, tensor in tensors.items()}
        connection.send({name: (str(tensor.device), tensor.cpu().float().numpy()) for name, tensor in found.items()})


class Engine:
    """A process that hears a line."""

    def __init__(self, offer: Offer, device: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=engine, args=(offer, device, theirs), daemon=True)
        self.process.start()

    def take(self, sending: int) -> None:
        self.connection.send(sending)

    def taken(self) -> dict[str, tuple[str, Tensor]]:
        assert self.connection.poll(LIMIT_S), "it says what arrived"
        return {name: (device, torch.from_numpy(array)) for name, (device, array) in self.connection.recv().items()}

    def kill(self) -> None:
        self.process.kill()
        self.process.join(LIMIT_S)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("path", "of_learner", "of_engine", "delta"), WAYS)
def test_weights_come_to_a_process_version_after_version_and_a_dead_one_is_given_up(
    path: WeightPath, of_learner: str, of_engine: str, delta: bool
):
    sender = Sender(path, 1, torch.device(of_learner), LIMIT_S, delta=delta)
    taker = Engine(Offer(0, 0, path, (sender.address,), 0, 1, LIMIT_S), of_engine)
    brought: list[int] = []
    for sending, tensors in enumerate(versions(of_learner), start=1):
        taker.take(sending)
        sent = sender.send(sending, groups(tensors))
        assert sent.broken == ""
        brought.append(sent.brought_bytes)
        found = taker.taken()
        assert found.keys() == tensors.keys()
        for name, (device, tensor) in found.items():
            assert device == of_engine and torch.equal(tensor, tensors[name].cpu().float())
    # 6 numbers of 4 bytes and 100,000 of 2; of the second version four numbers of 2 bytes with positions of 4
    assert brought == [200_024, 24 if delta else 200_024, 1_400_000]

    taker.kill()
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(sender.send, 4, groups(versions(of_learner)[0]))
        time.sleep(0.5)
        meeting_at(sender.address, LIMIT_S).set(GIVEN_UP, "rollout worker 0 was lost")
        sent: Sent = sending.result(timeout=SOON_S)
    assert sent.broken
