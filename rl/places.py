"""A plan on Ray: the nodes as Ray sees them, and the options that bind each process to its place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from conf.errors import ConfigError, WaitTimeout, last_line
from rl.placement import Node, Plan, Process, Role, moved
from rollout.waiting import wait_all

logger = logging.getLogger(__name__)

SEATS_LIMIT_S = 60.0
LOOK_LIMIT_S = 120.0
"""Longest a node may take to say which files it sees."""


def ray_nodes() -> list[Node]:
    """The nodes that live, with what is free on each; the driver's first."""
    here = ray.get_runtime_context().get_node_id()
    free = available_resources_per_node()
    nodes = []
    for each in ray.nodes():
        if not each["Alive"]:
            continue
        total: Mapping[str, float] = each["Resources"]
        left = free.get(each["NodeID"], total)
        nodes.append(
            Node(
                id=each["NodeID"],
                address=each["NodeManagerAddress"],
                num_cpus=left.get("CPU", 0.0),
                num_gpus=int(left.get("GPU", 0.0)),
                is_driver=each["NodeID"] == here,
            )
        )
    return sorted(nodes, key=lambda node: (not node.is_driver, node.address, node.id))


class Places:
    """Where the processes of a plan are started; a worker whose node is gone gets another place.

    A GPU that several processes share is held by a placement group, so that all of them get that very one.
    """

    def __init__(self, plan: Plan) -> None:
        """Take the shared GPUs.

        Raises: WaitTimeout when somebody else has taken one meanwhile.
        """
        self.plan = plan
        self._seats: dict[int, Any] = {}
        for seat in sorted({each.seat for each in plan.processes if each.seat is not None}):
            sharing = [each for each in plan.processes if each.seat == seat]
            bundle = {"GPU": 1.0} | ({"CPU": cores} if (cores := sum(each.cpus for each in sharing)) else {})
            self._seats[seat] = placement_group([bundle], bundle_label_selector=[{"ray.io/node-id": sharing[0].node}])
        for seat, group in self._seats.items():
            if not group.wait(SEATS_LIMIT_S):
                self.close()
                raise WaitTimeout(
                    f"GPU {seat} of the plan did not become free within {SEATS_LIMIT_S:.0f} s: another job has taken "
                    "it since the plan was made. Start again, and the plan is made of what is free then."
                )

    def options(self, process: Process) -> dict[str, Any]:
        """What ray.remote(...).options takes to start a process in its place."""
        if process.seat is not None:
            strategy: Any = PlacementGroupSchedulingStrategy(self._seats[process.seat], placement_group_bundle_index=0)
        else:
            strategy = NodeAffinitySchedulingStrategy(process.node, soft=False)
        return {"num_cpus": process.cpus, "num_gpus": process.gpus, "scheduling_strategy": strategy}

    def of_role(self, role: Role) -> list[dict[str, Any]]:
        """Options of all processes of a role, in their order."""
        return [self.options(process) for process in self.plan.of(role)]

    def of_worker(self, number: int) -> dict[str, Any] | None:
        """Options of a worker now: on its own node while that lives, else where room is; None where there is none."""
        after = moved(self.plan, self._worker(number), self._living())
        if after is None:
            return None
        self.plan = after
        return self.options(self._worker(number))

    def lost_node(self, number: int) -> str:
        """The node of a worker if it is gone, else ""."""
        node = self._worker(number).node
        return "" if node in {each["NodeID"] for each in ray.nodes() if each["Alive"]} else node

    def close(self) -> None:
        """Give the shared GPUs back."""
        for group in self._seats.values():
            remove_placement_group(group)
        self._seats = {}

    def _worker(self, number: int) -> Process:
        return self.plan.process(Role.worker, str(number))

    def _living(self) -> list[Node]:
        """Nodes with what is free for this run: what its own processes take is counted in."""
        nodes = []
        for node in ray_nodes():
            own = [each for each in self.plan.processes if each.node == node.id and each.seat is None]
            ours = [sum(each.cpus for each in own), sum(each.gpus for each in own)]
            nodes.append(
                Node(node.id, node.address, node.num_cpus + ours[0], int(node.num_gpus + ours[1]), node.is_driver)
            )
        return nodes


def check_files(plan: Plan, log_dir: Path, model_path: str) -> None:
    """See what the other nodes see of this node's files, and say where logs go that cannot come here.

    Raises: ConfigError where a node lacks the model, or a learner's node the run folder.
    """
    elsewhere = [node for node in plan.nodes if any(each.node == node.id for each in plan.processes)]
    elsewhere = [node for node in elsewhere if not node.is_driver]
    if not elsewhere:
        return
    marker = log_dir / ".shared"
    marker.touch()
    paths = [str(marker), *([model_path] if Path(model_path).is_dir() else [])]
    look = ray.remote(num_cpus=0)(_seen)
    calls = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(paths)
        for node in elsewhere
    ]
    try:
        seen = wait_all(calls, limit_s=LOOK_LIMIT_S, what="the nodes to say which files they see")
    except RayError as error:
        raise ConfigError(
            f"a node of the cluster cannot run Grove ({last_line(error)}): every node needs the same Python "
            "environment, and the code of this run at the same path or sent along as Ray's working directory."
        ) from error
    finally:
        marker.unlink(missing_ok=True)
    for node, found in zip(elsewhere, seen, strict=True):
        own = [each for each in plan.processes if each.node == node.id]
        if model_path in paths and model_path not in found:
            raise ConfigError(
                f'the model folder "{model_path}" is on this node and not on {node.address}, where '
                f"{', '.join(map(str, own))} should run. Put it on a file system that all nodes share, or give a name "
                "of the hub as model.path."
            )
        if str(marker) in found:
            continue
        ranks = [each for each in own if each.role in (Role.learner, Role.prm)]
        if ranks:
            raise ConfigError(
                f"{', '.join(map(str, ranks))} should run on {node.address}, which does not see the run folder "
                f"{log_dir.parent}: checkpoints could be neither written nor read there. Put run.dir on a file system "
                "that all nodes share, or use fewer cluster.learner_nodes."
            )
        logger.warning(
            "%s does not see the run folder: logs of %s are on that node, in %s",
            node.address, ", ".join(map(str, own)), log_dir,
        )  # fmt: skip


def _seen(paths: list[str]) -> list[str]:
    return [path for path in paths if Path(path).exists()]
