"""Whole runs with models that judge: one that learns beside the policy, a judge at an endpoint that breaks, a process
reward model in an actor, values by rollouts; and a stranger's reward in train, eval and replay."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import judge_server
import pytest
import tiny_prms
import torch
from judge_server import JudgeServer
from safetensors.torch import load_file
from whole_runs import WARM_START
from whole_runs import steady_metrics as metrics

from rewards.types import ScoreStatus
from rl.outcomes import Sample, read_outcomes
from rl.record import RecordedTree, read_trees
from rollout.tree import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = [
    "run.eval_prompts=16",
    "run.eval_every_steps=0",
    "run.checkpoint_every_steps=2",
    "rollout.prompts_per_step=4",
    "rollout.num_leaves=4",
    "rollout.num_workers=1",
    "tracker=disabled",
    *WARM_START,
]
STRANGER = """
def rarer(step, siblings, relations):
    \"\"\"Pays what the siblings did not try, the more the longer the chain.\"\"\"
    same = sum(step.action_text == sibling.action_text for sibling in siblings)
    return (1.0 - same / max(1, len(siblings))) * len(relations)
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def grove(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rl.cli", *arguments], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def refused(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rl.cli", *arguments], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 2, done.stdout[-2000:]
    return done.stderr


def train(room: Path, name: str, *overrides: str) -> Path:
    grove("train", *overrides, *SMALL, f"run.dir={room / name}")
    return room / name


def recorded(folder: Path, step: int) -> list[RecordedTree]:
    return read_trees(folder / "trees" / f"step_{step:06d}.jsonl.gz")


def samples_of(outcomes: Path) -> list[Sample]:
    return [sample for outcome in read_outcomes(outcomes) for sample in outcome.samples]


def prm_weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "prm" / "rank0.safetensors")


def test_primes_reward_model_learns_beside_the_policy_and_resumes_to_the_last_bit(room: Path):
    prime = ("experiment=hop_search_prime", "select=none")
    whole = train(room, "prime", *prime, "run.num_steps=4")
    halves = shutil.copytree(whole, room / "halves")
    shutil.rmtree(halves / "checkpoints" / "step_000004")  # as if it had been killed before it wrote that
    train(room, "halves", *prime, "run.num_steps=4", "run.resume=true")
    rows = [row for row in metrics(whole) if "prm/loss" in row]
    assert len(rows) == 4
    assert rows[0]["reward/implicit_mean"] == 0.0  # before the first update it is its own reference
    assert all(row["reward/implicit_mean"] != 0 and row["prm/drift"] > 0 for row in rows[1:])
    assert metrics(halves)[-2:] == metrics(whole)[-2:]
    first, last = prm_weights(whole, 2), prm_weights(whole, 4)
    assert any(not torch.equal(first[name], last[name]) for name in first if name.startswith("weights/"))
    for name, value in last.items():
        assert torch.equal(value, prm_weights(halves, 4)[name]), name
    (tree, *_) = recorded(whole, 4)
    assert tree.scored.origins["implicit"].version == "3"  # it had learnt from three batches


def test_a_model_of_progress_feeds_the_critics_rewards(room: Path, tmp_path: Path):
    file = tmp_path / "outcome.py"
    file.write_text("def brief(trajectory): return 1 / len(trajectory)")  # the barely trained policy is never right
    spa = ("experiment=hop_search_ppo", "credit=spa_rl", "prm=progress", "run.num_steps=2")
    chosen = ("run.eval_samples=2", "run.eval_score=contribution")
    taught = ("prm.head_learning_rate=1e-3", f"rewards.sources.answer.fn={file}:brief")
    folder = train(room, "progress", *spa, *taught, *chosen)
    _, second = [row for row in metrics(folder) if "prm/loss" in row]
    assert second["reward/contribution_mean"] != 0
    assert second["prm/loss"] < 1
    assert metrics(folder)[-1].keys() >= {"eval/best_of_2_share", "eval/weighted_vote_share"}
    samples = samples_of(folder / "eval" / "step_000002.jsonl")
    assert len(samples) == 16 * 2 and all(None not in sample.step_scores["contribution"] for sample in samples)
    grove("eval", str(folder))  # by itself it has the model as the checkpoint has it
    alone = samples_of(folder / "eval" / "alone_000002.jsonl")
    assert [sample.answer for sample in alone] == [sample.answer for sample in samples]
    for mine, its in zip(alone, samples, strict=True):
        assert mine.step_scores["contribution"] == pytest.approx(its.step_scores["contribution"], abs=1e-5)
    only_policy = str(folder / "checkpoints" / "step_000002" / "model")
    assert "holds a policy alone" in refused("eval", only_policy, *spa, *taught, *chosen)


