"""The learner's Ray actors: each carries a `Learner`, decides nothing; the driver talks to all of them as one."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError

from conf.errors import GroveError, WaitTimeout, WorkerLost
from conf.schema import Config, WeightPath
from rl.credit.measured import Needs
from rl.generators import seed_generators
from rl.policy.memory import keep_freed_memory
from rl.policy.pack import TreeCredit
from rl.policy.profile import PROFILES, profiled
from rl.policy.ranks import Ranks, join
from rollout.busy import BusyClock
from rollout.lines import Sender, Sent
from rollout.meeting import LOOPBACK, meeting_address, open_meeting
from rollout.process import begin_actor
from rollout.seeds import derive_seed
from rollout.shards import Piece, Published, as_bytes, piece_of
from rollout.tree import Tree
from rollout.waiting import value_of, wait_all

Calls = list["ray.ObjectRef[Any]"]
"""One call on every rank, rank 0's first."""

SETTLE_S = 10.0
"""How long the other ranks may take to fail too, once one has."""


class LearnerActor:
    """Forwards to one rank's `rl.policy.learner.Learner`, in a process of its own."""

    def __init__(self, cfg: Config, model_path: str, rank: int, log_path: str) -> None:
        begin_actor(Path(log_path))
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", force=True)
        logging.getLogger("rl").setLevel(logging.INFO)
        self._cfg, self._model_path, self._rank = cfg, model_path, rank
        self._meeting: Any = None
        self._version = 0
        self._line: Sender | None = None
        self._clock = BusyClock()
        self._profiles = Path(log_path).parent.parent / PROFILES

    def open_meeting(self, host: str) -> str:
        """Rank 0: open the place where the ranks meet, at an address of this node; returns it with the port."""
        self._meeting = open_meeting(self._cfg.learner.update_timeout_s, host)
        return meeting_address(self._meeting)

    def load_learner(self, address: str) -> None:
        """Meet the other ranks and load the model."""
        from rl.policy.learner import Learner  # loads transformers

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        learner = self._cfg.learner
        if device.type == "cpu":
            keep_freed_memory()
        if learner.num_processes == 1:
            ranks = Ranks.alone(device)
        else:
            meeting = self._meeting or address
            own_host = LOOPBACK if address.startswith(f"{LOOPBACK}:") else ray.util.get_node_ip_address()
            ranks = join(self._rank, learner.num_processes, meeting, device, learner.update_timeout_s, own_host)
        seed_generators(derive_seed(self._cfg.seed, "learner", self._rank))
        self._learner = Learner(self._cfg, self._model_path, ranks)

    def update(self, trees: list[TreeCredit], step: int) -> dict[str, float]:
        """One step of training; returns its metrics."""
        trace = self._profiles / f"learner_rank{self._rank}_step_{step + 1:06d}.json.gz"
        with self._clock.running(), profiled(trace if step + 1 in self._cfg.run.profile_steps else None):
            metrics = self._learner.update(trees, step)
        self._version = step + 1
        return metrics

    def measure(self, trees: list[Tree], needs: Needs) -> Any:
        """What credit must know of the policy at the steps of `trees`."""
        with self._clock.running():
            return self._learner.measure(trees, needs)

    def score(self, samples: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Log-probabilities of each (context ids, action ids) sample, at temperature 1."""
        with self._clock.running():
            return self._learner.score(samples)

    def publish(self, version: int | None) -> tuple[int, list[Piece]]:
        """Put this rank's part of what the engines load into the memory that its node shares, group by group.

        It stays there as long as anybody holds what is returned.

        Args:
            version: what the weights are now; None for what they were called last.
        """
        self._version = self._version if version is None else version
        with self._clock.running():
            pieces = []
            for rows, tensors in self._learner.pieces():
                arrays = [as_bytes(each) for each in tensors]
                pieces.append(piece_of(rows, arrays, payload=ray.put(arrays)))
        return self._version, pieces

    def open_line(self, path: WeightPath, num_receivers: int, host: str) -> str:
        """Make a line to so many engine processes in place of any before; returns its address."""
        limit_s = self._cfg.cluster.weights_timeout_s
        device, delta = self._learner.ranks.device, self._cfg.cluster.weights_delta
        self._line = Sender(path, num_receivers, device, limit_s, host, delta=delta)
        return self._line.address

    def send(self, version: int, sending: int) -> Sent:
        """Bring the weights to everybody at the line."""
        assert self._line is not None, "a line is made before anything is sent"
        self._version = version
        with self._clock.running():
            sent = self._line.send(sending, self._learner.pieces(whole=self._line.path is WeightPath.ipc))
        if sent.broken:
            self._line = None  # all that still listen hear at once that it is over
        return sent

    def begin_save(self, folder: str) -> None:
        """Copy what a checkpoint needs, and write it while training goes on."""
        with self._clock.running():
            self._learner.begin_save(folder)

    def saved(self) -> Any:
        """How far this rank is with it."""
        return self._learner.saved()

    def load(self, folder: str) -> None:
        """Continue from a checkpoint folder, without executing anything stored in it."""
        self._learner.load(folder)

    def busy_seconds(self) -> dict[str, float]:
        """Time with something to do so far."""
        return {"learner": self._clock.seconds()}


class LearnerGroup:
    """All ranks of the learner, which get every call in the same order; a call returns at once, `answer` waits for it.

    The actors take no core of their own: in a synchronous step they work while the engines rest.

    Args:
        cfg: the run; learner.num_processes actors are started.
        log_dir: folder of learner.log, learner_rank1.log ...
        places: options for Ray that bind each rank to its place; anywhere and without a GPU by default. Several ranks
            need a GPU each, since NCCL joins no two processes on one.
        host: address at which ranks on several nodes meet, of rank 0's node.
    """

    def __init__(
        self,
        cfg: Config,
        model_path: str,
        log_dir: Path,
        *,
        places: Sequence[Mapping[str, Any]] = (),
        host: str = LOOPBACK,
    ) -> None:
        size = cfg.learner.num_processes
        places = places or [{}] * size
        environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_restarts": 0,
            "runtime_env": {"env_vars": environment},
        }
        actors = [ray.remote(LearnerActor).options(**(options | dict(place))) for place in places]
        self._logs = [str(log_dir / f"learner{f'_rank{rank}' if rank else ''}.log") for rank in range(size)]
        self._actors: list[Any] = [
            actor.remote(cfg, model_path, rank, log)
            for rank, (actor, log) in enumerate(zip(actors, self._logs, strict=True))
        ]
        self._in_turn, self._limit_s = threading.Lock(), cfg.learner.update_timeout_s
        address = self._actors[0].open_meeting.remote(host)
        self._loading = [each.load_learner.remote(address) for each in self._actors]

    def ready(self) -> Calls:
        """Answered once the model is loaded."""
        return self._loading

    def update(self, trees: Sequence[TreeCredit], step: int) -> Calls:
        """One step of training; the answer is its metrics."""
        return self._call("update", ray.put(list(trees)), step)

    def measure(self, trees: Sequence[Tree], needs: Needs) -> Calls:
        """The answer is what credit must know of the policy, one `Measured` per tree."""
        return self._call("measure", ray.put(list(trees)), needs)

    def score(self, samples: Sequence[tuple[list[int], list[int]]]) -> Calls:
        """The answer is the log-probabilities of each (context ids, action ids) sample, at temperature 1."""
        return self._call("score", list(samples))

    def publish(self, version: int | None, *, limit_s: float) -> Published:
        """What the engines load, each rank's part in the memory of its own node.

        Args:
            version: what the weights are now; None for what they were called last.
        Raises: as `answer`.
        """
        calls = self._call("publish", version)
        of_rank = self.answers(calls, limit_s=limit_s, what=f"the learner to publish weights {version or ''}".rstrip())
        groups = zip(*(pieces for _, pieces in of_rank), strict=True)
        return Published(of_rank[0][0], tuple(tuple(piece for piece in group if piece.rows) for group in groups))

    def open_lines(self, path: WeightPath, num_receivers: Sequence[int], hosts: Sequence[str]) -> list[str]:
        """A line of each rank to so many engine processes; returns their addresses by rank."""
        with self._in_turn:
            calls = [
                actor.open_line.remote(path, number, host)
                for actor, number, host in zip(self._actors, num_receivers, hosts, strict=True)
            ]
        return self.answers(calls, limit_s=self._limit_s, what="the learner to make lines to the engines")

    def send(self, version: int, sending: int) -> Calls:
        """Bring the weights to all engines at the lines; the answers are a `Sent` of each rank."""
        return self._call("send", version, sending)

    def begin_save(self, folder: str) -> Calls:
        """Begin to write a checkpoint; answered once all is copied and training may go on."""
        return self._call("begin_save", folder)

    def saved(self) -> Calls:
        """Each rank's answer is how far it is with the checkpoint, a `Written`."""
        return self._call("saved")

    def load(self, folder: str) -> Calls:
        """Continue from a checkpoint."""
        return self._call("load", folder)

    def answer(self, calls: Calls, *, limit_s: float, what: str) -> Any:
        """Rank 0's answer, once all ranks have answered; see `answers`."""
        return self.answers(calls, limit_s=limit_s, what=what)[0]

    def answers(self, calls: Calls, *, limit_s: float, what: str) -> list[Any]:
        """What all ranks answered.

        An error that all ranks raise alike leaves them in step and alive. After any other one rank would wait for a
        call that never comes, so all are killed.

        Raises: WorkerLost naming the ranks that died; WaitTimeout; whatever a rank raised.
        """
        try:
            return wait_all(calls, limit_s=limit_s, what=what)
        except WaitTimeout:
            raise
        except (GroveError, RayError) as error:
            failures = _failures(calls)
            dead = [rank for rank, failure in enumerate(failures) if isinstance(failure, RayActorError)]
            if not dead and len({type(failure).__name__ for failure in failures}) == 1:  # Ray makes a type for each
                raise
            self.close()
            if not dead:
                raise
            named = " and ".join(f"rank {rank} ({self._logs[rank]})" for rank in dead)
            stopped = " The others cannot go on alone and were stopped." if len(dead) < len(calls) else ""
            raise WorkerLost(
                f"waiting for {what}, {len(dead)} of {len(calls)} learner processes died: {named}.{stopped} The end "
                "of its log says why; a process killed without a word was often out of memory: lower "
                "learner.pack_tokens, or set learner.gradient_checkpointing=true."
            ) from error

    def actors(self) -> list[Any]:
        """Handles by rank, for who asks them beside the group."""
        return list(self._actors)

    def pids(self) -> list[int]:
        """Process ids by rank, for those who want to look or to kill."""
        refs = [each.__ray_call__.remote(_pid) for each in self._actors]
        return wait_all(refs, limit_s=SETTLE_S, what="the learner's process ids")

    def close(self) -> None:
        """Stop all ranks."""
        for actor in self._actors:
            ray.kill(actor)

    def _call(self, method: str, *arguments: Any) -> Calls:
        with self._in_turn:  # two threads' calls would reach the ranks in different orders
            return [getattr(actor, method).remote(*arguments) for actor in self._actors]


def _failures(calls: Calls) -> list[BaseException | None]:
    """What each call raised, given a little time; None for one that answered or still waits."""
    ready, _ = ray.wait(calls, num_returns=len(calls), timeout=SETTLE_S)
    failures: list[BaseException | None] = []
    for call in calls:
        try:
            if call in ready:
                value_of(call)
            failures.append(None)
        except (GroveError, RayError) as error:
            failures.append(error)
    return failures


def _pid(_: Any) -> int:
    return os.getpid()
