"""Every shipped way to grow trees, on real engines with a real judge: grown, scored, given credit and trained once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conf.compose import compose
from conf.keys import group_choices
from conf.schema import Config
from rl.credited import credited
from rl.launch import Parts, launched
from rl.policy.tree_credits import tree_credits
from rl.tiny import write_tiny_model
from rollout.data import PromptSource, build_prompt_source

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

OUTCOMES = Path(__file__).with_name("signals_of_nobody.py")
CREDIT_OF = {
    "slate": "slate",
    "tree_rl": "tree_rl",
    "spo_tree": "spo_tree",
    "tree_po": "tree_po",
    "tree_rpo": "tree_rpo",
}
"""Recipes that are meant for one way of growing; GRPO for the others."""


def config(rollout: str) -> Config:
    return compose(
        [
            *("experiment=hop_search", "tracker=disabled", f"rollout={rollout}", "rollout.judge=progress"),
            *(f"credit={CREDIT_OF.get(rollout, 'grpo')}", "rewards.sources.progress.signal=judge"),
            *(
                "rollout.prompts_per_step=2",
                "rollout.num_workers=1",
                "rollout.max_turn_tokens=12",
                "rollout.max_steps=4",
            ),
            *("cluster.num_cpus=2", "task.on_malformed=reply"),
            f"rewards.sources.answer.fn={OUTCOMES}:of_trajectory",  # a policy that knows nothing is never right
        ]
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(folder, config("tree"))
    return str(folder)


@pytest.fixture(scope="module")
def parts(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with launched(config("tree"), model_path, tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture(scope="module")
def source(model_path: str) -> PromptSource:
    return build_prompt_source(config("tree"), AutoTokenizer.from_pretrained(model_path))


@pytest.mark.parametrize("rollout", group_choices()["rollout"])
def test_a_way_to_grow_trains(rollout: str, parts: Parts, source: PromptSource, tmp_path: Path):
    cfg = config(rollout)
    prompts = source.draw(0, 2)
    grown = [dict(parts.pool.grow(prompts, seed, cfg.rollout)) for seed in (1, 1)]
    for index, tree in grown[0].items():
        again = grown[1][index]
        assert [node.action_ids for node in tree.nodes] == [node.action_ids for node in again.nodes]
        assert [node.parent for node in tree.nodes] == [node.parent for node in again.nodes]
        assert tree.trained_leaves()
    scored = parts.scoring.collect(parts.scoring.submit(iter(grown[0].items())))
    found = credited(scored, cfg)
    kept = [each.tree for each in found.selection.trees]
    trees = tree_credits(kept, found.forest, found.credit, cfg.loss, cfg.rollout.max_context_tokens)
    assert parts.learner is not None
    metrics = parts.learner.answer(parts.learner.update(trees, 0), limit_s=120, what="the update")
    assert metrics["learner/trained_tokens"] > 0
    assert math.isfinite(metrics["loss/total"])
