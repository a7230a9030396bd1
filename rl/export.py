"""Recorded trees as data to train other models on: steps, trajectories with labels, and pairs. Pure, row by row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from rewards.types import Score, ScoredTree
from rl.completion import FORMATS
from rl.record import RecordedTree
from rl.select import outcome
from rollout.tree import ROOT, Tree

Row = dict[str, Any]


def step_rows(recorded: RecordedTree) -> Iterator[Row]:
    """One row for each step of a tree, with every score it got; null where a source gave no number."""
    tree, scored = recorded.tree, recorded.scored
    for row, node in enumerate(tree.nodes):
        yield {
            "prompt_id": tree.prompt.id,
            "question": tree.prompt.question,
            "reference": tree.prompt.answer,
            "row": row,
            "parent": node.parent,
            "depth": tree.depth(row),
            "action": node.action_text,
            "observation": node.observation_text,
            "num_tokens": len(node.action_ids),
            "stop": str(node.stop),
            "kept": node.kept,
            "version": node.version,
            "scores": json.dumps({name: _number(scores.get(row)) for name, scores in scored.step_scores.items()}),
            "outcomes": json.dumps({name: _number(scores.get(row)) for name, scores in scored.leaf_scores.items()}),
        }


def trajectory_rows(recorded: RecordedTree) -> Iterator[Row]:
    """One row for each trajectory, as a process reward model is trained on: a prompt, its steps, a label of each.

    `labels` are the first step source's scores, null where it gave none; `outcome` is the first trajectory source's.
    """
    tree, scored = recorded.tree, recorded.scored
    labels = next(iter(scored.step_scores.values()), {})
    for leaf in tree.trained_leaves():
        path = tree.path(leaf)
        yield {
            "prompt_id": tree.prompt.id,
            "prompt": tree.prompt.question,
            "completions": [_said(tree, row) for row in path],
            "labels": [_number(labels.get(row)) for row in path],
            "outcome": outcome(scored, leaf),
        }


def pair_rows(recorded: RecordedTree) -> Iterator[Row]:
    """Steps that were tried at one fork and came to different ends: what preferences are learned from.

    The worth of a step is the mean outcome of the trajectories through it; of each fork the best and the worst step are
    a pair, `margin` apart, behind the conversation so far.
    """
    tree = recorded.tree
    worth = _mean_outcomes(recorded.scored)
    for parent in [ROOT, *range(len(tree.nodes))]:
        tried = [row for row in tree.children(parent) if row in worth]
        if len(tried) < 2:
            continue
        best, worst = max(tried, key=worth.__getitem__), min(tried, key=worth.__getitem__)
        if worth[best] > worth[worst]:
            yield {
                "prompt_id": tree.prompt.id,
                "prompt": "\n".join([tree.prompt.question, *(_said(tree, row) for row in tree.path(parent))]),
                "chosen": tree.nodes[best].action_text,
                "rejected": tree.nodes[worst].action_text,
                "margin": worth[best] - worth[worst],
            }


EXPORTS: dict[str, Callable[[RecordedTree], Iterator[Row]]] = {
    "steps": step_rows,
    "trajectories": trajectory_rows,
    "pairs": pair_rows,
}
"""What recorded trees can be written as."""


def write_export(path: Path, recorded: Iterable[RecordedTree], kind: str) -> int:
    """Write trees as `kind`, in one move; JSON lines or Parquet by the file's ending.

    Returns: number of rows.
    Raises: ConfigError for an unknown kind or ending.
    """
    if kind not in EXPORTS:
        raise ConfigError(f'trees cannot be written as "{kind}"; as {", ".join(EXPORTS)} they can.')
    ending = path.suffix.removeprefix(".")
    if ending not in FORMATS:
        raise ConfigError(f'"{path}" must end in {" or ".join(f".{each}" for each in FORMATS)}.')
    rows = [row for each in recorded for row in EXPORTS[kind](each)]
    beside = path.with_name(path.name + ".tmp")
    if ending == "jsonl":
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), beside)
    beside.replace(path)
    return len(rows)


def _mean_outcomes(scored: ScoredTree) -> dict[int, float]:
    """Row -> mean outcome of the trajectories through it, of those that have one."""
    ends: dict[int, list[float]] = {}
    for leaf in scored.tree.trained_leaves():
        value = outcome(scored, leaf)
        if value is not None:
            for row in scored.tree.path(leaf):
                ends.setdefault(row, []).append(value)
    return {row: sum(values) / len(values) for row, values in ends.items()}


def _said(tree: Tree, row: int) -> str:
    node = tree.nodes[row]
    return "\n".join(filter(None, (node.action_text, node.observation_text)))


def _number(score: Score | None) -> float | None:
    return score.value if score is not None and score.is_scored else None
