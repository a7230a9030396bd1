"""What became of each sample of each held-out prompt: made from scored trees, kept in the run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import DataError
from rewards.types import Score, ScoredTree, ScoreStatus
from rollout.types import WORLD_FAILED


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One trajectory of a held-out prompt."""

    success: bool | None
    """Whether the first trajectory source gave more than a half; None where nobody knows, which is no failure."""
    unknown: str = ""
    """Why nobody knows: how the world failed, or why the score did."""
    answer: str | None = None
    """The final answer's text; None where the trajectory gave none."""
    tokens: int = 0
    """Tokens the policy sampled on it."""
    turns: int = 0
    stop: str = ""
    """Why it ended (`rollout.types.StopReason`)."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """Source of trajectories -> its score; None where it has none."""
    step_scores: dict[str, list[float | None]] = field(default_factory=dict)
    """Source of steps -> its score of each step that it has something to say of, in order; None where it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptOutcome:
    """One held-out prompt and what its samples came to."""

    prompt: str
    """`Prompt.id`: the same prompt has the same id in every run of a task."""
    reference: str
    samples: list[Sample]

    @property
    def known(self) -> list[Sample]:
        """Samples whose success is known."""
        return [sample for sample in self.samples if sample.success is not None]

    @property
    def success_share(self) -> float:
        """Share of the known samples that succeeded; NaN where none is known."""
        known = self.known
        return sum(bool(sample.success) for sample in known) / len(known) if known else math.nan


def prompt_outcomes(scored: Iterable[ScoredTree]) -> list[PromptOutcome]:
    """One row for each tree, with a sample for each trajectory that was kept."""
    return [
        PromptOutcome(
            prompt=tree.tree.prompt.id,
            reference=tree.tree.prompt.answer,
            samples=[_sample(tree, leaf) for leaf in tree.tree.leaves() if tree.tree.nodes[leaf].kept],
        )
        for tree in scored
    ]


def successes_of(scored: ScoredTree) -> list[bool]:
    """Whether each scored trajectory succeeded, by the first trajectory source of the config."""
    by_leaf = next(iter(scored.leaf_scores.values()), {})
    return [score.value > 0.5 for score in by_leaf.values() if score.is_scored]


def _sample(scored: ScoredTree, leaf: int) -> Sample:
    tree = scored.tree
    node, path = tree.nodes[leaf], tree.path(leaf)
    success, unknown = _success(scored, leaf)
    return Sample(
        success=success,
        unknown=unknown,
        answer=node.facts.answer,
        tokens=sum(len(tree.nodes[row].action_ids) for row in path),
        turns=tree.num_turns(leaf),
        stop=node.stop.value,
        scores={name: _value(by_leaf.get(leaf)) for name, by_leaf in scored.leaf_scores.items()},
        step_scores={
            name: [_value(by_row[row]) for row in path if row in by_row and not _says_nothing(by_row[row])]
            for name, by_row in scored.step_scores.items()
        },
    )


def _success(scored: ScoredTree, leaf: int) -> tuple[bool | None, str]:
    """Whether a trajectory succeeded by the first trajectory source, and why not even that is known."""
    stop = scored.tree.nodes[leaf].stop
    if stop in WORLD_FAILED:
        return None, stop.value
    score = next(iter(scored.leaf_scores.values()), {}).get(leaf)
    if score is None:
        return None, "not scored"
    return (score.value > 0.5, "") if score.is_scored else (None, f"{score.status.value}: {score.reason}")


def _says_nothing(score: Score) -> bool:
    return score.status is ScoreStatus.not_applicable


def _value(score: Score | None) -> float | None:
    return score.value if score is not None and score.is_scored else None


def write_outcomes(path: Path, outcomes: Sequence[PromptOutcome]) -> None:
    """Write one JSON object per prompt, in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(json.dumps(asdict(each)) + "\n" for each in outcomes), encoding="utf-8")
    beside.replace(path)


def read_outcomes(path: Path) -> list[PromptOutcome]:
    """The rows of one evaluation, equal to those written.

    Raises: DataError naming file and line when one is damaged or of another version.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row: dict[str, Any] = json.loads(line)
            row["samples"] = [Sample(**sample) for sample in row["samples"]]
            rows.append(PromptOutcome(**row))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path} line {number} is no row of an evaluation ({error}): a mean over the rest would be of other "
                f"prompts than was asked for. Evaluate again with `grove eval`."
            ) from error
    return rows


def shared_prompts(evaluations: Sequence[Sequence[PromptOutcome]]) -> list[list[float]]:
    """Success of each prompt in each evaluation, of the prompts that all of them know something of.

    Returns: [R][P] for R evaluations, prompts in the order of the first: what `rl.statistics.bootstrap_runs` takes.
    """
    tables = [{each.prompt: each.success_share for each in rows if each.known} for rows in evaluations]
    names = [name for name in tables[0] if all(name in table for table in tables)] if tables else []
    return [[table[name] for name in names] for table in tables]
