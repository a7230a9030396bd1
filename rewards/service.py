"""Scores grown trees: every source at once, every unique step once, and a stop when a source has been lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from conf.errors import RewardFailed
from conf.schema import Level, RewardsConfig
from rewards.base import Source, build_sources
from rewards.blend import blend
from rewards.sandbox import Answer, Sandbox
from rewards.types import BROKEN, Score, ScoredTree, ScoreStatus
from rollout.tree import Tree

MAX_EXAMPLE_CHARS = 200


class RewardService:
    """Scores trees with the configured sources. Shipped ones run here, a user's own in processes that can be killed."""

    def __init__(self, cfg: RewardsConfig, columns: Collection[str] | None = None):
        """Load every source; processes start with the first tree that needs one.

        Args:
            cfg: sources, processes, failure budget.
            columns: columns that every prompt has, where known, so that a misspelt argument is refused here.
        Raises: ConfigError that lists the problems of all sources together.
        """
        self._cfg = cfg
        self._sources = build_sources(cfg, columns)
        self._sandbox = Sandbox(cfg)

    async def score(self, tree: Tree) -> ScoredTree:
        """Ask every source about the steps and trajectories that may train, and blend what they say into signals.

        Returns: the scored tree; a source that broke has failed or timed-out scores there, nothing is raised.
        """
        answers = await asyncio.gather(*(self._answer(source, tree) for source in self._sources))
        scored = ScoredTree(tree=tree)
        for source, (scores, seconds) in zip(self._sources, answers, strict=True):
            of_level = scored.step_scores if source.level is Level.step else scored.leaf_scores
            of_level[source.name] = scores
            scored.seconds[source.name] = seconds
        return blend(scored, self._cfg)

    @property
    def num_processes(self) -> int:
        """Reward processes that are up; none before the first tree that needs one."""
        return self._sandbox.num_running

    def close(self) -> None:
        """Stop the reward processes."""
        self._sandbox.close()

    async def _answer(self, source: Source, tree: Tree) -> Answer:
        if not source.is_shipped:
            return await self._sandbox.score(source, tree)
        started = time.monotonic()
        return source.score_tree(tree), time.monotonic() - started


def score_counts(scored: Sequence[ScoredTree]) -> dict[str, dict[ScoreStatus, int]]:
    """How often each source said what, over a batch: source -> status -> number of scores, every status present."""
    counted: dict[str, Counter[ScoreStatus]] = {}
    for tree in scored:
        for source, scores in {**tree.step_scores, **tree.leaf_scores}.items():
            counted.setdefault(source, Counter()).update(score.status for score in scores.values())
    return {source: {status: counts[status] for status in ScoreStatus} for source, counts in counted.items()}


def check_failure_budget(scored: Sequence[ScoredTree], cfg: RewardsConfig) -> None:
    """Stop a run that has lost a source.

    share = (failed + timed out) / (scored + failed + timed out), per source over the batch. Scores that are not
    applicable count on neither side: a source that is rarely asked for an opinion may still not break.

    Raises: RewardFailed naming the first source above cfg.max_failed_share, its share and first error, and a way out.
    """
    for source, counts in score_counts(scored).items():
        broken = sum(counts[status] for status in BROKEN)
        asked = broken + counts[ScoreStatus.scored]
        if broken and broken / asked > cfg.max_failed_share:
            raise RewardFailed(_budget_message(source, broken, asked, scored, cfg))


def _budget_message(source: str, broken: int, asked: int, scored: Sequence[ScoredTree], cfg: RewardsConfig) -> str:
    tree, row, score = next(_broken_scores(source, scored))
    text = tree.nodes[row].action_text
    shown = text if len(text) <= MAX_EXAMPLE_CHARS else f"{text[:MAX_EXAMPLE_CHARS]}..."
    if score.status is ScoreStatus.timed_out:
        remedy = f"Make it faster or raise rewards.sources.{source}.timeout_s"
    else:
        remedy = "Mend it"
    return (
        f"rewards.sources.{source} failed {broken} of {asked} scores in this batch ({broken / asked:.1%}), more than "
        f"rewards.max_failed_share={cfg.max_failed_share:g} allows: the policy would learn only from the steps that it "
        f'happens to answer. First error: {score.reason}; at prompt "{tree.prompt.id}", step "{shown}". '
        f"{remedy}, return None where it has nothing to say, or raise rewards.max_failed_share."
    )


def _broken_scores(source: str, scored: Sequence[ScoredTree]) -> Iterator[tuple[Tree, int, Score]]:
    for each in scored:
        scores = {**each.step_scores, **each.leaf_scores}.get(source, {})
        for row, score in scores.items():
            if score.status in BROKEN:
                yield each.tree, row, score
