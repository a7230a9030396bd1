"""Is a reward fit for a run? Asked of recorded trees, in the processes and under the deadline that a run would use."""

from __future__ import annotations

import asyncio
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from conf.errors import ConfigError, DataError
from conf.schema import RewardsConfig, SourceConfig
from rewards.service import RewardService
from rewards.types import Score, ScoredTree, ScoreStatus
from rl.credit.forest import Forest, forest_of
from rl.health import agreement, outcomes, path_mean, within_correlation
from rl.record import RecordedTree, read_trees
from rl.run_folder import RunFolder
from rollout.tree import Tree

SAMPLE = Path(__file__).parents[1] / "rewards" / "samples" / "hop_search.jsonl.gz"
"""Recorded trees of the embedded task, for who has no run yet."""
HUGE = "word " * 200_000
"""A step of a megabyte: what a model that never stops leaves behind."""
SLOW_S = 0.01
"""Seconds of a call above which scoring will be felt: a step of training asks for thousands of scores."""
STRONG = 0.5
"""Correlation that a reader should know of."""


class Verdict(StrEnum):
    """What a finding means for a run."""

    ok = "ok"
    warning = "warning"
    failure = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    what: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, slots=True)
class RewardCheck:
    """All that was found of one reward."""

    findings: list[Finding]
    setting: str
    """The setting that adds it to a run, as it is typed."""

    @property
    def passed(self) -> bool:
        """Whether a run may use it."""
        return all(finding.verdict is not Verdict.failure for finding in self.findings)


def recorded_trees_of(place: str) -> list[RecordedTree]:
    """Trees of a run's newest record, of one recorded file, or for "" of the sample that ships.

    Raises: DataError when there are none; ConfigError when the place does not exist.
    """
    path = Path(place) if place else SAMPLE
    if path.is_dir():
        files = sorted(RunFolder(path).trees.glob("*.jsonl.gz"))
        if not files:
            raise DataError(
                f"{path} holds no recorded trees: nothing to try the reward on. Record some with "
                f"run.record_every_steps=1, or leave --trees away for the sample that ships."
            )
        path = files[-1]
    if not path.is_file():
        raise ConfigError(f'--trees "{place}" is neither the folder of a run nor a recorded file such as trees/*.gz.')
    found = [each for each in read_trees(path) if each.tree.trained_leaves()]
    if not found:
        raise DataError(f"{path} holds no tree with a trajectory that may train. Give another step's record.")
    return found


def check_reward(
    fn: str,
    recorded: Sequence[RecordedTree],
    *,
    args: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    level: str = "",
    timeout_s: float = SourceConfig().timeout_s,
) -> RewardCheck:
    """Try a reward on recorded trees.

    Args:
        fn: as rewards.sources.NAME.fn.
        recorded: at least one tree.
        args: as rewards.sources.NAME.args.
        columns: data columns that the prompts of the trees lack.
        level: as rewards.sources.NAME.level.
        timeout_s: as rewards.sources.NAME.timeout_s.
    Raises: ConfigError when it cannot be loaded, or asks for something that nothing can fill.
    """
    name = fn.rpartition(":")[2].rpartition(".")[2]
    source = SourceConfig(fn=fn, args=dict(args or {}), level=level, timeout_s=timeout_s)
    cfg = RewardsConfig(sources={name: source}, num_processes=1)
    trees = [with_columns(each.tree, columns or {}) for each in recorded]
    odd = odd_trees(trees[0])
    first, again, answers = (_scored(cfg, each) for each in (trees, trees, list(odd.values())))
    said = [_said(each, name) for each in first]
    scores = [score for table in said for score in table.values()]
    of_steps = any(name in each.step_scores for each in first)
    findings = [
        Finding("arguments", Verdict.ok, f"scores {'steps' if of_steps else 'whole trajectories'}"),
        _statuses(scores, cfg.max_failed_share),
        *_values(scores),
        _determinism(said, [_said(each, name) for each in again]),
        _time(sum(each.costs[name].seconds for each in again), len(scores)),
        *_oddities(dict(zip(odd, answers, strict=True)), name),
        *_correlations(first, recorded, name, of_steps=of_steps),
    ]
    return RewardCheck(findings, setting_of(name, source))


def check_table(check: RewardCheck) -> Table:
    """For the terminal."""
    table = Table("", "checked", "found", title="fit for a run" if check.passed else "not fit for a run")
    marks = {Verdict.ok: "[green]ok", Verdict.warning: "[yellow]look", Verdict.failure: "[red]fails"}
    for finding in check.findings:
        table.add_row(marks[finding.verdict], finding.what, escape(finding.detail))
    return table


def setting_of(name: str, source: SourceConfig) -> str:
    """What to type after `grove train`, quoted for a shell."""
    parts = [f"fn: {source.fn}", "weight: 0.2"]
    if source.level:
        parts.append(f"level: {source.level}")
    if source.args:
        args = yaml.safe_dump(source.args, default_flow_style=True, sort_keys=False, width=math.inf).strip()
        parts.append(f"args: {args}")
    return shlex.quote(f"rewards.sources.{name}={{{', '.join(parts)}}}")


def with_columns(tree: Tree, columns: Mapping[str, Any]) -> Tree:
    """The tree with more columns beside its prompt's own."""
    if not columns:
        return tree
    return replace(tree, prompt=replace(tree.prompt, data={**tree.prompt.data, **columns}))


def odd_trees(tree: Tree) -> dict[str, Tree]:
    """What a policy sooner or later does: a tree with steps that say nothing, and one with steps that never end."""

    def with_text(text: str) -> Tree:
        nodes = [replace(node, action_text=text, observation_text=text) for node in tree.nodes]
        return replace(tree, nodes=nodes)

    return {"empty steps": with_text(""), "steps of a megabyte": with_text(HUGE)}


