"""Credit the slow and obvious way: trees as they are, one pair of a step and a trajectory at a time, no tensors.

Every step has one token. Only terms whose signals are "step" and "outcome" are understood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from conf.schema import (
    Backup,
    Combine,
    Compare,
    CreditConfig,
    Degenerate,
    Level,
    Normalizer,
    Read,
    Return,
    Scope,
    TermConfig,
    TokenWeight,
)
from rewards.types import ScoredTree, ScoreStatus
from rollout.tree import ROOT

Item = tuple[int, ...]
Pair = Item
"""Prompt, leaf row, step row."""


@dataclass
class Path:
    """One trajectory: its steps, and for each what a term's signals say."""

    prompt: int
    scored: ScoredTree
    leaf: int
    rows: list[int]
    end: float | None = None
    """What the trajectory earns at its end; None where that is not known."""
    own: list[float] = field(default_factory=list)
    """What each step earns by itself."""
    spoken: list[bool] = field(default_factory=list)
    broken: list[bool] = field(default_factory=list)

    def pairs(self) -> list[Pair]:
        return [(self.prompt, self.leaf, row) for row in self.rows]


def slow_credit(scored: list[ScoredTree], cfg: CreditConfig) -> dict[tuple[str, str], tuple[float, float]]:
    """(leaf, step) -> (advantage, weight)."""
    total: dict[Pair, float] = {}
    trained: set[Pair] = set()
    for term in cfg.terms.values():
        for pair, advantage in slow_term(scored, term).items():
            total[pair] = total.get(pair, 0.0) + term.weight * (advantage or 0.0)
            if advantage is not None and term.weight != 0:
                trained.add(pair)
    if cfg.whiten:
        total = _whitened(total, {pair: _weight(pair, trained, cfg) for pair in total})
    names = [[node.action_text for node in each.tree.nodes] for each in scored]
    return {
        (names[pair[0]][pair[1]], names[pair[0]][pair[2]]): (advantage, _weight(pair, trained, cfg))
        for pair, advantage in total.items()
    }


def _whitened(value: dict[Pair, float], weight: dict[Pair, float]) -> dict[Pair, float]:
    """Every step has one token here, so a pair counts as often as its weight says."""
    count = math.fsum(weight.values())
    if not count:
        return value
    mean = math.fsum(value[pair] * weight[pair] for pair in value) / count
    spread = math.fsum(weight[pair] * (value[pair] - mean) ** 2 for pair in value)
    if count <= 1 or max(abs(value[pair] - mean) for pair in value if weight[pair]) < 1e-12:
        return dict.fromkeys(value, 0.0)
    deviation = math.sqrt(spread / (count - 1) + 1e-8)
    return {pair: (value[pair] - mean) / deviation if weight[pair] else 0.0 for pair in value}


def _weight(pair: Pair, trained: set[Pair], cfg: CreditConfig) -> float:
    if pair not in trained:
        return 0.0
    count = sum(other[0] == pair[0] and other[2] == pair[2] for other in trained)
    return {TokenWeight.per_leaf: 1.0, TokenWeight.sqrt_leaf: count**-0.5, TokenWeight.unique: 1 / count}[
        cfg.shared_token_weight
    ]


def slow_term(scored: list[ScoredTree], term: TermConfig) -> dict[Pair, float | None]:
    """Advantage of each pair, None where the term has nothing to say."""
    paths = [
        Path(prompt, each, leaf, each.tree.path(leaf))
        for prompt, each in enumerate(scored)
        for leaf in each.tree.leaves()
    ]
    _read(scored, paths, term)
    pairs = [pair for path in paths for pair in path.pairs()]
    if term.level is Level.trajectory:
        values = {(path.prompt, path.leaf): _trajectory_value(path, term) for path in paths}
        if term.scope in (Scope.ancestors, Scope.ancestors_by_size):
            compared = _among_ancestors(paths, values, term)
        else:
            compared = _compared(values, lambda item: _group_of_leaf(scored, item, term), term)
        return {pair: compared[pair[0], pair[1]] for pair in pairs}
    if term.compare is Compare.rewards:
        return _rewards_compared(scored, paths, term)
    own, rest = _pair_values(paths, term)
    if term.backup is Backup.none:
        values = {pair: _plus(own[pair[0], pair[2]], rest[pair]) for pair in pairs}
        compared = _compared(
            values, lambda item: _group_of_step(scored, item[0], item[2], term), term, _ended(paths, values)
        )
        return compared
    taken = _taken(paths, term)
    nodes = sorted({(pair[0], pair[2]) for pair in pairs})
    values = {node: _plus(own[node], _backed_up(scored, rest, taken, node, term.backup)) for node in nodes}
    if term.scope in (Scope.parent_value, Scope.root_value):
        compared = _less_baseline(scored, values, own, rest, taken, term)
    else:
        compared = _compared(values, lambda item: _group_of_step(scored, item[0], item[1], term), term)
    return {pair: compared[pair[0], pair[2]] for pair in pairs}


