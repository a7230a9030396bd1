"""Whole runs by the command a user types: real Ray, real vLLM, the embedded task."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_runs import WARM_START, WARM_STARTS
from whole_runs import steady_metrics as metrics

from rl.outcomes import read_outcomes
from rl.record import read_trees

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

SMALL = [
    "experiment=hop_search",
    "run.eval_prompts=16",
    "run.eval_samples=2",
    "run.eval_every_steps=5",
    "run.checkpoint_every_steps=5",
    "rollout.prompts_per_step=4",
    *WARM_START,
]
STEPS, HALF = 10, 5


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def command(room: Path, name: str, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "rl.cli", "train", *SMALL, f"run.dir={room / name}", *overrides]


def train(room: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(room, name, *overrides), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def whole(room: Path) -> Path:
    seen = [f"tracker.metrics_file={room / 'grove.prom'}", "run.profile_steps=[2]"]
    train(room, "whole", f"run.num_steps={STEPS}", *seen)
    return room / "whole"


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, moments and generators."""
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "training" / "rank0.safetensors")


@pytest.mark.timeout(600)
def test_a_run_leaves_everything_a_reader_needs(whole: Path):
    files = {"config.yaml", "metrics.jsonl", "curve.png", "report.html", "summary.json"}
    assert {each.name for each in whole.iterdir()} >= files | {"trees", "checkpoints", "logs", "wandb"}
    summary = json.loads((whole / "summary.json").read_text())
    for key in ("success_before", "success_after", "generated_tokens", "trained_tokens", "seconds", "versions"):
        assert summary[key] is not None, key
    assert set(summary["stage_seconds"]) >= {"grow", "score", "credit", "update", "publish", "eval", "checkpoint"}
    assert {"foreseen", "measured"} <= set(summary["cost_per_tree"]), (
        "what trees were foreseen to cost, and what they did"
    )
    assert "growing with" in json.loads((whole / "plan.json").read_text())["text"]
    assert summary["steps"] == STEPS and 0 < summary["trained_tokens"] <= summary["generated_tokens"]


def test_each_held_out_sample_is_kept_beside_the_metrics_made_of_them(whole: Path):
    rows = {row["step"]: row for row in metrics(whole) if "eval/success_share" in row}
    assert list(rows) == [0, HALF, STEPS]
    for step, row in rows.items():
        outcomes = read_outcomes(whole / "eval" / f"step_{step:06d}.jsonl")
        assert len(outcomes) == 16 and all(len(each.samples) == 2 for each in outcomes)
        # pass@1 is the mean of the prompts' shares, pass@2 the share of prompts with one right, pass^2 with both
        shares = [each.success_share for each in outcomes]
        assert row["eval/success_share"] == pytest.approx(sum(shares) / 16)
        assert row["eval/pass_at_2_share"] == pytest.approx(sum(share > 0 for share in shares) / 16)
        assert row["eval/pass_all_2_share"] == pytest.approx(sum(share == 1 for share in shares) / 16)


def test_who_had_nothing_to_do_is_measured_and_shown(whole: Path, room: Path):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "time/step_seconds" in row]
    for part in ("rollout", "engine", "reward", "learner", "driver"):
        shares = [row[f"time/{part}_idle_share"] for row in trained if f"time/{part}_idle_share" in row]
        assert shares and all(0 <= share <= 1 for share in shares), part
    for row in (row for row in trained if {"time/engine_idle_share", "time/learner_idle_share"} <= row.keys()):
        assert row["time/engine_idle_share"] >= row["time/rollout_idle_share"] - 1e-3
        # in a synchronous step the engines rest while the learner works
        assert row["time/engine_idle_share"] + row["time/learner_idle_share"] > 0.9
    assert "rollout workers" in (whole / "report.html").read_text()
    assert f"grove_steps_total {STEPS}.0" in (room / "grove.prom").read_text()


def test_a_profiled_step_leaves_traces_of_learner_driver_and_ray(whole: Path):
    folder = whole / "profile"
    names = {"driver_step_000002.json", "learner_rank0_step_000002.json.gz", "ray_until_step_000002.json"}
    assert {path.name for path in folder.iterdir()} == names
    with gzip.open(folder / "learner_rank0_step_000002.json.gz", "rt") as file:
        assert any(str(event.get("name")).startswith("aten::") for event in json.load(file)["traceEvents"])
    stages = json.loads((folder / "driver_step_000002.json").read_text())["traceEvents"]
    assert {event["name"] for event in stages} >= {"grow", "score", "credit", "update", "publish"}
    did = {event["name"] for event in json.loads((folder / "ray_until_step_000002.json").read_text())}
    assert any("grow" in name for name in did) and any("update" in name for name in did), did


@pytest.mark.timeout(300)
def test_eval_measures_a_run_by_itself(whole: Path, room: Path):
    words = ["eval", str(whole), "--prompts", "6", "--samples", "4", "--score", "progress", "--json"]
    quick = ["rollout.engine=transformers", "rollout.num_workers=1"]
    before = (whole / "eval" / f"step_{STEPS:06d}.jsonl").read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "rl.cli", *words, *quick], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert (found["prompts"], found["samples"]) == (6, 24)
    assert found["estimates"].keys() >= {"success", "pass_at_2", "pass_all_4", "best_of_4"}
    outcomes = read_outcomes(whole / "eval" / f"alone_{STEPS:06d}.jsonl")
    assert found["success_share"] == pytest.approx(sum(each.success_share for each in outcomes) / 6)
    assert (whole / "eval" / f"step_{STEPS:06d}.jsonl").read_bytes() == before, "the run's own record stays"


