"""Are the nodes of a cluster that a run joins fit for it?"""

from __future__ import annotations

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from conf.errors import ConfigError, last_line
from rl.jobs.versions import differences, pinned_versions, refusal
from rollout.waiting import wait_all

NODES_LIMIT_S = 120.0


def require_equal_nodes() -> None:
    """Every node of the cluster that this driver joined has the libraries that the driver has.

    Raises: ConfigError naming a node and what differs there.
    """
    here = pinned_versions()
    own = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != own]
    asked = [
        ray.remote(pinned_versions)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote()
        for node in others
    ]
    try:
        found = wait_all(asked, limit_s=NODES_LIMIT_S, what="the versions of the other nodes")
    except (RayError, ImportError) as error:
        raise ConfigError(
            f"a node of the cluster could not say what is installed there ({last_line(error)}), so no part "
            f"of the run would start on it. Is Grove installed in the environment that Ray was started from?"
        ) from error
    for node, there in zip(others, found, strict=True):
        wrong = differences(here, there)
        if wrong:
            raise ConfigError(refusal(wrong, f"the Python of Ray's node {node['NodeManagerAddress']}"))