# ---- what each step earns ----


def _read(scored: list[ScoredTree], paths: list[Path], term: TermConfig) -> None:
    largest = _largest_return(paths, term) if _reads(term) is Read.max_return else 1.0
    for path in paths:
        if "outcome" in term.signals:
            score, use = path.scored.leaf_signals["outcome"][path.leaf], term.signals["outcome"]
            path.end = use.scale * score.value + use.shift if score.is_scored else None
        else:
            path.end = 0.0
        raw, path.broken = _step_scores(path, term)
        read = _as_read(path, raw, term, largest)
        use = term.signals.get("step")
        path.spoken = [each is not None for each in read]
        path.own = [0.0 if each is None or use is None else use.scale * each + use.shift for each in read]
        if term.combine is Combine.gate and not (path.end or 0.0) > 0:
            path.own = [0.0] * len(path.own)
        if term.combine in (Combine.overwrite, Combine.renorm):
            path.own[-1], path.spoken[-1], path.broken[-1] = 0.0, False, False
        if term.combine is Combine.renorm:
            path.own = [
                earned + (path.end or 0.0) if spoken else earned
                for earned, spoken in zip(path.own, path.spoken, strict=True)
            ]


def _reads(term: TermConfig) -> Read:
    return term.signals["step"].read if "step" in term.signals else Read.score


def _step_scores(path: Path, term: TermConfig) -> tuple[list[float | None], list[bool]]:
    if "step" not in term.signals:
        return [None] * len(path.rows), [False] * len(path.rows)
    scores = [path.scored.step_signals["step"][row] for row in path.rows]
    failed = [score.status in (ScoreStatus.failed, ScoreStatus.timed_out) for score in scores]
    if _reads(term) in (Read.difference, Read.lookahead):
        failed = [each or (place > 0 and failed[place - 1]) for place, each in enumerate(failed)]
    if _reads(term) in (Read.lookahead, Read.soft_min):
        failed = [any(failed)] * len(failed)
    return [score.value if score.is_scored else None for score in scores], failed


def _as_read(path: Path, raw: list[float | None], term: TermConfig, largest: float) -> list[float | None]:
    read = _reads(term)
    if read is Read.max_return:
        return [None if each is None else each / largest for each in raw]
    if read is Read.soft_min:
        total = math.fsum(math.exp(-each / 0.1) for each in raw if each is not None)
        return [None if each is None else math.exp(-each / 0.1) / total * each for each in raw]
    if read is Read.score or "step" not in term.signals:
        return raw
    tree = path.scored.tree
    firsts = [path.scored.step_signals["step"][row] for row in tree.children(ROOT)]
    known = [score.value for score in firsts if score.is_scored]
    before = [math.fsum(known) / len(known) if known else None, *raw[:-1]]
    change = [None if a is None or b is None else b - a for a, b in zip(before, raw, strict=True)]
    if read is Read.difference:
        return change
    return [_first_change(change[place:]) for place in range(len(change))]


def _first_change(change: list[float | None]) -> float | None:
    for distance, each in enumerate(change[:5]):
        if each is None:
            return None
        if abs(each) >= 1e-5:
            return 0.7**distance * each
    return 0.0


def _largest_return(paths: list[Path], term: TermConfig) -> float:
    sums = [0.0]
    for path in paths:
        raw = [each or 0.0 for each in _step_scores(path, term)[0]]
        sums += [abs(_discounted(raw[place:], term.gamma)) for place in range(len(raw))]
    return max(sums) + 1e-6


def _discounted(rewards: list[float], gamma: float) -> float:
    return math.fsum(gamma**distance * reward for distance, reward in enumerate(rewards))


# ---- returns and backups ----


def _trajectory_value(path: Path, term: TermConfig) -> float | None:
    if term.returns is Return.immediate:
        return path.end
    if path.end is None or any(path.broken) or not (any(path.spoken) or "outcome" in term.signals):
        return None
    count = max(sum(path.spoken), 1) if term.returns is Return.broadcast_mean else 1
    return path.end + math.fsum(path.own) / count


