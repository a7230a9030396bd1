"""Rules about where the processes of a run go; `rl.placement` then counts what each node has."""

from __future__ import annotations

from collections.abc import Callable

from conf.problem import Problem
from conf.schema import Config, ModelKind, Placement, WeightPath


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [turns_are_taken_in_step, turns_are_taken_on_one_gpu, learner_nodes_are_there, changes_go_over_a_network]


def turns_are_taken_in_step(cfg: Config) -> list[Problem]:
    """Engines that sleep while the learner updates grow nothing meanwhile."""
    if cfg.cluster.placement is not Placement.time_share or not cfg.rollout.max_staleness:
        return []
    return [
        Problem(
            f"cluster.placement=time_share with rollout.max_staleness={cfg.rollout.max_staleness}: batches that grow "
            "ahead need the engines while the learner updates, and then they sleep. Use rollout.max_staleness=0, or "
            "cluster=split."
        )
    ]


def turns_are_taken_on_one_gpu(cfg: Config) -> list[Problem]:
    """What spans GPUs has them to itself."""
    sizes = {"rollout.tensor_parallel_size": cfg.rollout.tensor_parallel_size}
    for name, model in cfg.rewards.models.items():
        if model.kind is not ModelKind.endpoint:
            sizes[f"rewards.models.{name}.tensor_parallel_size"] = model.tensor_parallel_size
    if cfg.cluster.placement is not Placement.time_share:
        return []
    return [
        Problem(
            f"cluster.placement=time_share with {key}={size}: an engine that spans GPUs has them to itself. Use "
            f"{key}=1 with more workers, or cluster=split."
        )
        for key, size in sizes.items()
        if size > 1
    ]


def learner_nodes_are_there(cfg: Config) -> list[Problem]:
    """Several nodes are a Ray cluster's; each gets a process."""
    nodes, found = cfg.cluster.learner_nodes, []
    if nodes and not cfg.cluster.address:
        found.append(
            Problem(
                f"cluster.learner_nodes={nodes}, but a run without cluster.address has this machine alone. Use "
                "cluster.learner_nodes=0, or join a Ray cluster by cluster=existing."
            )
        )
    if nodes > cfg.learner.num_processes:
        found.append(
            Problem(
                f"cluster.learner_nodes={nodes} is more than learner.num_processes={cfg.learner.num_processes}: some "
                f"would have nothing to do. Use learner.num_processes={nodes} or a multiple, or fewer nodes."
            )
        )
    if nodes and cfg.cluster.placement is Placement.time_share:
        found.append(
            Problem(
                f"cluster.learner_nodes={nodes} with cluster.placement=time_share: the learner goes where the engines "
                "are. Use cluster.learner_nodes=0."
            )
        )
    return found


def changes_go_over_a_network(cfg: Config) -> list[Problem]:
    """What is not sent over a network is not made smaller."""
    if not cfg.cluster.weights_delta or cfg.cluster.weights is WeightPath.broadcast:
        return []
    return [
        Problem(
            f"cluster.weights_delta=true with cluster.weights={cfg.cluster.weights.value}: changes alone are sent by "
            "broadcast; nothing else would read the setting. Use cluster.weights=broadcast, or "
            "cluster.weights_delta=false."
        )
    ]
