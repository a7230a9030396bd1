"""Scored trees on disk, with the advantage of every step: enough to look at a run, and to score it again."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import DataError
from rewards.types import Cost, Origin, Score, ScoredTree, ScoreStatus
from rollout.tree import Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason

TOTAL = "total"
"""Key of the whole advantage beside the terms it is the sum of."""

Advantages = dict[int, dict[str, float]]
"""row -> {term: its contribution, "total": the advantage}; rows that were not trained are absent."""

TermValues = dict[int, dict[str, float]]
"""row -> {term: a value of it}; absent where the term has nothing to say of the step."""


@dataclass(kw_only=True, slots=True)
class RecordedTree:
    """A scored tree and what credit made of it."""

    scored: ScoredTree
    advantages: Advantages = field(default_factory=dict)
    raw: TermValues = field(default_factory=dict)
    """What each term is made of, before it is compared; as `compared` in the mean over the trajectories."""
    compared: TermValues = field(default_factory=dict)
    """The same against its scope, before the term's weight and before the sum is whitened."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Row of a leaf -> why selection left its trajectory out (`rl.select`)."""

    @property
    def tree(self) -> Tree:
        """The tree itself."""
        return self.scored.tree

    def total(self, row: int) -> float | None:
        """The advantage of a step; None when it was not trained."""
        return self.advantages.get(row, {}).get(TOTAL)


def write_records(path: Path, recorded: list[RecordedTree]) -> None:
    """Write one step's trees as gzipped JSON lines, one tree a line; the same trees give the same bytes.

    Args:
        path: file to write, in one move.
        recorded: the trees, with every score and its status, and what credit made of them.
    Raises: DataError naming the prompt whose columns hold something that JSON cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        # no name and no time in the header: a record is compared byte for byte when a run is repeated
        with beside.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=5, fileobj=raw, mtime=0) as file:
            for each in recorded:
                file.write(_line(each))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_trees(path: Path) -> list[RecordedTree]:
    """The trees of one file, equal to those written.

    Raises: DataError naming file and line when it is cut short, damaged, or written by another version.
    """
    trees: list[RecordedTree] = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                trees.append(_recorded(json.loads(line)))
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} line {len(trees) + 1} is not a recorded tree ({type(error).__name__}: {error}): the file was cut "
            f"short or written by another version of Grove. Read another step's file, or use the version that wrote it."
        ) from error
    return trees


def _line(recorded: RecordedTree) -> bytes:
    try:
        # ASCII escapes keep even a lone surrogate in a model's output, which UTF-8 could not hold
        return (json.dumps(_encoded(recorded), separators=(",", ":")) + "\n").encode("ascii")
    except TypeError as error:
        raise DataError(
            f"prompt {recorded.tree.prompt.id} cannot be recorded ({error}): its columns must be JSON values, or the "
            f"trees could not be read back as they were. Convert that column in the data file, or record nothing with "
            f"run.record_every_steps=0."
        ) from error


def _encoded(value: Any) -> Any:
    """Records become dicts of all their fields, so that a field added later is never forgotten here."""
    if isinstance(value, Score):
        said = {"value": value.value if value.is_scored else None, "status": value.status, "reason": value.reason}
        return said | ({"parts": dict(value.parts)} if value.parts else {})
    if dataclasses.is_dataclass(value):
        return {part.name: _encoded(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    return value


def _recorded(line: dict[str, Any]) -> RecordedTree:
    scored = line["scored"]
    tree = Tree(prompt=_prompt(scored["tree"]["prompt"]), nodes=[_node(node) for node in scored["tree"]["nodes"]])
    tables = ("step_scores", "leaf_scores", "step_signals", "leaf_signals")
    return RecordedTree(
        scored=ScoredTree(
            tree=tree,
            **{name: _score_table(scored[name]) for name in tables},
            origins={source: Origin(**origin) for source, origin in scored.get("origins", {}).items()},
            costs=_costs(scored),
        ),
        # Records written before a part was added lack it.
        **{name: _by_row(line.get(name, {})) for name in ("advantages", "raw", "compared", "left_out")},
    )


def _costs(scored: dict[str, Any]) -> dict[str, Cost]:
    if "costs" in scored:
        return {source: Cost(**cost) for source, cost in scored["costs"].items()}
    return {source: Cost(seconds=seconds) for source, seconds in scored["seconds"].items()}


def _by_row(raw: dict[str, Any]) -> dict[int, Any]:
    return {int(row): value for row, value in raw.items()}


def _prompt(raw: dict[str, Any]) -> Prompt:
    return Prompt(**{**raw, "token_ids": tuple(raw["token_ids"])})


def _node(raw: dict[str, Any]) -> Node:
    facts = StepFacts(**{**raw["facts"], "kind": StepKind(raw["facts"]["kind"])})
    return Node(**{**raw, "facts": facts, "stop": StopReason(raw["stop"])})


def _score_table(raw: dict[str, dict[str, Any]]) -> dict[str, dict[int, Score]]:
    return {name: {int(row): _score(score) for row, score in by_row.items()} for name, by_row in raw.items()}


def _score(raw: dict[str, Any]) -> Score:
    # math.nan itself, as Score.failed uses it: Python then calls two unscored scores equal
    value = math.nan if raw["value"] is None else raw["value"]
    return Score(value, ScoreStatus(raw["status"]), raw["reason"], raw.get("parts", {}))