def _pair_values(paths: list[Path], term: TermConfig) -> tuple[dict[Item, float], dict[Pair, float | None]]:
    """What a step has whatever the trajectory, and what each trajectory adds, None where the sum is not known."""
    own: dict[Item, float] = {}
    rest: dict[Pair, float | None] = {}
    apart = term.returns is Return.immediate and not _varies(term)
    for path in paths:
        for place, pair in enumerate(path.pairs()):
            own[pair[0], pair[2]] = path.own[place] if apart else 0.0
            rest[pair] = _pair_value(path, place, term, apart)
    return own, rest


def _varies(term: TermConfig) -> bool:
    return term.combine in (Combine.renorm, Combine.gate) or _reads(term) in (Read.lookahead, Read.soft_min)


def _pair_value(path: Path, place: int, term: TermConfig, apart: bool) -> float | None:
    ends = "outcome" in term.signals
    last = place == len(path.rows) - 1
    if path.end is None:
        return None
    if term.returns is Return.to_go:
        if any(path.broken[place:]) or not (ends or any(path.spoken[place:])):
            return None
        return _discounted([*path.own[place:-1], path.own[-1] + path.end], term.gamma)
    if path.broken[place]:
        return None
    if term.combine is Combine.renorm:
        if not (path.spoken[place] or last):
            return None
        return path.own[place] + (path.end if last else 0.0)
    if not (ends or path.spoken[place]):
        return None
    decayed = term.gamma ** (len(path.rows) - 1 - place) * path.end
    return decayed if apart else decayed + path.own[place]


def _plus(own: float, rest: float | None) -> float | None:
    return None if rest is None else own + rest


def _taken(paths: list[Path], term: TermConfig) -> set[Pair]:
    """Pairs of which nothing that the value is made of is missing."""
    return {
        pair
        for path in paths
        for place, pair in enumerate(path.pairs())
        if path.end is not None and not (term.returns is Return.to_go and any(path.broken[place:]))
    }


def _chances(
    scored: list[ScoredTree], rest: Mapping[Pair, float | None], taken: set[Pair], node: Item
) -> dict[int, float]:
    """leaf -> chance of ending there from a step, every continuation that counts as likely as another."""
    prompt, row = node
    tree = scored[prompt].tree
    children = [
        child
        for child in tree.children(row)
        if any(pair[0] == prompt and pair[2] == child and pair in taken for pair in rest)
    ]
    if not tree.children(row):
        return {row: 1.0}
    found: dict[int, float] = {}
    for child in children:
        for leaf, chance in _chances(scored, rest, taken, (prompt, child)).items():
            found[leaf] = found.get(leaf, 0.0) + chance / len(children)
    return found


def _backed_up(
    scored: list[ScoredTree], rest: Mapping[Pair, float | None], taken: set[Pair], node: Item, backup: Backup
) -> float | None:
    """At a step, or with row ROOT at the prompt, whose trajectories are worth what they are at their first steps."""
    prompt, row = node
    tree = scored[prompt].tree
    at = {leaf: row if row != ROOT else tree.path(leaf)[0] for leaf in tree.leaves()}
    through = {leaf: rest[prompt, leaf, step] for leaf, step in at.items() if step in tree.path(leaf)}
    known = {leaf: value for leaf, value in through.items() if value is not None}
    if not known:
        return None
    if backup is Backup.max:
        return max(known.values())
    if backup is Backup.any:
        return float(max(known.values()) > 0)
    chances = _chances(scored, rest, taken, node) if backup is Backup.child_mean else dict.fromkeys(known, 1.0)
    total = math.fsum(chances[leaf] for leaf in known)
    return math.fsum(chances[leaf] * value for leaf, value in known.items()) / total


# ---- comparing ----


def _group_of_leaf(scored: list[ScoredTree], item: Item, term: TermConfig) -> Hashable:
    prompt, leaf = item
    return {
        Scope.prompt: prompt,
        Scope.tree: (prompt, scored[prompt].tree.nodes[leaf].branch),
        Scope.batch: "all",
    }[term.scope]


