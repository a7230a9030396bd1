"""`grove rollout`: trees without training, real Ray and vLLM; what is stopped half-way goes on to the same trees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from whole_runs import WARM_START

from rl.record import read_trees

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = [
    "experiment=hop_search",
    "rollout.prompts_per_step=3",
    "rollout.num_leaves=4",
    "rollout.num_workers=1",
    *WARM_START,
]


def grove(room: Path, out: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rl.cli", "rollout", str(room / out), *arguments, *SMALL]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def trees(folder: Path) -> list:
    return [each for path in sorted((folder / "trees").iterdir()) for each in read_trees(path)]


def test_trees_are_recorded_exported_and_the_same_when_it_was_stopped_half_way(tmp_path: Path):
    whole = grove(
        tmp_path, "whole", "--prompts", "7", *(f"--export={kind}" for kind in ("steps", "trajectories", "pairs"))
    )
    assert whole.returncode == 0, whole.stderr[-4000:]
    assert [path.name for path in sorted((tmp_path / "whole" / "trees").iterdir())] == [
        f"step_{number:06d}.jsonl.gz" for number in (1, 2, 3)
    ]
    (tmp_path / "whole" / "trees" / "step_000002.jsonl.gz").rename(tmp_path / "second")  # as if it had been stopped
    again = grove(tmp_path, "whole", "--prompts", "7", "--export", "trajectories", "--format", "parquet")
    assert again.returncode == 0, again.stderr[-4000:]
    lost = read_trees(tmp_path / "second")
    grown = read_trees(tmp_path / "whole" / "trees" / "step_000002.jsonl.gz")
    tokens = [[[node.action_ids for node in each.tree.nodes] for each in batch] for batch in (lost, grown)]
    assert tokens[0] == tokens[1]
    found = trees(tmp_path / "whole")
    assert len({each.tree.prompt.id for each in found}) == len(found) == 7
    assert all(each.scored.step_scores["progress"] for each in found)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["trajectories"] == sum(len(each.tree.trained_leaves()) for each in found)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "trajectories.jsonl").read_text().splitlines()]
    assert len(rows) == summary["trajectories"]
    assert all(len(row["completions"]) == len(row["labels"]) for row in rows)
    assert (tmp_path / "whole" / "trajectories.parquet").is_file()
    other = grove(tmp_path, "whole", "--prompts", "7", "rollout.temperature=0.5")
    assert other.returncode == 2
    assert "holds trees that were grown with other settings (rollout)" in other.stderr
    assert yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["rollout"]["temperature"] == 1.0
