"""Laws of credit on random batches, and agreement with a slow version that walks the trees one pair at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from credit_forests import MAX_STEPS, credit_of, per_node, per_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import parse_scored

from conf.schema import (
    Backup,
    CreditConfig,
    Level,
    Normalizer,
    Scope,
    SignalUse,
    Singleton,
    TermConfig,
    TokenWeight,
)
from rewards.types import Score, ScoredTree, ScoreStatus
from rollout.tree import ROOT

VALUES = st.sampled_from([-1.0, -0.5, 0.0, 0.1, 0.25, 0.3, 1.0])
SCORES = st.one_of(
    VALUES.map(Score),
    VALUES.map(Score),
    st.sampled_from([Score.failed("down"), Score.timed_out("late"), Score.not_applicable()]),
)
FORKS = st.recursive(st.just([]), lambda below: st.lists(below, min_size=1, max_size=3), max_leaves=8)
"""A step as the list of the steps that continue it."""

BATCHES = st.lists(st.lists(FORKS, min_size=1, max_size=3), min_size=1, max_size=2)
"""Prompts as the lists of their first steps."""

COMPARING = [normalizer for normalizer in Normalizer if normalizer is not Normalizer.none]

laws = settings(max_examples=60, deadline=None)


def drawing(name: str, below: list) -> str:
    """The text that `parse_scored` reads; a step is called by its place: s0, s01 for its second continuation."""
    if not below:
        return name
    return f"{name} -> ({', '.join(drawing(f'{name}{place}', each) for place, each in enumerate(below))})"


def places(name: str, below: list) -> list[str]:
    """Names of all steps of a drawing."""
    return [name] + [each for place, steps in enumerate(below) for each in places(f"{name}{place}", steps)]


def draw_batch(data: st.DataObject, scores: st.SearchStrategy[Score]) -> list[ScoredTree]:
    """Random prompts with random trees; step names are unique within the batch."""
    return [draw_tree(data, scores, f"t{index}s", firsts) for index, firsts in enumerate(data.draw(BATCHES))]


def draw_tree(data: st.DataObject, scores: st.SearchStrategy[Score], prefix: str, firsts: list) -> ScoredTree:
    names = places(prefix, firsts)[1:]
    leaves = [name for name in names if f"{name}0" not in names]
    return parse_scored(
        drawing(prefix, firsts),
        branches={f"{prefix}{place}": data.draw(st.integers(0, 1)) for place in range(len(firsts))},
        steps={name: data.draw(scores) for name in names},
        outcomes={name: data.draw(scores) for name in leaves},
    )


def draw_term(data: st.DataObject, **fixed) -> TermConfig:
    level = fixed.pop("level", None) or data.draw(st.sampled_from(Level))
    scopes = [scope for scope in Scope if level is Level.step or scope is not Scope.siblings]
    names = (
        data.draw(st.sampled_from([["outcome"], ["step"], ["outcome", "step"]])) if level is Level.step else ["outcome"]
    )
    options = {
        "signals": {name: SignalUse(scale=data.draw(st.sampled_from([1.0, 2.0])), shift=-0.25) for name in names},
        "backup": data.draw(st.sampled_from(Backup)),
        "gamma": data.draw(st.sampled_from([0.5, 0.95, 1.0])),
        "scope": data.draw(st.sampled_from(scopes)),
        "normalizer": data.draw(st.sampled_from(Normalizer)),
        "ddof": data.draw(st.sampled_from([0, 1])),
        "eps": data.draw(st.sampled_from([0.0, 1e-6, 0.01])),
        "min_std": data.draw(st.sampled_from([0.0, 0.1])),
        "singleton": data.draw(st.sampled_from(Singleton)),
        "weight": data.draw(st.sampled_from([0.0, 0.5, 1.0])),
    }
    return TermConfig(level=level, **{**options, **fixed})


def draw_credit(data: st.DataObject, **fixed) -> CreditConfig:
    terms = {f"term{index}": draw_term(data, **fixed) for index in range(data.draw(st.integers(1, 3)))}
    weight = data.draw(st.sampled_from(TokenWeight))
    return CreditConfig(terms=terms, whiten=data.draw(st.booleans()), shared_token_weight=weight)


# ---- the slow version: trees as they are, one pair at a time, no tensors ----


def slow_credit(scored: list[ScoredTree], cfg: CreditConfig) -> dict[tuple[str, str], tuple[float, float]]:
    """(leaf, step) -> (advantage, weight)."""
    total: dict[tuple[str, str], float] = {}
    trained: set[tuple[str, str]] = set()
    for term in cfg.terms.values():
        for pair, advantage in slow_term(scored, term).items():
            total[pair] = total.get(pair, 0.0) + term.weight * (advantage or 0.0)
            if advantage is not None and term.weight != 0:
                trained.add(pair)
    if cfg.whiten:
        total = slow_whitened(total, {pair: slow_weight(pair, trained, cfg) for pair in total})
    return {pair: (advantage, slow_weight(pair, trained, cfg)) for pair, advantage in total.items()}


def slow_whitened(value: dict, weight: dict) -> dict:
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


def slow_weight(pair: tuple[str, str], trained: set[tuple[str, str]], cfg: CreditConfig) -> float:
    if pair not in trained:
        return 0.0
    count = sum(step == pair[1] for _, step in trained)
    return {TokenWeight.per_leaf: 1.0, TokenWeight.sqrt_leaf: count**-0.5, TokenWeight.unique: 1 / count}[
        cfg.shared_token_weight
    ]


def slow_term(scored: list[ScoredTree], term: TermConfig) -> dict[tuple[str, str], float | None]:
    """(leaf, step) -> advantage, None where the term has nothing to say."""
    values: dict[tuple[int, int], float | None] = {}
    groups: dict[tuple[int, int], object] = {}
    for prompt, each in enumerate(scored):
        rows = each.tree.leaves() if term.level is Level.trajectory else range(len(each.tree.nodes))
        for row in rows:
            read = slow_leaf_value if term.level is Level.trajectory else slow_step_value
            values[prompt, row] = read(each, row, term)
            groups[prompt, row] = slow_group(each, prompt, row, term.scope)
    advantages = {place: slow_compared(place, values, groups, term) for place in values}
    result = {}
    for prompt, each in enumerate(scored):
        names = [node.action_text for node in each.tree.nodes]
        for leaf in each.tree.leaves():
            for row in each.tree.path(leaf):
                place = (prompt, leaf if term.level is Level.trajectory else row)
                result[names[leaf], names[row]] = advantages[place]
    return result


def slow_group(scored: ScoredTree, prompt: int, row: int, scope: Scope) -> object:
    node = scored.tree.nodes[row]
    return {
        Scope.prompt: prompt,
        Scope.tree: (prompt, node.branch),
        Scope.siblings: (prompt, node.parent),
        Scope.batch: "all",
    }[scope]


def slow_leaf_value(scored: ScoredTree, leaf: int, term: TermConfig) -> float | None:
    score, use = scored.leaf_signals["outcome"][leaf], term.signals["outcome"]
    return use.scale * score.value + use.shift if score.is_scored else None


def slow_step_value(scored: ScoredTree, row: int, term: TermConfig) -> float | None:
    found = []
    if "outcome" in term.signals:
        below = [leaf for leaf in scored.tree.leaves() if row in scored.tree.path(leaf)]
        known = [(leaf, slow_leaf_value(scored, leaf, term)) for leaf in below]
        decayed = [
            term.gamma ** (scored.tree.depth(leaf) - scored.tree.depth(row)) * value
            for leaf, value in known
            if value is not None
        ]
        if not decayed:
            return None
        found.append(max(decayed) if term.backup is Backup.max else math.fsum(decayed) / len(decayed))
    if "step" in term.signals:
        score, use = scored.step_signals["step"][row], term.signals["step"]
        if score.status in (ScoreStatus.failed, ScoreStatus.timed_out):
            return None
        if score.is_scored:
            found.append(use.scale * score.value + use.shift)
    return math.fsum(found) if found else None


def slow_compared(place, values, groups, term: TermConfig) -> float | None:
    value = values[place]
    if value is None or term.normalizer is Normalizer.none:
        return value
    group = [values[other] for other in values if groups[other] == groups[place] and values[other] is not None]
    if len(group) == 1:
        return value if term.singleton is Singleton.raw else 0.0
    mean = math.fsum(group) / len(group)
    if max(group) - min(group) < 1e-12:
        return 0.0
    if term.normalizer is Normalizer.center:
        return value - mean
    if term.normalizer is Normalizer.leave_one_out:
        return value - (math.fsum(group) - value) / (len(group) - 1)
    deviation = math.sqrt(math.fsum((other - mean) ** 2 for other in group) / (len(group) - term.ddof))
    return (value - mean) / (max(deviation, term.min_std) + term.eps)


@laws
@given(st.data())
def test_agrees_with_walking_the_trees_one_pair_at_a_time(data):
    scored, cfg = draw_batch(data, SCORES), draw_credit(data)
    forest, credit = credit_of(cfg, *scored)
    slow = slow_credit(scored, cfg)
    assert per_pair(forest, credit.advantage_P, *scored) == pytest.approx(
        {pair: advantage for pair, (advantage, _) in slow.items()}, abs=1e-5
    )
    assert per_pair(forest, credit.weight_P, *scored) == pytest.approx(
        {pair: weight for pair, (_, weight) in slow.items()}
    )


@laws
@given(st.data())
def test_sums_of_a_step_are_the_sums_over_its_pairs(data):
    scored, cfg = draw_batch(data, SCORES), draw_credit(data)
    forest, credit = credit_of(cfg, *scored)
    for node in range(len(forest.parent_N)):
        pairs = forest.pair_node_P == node
        weight, advantage = credit.weight_P[pairs], credit.advantage_P[pairs]
        assert credit.w0_N[node].item() == pytest.approx(weight.sum().item())
        assert credit.w_pos_N[node].item() == pytest.approx((weight * advantage.clamp(min=0)).sum().item(), abs=1e-6)
        assert credit.w_neg_N[node].item() == pytest.approx((weight * advantage.clamp(max=0)).sum().item(), abs=1e-6)
        if weight.sum() > 0:
            mean = (weight * advantage).sum() / weight.sum()
            assert credit.advantage_N[node].item() == pytest.approx(mean.item(), abs=1e-6)


@laws
@given(st.data())
def test_no_batch_makes_nan_or_infinity(data):
    scored, cfg = draw_batch(data, SCORES), draw_credit(data)
    _, credit = credit_of(cfg, *scored)
    tensors = [credit.advantage_P, credit.weight_P, credit.w_pos_N, credit.w_neg_N, credit.w0_N, credit.advantage_N]
    for tensor in [*tensors, *credit.parts.values()]:
        assert tensor.isfinite().all()
        assert tensor.dtype is torch.float32


def shifted(scored: ScoredTree, shift: float) -> ScoredTree:
    """The same tree with a constant added to every score."""

    def add(signals):
        return {
            name: {row: Score(score.value + shift) for row, score in by_row.items()} for name, by_row in signals.items()
        }

    return replace(scored, step_signals=add(scored.step_signals), leaf_signals=add(scored.leaf_signals))


@pytest.mark.parametrize("shift", [-3.0, 0.5, 100.0])
@laws
@given(data=st.data())
def test_constant_added_to_every_score_changes_no_compared_advantage(shift, data):
    scored = draw_batch(data, VALUES.map(Score))
    normalizer = data.draw(st.sampled_from(COMPARING))
    # Without decay only: a constant that is decayed differs from step to step.
    cfg = draw_credit(data, normalizer=normalizer, singleton=Singleton.zero, gamma=1.0)
    forest, before = credit_of(cfg, *scored)
    _, after = credit_of(cfg, *[shifted(each, shift) for each in scored])
    assert per_pair(forest, after.advantage_P, *scored) == pytest.approx(
        per_pair(forest, before.advantage_P, *scored), abs=1e-5
    )


@laws
@given(st.data())
def test_order_of_children_changes_no_ones_advantage(data):
    scored, cfg = draw_batch(data, SCORES), draw_credit(data)
    turned = [reordered(each, data) for each in scored]
    forest, credit = credit_of(cfg, *scored)
    turned_forest, turned_credit = credit_of(cfg, *turned)
    assert per_pair(turned_forest, turned_credit.advantage_P, *turned) == pytest.approx(
        per_pair(forest, credit.advantage_P, *scored), abs=1e-6
    )
    assert per_pair(turned_forest, turned_credit.weight_P, *turned) == per_pair(forest, credit.weight_P, *scored)


def reordered(scored: ScoredTree, data: st.DataObject) -> ScoredTree:
    """The same steps in another order, parents still before children."""
    order: list[int] = []
    open_rows = scored.tree.children(ROOT)
    while open_rows:
        row = open_rows.pop(data.draw(st.integers(0, len(open_rows) - 1)))
        order.append(row)
        open_rows += scored.tree.children(row)
    place = {ROOT: ROOT, **{row: index for index, row in enumerate(order)}}
    nodes = [replace(scored.tree.nodes[row], parent=place[scored.tree.nodes[row].parent]) for row in order]

    def moved(signals):
        return {name: {place[row]: score for row, score in by_row.items()} for name, by_row in signals.items()}

    return ScoredTree(
        tree=replace(scored.tree, nodes=nodes),
        step_signals=moved(scored.step_signals),
        leaf_signals=moved(scored.leaf_signals),
    )


@laws
@given(st.data())
def test_advantages_among_siblings_add_up_to_zero(data):
    scored = draw_batch(data, SCORES)
    normalizer = data.draw(st.sampled_from(COMPARING))
    term = draw_term(
        data, level=Level.step, scope=Scope.siblings, normalizer=normalizer, singleton=Singleton.zero, weight=1.0
    )
    forest, credit = credit_of(CreditConfig(terms={"fork": term}), *scored)
    forks: dict[tuple[int, int], float] = {}
    for prompt, parent, advantage in zip(forest.prompt_N, forest.parent_N, credit.advantage_N, strict=True):
        fork = (int(prompt), int(parent))
        forks[fork] = forks.get(fork, 0.0) + advantage.item()
    assert list(forks.values()) == pytest.approx([0.0] * len(forks), abs=1e-5)


@laws
@given(st.data())
def test_chain_without_forks_earns_no_fork_credit(data):
    length = data.draw(st.integers(1, 5))
    names = [f"s{place}" for place in range(length)]
    tree = parse_scored(
        " -> ".join(["prompt", *names]),
        steps={name: data.draw(SCORES) for name in names},
        outcomes={names[-1]: data.draw(SCORES)},
    )
    normalizer = data.draw(st.sampled_from(COMPARING))
    term = draw_term(data, level=Level.step, scope=Scope.siblings, normalizer=normalizer, singleton=Singleton.zero)
    _, credit = credit_of(CreditConfig(terms={"fork": term}), tree)
    assert not credit.advantage_P.any()


@laws
@given(st.data())
def test_trajectory_whose_verdict_failed_changes_no_others_advantage(data):
    scored = draw_batch(data, SCORES)
    term = draw_term(data, signals={"outcome": SignalUse()})
    forest, credit = credit_of(CreditConfig(terms={"term": term}), *scored)
    never_sampled = [without_unscored(each) for each in scored]
    rest, expected_credit = credit_of(CreditConfig(terms={"term": term}), *never_sampled)
    advantage = per_pair(forest, credit.advantage_P, *scored)
    expected = per_pair(rest, expected_credit.advantage_P, *never_sampled)
    assert {pair: advantage[pair] for pair in expected} == pytest.approx(expected, abs=1e-6)


@laws
@given(st.data())
def test_trajectory_whose_verdict_failed_counts_nowhere_under_a_trajectory_term(data):
    scored = draw_batch(data, SCORES)
    cfg = draw_credit(data, level=Level.trajectory, weight=1.0)
    forest, credit = credit_of(cfg, *scored)
    never_sampled = [without_unscored(each) for each in scored]
    rest, expected_credit = credit_of(cfg, *never_sampled)
    weight = per_pair(forest, credit.weight_P, *scored)
    expected = per_pair(rest, expected_credit.weight_P, *never_sampled)
    assert weight == {**dict.fromkeys(weight, 0.0), **expected}


def without_unscored(scored: ScoredTree) -> ScoredTree:
    """The tree with every trajectory pruned that has no outcome, and every step that only such trajectories took."""
    tree = scored.tree
    scores = scored.leaf_signals["outcome"]
    used = {row for leaf in tree.leaves() if scores[leaf].is_scored for row in tree.path(leaf)}
    nodes = [replace(node, kept=row in used) for row, node in enumerate(tree.nodes)]
    return replace(scored, tree=replace(tree, nodes=nodes))


@laws
@given(st.data())
def test_credit_of_a_prompt_depends_on_the_rest_of_the_batch_only_if_compared_with_it(data):
    scored, drawn = draw_batch(data, SCORES), draw_credit(data)
    own = {name: replace(term, scope=own_scope(term.scope)) for name, term in drawn.terms.items()}
    cfg = replace(drawn, terms=own, whiten=False)
    forest, together = credit_of(cfg, *scored)
    advantage = per_node(forest, together.advantage_N, *scored)
    for each in scored:
        own_forest, alone = credit_of(cfg, each)
        for name, value in per_node(own_forest, alone.advantage_N, each).items():
            assert value == pytest.approx(advantage[name], abs=1e-6)


def own_scope(scope: Scope) -> Scope:
    return Scope.prompt if scope is Scope.batch else scope


@laws
@given(st.data())
def test_whitened_credit_has_mean_zero_and_no_more_than_unit_deviation_over_the_batch(data):
    scored, cfg = draw_batch(data, SCORES), replace(draw_credit(data), whiten=True)
    _, credit = credit_of(cfg, *scored)
    total = credit.weight_P.sum()  # one token a step
    assert abs((credit.weight_P * credit.advantage_P).sum().item()) < 1e-4
    assert (credit.weight_P * credit.advantage_P.square()).sum() <= max(total - 1, 0) + 1e-3


def test_depth_limit_changes_only_signals_with_a_bound():
    tree = parse_scored("prompt -> (a, b)", steps={"a": 1.0, "b": 0.0}, outcomes={"a": 1.0, "b": 0.0})
    for bound in (False, True):
        term = TermConfig(level=Level.step, signals={"step": SignalUse(bound=bound)}, normalizer=Normalizer.center)
        cfg = CreditConfig(terms={"step": replace(term, gamma=0.5)})
        _, short = credit_of(cfg, tree, max_steps=MAX_STEPS)
        _, long = credit_of(cfg, tree, max_steps=MAX_STEPS + 1)
        # 0.5^4 / 2 * 0.5 against 0.5^5 / 2 * 0.5
        assert short.advantage_P.equal(long.advantage_P * 2 if bound else long.advantage_P)