def _group_of_step(scored: list[ScoredTree], prompt: int, row: int, term: TermConfig) -> Hashable:
    tree = scored[prompt].tree
    node = tree.nodes[row]
    seen = () if node.parent == ROOT else tuple(tree.nodes[node.parent].observation_ids)
    return {
        Scope.prompt: prompt,
        Scope.tree: (prompt, node.branch),
        Scope.siblings: (prompt, node.parent),
        Scope.turn_index: (prompt, tree.depth(row)),
        Scope.turn_index_padded: (prompt, tree.depth(row)),
        Scope.state_key: (prompt, seen or node.parent),
        Scope.batch: "all",
    }[term.scope]


def _ended(paths: list[Path], values: Mapping[Item, float | None]) -> list[tuple[int, int]]:
    """Prompt and last depth of every trajectory that counts."""
    return [(path.prompt, len(path.rows)) for path in paths if any(values[pair] is not None for pair in path.pairs())]


def _compared(
    values: Mapping[Item, float | None],
    group_of: Callable[[Item], Hashable],
    term: TermConfig,
    ended: list[tuple[int, int]] | None = None,
) -> dict[Item, float | None]:
    groups: dict[Hashable, list[float]] = {}
    for item, value in values.items():
        if value is not None:
            groups.setdefault(group_of(item), []).append(value)
    if term.scope is Scope.turn_index_padded:
        for group, members in groups.items():
            assert isinstance(group, tuple) and ended is not None
            members += [0.0 for prompt, depth in ended if prompt == group[0] and depth < group[1]]
    everyone = [value for members in groups.values() for value in members]
    return {
        item: None if value is None else _against(value, groups[group_of(item)], everyone, term)
        for item, value in values.items()
    }


def _against(value: float, group: list[float], everyone: list[float], term: TermConfig) -> float | None:
    if term.normalizer is Normalizer.none:
        return value
    if term.normalizer is Normalizer.max_return:
        return value / scale if (scale := max(map(abs, group)) + term.eps) else 0.0
    if len(group) == 1:
        return {Degenerate.zero: 0.0, Degenerate.raw: value, Degenerate.drop: None}[term.singleton]
    if max(group) - min(group) < 1e-12:
        return {Degenerate.zero: 0.0, Degenerate.raw: value, Degenerate.drop: None}[term.zero_variance]
    if term.normalizer is Normalizer.leave_one_out:
        return value - (math.fsum(group) - value) / (len(group) - 1)
    if term.normalizer is Normalizer.rank:
        worst = max(sum(other > each + 1e-12 for other in group) for each in group)
        group, value = [_place(each, group, worst) for each in group], _place(value, group, worst)
    gap = value - math.fsum(group) / len(group)
    if term.normalizer is Normalizer.center:
        return gap
    variance = _variance(everyone if term.normalizer is Normalizer.center_batch_std else group, term.ddof)
    if term.normalizer is Normalizer.whiten:
        return gap / math.sqrt(max(variance, term.min_std**2) + 1e-8)
    return gap / (max(math.sqrt(variance), term.min_std) + term.eps)


def _place(value: float, group: list[float], worst: int) -> float:
    return (worst - sum(other > value + 1e-12 for other in group)) / worst


def _variance(group: list[float], ddof: int) -> float:
    mean = math.fsum(group) / len(group)
    return math.fsum((other - mean) ** 2 for other in group) / (len(group) - ddof)


def _among_ancestors(
    paths: list[Path], values: Mapping[Item, float | None], term: TermConfig
) -> dict[Item, float | None]:
    found: dict[Item, float | None] = {}
    everyone = [value for value in values.values() if value is not None]
    for path in paths:
        value = values[path.prompt, path.leaf]
        parts: list[tuple[float, int]] = []
        for row in [ROOT, *path.rows]:
            known = [
                values[other.prompt, other.leaf]
                for other in paths
                if other.prompt == path.prompt and (row == ROOT or row in other.rows)
            ]
            group = [each for each in known if each is not None]
            if value is None or (row != ROOT and len(group) < 2):
                continue
            advantage = _against(value, group, everyone, term)
            if advantage is not None:
                parts.append((advantage, len(group) if term.scope is Scope.ancestors_by_size else 1))
        total = sum(size for _, size in parts)
        found[path.prompt, path.leaf] = (
            math.fsum(advantage * size for advantage, size in parts) / total if total else None
        )
    return found


