"""Trees of batches that grow ahead, in a checkpoint: those that have grown are kept, the others grow again by seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rewards.types import ScoredTree
from rl.record import RecordedTree, read_trees, write_records
from rollout.tree import Tree
from rollout.types import Prompt

AHEAD = "ahead"
"""Folder of these trees inside a checkpoint."""
BATCHES = "batches.json"


@dataclass(kw_only=True, slots=True)
class Kept:
    """What there is of one batch; every index is that of a prompt."""

    step: int
    """That the batch is trained at."""
    trees: dict[int, Tree] = field(default_factory=dict)
    """Grown, and not scored yet."""
    scored: dict[int, ScoredTree] = field(default_factory=dict)

    def fitting(self, prompts: Sequence[Prompt], max_staleness: int) -> Kept:
        """Those that grew from these prompts, under weights no older than allowed at the batch's step."""

        def fits(index: int, tree: Tree) -> bool:
            same = index < len(prompts) and tree.prompt.token_ids == prompts[index].token_ids
            return same and all(self.step - node.version <= max_staleness for node in tree.nodes)

        return Kept(
            step=self.step,
            trees={index: tree for index, tree in self.trees.items() if fits(index, tree)},
            scored={index: each for index, each in self.scored.items() if fits(index, each.tree)},
        )


def write_kept(folder: Path, batches: Iterable[Kept]) -> None:
    """Write batches into a checkpoint; nothing where there are none.

    Raises: DataError naming the prompt whose columns hold something that JSON cannot.
    """
    listed = []
    for batch in batches:
        lines = [(index, RecordedTree(scored=ScoredTree(tree=tree))) for index, tree in batch.trees.items()]
        lines += [(index, RecordedTree(scored=scored)) for index, scored in batch.scored.items()]
        write_records(folder / AHEAD / _file(batch.step), [each for _, each in lines])
        indices = [index for index, _ in lines]
        listed.append({"step": batch.step, "indices": indices, "num_unscored": len(batch.trees)})
    if listed:
        (folder / AHEAD / BATCHES).write_text(json.dumps(listed), encoding="utf-8")


def read_kept(folder: Path) -> list[Kept]:
    """The batches that `write_kept` wrote; [] where it wrote none.

    Raises: DataError for a damaged file.
    """
    listed = folder / AHEAD / BATCHES
    if not listed.is_file():
        return []
    batches = []
    for row in json.loads(listed.read_text(encoding="utf-8")):
        trees = read_trees(folder / AHEAD / _file(row["step"]))
        found, unscored = list(zip(row["indices"], trees, strict=True)), row["num_unscored"]
        batches.append(
            Kept(
                step=row["step"],
                trees={index: each.tree for index, each in found[:unscored]},
                scored={index: each.scored for index, each in found[unscored:]},
            )
        )
    return batches


def _file(step: int) -> str:
    return f"step_{step:06d}.jsonl.gz"
