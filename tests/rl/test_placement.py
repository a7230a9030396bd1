"""Where processes go: plain values, worked out by hand."""

from __future__ import annotations

import pytest

from conf.errors import ConfigError
from conf.schema import Config, ModelKind, Placement, RewardModelConfig, SourceConfig
from rl.placement import Node, Plan, Role, moved, plan


def config(
    workers: int, *, ranks: int = 1, tensor_parallel: int = 1, placement: Placement = Placement.auto, nodes: int = 0
) -> Config:
    cfg = Config()
    cfg.rollout.num_workers, cfg.rollout.tensor_parallel_size = workers, tensor_parallel
    cfg.rollout.gpu_memory_share = 0.9
    cfg.learner.num_processes, cfg.learner.num_threads = ranks, 2
    cfg.cluster.placement, cfg.cluster.learner_nodes = placement, nodes
    return cfg


def machines(*sizes: tuple[int, int]) -> list[Node]:
    """Nodes a, b, c ... of (cores, GPUs); the command runs on a."""
    return [
        Node("abc"[number], f"10.0.0.{number + 1}", cpus, gpus, is_driver=number == 0)
        for number, (cpus, gpus) in enumerate(sizes)
    ]


def places(found: Plan, role: Role) -> str:
    """Nodes of the processes of a role, one letter each."""
    return "".join(process.node for process in found.of(role))


def seats(found: Plan, role: Role) -> list[int | None]:
    return [process.seat for process in found.of(role)]


# One machine


def test_without_gpus_a_worker_takes_a_core_and_nobody_else_takes_any():
    found = plan(config(2), machines((2, 0)))
    assert [(str(each), each.cpus, each.gpus) for each in found.processes] == [
        ("reward service", 0, 0), ("learner 0", 0, 0), ("rollout worker 0", 1, 0), ("rollout worker 1", 1, 0),
    ]  # fmt: skip
    assert found.engine_memory_share == 0.9 and not found.engines_sleep and found.learner_address() == ""


def test_with_enough_gpus_everyone_has_whole_ones():
    # 2 engines of 2 GPUs and a learner: 5
    found = plan(config(2, tensor_parallel=2), machines((8, 5)))
    assert [each.gpus for each in found.of(Role.worker)] == [2, 2]
    assert [each.gpus for each in found.of(Role.learner)] == [1]
    assert found.engine_memory_share == 0.9


def test_a_single_gpu_is_dealt_out_in_equal_parts():
    # 2 engines and a learner on 1 GPU: a third each, and a third of 0.9 of the memory
    found = plan(config(2), machines((8, 1)))
    assert [each.gpus for each in found.processes] == [0, *[pytest.approx(1 / 3)] * 3]
    assert found.engine_memory_share == pytest.approx(0.3)


def test_two_gpus_hold_two_parts_each():
    # a learner and 3 engines on 2 GPUs, dealt out in turn
    found = plan(config(3), machines((8, 2)))
    assert seats(found, Role.learner) + seats(found, Role.worker) == [0, 1, 0, 1]
    assert {each.gpus for each in found.of(Role.worker)} == {1 / 2}


def test_a_reward_model_that_a_source_asks_has_its_gpu_and_another_has_none():
    cfg = config(1)
    cfg.rewards.models = {name: RewardModelConfig(kind=ModelKind.vllm, path="m") for name in ("judge", "unused")}
    cfg.rewards.sources = {"quality": SourceConfig(fn="a:b", model="judge")}
    found = plan(cfg, machines((4, 3)))
    assert [str(each) for each in found.of(Role.model)] == ["reward model judge"]
    assert sum(each.gpus for each in found.processes) == 3


@pytest.mark.parametrize(
    ("cfg", "gpus", "why"),
    [
        (config(2, tensor_parallel=2), 4, "no node has room left for rollout worker 1"),
        (config(2, ranks=3), 2, "no node has room left for learner 2"),
        (config(2, placement=Placement.split), 2, "no node has room left for rollout worker 1"),
    ],
    ids=["an engine that spans GPUs", "several ranks", "split"],
)
def test_what_cannot_share_a_gpu_is_refused_with_what_is_there_and_what_is_needed(cfg: Config, gpus: int, why: str):
    with pytest.raises(ConfigError, match=why) as refused:
        plan(cfg, machines((8, gpus)))
    assert f"Free: 10.0.0.1: 8 cores, {gpus} GPUs." in str(refused.value)
    engines = f"2 x rollout worker of 1 core and {cfg.rollout.tensor_parallel_size} GPU"
    assert engines in str(refused.value) and "Nothing was started" in str(refused.value)


# Taking turns


def test_taking_turns_each_rank_has_a_gpu_and_each_engine_all_of_its_share_of_the_memory():
    found = plan(config(2, ranks=2, placement=Placement.time_share), machines((8, 2)))
    assert seats(found, Role.learner) == seats(found, Role.worker) == [0, 1]
    assert {each.gpus for each in found.processes if each.gpus} == {1 / 2}
    assert found.engine_memory_share == 0.9 and found.engines_sleep