def _less_baseline(
    scored: list[ScoredTree],
    values: Mapping[Item, float | None],
    own: Mapping[Item, float],
    rest: Mapping[Pair, float | None],
    taken: set[Pair],
    term: TermConfig,
) -> dict[Item, float | None]:
    found: dict[Item, float | None] = {}
    for (prompt, row), value in values.items():
        tree = scored[prompt].tree
        firsts = [first for first in tree.children(ROOT) if values[prompt, first] is not None]
        baseline = _backed_up(scored, rest, taken, (prompt, ROOT), term.backup)
        if baseline is not None:
            baseline += math.fsum(own[prompt, first] for first in firsts) / len(firsts)
        if term.scope is Scope.parent_value and tree.nodes[row].parent != ROOT:
            baseline = values[prompt, tree.nodes[row].parent]
        if value is None or baseline is None:
            found[prompt, row] = None
        elif abs(value - baseline) < 1e-12:
            found[prompt, row] = {Degenerate.zero: 0.0, Degenerate.raw: value, Degenerate.drop: None}[
                term.zero_variance
            ]
        else:
            found[prompt, row] = value - baseline
    return found


def _rewards_compared(scored: list[ScoredTree], paths: list[Path], term: TermConfig) -> dict[Pair, float | None]:
    go_on: dict[Pair, bool] = {}
    earned: dict[Pair, float] = {}
    counts: dict[Pair, bool] = {}
    for path in paths:
        for place, pair in enumerate(path.pairs()):
            last = place == len(path.rows) - 1
            go_on[pair] = _pair_value(path, place, term, apart=False) is not None
            earned[pair] = path.own[place] + ((path.end or 0.0) if last else 0.0)
            counts[pair] = go_on[pair] and (path.spoken[place] or (last and "outcome" in term.signals))
    compared = _compared_rewards(scored, paths, term, earned, counts, go_on)
    summed: dict[Pair, float | None] = {}
    for path in paths:
        for place, pair in enumerate(path.pairs()):
            rewards = [compared[later] for later in path.pairs()[place:]]
            speaks = go_on[pair] and any(reward is not None for reward in rewards)
            summed[pair] = _discounted([reward or 0.0 for reward in rewards], term.gamma) if speaks else None
    if term.backup is Backup.none:
        return summed
    taken = _taken(paths, term)
    return {pair: _backed_up(scored, summed, taken, (pair[0], pair[2]), term.backup) for pair in summed}


def _compared_rewards(
    scored: list[ScoredTree],
    paths: list[Path],
    term: TermConfig,
    earned: dict[Pair, float],
    counts: dict[Pair, bool],
    go_on: dict[Pair, bool],
) -> dict[Pair, float | None]:
    if term.normalizer in (Normalizer.token_leave_one_out, Normalizer.token_leave_one_out_released):
        return _less_others_per_token(scored, paths, term, earned, go_on)
    if _varies(term):
        values: dict[Item, float | None] = {pair: earned[pair] if counts[pair] else None for pair in earned}
        return _compared(values, lambda item: _group_of_step(scored, item[0], item[2], term), term)
    once: dict[Item, float | None] = {(pair[0], pair[2]): None for pair in earned}
    once |= {(pair[0], pair[2]): earned[pair] for pair in earned if counts[pair]}
    compared = _compared(once, lambda item: _group_of_step(scored, item[0], item[1], term), term)
    return {pair: compared[pair[0], pair[2]] if counts[pair] else None for pair in earned}


def _less_others_per_token(
    scored: list[ScoredTree], paths: list[Path], term: TermConfig, earned: dict[Pair, float], go_on: dict[Pair, bool]
) -> dict[Pair, float | None]:
    found: dict[Pair, float | None] = {}
    mean: dict[Item, float] = {}
    for path in paths:
        known = [earned[pair] for pair in path.pairs() if go_on[pair]]
        if known:
            mean[path.prompt, path.leaf] = math.fsum(known) / len(known)
    for path in paths:
        group = _group_of_leaf(scored, (path.prompt, path.leaf), term)
        others = [
            value
            for item, value in mean.items()
            if _group_of_leaf(scored, item, term) == group and item != (path.prompt, path.leaf)
        ]
        for pair in path.pairs():
            if not go_on[pair]:
                found[pair] = None
            elif not others:
                found[pair] = {Degenerate.zero: 0.0, Degenerate.raw: earned[pair], Degenerate.drop: None}[
                    term.singleton
                ]
            elif term.normalizer is Normalizer.token_leave_one_out:
                found[pair] = earned[pair] - math.fsum(others) / len(others)
            else:
                everyone = math.fsum([*others, mean[path.prompt, path.leaf]])
                found[pair] = earned[pair] * (len(others) + 1) / len(others) - everyone / len(others)
    return found
