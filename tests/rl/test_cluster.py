"""Runs on several Ray nodes of this machine, each with an address of its own, against the same run on one node."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from published import arrived
from ray.cluster_utils import Cluster
from transformers import AutoTokenizer
from whole_runs import steady_metrics

from conf.compose import compose
from rl.launch import Parts, launched
from rl.placement import Role, plan
from rl.places import Places, ray_nodes
from rl.progress import Progress
from rl.run import Run
from rl.run_folder import open_run_folder, settings
from rl.tiny import write_tiny_model
from rl.tracker import Tracker
from rollout.data import build_prompt_source
from rollout.tree import Tree
from rollout.types import Prompt

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 3
LIMIT_S = 150.0
SOURCE = Path(__file__).with_name("signals_of_nobody.py")
OUTCOME = f"rewards.sources.outcome={{fn: '{SOURCE}:of_trajectory', signal: outcome}}"
"""A reward that even a model that can do nothing earns more or less of."""
SMALL = [
    *("experiment=hop_search", "tracker=disabled", "credit=grpo", OUTCOME, "run.eval_prompts=0"),
    *("rollout=chains", "rollout.prompts_per_step=4", "rollout.num_leaves=4", "rollout.max_turn_tokens=24"),
    *("rollout.max_steps=3", "task.on_malformed=reply"),
    *("learner.num_processes=2", "learner.num_threads=1", f"run.num_steps={STEPS}"),
]
Meddle = Callable[[int, Parts, bool], None]
"""Called with the number of a step before it, and again, with True, behind its first tree."""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    write_tiny_model(folder / "model", compose(SMALL))
    return folder


def nothing(step: int, parts: Parts, amid: bool) -> None:
    """The undisturbed run."""


def trained(room: Path, name: str, *overrides: str, meddle: Meddle = nothing) -> dict[str, Any]:
    """Metrics of every step that no clock is in, and the weights at the end."""
    cfg = compose([*SMALL, f"run.dir={room / name}", *overrides])
    folder, model = open_run_folder(room / name, settings(cfg)), str(room / "model")
    source = build_prompt_source(cfg, AutoTokenizer.from_pretrained(model))
    with launched(cfg, model, folder.logs) as parts:
        run = Run(cfg, folder, source, parts, Progress(cfg), Tracker(cfg.tracker, folder.path, "test", settings(cfg)))
        run.restore()
        while run.goes_on():
            step = run.state.step
            meddle(step, parts, False)
            trees = run.grow(run.next_prompts())
            scored = run.score(disturbed(trees, lambda step=step: meddle(step, parts, True)))
            found = run.assign(scored)
            run.update(scored, found)
            run.finish_step(scored, found)
        assert parts.learner is not None
        weights = arrived(parts.learner.publish(STEPS, limit_s=LIMIT_S), in_shared_memory)
    rows = steady_metrics(folder.path)
    assert len(rows) == STEPS and all(row["learner/grad_norm"] > 0 for row in rows)
    by_store = ["weights/lay_out_seconds" in json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return {"metrics": rows, "weights": weights, "by_store": by_store}


async def in_shared_memory(ref: Any) -> Any:
    return await asyncio.to_thread(ray.get, ref)


def disturbed(trees: Any, meddle: Callable[[], None]) -> Iterator[tuple[int, Tree]]:
    for number, tree in enumerate(trees):
        yield tree
        if number == 0:
            meddle()


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["metrics"] == wanted["metrics"]
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        assert torch.equal(found["weights"][name], weight), name


@pytest.fixture(scope="module")
def on_one_node(room: Path) -> dict[str, Any]:
    return trained(room, "one_node", "rollout.num_workers=2", "cluster.num_cpus=2")


def test_engines_that_take_turns_with_the_learner_and_map_its_memory_change_no_bit(
    room: Path, on_one_node: dict[str, Any]
):
    in_turn = ["rollout.num_workers=1", "cluster=one_gpu", "cluster.num_cpus=1", "cluster.weights=ipc"]
    found = trained(room, "in_turn", *in_turn)
    assert_same(found, on_one_node)
    assert on_one_node["by_store"] == [True] * STEPS and found["by_store"] == [False] * STEPS
    log = (room / "in_turn" / "logs" / "rollout_worker_0.log").read_text()
    assert log.count("sleep mode is not supported on CPU") == 3 * STEPS, "asleep, weights awake, cache awake"


ON_GPUS = [
    pytest.param(["cluster=one_gpu", "cluster.weights=ipc"], id="one GPU, CUDA IPC", marks=pytest.mark.gpu),
    pytest.param(["cluster=one_gpu"], id="one GPU, object store", marks=pytest.mark.gpu),
    pytest.param(["cluster=split", "cluster.weights=broadcast"], id="two GPUs, NCCL", marks=pytest.mark.gpu(2)),
]


@pytest.mark.parametrize("overrides", ON_GPUS)
def test_on_gpus_engines_sample_from_the_weights_that_came(room: Path, overrides: list[str]):
    name = "-".join(overrides).replace("=", "_")  # which no setting's text may hold unquoted
    found = trained(room, name, "learner.num_processes=1", "rollout.num_workers=1", *overrides)
    straight = any(each.startswith("cluster.weights=") for each in overrides)
    assert found["by_store"] == [not straight] * STEPS
    gaps = [row["weights/canary_gap_nats"] for row in found["metrics"]]
    assert all(gap <= compose(SMALL).learner.canary_max_logprob_gap for gap in gaps), gaps


class Nodes:
    """A Ray cluster on this machine: node a carries the driver."""

    def __init__(self) -> None:
        self._cluster = Cluster()
        self._nodes: dict[str, Any] = {}
        for name in "abc":
            self.add(name)
        self.address = self._cluster.address

    def add(self, name: str, **resources: Any) -> None:
        kept: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        address = f"127.0.0.{'abcd'.index(name) + 2}"
        self._nodes[name] = self._cluster.add_node(**(kept | resources), node_ip_address=address)

    def take_away(self, name: str) -> None:
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def stop(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        # Else every other Ray of this machine would be told that here is the cluster to join.
        patch.setattr("ray._private.utils.write_ray_address", lambda *_: None)
        started = Nodes()
    yield started
    started.stop()


def test_a_run_over_several_nodes_of_which_one_goes_and_comes_back_equals_the_run_on_one(
    room: Path, on_one_node: dict[str, Any], nodes: Nodes, caplog: pytest.LogCaptureFixture
):
    seen: list[int] = []

    def meddle(step: int, parts: Parts, amid: bool) -> None:
        seen.append(len(parts.pool.actors()))
        if (step, amid) == (1, True):
            nodes.take_away("c")
        if (step, amid) == (2, False):
            nodes.add("c")
            wait_for(parts, room)

    spread = [
        "rollout.num_workers=3",
        "cluster=existing",
        f"cluster.address={nodes.address}",
        "cluster.learner_nodes=2",
        "cluster.weights=broadcast",
        "cluster.weights_delta=true",
    ]
    with caplog.at_level(logging.INFO):
        found = trained(room, "spread", *spread, meddle=meddle)
    assert_same(found, on_one_node)
    assert not found["by_store"][0] and not found["by_store"][2], "by lines, made anew for those who are there"
    for line in ("learner 0         127.0.0.2 (here)", "learner 1         127.0.0.3", "rollout worker 2  127.0.0.4"):
        assert line in caplog.text
    assert seen == [3, 3, 3, 3, 2, 3], (
        "its worker did not fit on the other nodes, and was there again once the node was"
    )
    assert "and no other node has room for it: going on with the other 2" in caplog.text
    logs = {path.name for path in (room / "spread" / "logs").iterdir()}
    assert logs >= {"learner.log", "learner_rank1.log", *(f"rollout_worker_{number}.log" for number in range(3))}


def wait_for(parts: Parts, room: Path) -> None:
    """Grow something that is not part of the run until the worker is back."""
    prompts = some_prompts(room)
    deadline = time.monotonic() + LIMIT_S
    while len(parts.pool.actors()) < 3:
        assert time.monotonic() < deadline, "the worker did not come back"
        time.sleep(0.5)
        list(parts.pool.grow(prompts, 99))


def some_prompts(room: Path) -> list[Prompt]:
    return build_prompt_source(compose(SMALL), AutoTokenizer.from_pretrained(room / "model")).draw(100, 2)


def test_a_learner_process_and_its_engine_are_given_the_very_same_gpu(nodes: Nodes):
    class Holder:  # here, so that Ray sends it along: no other process can import a test
        def gpus(self) -> list[int]:
            return [int(each) for each in ray.get_gpu_ids()]

    nodes.add("d", num_gpus=2, num_cpus=2)  # Ray believes what it is told
    cfg = compose([*SMALL, "cluster=one_gpu", "rollout.num_workers=2"])
    ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        places = Places(plan(cfg, ray_nodes()))
        holders = {
            str(process): ray.remote(Holder).options(**places.options(process)).remote()
            for role in (Role.learner, Role.worker)
            for process in places.plan.of(role)
        }
        given = dict(zip(holders, ray.get([each.gpus.remote() for each in holders.values()], timeout=60), strict=True))
        places.close()
    finally:
        ray.shutdown()
    assert given["learner 0"] == given["rollout worker 0"] and given["learner 1"] == given["rollout worker 1"]
    assert given["learner 0"] != given["learner 1"]
