"""`grove check` as a user types it: a task of their own passes, a reward that raises and a dead setting do not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import judge_server
import pytest
import torch
from chatml import chatml_tokenizer
from judge_server import JudgeServer
from transformers import Qwen3Config, Qwen3ForCausalLM

from rl.cli import main

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CODE = '''
def brevity(step, question):
    """Up to 1 for a step no longer than the question."""
    return min(1.0, len(question) / max(1, len(step.action_text)))


def broken(step):
    raise ValueError("the judge is out")


def double(number: int) -> str:
    """Double a number.

    Args:
        number: Any number.
    """
    return str(2 * number)
'''
QUICK = ["rollout.engine=transformers", "run.eval_prompts=1", "rollout.prompts_per_step=2", "learner.mini_batches=1"]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions, a tool, rewards and a model of a user."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(CODE)
    rows = [json.dumps({"question": f"Double {number}?", "answer": str(2 * number)}) for number in range(8)]
    (folder / "questions.jsonl").write_text("\n".join(rows))
    tokenizer = chatml_tokenizer()
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2}
    sizes |= {"head_dim": 32, "intermediate_size": 512, "max_position_embeddings": 4096, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = Qwen3Config(**sizes, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def in_the_room(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(room)


def leftovers(room: Path) -> set[str]:
    ours = {path.name for path in Path(tempfile.gettempdir()).glob("grove-check-*")}
    return ours | {path.name for path in room.iterdir()} - {"__pycache__"}


def judge(server: JudgeServer) -> list[str]:
    source = "rewards.sources.judged={fn: rewards.sources.judge:Principles, model: judge, weight: 0.1}"
    return [f"rewards.models.judge={{kind: endpoint, path: judge, url: {server.url}}}", source]


@pytest.mark.timeout(300)
def test_a_task_of_ones_own_passes_and_leaves_nothing_behind(room: Path, capsys: pytest.CaptureFixture[str]):
    before = leftovers(room)
    task = ["task=custom", "task.train.path=questions.jsonl", "task.eval.path=questions.jsonl", "model.path=model"]
    mine = ["task.tools=[mine.py:double]", "rewards=custom", "rewards.sources.brief.fn=mine.py:brevity"]
    right = "rewards.sources.right.fn=rewards.sources.outcome:exact_match"
    sizes = ["rollout.max_turn_tokens=128", "rollout.max_context_tokens=2048", "rollout.num_leaves=64"]
    with JudgeServer(judge_server.hop_search) as server:
        asked = [*judge(server), "cluster.address=ray://nowhere:1", "--json"]
        status = main(["check", *task, *mine, right, *sizes, *QUICK, *asked])
    output = capsys.readouterr()
    assert status == 0, output.err
    assert 1 <= server.num_requests <= 4  # of one tree
    assert leftovers(room) == before
    found = json.loads(output.out)
    assert found["passed"] and found["unread"] == {}
    stages = [stage["name"] for stage in found["stages"]]
    wanted = ["rewards", "model", "data", "tools", "teach", "start", "eval", "step 1: update", "step 1: checkpoint"]
    assert list(dict.fromkeys(name for name in stages if name in wanted)) == wanted  # the end is evaluated too
    details = {stage["name"]: stage["detail"] for stage in found["stages"]}
    assert "2 layers of 64" in details["model"] and details["tools"] == "double returned"
    assert details["judges"].startswith(f"{server.num_requests} requests, ")
    assert details["resume"] == "the same step, bit for bit"
    assert found["replaced"]["rollout.num_leaves"] == {"run": "64", "check": "4"}
    learner, engine = found["memory"]
    weights = sum(each.numel() for each in Qwen3ForCausalLM.from_pretrained(room / "model").parameters())
    assert learner["bytes"]["weights"] == 4 * weights  # of the real model, not of its stand-in
    assert engine["process"] == "engine" and engine["number"] == 2
    assert found["places"] == []  # of a cluster that was not asked
    assert found["tokens_per_step"]["trajectories"] == 2 * 64


@pytest.mark.timeout(300)
def test_a_reward_that_raises_is_named_with_what_it_raised(room: Path, capsys: pytest.CaptureFixture[str]):
    before = leftovers(room)
    status = main(["check", "experiment=hop_search", *QUICK, "rewards.sources.mine.fn=mine.py:broken"])
    told = capsys.readouterr().err
    assert status == 1
    assert "rewards.sources.mine failed" in told and "the judge is out" in told and "not passed" in told
    assert "Traceback" not in told and leftovers(room) == before


@pytest.mark.timeout(300)
def test_a_setting_that_does_nothing_is_refused_and_a_judge_that_talks_nonsense(
    room: Path, capsys: pytest.CaptureFixture[str]
):
    with JudgeServer(always=judge_server.GARBAGE) as server:
        nonsense = [*judge(server), "rewards.models.judge.max_retries=0"]
        status = main(["check", "experiment=hop_search", *QUICK, "rollout.num_trees=4", *nonsense])
    output = capsys.readouterr()
    assert status == 2, output.err
    assert "rollout.num_trees=4 changes nothing" in output.err
    assert "rewards.sources.judged: " in output.err and "scores of its judge failed" in output.err
    assert output.err.count("error:") == 2  # they alone
    assert "was not asked" not in output.err
    assert "rollout worker 1" in output.out and "memory of a process" in output.out
