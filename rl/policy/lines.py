"""The driver's end of the lines from the learner to the engines: who hears whom, and what to do when one breaks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from conf.errors import LineBroken
from conf.schema import Config, WeightPath
from rl.line_plan import Ends
from rl.policy.actor import Calls, LearnerGroup
from rollout.lines import Offer, Sent
from rollout.meeting import give_up
from rollout.pool import RolloutPool
from rollout.shards import Published


class Lines:
    """Makes lines to the engines that are there, and others whenever these are not the same; brings versions by them.

    Args:
        ends: which learner processes a worker hears and at which addresses, asked whenever lines are made.
    """

    def __init__(self, cfg: Config, learner: LearnerGroup, pool: RolloutPool, ends: Ends) -> None:
        self._cfg, self._learner, self._pool, self._ends = cfg, learner, pool, ends
        self._path = cfg.cluster.weights
        self._offers: dict[int, Offer] = {}
        self._members: dict[int, str] = {}
        """Whom the lines were made for."""
        self._sending = 0

    def bring(self, version: int) -> dict[str, float]:
        """Have the learner send a version and all engines take it.

        Returns: metrics.
        Raises: LineBroken when not all of it came through; DamagedWeights. The engines then wait for weights that come
            another way.
        """
        try:
            return self._brought(version)
        except LineBroken:
            self._members = {}  # of no more use to anybody
            raise

    def _brought(self, version: int) -> dict[str, float]:
        calls: Calls = []
        limit_s = self._cfg.learner.update_timeout_s

        def offer(members: dict[int, str]) -> Mapping[int, Offer]:
            if members != self._members:
                self._offers, self._members = self._made(sorted(members)), members
            self._sending += 1
            calls.extend(self._learner.send(version, self._sending))
            return {number: each.of(version, self._sending) for number, each in self._offers.items()}

        started, failed, arrivals = time.monotonic(), None, []
        try:
            arrivals = self._pool.receive_weights(offer, self._in_store, self._give_up)
        except LineBroken as error:
            failed = error
        finally:  # whatever the engines say, the learner must be through before it is asked for anything else
            what = f"the learner to send weights {version}"
            sent: Sequence[Sent] = self._learner.answers(calls, limit_s=limit_s, what=what) if calls else []
        if broken := [each.broken for each in sent if each.broken]:
            raise LineBroken(f"the learner could not send version {version} to all engines: {broken[0]}") from failed
        if failed is not None:
            raise failed
        # A line by a shared device carries all of the weights, one of several by the network its rows alone.
        whole = max if self._path is WeightPath.ipc else sum
        return {
            "weights/bytes": float(whole(each.size_bytes for each in sent)),
            "weights/brought_bytes": float(whole(each.brought_bytes for each in sent)),
            "weights/load_seconds": max((each.load_seconds for each in arrivals), default=time.monotonic() - started),
        }

    def _give_up(self, why: str) -> None:
        for address in {line for each in self._offers.values() for line in each.lines}:
            with contextlib.suppress(dist.DistError):  # it is over already
                give_up(address, why)

    def _in_store(self) -> Published:
        return self._learner.publish(None, limit_s=self._cfg.learner.update_timeout_s)

    def _made(self, numbers: Sequence[int]) -> dict[int, Offer]:
        """Lines to these workers, and what each is told; a version is still to be named."""
        heard = {number: self._ends.heard(number) for number in numbers}
        if deaf := [number for number, ranks in heard.items() if not ranks]:
            raise LineBroken(f"rollout worker {deaf[0]} shares its device with no process of the learner any more")
        width = self._cfg.rollout.tensor_parallel_size
        of_rank = [[number for number in numbers if rank in heard[number]] for rank in range(self._ends.num_ranks)]
        counts = [width * len(listening) for listening in of_rank]
        hosts = [self._ends.rank_address(rank) for rank in range(self._ends.num_ranks)]
        addresses = self._learner.open_lines(self._path, counts, hosts)
        return {
            number: Offer(
                version=0,
                sending=0,
                path=self._path,
                lines=tuple(addresses[rank] for rank in ranks),
                receiver=width * of_rank[ranks[0]].index(number),
                num_receivers=counts[ranks[0]],
                limit_s=self._cfg.cluster.weights_timeout_s,
                own_host=self._ends.worker_address(number),
            )
            for number, ranks in heard.items()
        }