def _scored(cfg: RewardsConfig, trees: Sequence[Tree]) -> list[ScoredTree]:
    """By a service of their own, so that asking again meets another process, with another seed of `hash`."""

    async def score(service: RewardService) -> list[ScoredTree]:
        return [await service.score(tree) for tree in trees]

    try:
        service = RewardService(cfg, trees[0].prompt.data.keys())
    except ConfigError as error:
        hint = " To try it here, give what is missing with --column NAME=VALUE, or --arg NAME=VALUE."
        raise ConfigError(f"{error}{hint if 'nothing can fill' in str(error) else ''}") from error
    try:
        return asyncio.run(score(service))
    finally:
        service.close()


def _said(scored: ScoredTree, name: str) -> dict[int, Score]:
    return {**scored.step_scores, **scored.leaf_scores}[name]


def _statuses(scores: Sequence[Score], max_failed_share: float) -> Finding:
    counts = Counter(score.status for score in scores)
    text = ", ".join(f"{counts[status]} {status.value.replace('_', ' ')}" for status in ScoreStatus if counts[status])
    broken = [score for score in scores if score.status in (ScoreStatus.failed, ScoreStatus.timed_out)]
    if not counts[ScoreStatus.scored] and not broken:
        return Finding("scores", Verdict.failure, f"{text}: it has nothing to say of any of these trees")
    if broken:
        share = len(broken) / (len(broken) + counts[ScoreStatus.scored])
        verdict = Verdict.failure if share > max_failed_share else Verdict.warning
        return Finding("scores", verdict, f"{text}; first error: {broken[0].reason}")
    return Finding("scores", Verdict.ok, text)


def _values(scores: Sequence[Score]) -> Iterator[Finding]:
    values = [score.value for score in scores if score.is_scored]
    if not values:
        return
    low, high, mean = min(values), max(values), statistics.fmean(values)
    text = f"from {low:.3g} to {high:.3g}, mean {mean:.3g}, {len(set(values))} different"
    if low == high:
        yield Finding("values", Verdict.warning, f"always {low:.3g}: nothing is told apart, so nothing is learned")
    elif max(abs(low), abs(high)) > 10:
        yield Finding("values", Verdict.warning, f"{text}: far from [-1, 1], so choose its weight with care")
    else:
        yield Finding("values", Verdict.ok, text)


def _determinism(first: list[dict[int, Score]], again: list[dict[int, Score]]) -> Finding:
    pairs = [(one[row], other[row]) for one, other in zip(first, again, strict=True) for row in one]
    differing = sum(
        one.status is not other.status or (one.is_scored and one.value != other.value) for one, other in pairs
    )
    if differing:
        text = f"{differing} of {len(pairs)} scores differ when another process is asked: no run can be repeated"
        return Finding("determinism", Verdict.warning, text)
    return Finding("determinism", Verdict.ok, "the same when another process is asked")


def _time(seconds: float, num_scores: int) -> Finding:
    each_s = seconds / max(1, num_scores)
    text = f"{each_s * 1e6:,.0f} microseconds a score, the process and its pipe included"
    if each_s > SLOW_S:
        return Finding("time", Verdict.warning, f"{text}: a step of training asks for thousands")
    return Finding("time", Verdict.ok, text)


def _oddities(odd: Mapping[str, ScoredTree], name: str) -> Iterator[Finding]:
    for what, scored in odd.items():
        broken = [
            score
            for score in _said(scored, name).values()
            if score.status in (ScoreStatus.failed, ScoreStatus.timed_out)
        ]
        if broken:
            yield Finding(what, Verdict.warning, f"{len(broken)} scores break: {broken[0].reason}")
        else:
            yield Finding(what, Verdict.ok, "answered")


def _correlations(
    scored: Sequence[ScoredTree], recorded: Sequence[RecordedTree], name: str, *, of_steps: bool
) -> Iterator[Finding]:
    forest = forest_of([replace(each, step_signals=each.step_scores, leaf_signals=each.leaf_scores) for each in scored])
    tokens_N = forest.num_actions_N.double()
    if of_steps:
        value_N = forest.step_signals[name]
        value_L = path_mean(forest, value_N)
        length = within_correlation(value_N, tokens_N, forest.prompt_N)
    else:
        value_L = forest.leaf_signals[name]
        length = within_correlation(value_L, _path_tokens(forest), forest.prompt_L)
    if math.isfinite(length):
        detail = f"correlation {length:+.2f} within prompts"
        if abs(length) > STRONG:
            way = "long" if length > 0 else "short"
            yield Finding("length", Verdict.warning, f"{detail}: the policy may learn to be {way} instead of good")
        else:
            yield Finding("length", Verdict.ok, detail)
    outcome_L = outcomes([each.scored for each in recorded], forest)
    agrees = agreement(value_L, outcome_L, forest.prompt_L)
    if math.isfinite(agrees):
        detail = f"puts {agrees:.0%} of the pairs with different outcomes in the right order; 50% is chance"
        verdict = Verdict.warning if agrees < STRONG else Verdict.ok
        yield Finding("outcome", verdict, detail if agrees >= STRONG else f"{detail}: it pays for what leads nowhere")


def _path_tokens(forest: Forest) -> Tensor:
    tokens_P = forest.num_actions_N.double()[forest.pair_node_P]
    return torch.zeros(len(forest.leaf_node_L), dtype=torch.float64).index_add(0, forest.pair_leaf_P, tokens_P)
