"""A user's own data, model, tools and rewards, by configuration alone, through the whole loop; and what breaks it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from chatml import chatml_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM
from whole_runs import WARM_START

from conf.compose import compose
from rl.record import read_trees
from rl.warm_start import warm_started_model
from rollout.envs.hop_search import HopSearchRows

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUICK = [
    "run.num_steps=2",
    "run.eval_prompts=4",
    "rollout.prompts_per_step=4",
    "rollout.num_leaves=4",
    "tracker=disabled",
]
PORTABLE = ["rollout.engine=transformers", "rollout.num_workers=1", "run.eval_every_steps=0"]
TINY_TASK = ["experiment=hop_search", *WARM_START]

REWARDS = '''
def brevity(step, question):
    """Up to 1 for a step no longer than the question."""
    return min(1.0, len(question) / max(1, len(step.action_text)))


def broken(step):
    raise ValueError("the judge is out")
'''

TOOLS = '''
from rollout.envs import hop_search


def office(relation: str, person: str, *, world: str) -> str:
    """Ask the office.

    Args:
        relation: what is asked for
        person: of whom
    """
    raise ZeroDivisionError("the tool has a bug")


school, family, clinic = hop_search.school, hop_search.family, hop_search.clinic
'''


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("custom")
    (folder / "my_rewards.py").write_text(REWARDS)
    (folder / "my_tools.py").write_text(TOOLS)
    return folder


@pytest.fixture(scope="module")
def model(room: Path) -> Path:
    """An untrained Qwen3 over bytes with a ChatML template and Hermes calls."""
    tokenizer = chatml_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 32, "intermediate_size": 128, "max_position_embeddings": 4096, "vocab_size": len(tokenizer)}
    config = Qwen3Config(**sizes, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
    Qwen3ForCausalLM(config).save_pretrained(room / "model")
    tokenizer.save_pretrained(room / "model")
    return room / "model"


def grove(room: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rl.cli", "train", *overrides, f"run.dir={room / name}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=room)


def leftovers(room: Path) -> list[str]:
    """Command lines of processes that still name this test's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(room) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


@pytest.mark.vllm
def test_gsm8k_runs_on_a_users_files_and_model(room: Path, model: Path, shared_data: Path):
    data = shared_data / "gsm8k"
    files = [
        f"task.train.path={data / 'train.jsonl'}",
        f"task.eval.path={data / 'test.jsonl'}",
        "task.train.max_rows=50",
    ]
    sizes = ["rollout.max_turn_tokens=24", "rollout.max_context_tokens=2048", "model.dtype=float32"]
    done = grove(
        room, "gsm8k", "experiment=gsm8k", f"model.path={model}", *files, *sizes, *QUICK, "rollout.max_steps=3"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    trees = [recorded.tree for recorded in read_trees(room / "gsm8k" / "trees" / "step_000001.jsonl.gz")]
    assert all(tree.prompt.answer.replace("-", "").isdigit() for tree in trees)
    assert '"name": "calculator"' in chatml_tokenizer().decode(trees[0].prompt.token_ids)


def test_a_users_reward_file_is_trained_and_recorded(room: Path):
    mine = "rewards.sources.mine={fn: my_rewards.py:brevity, weight: 0.2}"
    done = grove(room, "mine", *TINY_TASK, *QUICK, *PORTABLE, mine)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    recorded = read_trees(room / "mine" / "trees" / "step_000002.jsonl.gz")[0]
    scores, progress = recorded.scored.step_scores["mine"], recorded.scored.step_scores["progress"]
    for row, signal in recorded.scored.step_signals["step"].items():
        assert signal.value == pytest.approx(0.2 * scores[row].value + 1.0 * progress[row].value)
    rows = [json.loads(line) for line in (room / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert any("reward/mine_mean" in row for row in rows)


def test_a_reward_that_raises_stops_the_run_and_says_which(room: Path):
    done = grove(room, "broken", *TINY_TASK, *QUICK, *PORTABLE, "rewards.sources.mine.fn=my_rewards.py:broken")
    assert done.returncode == 1
    assert "rewards.sources.mine failed" in done.stderr and "the judge is out" in done.stderr
    assert "Traceback" not in done.stderr
    assert leftovers(room) == []


@pytest.fixture(scope="module")
def tiny_task(room: Path) -> list[str]:
    """Hop search as a user would bring it: questions in a file, tools in another, a model in a folder."""
    cfg = compose(TINY_TASK)
    model = warm_started_model(cfg)
    rows = HopSearchRows(cfg.task.hop_search, seed=0, split="train")
    (room / "questions.jsonl").write_text("".join(json.dumps(rows.row(index)) + "\n" for index in range(20)))
    path = room / "questions.jsonl"
    task = ["task=custom", f"task.train.path={path}", f"task.eval.path={path}", "task.tool_format=words"]
    return [*task, "task.on_malformed=end", "task.columns.max_calls=max_calls", f"model.path={model}"]


def test_a_tool_that_raises_stops_the_run_and_says_which(room: Path, tiny_task: list[str]):
    tools = "task.tools=[my_tools.py:office,my_tools.py:school,my_tools.py:family,my_tools.py:clinic]"
    done = grove(room, "crash", *tiny_task, *QUICK, *PORTABLE, tools)
    assert done.returncode == 1, done.stderr
    assert 'tool "office" crashed' in done.stderr and "the tool has a bug" in done.stderr
    assert leftovers(room) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=no/such/folder"], "no/such/folder"),
        (["rollout.num_workrs=3"], "rollout.num_workers"),
        (["rollout.num_workers=9999"], "9999"),
        (["rewards.sources.mine.fn=my_rewards.py:missing"], "missing"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(room: Path, overrides: list[str], message: str):
    done = grove(room, "refused", "experiment=hop_search", *overrides)
    assert done.returncode == 2 and message in done.stderr
    assert not (room / "refused").exists()
    assert leftovers(room) == []


def test_a_broken_line_of_data_is_named_before_any_engine_starts(room: Path, model: Path):
    (room / "broken.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"question": \n')
    files = [f"task.train.path={room / 'broken.jsonl'}", f"task.eval.path={room / 'broken.jsonl'}"]
    done = grove(room, "data", "experiment=gsm8k", f"model.path={model}", *files)
    assert done.returncode != 0 and "broken.jsonl" in done.stderr and "line 2" in done.stderr
    assert not (room / "data" / "logs" / "learner.log").exists()
    assert leftovers(room) == []
