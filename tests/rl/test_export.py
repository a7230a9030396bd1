from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import ConfigError
from rewards.drawn import parse_scored
from rewards.types import Score
from rl import completion
from rl.export import EXPORTS, pair_rows, step_rows, trajectory_rows, write_export
from rl.record import RecordedTree


def tree() -> RecordedTree:
    return RecordedTree(
        scored=parse_scored(
            "q -> (a -> (a1, a2), b -> b1)",
            steps={"a": 0.5, "b": -1.0, "a1": 1.0, "a2": Score.failed("down"), "b1": 0.0},
            outcomes={"a1": 1.0, "a2": 1.0, "b1": 0.0},
        )
    )


def test_every_step_is_a_row_with_its_scores():
    rows = list(step_rows(tree()))
    assert [row["action"] for row in rows] == ["a", "a1", "a2", "b", "b1"]
    assert [row["parent"] for row in rows] == [-1, 0, 0, -1, 3]
    assert [json.loads(row["scores"])["step"] for row in rows] == [0.5, 1.0, None, -1.0, 0.0]
    assert [json.loads(row["outcomes"])["outcome"] for row in rows] == [None, 1.0, 1.0, None, 0.0]


def test_a_trajectory_is_a_prompt_its_steps_and_their_labels():
    first, second, third = trajectory_rows(tree())
    assert first == {
        "prompt_id": "test/0",
        "prompt": "q",
        "completions": ["a", "a1"],
        "labels": [0.5, 1.0],
        "outcome": 1.0,
    }
    assert second["labels"] == [0.5, None]  # a score that failed is no label
    assert third["completions"] == ["b", "b1"]


def test_the_best_and_the_worst_of_a_fork_are_a_pair_where_they_ended_differently():
    # a came to 1 twice, b to 0; behind a both ends are equal, behind b nothing else was tried
    (pair,) = pair_rows(tree())
    assert pair == {"prompt_id": "test/0", "prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.0}


@pytest.mark.parametrize("kind", list(EXPORTS))
@pytest.mark.parametrize("ending", completion.FORMATS)
def test_what_is_written_reads_back(tmp_path: Path, kind: str, ending: str):
    path = tmp_path / f"{kind}.{ending}"
    rows = list(EXPORTS[kind](tree()))
    assert write_export(path, [tree(), tree()], kind) == 2 * len(rows)
    if ending == "jsonl":
        read = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        from pyarrow import parquet

        read = parquet.read_table(path).to_pylist()
    assert read == rows + rows
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_line_offers_what_can_be_written():
    assert tuple(EXPORTS) == completion.EXPORTS


def test_what_cannot_be_written_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match='trees cannot be written as "chat"; as steps, trajectories, pairs they can'):
        write_export(tmp_path / "a.jsonl", [], "chat")
    with pytest.raises(ConfigError, match=r"must end in \.jsonl or \.parquet"):
        write_export(tmp_path / "a.csv", [], "steps")
