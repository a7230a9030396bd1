"""What one step's trees and scores come to, as metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from rewards.sources.outcome import exact_match
from rewards.types import Score, ScoredTree, ScoreStatus
from rollout.cost import lengths_of, measured
from rollout.tree import ROOT, Tree
from rollout.types import StopReason


def rollout_metrics(trees: list[Tree], seconds: float) -> dict[str, float]:
    """What growing one step's trees came to. A share with nothing to divide by is left out rather than called 0.

    Args:
        trees: the step's trees, before any selection.
        seconds: wall time of growing them.
    """
    trained = [(tree, leaf) for tree in trees for leaf in tree.outcome_leaves()]
    judged = [
        exact_match(tree.nodes[leaf].facts, tree.prompt.answer) for tree, leaf in trained if tree.prompt.answer.strip()
    ]
    nodes = [node for tree in trees for node in tree.nodes]
    tool_ok = [node.facts.tool_ok for node in nodes if node.facts.tool_ok is not None]
    generated = sum(tree.num_generated_tokens() for tree in trees)
    cached = sum(node.num_cached_tokens for node in nodes)
    context = sum(_context_tokens(tree) for tree in trees)
    shares = {
        "rollout/success_share": (sum(judged), len(judged)),
        "rollout/cached_token_share": (cached, context),
        "rollout/tool_ok_share": (sum(tool_ok), len(tool_ok)),
        "rollout/tokens_per_second": (generated, seconds),
        **_stop_shares(trees),
    }
    cost = measured(trees)
    counts: dict[str, float] = {
        "rollout/generated_tokens": generated,
        "rollout/trajectories": len(trained),
        "rollout/trees": len(trees),
        "rollout/requests": cost.steps,
        "rollout/uncached_tokens": cost.prefilled,
        "rollout/cached_tokens": cost.cached,
    }
    steps, lengths = lengths_of(trees)
    means = {
        "rollout/generated_share_of_chains": cost.generated_share,
        "rollout/steps_per_trajectory": steps,
        "rollout/tokens_per_prompt": lengths.prompt_tokens,
        "rollout/tokens_per_turn": lengths.turn_tokens,
        "rollout/tokens_per_reply": lengths.observation_tokens or math.nan,  # there were none
    }
    counts |= {name: value for name, value in means.items() if math.isfinite(value)}
    return counts | {name: part / whole for name, (part, whole) in shares.items() if whole}


def staleness_metrics(trees: list[Tree], version: int) -> dict[str, float]:
    """How far the weights that sampled are behind those that will learn, version `version`; {} without a token."""
    behind = [(version - node.version, len(node.action_ids)) for tree in trees for node in tree.nodes]
    tokens = sum(count for _, count in behind)
    if not tokens:
        return {}
    return {
        "rollout/staleness_mean": sum(age * count for age, count in behind) / tokens,
        "rollout/staleness_max": max(age for age, _ in behind),
        "rollout/stale_share": sum(count for age, count in behind if age) / tokens,
    }


def _stop_shares(trees: list[Tree]) -> dict[str, tuple[float, float]]:
    stops = Counter(tree.nodes[leaf].stop for tree in trees for leaf in tree.leaves() if tree.nodes[leaf].kept)
    reasons = [reason for reason in StopReason if reason is not StopReason.continues]
    return {f"rollout/stop_{reason}_share": (stops[reason], stops.total()) for reason in reasons}


def _context_tokens(tree: Tree) -> int:
    """Context tokens of all the tree's sampling requests together; parents come first, so one pass is enough."""
    after = {ROOT: len(tree.prompt.token_ids)}
    for row, node in enumerate(tree.nodes):
        after[row] = after[node.parent] + len(node.action_ids) + len(node.observation_ids)
    return sum(after[node.parent] for node in tree.nodes)


def reward_metrics(scored: list[ScoredTree]) -> dict[str, float]:
    """Mean of every signal and source, and how often each source had no number to give.

    A source and a signal of the same name share reward/<name>_mean: the source's is written. A mean of nothing is left
    out.
    """
    signals = _pooled([by_name for tree in scored for by_name in (tree.step_signals, tree.leaf_signals)])
    sources = _pooled([by_name for tree in scored for by_name in (tree.step_scores, tree.leaf_scores)])
    metrics = {f"reward/{name}_mean": _scored_mean(scores) for name, scores in (signals | sources).items()}
    unscored = (ScoreStatus.failed, ScoreStatus.timed_out, ScoreStatus.not_applicable)
    for name, scores in sources.items():
        count = Counter(score.status for score in scores)
        metrics |= {f"reward/{name}_{status}_share": count[status] / len(scores) for status in unscored}
        metrics |= _part_means(name, scores)
    metrics |= _costs(scored)
    return {name: value for name, value in metrics.items() if value is not None}


def _part_means(name: str, scores: list[Score]) -> dict[str, float]:
    """Mean of each named part of a source, as reward/<source>.<part>_mean."""
    parts: dict[str, list[float]] = {}
    for score in scores:
        for part, value in score.parts.items():
            parts.setdefault(part, []).append(value)
    return {f"reward/{name}.{part}_mean": sum(values) / len(values) for part, values in parts.items()}


def _costs(scored: list[ScoredTree]) -> dict[str, float]:
    """What asking each source took; requests, tokens and prices of those that ask a model alone."""
    metrics: dict[str, float] = {}
    for name in {name: None for tree in scored for name in tree.costs}:
        costs = [tree.costs[name] for tree in scored if name in tree.costs]
        metrics[f"reward/{name}_seconds"] = sum(cost.seconds for cost in costs) / len(costs)
        calls, cached = (sum(getattr(cost, part) for cost in costs) for part in ("calls", "cached_calls"))
        generated = sum(cost.generated_tokens for cost in costs)
        if generated:
            metrics[f"reward/{name}_generated_tokens"] = generated
        if cached:
            metrics[f"reward/{name}_cached_share"] = cached / calls
        requests, tries = (sum(getattr(cost, part) for cost in costs) for part in ("requests", "tries"))
        if requests:
            metrics[f"reward/{name}_requests"] = requests
            metrics[f"reward/{name}_retries"] = max(0, tries - requests)
            metrics[f"reward/{name}_tokens"] = sum(cost.prompt_tokens + cost.reply_tokens for cost in costs)
            metrics[f"reward/{name}_usd"] = sum(cost.usd for cost in costs)
    return metrics


def slowest_reward(metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """Name of the source that took longest, and its seconds a tree; None where nothing was scored."""
    ending = "_seconds"
    seconds = {
        name[len("reward/") : -len(ending)]: value
        for name, value in metrics.items()
        if name.startswith("reward/") and name.endswith(ending)
    }
    return max(seconds.items(), key=lambda each: each[1], default=None)


def _pooled(tables: Iterable[Mapping[str, Mapping[int, Score]]]) -> dict[str, list[Score]]:
    """name -> every score of it, names without one score left out."""
    pooled: dict[str, list[Score]] = {}
    for table in tables:
        for name, by_row in table.items():
            pooled.setdefault(name, []).extend(by_row.values())
    return {name: scores for name, scores in pooled.items() if scores}


def _scored_mean(scores: list[Score]) -> float | None:
    values = [score.value for score in scores if score.is_scored]
    return sum(values) / len(values) if values else None
