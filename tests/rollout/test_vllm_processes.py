"""AsyncLLM, the engine of a GPU, in processes of its own: here on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
import torch
from published import published
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.compose import compose
from conf.schema import Config, WeightPath
from rl.tiny import write_tiny_model
from rollout.data import build_prompt_source
from rollout.lines import Offer, Sender, Sent
from rollout.pool import RolloutPool
from rollout.shards import Rows
from rollout.tree import Tree

pytestmark = [pytest.mark.ray, pytest.mark.vllm]
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def cfg() -> Config:
    asynchronous = ["rollout.engine_processes=true", "rollout.num_workers=1"]
    return compose([*asynchronous, "task.on_malformed=reply", "rollout.max_turn_tokens=24", "cluster.num_cpus=2"])


@pytest.fixture(scope="module")
def model_path(cfg: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", cfg)


@pytest.fixture(scope="module")
def pool(cfg: Config, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutPool]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    running = RolloutPool(cfg, str(model_path), tmp_path_factory.mktemp("logs"))
    yield running
    children = [each for pid in running.worker_pids() for each in psutil.Process(pid).children(recursive=True)]
    assert children, "AsyncLLM has processes of its own"
    running.close()
    ray.shutdown()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == [], "closing the pool closes them"


def largest_gap(tree: Tree, model: torch.nn.Module) -> float:
    """Largest difference between a recorded log-prob and the model's own."""
    gaps = []
    for node in tree.nodes:
        context_ids = tree.path_ids(node.parent)
        with torch.no_grad():
            logits = model(torch.tensor([context_ids + node.action_ids])).logits[0, len(context_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(node.action_ids)[:, None])[:, 0]
        gaps.append((expected - torch.tensor(node.action_logprobs)).abs().max().item())
    return max(gaps)


def receive(pool: RolloutPool, weights: dict[str, torch.Tensor]) -> None:
    """Send weights over a line, in two groups."""
    sender, half = Sender(WeightPath.broadcast, 1, torch.device("cpu"), LIMIT_S), len(weights) // 2
    offer = Offer(1, 1, WeightPath.broadcast, (sender.address,), receiver=0, num_receivers=1, limit_s=LIMIT_S)
    names = list(weights)
    groups = [
        ([Rows(name, "float32", tuple(weights[name].shape), 0) for name in part], [weights[name] for name in part])
        for part in (names[:half], names[half:])
    ]
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(sender.send, 1, groups)
        pool.receive_weights(
            lambda members: dict.fromkeys(members, offer), later=lambda: published(weights), lost=pytest.fail
        )
        size = sum(each.numel() * 4 for each in weights.values())
        assert sent.result() == Sent(size, size)


@pytest.mark.parametrize("straight", [False, True])
def test_it_samples_the_model_and_follows_new_weights(cfg: Config, pool: RolloutPool, model_path: Path, straight: bool):
    prompts = build_prompt_source(cfg, AutoTokenizer.from_pretrained(model_path)).draw(0, 2)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    pool.load_weights(published(load_file(model_path / "model.safetensors"), version=0, put=ray.put))
    before = [tree for _, tree in pool.grow(prompts, 0)]
    assert max(largest_gap(tree, model) for tree in before) < 1e-4
    torch.manual_seed(0)
    weights = load_file(model_path / "model.safetensors")
    changed = {name: weight + 0.02 * torch.randn_like(weight) for name, weight in weights.items()}
    if straight:
        receive(pool, changed)
    else:
        pool.load_weights(published(changed, put=ray.put))
    after = [tree for _, tree in pool.grow(prompts, 0)]
    assert {node.version for tree in after for node in tree.nodes} == {1}
    assert max(largest_gap(tree, model) for tree in after) > 0.01, "the old weights are gone, the tied head's too"
    model.load_state_dict(changed, strict=False)
    assert max(largest_gap(tree, model) for tree in after) < 1e-4
