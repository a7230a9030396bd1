"""Every shipped method of credit trains the embedded task for two steps: real Ray, real vLLM engines, one set of parts.

Signals that a judge or a reward model would give come from `signals_of_nobody`; what is measured (KL, critic) is real.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conf.compose import compose
from conf.keys import group_choices
from conf.schema import Config
from rl.launch import Parts, launched
from rl.metrics import read_metrics
from rl.progress import Progress
from rl.record import TOTAL, read_trees
from rl.run import Run
from rl.run_folder import open_run_folder, settings
from rl.tiny import write_tiny_model
from rl.tracker import Tracker
from rollout.data import PromptSource, build_prompt_source

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

STEPS = 2
SOURCES = Path(__file__).with_name("signals_of_nobody.py")
OF_TRAJECTORIES = ("outcome", "arena", "length")
OF_STEPS = ("step", "judge", "prm", "match", "implicit", "value", "contribution")


def config(credit: str) -> Config:
    """A method on trees that fork, in two branches of a prompt, with a critic and a reference at hand."""
    sources = [
        f"rewards.sources.{signal}={{fn: '{SOURCES}:{function}', signal: {signal}}}"
        for function, signals in (("of_trajectory", OF_TRAJECTORIES), ("of_step", OF_STEPS))
        for signal in signals
    ]
    return compose(
        [
            *("experiment=hop_search", "tracker=disabled", "rollout=tree_grpo", f"credit={credit}", *sources),
            *("rollout.prompts_per_step=3", "rollout.max_turn_tokens=24", "rollout.max_steps=4"),
            *("task.on_malformed=reply", "cluster.num_cpus=2", "run.eval_prompts=0"),
            *("loss.critic.kind=value_head", "loss.kl_coef=0.01"),
        ]
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(folder, config("grpo"))
    return str(folder)


@pytest.fixture(scope="module")
def parts(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with launched(config("gae"), model_path, tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture(scope="module")
def source(model_path: str) -> PromptSource:
    return build_prompt_source(config("grpo"), AutoTokenizer.from_pretrained(model_path))


@pytest.mark.parametrize("credit", group_choices()["credit"])
def test_a_method_trains(credit: str, parts: Parts, source: PromptSource, tmp_path: Path):
    cfg = config(credit)
    cfg = replace(cfg, run=replace(cfg.run, dir=str(tmp_path), num_steps=STEPS))
    folder = open_run_folder(tmp_path / "run", settings(cfg))
    run = Run(cfg, folder, source, parts, Progress(cfg), Tracker(cfg.tracker, folder.path, "smoke", settings(cfg)))
    run.restore()
    while run.goes_on():
        scored = run.score(run.grow(run.next_prompts()))
        found = run.assign(scored)
        run.update(scored, found)
        run.finish_step(scored, found)
    rows = read_metrics(folder.metrics)
    assert [row["weights/version"] for row in rows] == [1, 2]
    for row in rows:
        assert row["learner/trained_tokens"] > 0
        assert row["learner/grad_norm"] > 0
        assert math.isfinite(row["loss/total"])
    recorded = [tree for step in (1, 2) for tree in read_trees(folder.tree_file(step))]
    totals = [values[TOTAL] for tree in recorded for values in tree.advantages.values() if TOTAL in values]
    assert all(math.isfinite(total) for total in totals)
    assert len(set(totals)) > 2, "steps are told apart"
