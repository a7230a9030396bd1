"""A whole run on small text games: a policy from nothing, real Ray, real vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rl.record import read_trees
from rollout.types import StopReason

pytestmark = [
    *(pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)),
    pytest.mark.skipif(find_spec("textworld") is None, reason="needs the package textworld"),
]
SMALL = [
    *("experiment=textworld_small", "run.num_steps=2", "run.eval_prompts=8", "run.eval_every_steps=0"),
    *("rollout.prompts_per_step=4", "rollout.num_leaves=4", "tracker=disabled", "task.textworld.num_games=16"),
    *("model.warm_start.num_steps=60", "model.warm_start.num_demonstrations=64"),
]


def test_a_policy_made_from_nothing_plays_and_is_trained_by_progress(tmp_path: Path):
    places = [f"run.dir={tmp_path / 'run'}", f"model.warm_start.cache_dir={tmp_path / 'warm_start'}"]
    places.append(f"task.textworld.cache_dir={tmp_path / 'games'}")
    command = [sys.executable, "-m", "rl.cli", "train", *SMALL, *places]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["trained_tokens"] > 0
    games = {path.name.partition("-")[0] for path in (tmp_path / "games").iterdir()}
    assert games == {"train", "eval"}

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoints" / "step_000002" / "model")
    recorded = [
        each for step in (1, 2) for each in read_trees(tmp_path / "run" / "trees" / f"step_{step:06d}.jsonl.gz")
    ]
    facts = [node.facts for each in recorded for node in each.tree.nodes]
    assert any(each.tool_ok and each.progress == 1.0 for each in facts)  # it knows some commands, and some lead on
    assert any(each.score == 0.5 for each in facts)  # and has made a point: one of two quests
    stops = {each.tree.nodes[leaf].stop for each in recorded for leaf in each.tree.leaves()}
    assert stops <= {StopReason.answered, StopReason.max_steps, StopReason.malformed, StopReason.turn_tokens}
    for each in recorded:
        for leaf in each.tree.trained_leaves():
            said = [each.tree.prompt.question]
            for row in each.tree.path(leaf):
                said += [each.tree.nodes[row].action_text, each.tree.nodes[row].observation_text]
            # words are tokens here, so the text can be encoded again to check the ids
            assert tokenizer(" ".join(filter(None, said[:-1]))).input_ids == each.tree.path_ids(leaf)
