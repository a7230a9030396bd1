"""The learner's processes: how they meet, add up numbers, and share out packs so that all make the same calls.

Every rank calls each collective the same number of times, or all wait for ever. So all get equally many packs, and a
rank that has fewer goes through dummies.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from conf.errors import WaitTimeout
from rl.policy.pack import PackedBatch, PathCredit, TokenCredit, TreeCredit, pack
from rollout.meeting import LOOPBACK, interface_of, meeting_at
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason

Gathered = TypeVar("Gathered")

TOKENS_PER_PAIR = 1 / 6000
"""Cost of one (token, token) pair of attention in tokens: 4 d of 24 d^2 multiplications in each layer, at d = 1,000."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that share the model; every rank calls its methods, in the same order."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    """All ranks, to shard over; None for a process that joined no other."""
    beside: dist.ProcessGroup | None = None
    """All ranks, for a thread that talks while the main one trains: in one group their calls would mix."""

    @classmethod
    def alone(cls, device: torch.device) -> Ranks:
        """The one process."""
        return cls(rank=0, size=1, device=device, mesh=None)

    def sum(self, parts: dict[str, float]) -> dict[str, float]:
        """Sums over the ranks by name, the same to the last bit on each; a name that a rank lacks counts as 0."""
        return self._reduce(parts, math.fsum)

    def max(self, parts: dict[str, float]) -> dict[str, float]:
        """Largest over the ranks by name."""
        return self._reduce(parts, max)

    def gather(self, part: Gathered) -> list[Gathered] | None:
        """Every rank's part in the order of ranks, on rank 0; None elsewhere."""
        gathered = self._gather_all(part)
        return gathered if self.rank == 0 else None

    def background(self) -> dist.ProcessGroup | None:
        """The group for threads beside training; None stands for the process alone, which is then in a group of one."""
        if self.beside is None:
            one_process_mesh(self.device)
        return self.beside

    def close(self) -> None:
        """Leave the group; the ranks cannot talk after it."""
        if self.size > 1:
            dist.destroy_process_group()

    def _reduce(self, parts: dict[str, float], reduce: Callable[[list[float]], float]) -> dict[str, float]:
        of_rank = self._gather_all(parts)
        names = dict.fromkeys(name for each in of_rank for name in each)
        return {name: reduce([each[name] for each in of_rank if name in each]) for name in names}

    def _gather_all(self, part: Gathered) -> list[Gathered]:
        if self.size == 1:
            return [part]
        gathered: list[Gathered | None] = [None] * self.size
        dist.all_gather_object(gathered, part)
        return gathered  # pyright: ignore[reportReturnType]


