"""Who hears whom: plain values, worked out by hand."""

from __future__ import annotations

import pytest
from test_placement import config, machines

from conf.errors import ConfigError
from conf.schema import Config, Placement, WeightPath
from rl.line_plan import Ends, check_lines, ranks_beside
from rl.placement import LEARNING, Plan, Role, plan


def heard(found: Plan, path: WeightPath) -> list[tuple[int, ...]]:
    """By each worker."""
    ends = Ends(path, lambda: found)
    return [ends.heard(number) for number in range(len(found.of(Role.worker)))]


def choosing(cfg: Config, path: WeightPath) -> Config:
    cfg.cluster.weights = path
    return cfg


def test_over_a_network_every_engine_hears_every_rank():
    found = plan(config(3, ranks=2), machines((2, 0), (2, 0)))
    assert heard(found, WeightPath.broadcast) == [(0, 1)] * 3


def test_engines_and_ranks_that_take_turns_pair_up_by_their_gpu():
    # ranks 0 and 1 on GPUs 0 and 1, workers 0 1 2 on GPUs 0 1 0
    found = plan(config(3, ranks=2, placement=Placement.time_share), machines((8, 2)))
    assert heard(found, WeightPath.ipc) == [(0,), (1,), (0,)]


def test_without_gpus_engines_are_dealt_out_to_the_ranks_of_their_node():
    found = plan(config(3, ranks=2), machines((4, 0)))
    assert heard(found, WeightPath.ipc) == [(0,), (1,), (0,)]


def test_an_engine_on_a_node_without_a_rank_hears_nobody():
    # rank 0 is on a; workers go to a, then b
    found = plan(config(2), machines((1, 0), (1, 0)))
    assert heard(found, WeightPath.ipc) == [(0,), ()]


def test_a_whole_gpu_of_its_own_is_beside_nobody():
    found = plan(config(1), machines((4, 2)))
    assert ranks_beside(found, found.process(Role.worker, "0")) == []


def test_on_one_node_lines_stay_on_the_loopback_and_over_several_they_have_the_nodes_addresses():
    near, far = plan(config(1), machines((4, 0))), plan(config(2), machines((1, 0), (1, 0)))
    assert Ends(WeightPath.broadcast, lambda: near).rank_address(0) == "127.0.0.1"
    ends = Ends(WeightPath.broadcast, lambda: far)
    assert ends.rank_address(0) == ends.worker_address(0) == "10.0.0.1" and ends.worker_address(1) == "10.0.0.2"


def test_memory_that_an_engine_cannot_map_is_refused_with_what_to_use():
    with pytest.raises(ConfigError, match=r"every engine on the GPU of a learner process.*rollout worker 0.*broadcast"):
        cfg = choosing(config(1), WeightPath.ipc)
        check_lines(cfg, plan(cfg, machines((4, 2))))
    with pytest.raises(ConfigError, match=r"on the node of a learner process.*rollout worker 1 on 10\.0\.0\.2"):
        cfg = choosing(config(2), WeightPath.ipc)
        check_lines(cfg, plan(cfg, machines((1, 0), (1, 0))))


def test_nccl_between_two_processes_of_one_gpu_is_refused():
    cfg = choosing(config(1, placement=Placement.time_share), WeightPath.broadcast)
    with pytest.raises(ConfigError, match=r"no two processes on one; rollout worker 0 shares its GPU.*weights=ipc"):
        check_lines(cfg, plan(cfg, machines((8, 1))))


@pytest.mark.parametrize("path", WeightPath)
def test_what_fits_is_accepted(path: WeightPath):
    cfg = choosing(config(2), path)
    check_lines(cfg, plan(cfg, machines((4, 0))))
    check_lines(cfg, plan(cfg, machines((4, 0)), without=LEARNING))


def test_the_object_store_fits_any_plan():
    cfg = choosing(config(1, placement=Placement.time_share), WeightPath.object_store)
    check_lines(cfg, plan(cfg, machines((8, 1))))