def test_recorded_trees_hold_the_path_law_the_versions_and_the_credit(whole: Path):
    tokenizer = AutoTokenizer.from_pretrained(whole / "checkpoints" / f"step_{STEPS:06d}" / "model")
    for step in range(1, STEPS + 1):
        for recorded in read_trees(whole / "trees" / f"step_{step:06d}.jsonl.gz"):
            tree = recorded.tree
            assert {node.version for node in tree.nodes} == {step - 1}
            for leaf in tree.trained_leaves():
                shown = [tree.prompt.question]
                for row in tree.path(leaf):
                    shown += [tree.nodes[row].action_text, tree.nodes[row].observation_text]
                    assert recorded.total(row) is not None
                # words are tokens here, so the text can be encoded again to check the ids
                assert tokenizer(" ".join(filter(None, shown[:-1]))).input_ids == tree.path_ids(leaf)


def test_the_checkpoint_is_an_ordinary_model_folder(whole: Path):
    model = AutoModelForCausalLM.from_pretrained(whole / "checkpoints" / f"step_{STEPS:06d}" / "model")
    assert model.config.architectures == ["Qwen3ForCausalLM"]


@pytest.mark.timeout(300)
def test_what_is_exported_loads_in_transformers_and_vllm_samples_from_it(whole: Path, room: Path):
    out = room / "searcher"
    places = ["experiment=hop_search", "run.eval_prompts=2", "rollout.num_workers=1"]
    for words in (["export", str(whole), str(out), "--best"], ["eval", str(out), *places]):
        done = subprocess.run(
            [sys.executable, "-m", "rl.cli", *words], capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
    assert "success, pass@1" in done.stdout
    AutoModelForCausalLM.from_pretrained(out)
    said = "".join(path.read_text() for path in out.iterdir() if path.suffix != ".safetensors")
    assert str(room) not in said and "hop_search, held out" in said


def test_no_key_is_written_to_disk(whole: Path):
    text = (whole / "config.yaml").read_text()
    assert "API_KEY" not in text and os.environ.get("HOME", "?") + "/.netrc" not in text


@pytest.mark.timeout(600)
def test_a_resumed_run_equals_the_undisturbed_one_to_the_last_bit(whole: Path, room: Path):
    # Seeds name their place: one worker grows what two grew.
    alone = ["rollout.num_workers=1", "tracker=disabled"]
    train(room, "halves", f"run.num_steps={HALF}", *alone)
    train(room, "halves", f"run.num_steps={STEPS}", "run.resume=true", *alone)
    assert metrics(room / "halves") == metrics(whole)
    halves = state(room / "halves", STEPS)
    for name, value in state(whole, STEPS).items():
        assert torch.equal(value, halves[name]), name
    with (
        gzip.open(whole / "trees" / "step_000008.jsonl.gz") as a,
        gzip.open(room / "halves" / "trees" / "step_000008.jsonl.gz") as b,
    ):
        assert (
            json.loads(a.readline())["scored"]["tree"]["prompt"] == json.loads(b.readline())["scored"]["tree"]["prompt"]
        )


@pytest.mark.timeout(600)
def test_ctrl_c_leaves_a_checkpoint_that_resumes_and_no_process(room: Path):
    little = ["run.checkpoint_every_steps=0", "run.eval_every_steps=0", "rollout.num_workers=1"]
    process = subprocess.Popen(
        command(room, "stopped", "run.num_steps=500", *little),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    log = room / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130, output[-3000:]
    assert "saved step" in output and "run.resume=true" in output
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
    (stored,) = (room / "stopped" / "checkpoints").iterdir()
    step = int(stored.name.removeprefix("step_"))
    train(room, "stopped", f"run.num_steps={step + 1}", "run.resume=true", "rollout.engine=transformers", *little)
    assert json.loads((room / "stopped" / "summary.json").read_text())["steps"] == step + 1


PORTABLE = "rollout.engine=transformers"
PPO = [
    *("loss=ppo", "credit=gae", "credit.gae.signals.step.scale=1", "rollout=chains", "loss.critic.kind=model"),
    PORTABLE,
]
ADAPTERS = ["model.lora.rank=4", "learner.num_processes=2", "learner.num_threads=1", "loss=dapo", "learner.epochs=2"]
KL_IN_REWARD = [
    *("loss=rloo", "credit.terms.trajectory.signals.path_kl.scale=-0.05", "learner.layout=depth_first"),
    PORTABLE,
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "choice",
    [PPO, ADAPTERS, KL_IN_REWARD],
    ids=["critic", "adapters on two ranks", "kl in reward"],
)
def test_a_run_trains_by_other_losses_layouts_and_ranks(room: Path, whole: Path, choice: list[str]):
    name = choice[0].replace("=", "_")
    train(room, name, "run.num_steps=2", "run.eval_every_steps=0", "rollout.num_workers=1", "tracker=disabled", *choice)
    rows = metrics(room / name)
    trained = [row for row in rows if "loss/total" in row]
    assert len(trained) == 2
    # the engines follow: what they sampled, and what they say after the update, is what the learner says
    assert all(row["loss/logprob_gap_nats"] < 1e-3 and row["weights/canary_gap_nats"] < 1e-3 for row in trained)
    assert "the policy trains by layout" in (room / name / "logs" / "learner.log").read_text()
    before, after = (load_file(path) for path in (started_from(), room / name / MODEL_OF_STEP_2))
    assert any(not torch.equal(before[name], after[name]) for name in before)


MODEL_OF_STEP_2 = Path("checkpoints") / "step_000002" / "model" / "model.safetensors"


def started_from() -> Path:
    (model,) = WARM_STARTS.glob("**/model.safetensors")
    return model