def test_two_engines_on_the_one_gpu_halve_the_memory_and_the_learner_takes_none_of_it():
    found = plan(config(2, placement=Placement.time_share), machines((8, 1)))
    assert found.engine_memory_share == pytest.approx(0.45)


def test_taking_turns_without_gpus_changes_no_place():
    found = plan(config(2, placement=Placement.time_share), machines((2, 0)))
    assert found.processes == plan(config(2), machines((2, 0))).processes and found.engines_sleep


def test_more_ranks_than_gpus_cannot_take_turns():
    with pytest.raises(ConfigError, match="2 learner processes cannot share 1 GPUs"):
        plan(config(1, ranks=2, placement=Placement.time_share), machines((8, 1)))


# Split


def test_split_without_gpus_gives_the_learners_threads_cores_of_their_own():
    # 2 workers and 2 threads: 4 cores
    found = plan(config(2, placement=Placement.split), machines((4, 0)))
    assert [each.cpus for each in found.of(Role.learner)] == [2]
    with pytest.raises(ConfigError, match="no node has room left for rollout worker 1"):
        plan(config(2, placement=Placement.split), machines((3, 0)))


def test_split_sets_whole_nodes_aside_for_the_learner():
    found = plan(config(3, ranks=2, placement=Placement.split, nodes=1), machines((8, 4), (8, 2), (8, 2)))
    assert places(found, Role.learner) == "aa" and places(found, Role.worker) == "bcb"
    with pytest.raises(ConfigError, match="no node has room left for rollout worker 4"):
        plan(config(5, ranks=2, placement=Placement.split, nodes=1), machines((8, 4), (8, 2), (8, 2)))


# Several nodes


def test_workers_are_spread_over_all_nodes_and_the_learner_stays_together():
    found = plan(config(4, ranks=2), machines((4, 0), (4, 0)))
    assert places(found, Role.worker) == "abab" and places(found, Role.learner) == "aa"
    assert places(found, Role.rewards) == "a"


def test_a_full_node_gets_no_more_workers():
    assert places(plan(config(5), machines((1, 0), (4, 0))), Role.worker) == "babbb"


def test_the_learners_processes_are_spread_in_blocks_and_meet_at_the_first_ones_address():
    found = plan(config(2, ranks=4, nodes=2), machines((2, 0), (2, 0), (2, 0)))
    assert places(found, Role.learner) == "aabb" and found.learner_address() == "10.0.0.1"


def test_a_learner_larger_than_a_node_goes_on_with_the_next():
    found = plan(config(2, ranks=3), machines((8, 2), (8, 4)))
    assert places(found, Role.learner) == "aab" and places(found, Role.worker) == "bb"


def test_a_node_without_gpus_computes_nothing_where_others_have_them():
    found = plan(config(1), machines((8, 0), (8, 2)))
    assert places(found, Role.rewards) == "a" and places(found, Role.learner) + places(found, Role.worker) == "bb"


def test_nodes_that_are_not_there_cannot_be_set_aside():
    with pytest.raises(ConfigError, match=r"cluster\.learner_nodes=3 are not there"):
        plan(config(1, ranks=3, nodes=3), machines((8, 0), (8, 0)))


# A node is lost


def lost(found: Plan, number: int, living: list[Node]) -> str:
    """Where a worker goes then; "" for nowhere."""
    after = moved(found, found.process(Role.worker, str(number)), living)
    return "" if after is None else after.process(Role.worker, str(number)).node


def test_a_worker_whose_node_lives_stays_there():
    nodes = machines((1, 0), (1, 0))
    assert lost(plan(config(2), nodes), 1, nodes) == "b"


def test_a_worker_whose_node_is_gone_goes_where_room_is_left():
    a, b, c = machines((1, 0), (1, 0), (2, 0))
    found = plan(config(3), [a, b, c])
    assert places(found, Role.worker) == "cab"
    assert lost(found, 2, [a, c]) == "c"  # a's only core is taken, c has one of two left


def test_a_worker_without_room_waits_until_a_node_comes():
    a, b = machines((1, 0), (1, 0))
    found = plan(config(2), [a, b])
    assert lost(found, 1, [a]) == ""
    after = moved(found, found.process(Role.worker, "1"), [a, Node("d", "10.0.0.2", 1)])
    assert after is not None and after.node(after.process(Role.worker, "1")).address == "10.0.0.2"


def test_nodes_set_aside_for_the_learner_stay_so():
    a, b, c = machines((8, 0), (1, 0), (1, 0))
    found = plan(config(2, placement=Placement.split, nodes=1), [a, b, c])
    assert lost(found, 1, [a, b]) == ""


def test_the_table_says_where_everything_goes():
    text = plan(config(2, placement=Placement.time_share), machines((8, 1))).table()
    assert text.splitlines() == [
        "process           node             cores  GPUs",
        "reward service    10.0.0.1 (here)  -      -",
        "learner 0         10.0.0.1 (here)  -      0.333 of GPU 0",
        "rollout worker 0  10.0.0.1 (here)  1      0.333 of GPU 0",
        "rollout worker 1  10.0.0.1 (here)  1      0.333 of GPU 0",
        "engines sleep while the learner updates",
    ]
