"""Which learner processes an engine can get its weights from directly: read off the plan of where they run."""

from __future__ import annotations

from collections.abc import Callable

from conf.errors import ConfigError
from conf.schema import Config, WeightPath
from rl.placement import Plan, Process, Role
from rollout.meeting import LOOPBACK


class Ends:
    """Both ends of the lines of a run.

    Args:
        path: broadcast or ipc.
        plan: gives the plan as it is now; workers move when their node is gone.
    """

    def __init__(self, path: WeightPath, plan: Callable[[], Plan]) -> None:
        self._path, self._plan = path, plan

    @property
    def num_ranks(self) -> int:
        """Processes of the learner."""
        return len(self._plan().of(Role.learner))

    def heard(self, worker: int) -> tuple[int, ...]:
        """The ranks that a worker hears: all of them over a network, the one beside it on its device; none where no
        rank is there."""
        plan = self._plan()
        if self._path is WeightPath.broadcast:
            return tuple(range(self.num_ranks))
        beside = ranks_beside(plan, plan.process(Role.worker, str(worker)))
        return (beside[worker % len(beside)],) if beside else ()

    def rank_address(self, rank: int) -> str:
        """Address at which a rank opens its line."""
        return self._address(self._plan().of(Role.learner)[rank])

    def worker_address(self, worker: int) -> str:
        """Address of a worker's node."""
        return self._address(self._plan().process(Role.worker, str(worker)))

    def _address(self, process: Process) -> str:
        plan = self._plan()
        ends = [*plan.of(Role.learner), *plan.of(Role.worker)]
        return plan.node(process).address if len({each.node for each in ends}) > 1 else LOOPBACK


def ranks_beside(plan: Plan, worker: Process) -> list[int]:
    """Ranks of the learner whose memory a worker's engine can map: on its GPU; without GPUs, on its node."""
    return [
        int(rank.name)
        for rank in plan.of(Role.learner)
        if rank.node == worker.node and (not worker.gpus or (rank.seat is not None and rank.seat == worker.seat))
    ]


def check_lines(cfg: Config, plan: Plan) -> None:
    """Refuse a way for the weights that this plan has not.

    Raises: ConfigError.
    """
    if not plan.of(Role.learner):
        return
    for worker in plan.of(Role.worker):
        beside = ranks_beside(plan, worker)
        if cfg.cluster.weights is WeightPath.ipc and not beside:
            what = "GPU" if worker.gpus else "node"
            raise ConfigError(
                f"cluster.weights=ipc needs every engine on the {what} of a learner process, whose memory it maps; "
                f"{worker} on {plan.node(worker).address} has none there. Use cluster.weights=broadcast, or "
                "cluster=one_gpu, which lets engines and learner share their GPUs."
            )
        if cfg.cluster.weights is WeightPath.broadcast and worker.gpus and beside:
            raise ConfigError(
                f"cluster.weights=broadcast is NCCL between GPUs, which joins no two processes on one; {worker} shares "
                f"its GPU with learner {beside[0]}. Use cluster.weights=ipc, which maps the learner's memory there."
            )