def test_judges_models_and_rollouts_score_one_run_that_a_breaking_endpoint_does_not_stop(room: Path, tmp_path: Path):
    file = tmp_path / "stranger.py"
    file.write_text(STRANGER)
    prm = tiny_prms.write_token_classifier(tmp_path / "prm")
    # Every fifth request breaks, each time otherwise; what is asked again is answered.
    broken = [judge_server.status(500), judge_server.status(429), judge_server.GARBAGE, judge_server.HALF_A_JSON]
    faults = [broken[number // 5 % 4] if number % 5 == 0 else None for number in range(200)]
    with JudgeServer(judge_server.hop_search, faults=faults) as server:
        folder = train(
            room,
            "judged",
            *("experiment=hop_search_ppr", f"rewards.models.judge.url={server.url}", "run.num_steps=2"),
            *(f"rewards.models.prm={{kind: transformers, path: {prm}, family: trl_prm}}",),
            "rewards.sources.prm={fn: rewards.sources.prm:StepScores, model: prm, weight: 0.0}",
            "rewards.sources.value={fn: rewards.sources.rollouts:Value, args: {grader: answer, num: 2}, weight: 0.0}",
            f"rewards.sources.rarer={{fn: {file}:rarer, weight: 0.0}}",
        )
        asked = server.num_requests
        grove("eval", str(folder), "rollout.engine=transformers")
        assert server.num_requests == asked  # held-out success asks no judge
    last = metrics(folder)[-2]
    assert (
        last["reward/judge_failed_share"] == last["reward/value_failed_share"] == last["reward/prm_failed_share"] == 0
    )
    assert last["reward/judge_tokens"] > 0
    assert last["reward/value_generated_tokens"] > 0
    assert sum(row.get("reward/judge_retries", 0) for row in metrics(folder)) > 0
    summary = json.loads((folder / "summary.json").read_text())
    grown = sum(row.get("rollout/generated_tokens", 0) for row in metrics(folder))
    measured = sum(row.get("reward/value_generated_tokens", 0) for row in metrics(folder))
    assert summary["generated_tokens"] == grown + measured
    for each in recorded(folder, 2):
        steps = {row for leaf in each.tree.trained_leaves() for row in each.tree.path(leaf)}
        assert set(each.scored.step_scores["rarer"]) == steps
        assert set(each.scored.step_scores["value"]) == {ROOT, *steps}
        assert all(0 <= score.value <= 1 for score in each.scored.step_scores["prm"].values())
        statuses = {score.status for score in each.scored.step_scores["judge"].values()}
        assert statuses <= {ScoreStatus.scored, ScoreStatus.not_applicable}
        assert each.scored.origins["judge"].prompt_hash and each.scored.origins["judge"].model.startswith("judge at ")
    assert (folder / "reward_cache.sqlite").is_file()
    # what was only recorded can be paid for afterwards, and a term finds nothing to read until it is
    assert 'names "step", which no tree of the batch has' in refused("replay", str(folder), "credit=tree_step")
    grove("replay", str(folder), "rewards.sources.rarer.weight=0.5", "credit=tree_step")