def join(
    rank: int, size: int, meeting: TCPStore | str, device: torch.device, timeout_s: float, own_host: str = LOOPBACK
) -> Ranks:
    """Meet the other ranks; returns once all are there.

    Args:
        meeting: what `open_meeting` gave, in the process that opened it; its address elsewhere.
        device: of this rank alone; gloo connects CPUs and NCCL connects GPUs.
        timeout_s: longest wait for the others, here and in every collective.
        own_host: address of this node at which the other ranks reach it.
    Raises: WaitTimeout when not all came.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        if isinstance(meeting, str):
            meeting = meeting_at(meeting, timeout_s)
        _start_group(rank, size, meeting, device, timeout, own_host)
    except dist.DistError as error:
        raise WaitTimeout(
            f"rank {rank} waited {timeout_s:.0f} s for the {size - 1} other learner processes and not all came "
            f"({error}). Look into learner*.log of the run's logs/ folder for the one that did not start."
        ) from error
    mesh = init_device_mesh(device.type, (size,))
    beside = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(beside, dist.ProcessGroup), "this rank is one of all ranks"
    return Ranks(rank=rank, size=size, device=device, mesh=mesh, beside=beside)


def one_process_mesh(device: torch.device) -> DeviceMesh:
    """A mesh of this process alone, for a model that is sharded only to compute in another type than it is kept in."""
    if not dist.is_initialized():
        _start_group(0, 1, HashStore(), device, timedelta(minutes=1))
    return init_device_mesh(device.type, (1,))


def _start_group(
    rank: int, size: int, store: Store, device: torch.device, timeout: timedelta, host: str = LOOPBACK
) -> None:
    # Named so, gloo needs no look-up of the machine's own name, which fails on many a laptop. NCCL finds its own way.
    interface = interface_of(host)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",  # a GPU's ranks exchange Python objects by gloo too
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )


def share_packs(
    packs: Sequence[list[TreeCredit]], size: int, cost: Callable[[list[TreeCredit]], float] | None = None
) -> list[list[list[TreeCredit]]]:
    """Deal packs out to ranks, equally many to each.

    The n-th packs of all ranks are computed in lockstep, since layers are gathered from all ranks. So packs of like
    cost are dealt in one round; within a round the costliest goes to the rank that has least so far (longest processing
    time first). The same packs are always dealt alike.

    Args:
        packs: of one mini-batch.
        size: number of ranks.
        cost: of a pack; by default `pack_cost`.
    Returns: the packs of each rank; [] stands for a dummy, in the last round alone.
    """
    costs = [(cost or pack_cost)(each) for each in packs]
    order = sorted(range(len(packs)), key=lambda number: (-costs[number], number))
    shares: list[list[list[TreeCredit]]] = [[] for _ in range(size)]
    load = [0.0] * size
    for start in range(0, len(order), size):
        round_ = order[start : start + size]
        free = sorted(range(size), key=lambda rank: (load[rank], rank))
        for place, rank in enumerate(free):
            shares[rank].append(packs[round_[place]] if place < len(round_) else [])
            load[rank] += costs[round_[place]] if place < len(round_) else 0.0
    return shares


def pack_cost(credits: list[TreeCredit]) -> float:
    """What a pack costs, in tokens: its tokens, and the pairs of tokens that see each other."""
    total = 0.0
    for credit in credits:
        nodes, prompt_tokens = credit.tree.nodes, len(credit.tree.prompt.token_ids)
        packed = sorted(
            {row for last in range(len(nodes)) if credit.is_trained(last) for row in credit.tree.path(last)}
        )
        stop = {ROOT: prompt_tokens}
        tokens, pairs = prompt_tokens, _pairs(0, prompt_tokens)
        for row in packed:
            before, length = stop[nodes[row].parent], len(nodes[row].action_ids) + len(nodes[row].observation_ids)
            stop[row] = before + length
            tokens, pairs = tokens + length, pairs + _pairs(before, length)
        total += tokens + TOKENS_PER_PAIR * pairs if packed else 0.0
    return total


def _pairs(before: int, length: int) -> int:
    """Tokens seen by `length` tokens behind `before` others, themselves included."""
    return length * before + length * (length + 1) // 2


def dummy_batch(pad_multiple: int = 1) -> PackedBatch:
    """A pack that trains nothing: one token behind one token, every weight 0, no trained steps.

    Its loss is 0 and so is every gradient, to the last bit. It has what any loss asks for: a trajectory, and a critic's
    values.
    """
    tree = Tree(prompt=Prompt(id="dummy", token_ids=(0,), question="", answer=""))
    tree.add(
        Node(
            parent=ROOT,
            action_ids=[0],
            action_logprobs=[0.0],
            observation_ids=[],
            facts=StepFacts(kind=StepKind.answer),
            stop=StopReason.answered,
            version=0,
        )
    )
    nothing = TokenCredit(advantage=[[0.0]], value=[[0.0]], target=[[0.0]])
    path = PathCredit(leaf=0, advantage=[0.0], weight=[1.0])
    batch = pack(
        [TreeCredit(tree=tree, w_pos=[0.0], w_neg=[0.0], w0=[1.0], paths=[path], tokens=nothing)], pad_multiple
    )
    assert batch.paths is not None, "it was packed with its trajectory"
    paths = replace(batch.paths, weight_M=torch.zeros_like(batch.paths.weight_M))
    return replace(batch, w0_E=torch.zeros_like(batch.w0_E), paths=paths, trained_steps=[])


def is_dummy(batch: PackedBatch) -> bool:
    """True for a pack that only keeps step with the other ranks."""
    return not batch.trained_steps
