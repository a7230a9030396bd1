"""Laws of credit on random batches, and agreement with a slow version that walks the trees one pair at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from credit_forests import MAX_STEPS, credit_of, per_node, per_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_credit import slow_credit

from conf.check_credit import BROADCASTS, GROUPS_OF_TRAJECTORIES, TOKEN_MEANS, term_faults
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
    SignalUse,
    TermConfig,
    TokenWeight,
)
from rewards.drawn import parse_scored
from rewards.types import Score, ScoredTree
from rollout.tree import ROOT, Tree

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

ALONE = [Normalizer.none, Normalizer.max_return]
"""Normalisers that subtract nothing."""
COMPARING = [
    Normalizer.center,
    Normalizer.zscore,
    Normalizer.leave_one_out,
    Normalizer.rank,
    Normalizer.whiten,
    Normalizer.center_batch_std,
]
STEP_GROUPS = [
    *(Scope.prompt, Scope.tree, Scope.siblings, Scope.turn_index, Scope.turn_index_padded),
    *(Scope.state_key, Scope.batch),
]
TRAJECTORY_SCOPES = [Scope.prompt, Scope.tree, Scope.batch, Scope.ancestors, Scope.ancestors_by_size]
PLAIN = {"combine": Combine.sum, "returns": Return.immediate, "reads": [Read.score]}
"""Values that move with the scores they are made of."""

laws = settings(max_examples=20, deadline=None)


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
        observation_tokens=data.draw(st.integers(0, 1)),
        steps={name: data.draw(scores) for name in names},
        outcomes={name: data.draw(scores) for name in leaves},
    )


def draw_term(data: st.DataObject, **fixed) -> TermConfig:
    """A term that can work, of signals that all trees have; `fixed` are fields that must be as they are."""

    def draw(name: str, choices) -> Any:
        return fixed[name] if name in fixed else data.draw(st.sampled_from(list(choices)))

    level = draw("level", Level)
    is_step = level is Level.step
    returns = draw("returns", [Return.immediate, Return.to_go] if is_step else [*BROADCASTS, Return.immediate])
    reads_steps = is_step or returns is not Return.immediate
    compare = draw("compare", Compare) if returns is Return.to_go else Compare.returns
    combine = (
        draw("combine", [Combine.sum, Combine.overwrite, Combine.renorm, Combine.gate]) if is_step else Combine.sum
    )
    names = [["outcome"], ["step"], ["outcome", "step"]] if reads_steps else [["outcome"]]
    if combine is not Combine.sum:
        names = names[2:]
    groups = [scope for scope in STEP_GROUPS if compare is Compare.returns or scope is not Scope.turn_index_padded]
    baselines = [] if compare is Compare.rewards else [Scope.parent_value, Scope.root_value]
    scope = draw("scope", [*groups, *baselines] if is_step else TRAJECTORY_SCOPES)
    backups = [each for each in Backup if each is not Backup.none] if scope in baselines else list(Backup)
    signs_are_exact = returns is Return.immediate and combine is Combine.sum
    backup = draw("backup", [each for each in backups if signs_are_exact or each is not Backup.any])
    if scope is Scope.turn_index_padded:
        backup = Backup.none
    # The sign of a sum, which Backup.any asks for, is rounding's to say.
    reads = [Read.score] if backup is Backup.any or scope in baselines else fixed.get("reads", list(Read))
    normalizers = [*ALONE, *COMPARING]
    if scope in (Scope.turn_index_padded, Scope.ancestors, Scope.ancestors_by_size):
        normalizers.remove(Normalizer.center_batch_std)
    if compare is Compare.rewards and scope in GROUPS_OF_TRAJECTORIES:
        normalizers += TOKEN_MEANS
    return TermConfig(
        level=level,
        signals=fixed.get("signals") or draw_signals(data, data.draw(st.sampled_from(names)), reads),
        combine=combine,
        returns=returns,
        backup=backup,
        gamma=1.0 if scope in baselines else draw("gamma", [0.5, 0.95, 1.0]),
        compare=compare,
        scope=scope,
        normalizer=Normalizer.center if scope in baselines else draw("normalizer", normalizers),
        ddof=draw("ddof", [0, 1]),
        eps=draw("eps", [0.0, 1e-6, 0.01]),
        min_std=draw("min_std", [0.0, 0.1]),
        singleton=draw("singleton", Degenerate),
        zero_variance=draw("zero_variance", Degenerate),
        weight=draw("weight", [0.0, 0.5, 1.0]),
    )


def draw_signals(data: st.DataObject, names: list[str], reads: list[Read]) -> dict[str, SignalUse]:
    return {
        name: SignalUse(
            scale=data.draw(st.sampled_from([1.0, 2.0])),
            shift=-0.25,
            read=data.draw(st.sampled_from(reads)) if name == "step" else Read.score,
        )
        for name in names
    }


def draw_credit(data: st.DataObject, **fixed) -> CreditConfig:
    terms = {f"term{index}": draw_term(data, **fixed) for index in range(data.draw(st.integers(1, 3)))}
    weight = data.draw(st.sampled_from(TokenWeight))
    cfg = CreditConfig(terms=terms, whiten=data.draw(st.booleans()), shared_token_weight=weight)
    assert term_faults(cfg) == []
    return cfg


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
    backup = data.draw(st.sampled_from([each for each in Backup if each is not Backup.any]))
    cfg = draw_credit(
        data,
        normalizer=normalizer,
        singleton=Degenerate.zero,
        zero_variance=Degenerate.zero,
        gamma=1.0,
        **PLAIN,
        scope=Scope.prompt,
        backup=backup,
    )
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
        data,
        level=Level.step,
        scope=Scope.siblings,
        backup=Backup.leaf_mean,
        compare=Compare.returns,
        normalizer=normalizer,
        singleton=Degenerate.zero,
        zero_variance=Degenerate.zero,
        weight=1.0,
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
    term = draw_term(
        data,
        level=Level.step,
        scope=Scope.siblings,
        compare=Compare.returns,
        normalizer=normalizer,
        singleton=Degenerate.zero,
        zero_variance=Degenerate.zero,
    )
    _, credit = credit_of(CreditConfig(terms={"fork": term}), tree)
    assert not credit.advantage_P.any()


@laws
@given(st.data())
def test_trajectory_whose_verdict_failed_changes_no_others_advantage(data):
    scored = draw_batch(data, SCORES)
    term = draw_term(data, signals={"outcome": SignalUse()}, combine=Combine.sum)
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
    cfg = draw_credit(data, level=Level.trajectory, returns=Return.immediate, weight=1.0)
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
    own = {name: own_term(term) for name, term in drawn.terms.items()}
    cfg = replace(drawn, terms=own, whiten=False)
    forest, together = credit_of(cfg, *scored)
    advantage = per_node(forest, together.advantage_N, *scored)
    for each in scored:
        own_forest, alone = credit_of(cfg, each)
        for name, value in per_node(own_forest, alone.advantage_N, each).items():
            assert value == pytest.approx(advantage[name], abs=1e-6)


def own_term(term: TermConfig) -> TermConfig:
    """The term without what reads the whole batch."""
    signals = {
        name: replace(use, read=Read.score if use.read is Read.max_return else use.read)
        for name, use in term.signals.items()
    }
    scope = Scope.prompt if term.scope is Scope.batch else term.scope
    by_batch = term.normalizer is Normalizer.center_batch_std
    return replace(term, scope=scope, signals=signals, normalizer=Normalizer.center if by_batch else term.normalizer)


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


def scaled(scored: ScoredTree, scale: float) -> ScoredTree:
    """The same tree with every score multiplied."""

    def times(signals):
        return {
            name: {row: Score(score.value * scale) for row, score in by_row.items()} for name, by_row in signals.items()
        }

    return replace(scored, step_signals=times(scored.step_signals), leaf_signals=times(scored.leaf_signals))


@pytest.mark.parametrize("scale", [0.5, 8.0])
@laws
@given(data=st.data())
def test_scaled_scores_scale_what_is_centred_and_leave_zscores_and_places_as_they_are(scale, data):
    scored = draw_batch(data, VALUES.map(Score))
    normalizer, factor = data.draw(
        st.sampled_from([(Normalizer.center, scale), (Normalizer.zscore, 1.0), (Normalizer.rank, 1.0)])
    )
    signals = {"outcome": SignalUse(), "step": SignalUse()}
    term = draw_term(
        data, level=Level.step, signals=signals, normalizer=normalizer, eps=0.0, min_std=0.0,
        scope=data.draw(st.sampled_from(STEP_GROUPS)), combine=Combine.sum, backup=Backup.leaf_mean,
        compare=Compare.returns, singleton=Degenerate.zero, zero_variance=Degenerate.zero,
    )  # fmt: skip
    _, before = credit_of(CreditConfig(terms={"x": term}), *scored)
    _, after = credit_of(CreditConfig(terms={"x": term}), *[scaled(each, scale) for each in scored])
    assert after.advantage_P.tolist() == pytest.approx((factor * before.advantage_P).tolist(), abs=1e-5)


@laws
@given(st.data())
def test_gains_of_the_steps_that_continue_a_step_cancel_out(data):
    scored = draw_batch(data, VALUES.map(Score))
    by_leaves = data.draw(st.booleans())
    backup = Backup.leaf_mean if by_leaves else Backup.child_mean
    term = TermConfig(
        level=Level.step,
        signals={"outcome": SignalUse()},
        backup=backup,
        scope=Scope.parent_value,
        normalizer=Normalizer.center,
    )
    forest, credit = credit_of(CreditConfig(terms={"gain": term}), *scored)
    share_N = forest.num_leaves_N if by_leaves else torch.ones_like(forest.num_leaves_N)
    forks: dict[tuple[int, int], float] = {}
    for fork, gain in zip(
        zip(forest.prompt_N.tolist(), forest.parent_N.tolist(), strict=True),
        (share_N * credit.advantage_N).tolist(),
        strict=True,
    ):
        forks[fork] = forks.get(fork, 0.0) + gain
    assert list(forks.values()) == pytest.approx([0.0] * len(forks), abs=1e-5)


def copies(scored: ScoredTree) -> ScoredTree:
    """Every trajectory as a chain of its own, shared steps as often as they are shared."""
    tree = Tree(prompt=scored.tree.prompt)
    copied = ScoredTree(tree=tree)
    for signals, found in ((scored.step_signals, copied.step_signals), (scored.leaf_signals, copied.leaf_signals)):
        found.update({name: {} for name in signals})
    for leaf in scored.tree.leaves():
        parent = ROOT
        for row in scored.tree.path(leaf):
            parent = tree.add(replace(scored.tree.nodes[row], parent=parent, branch=scored.tree.nodes[leaf].branch))
            for name, scores in scored.step_signals.items():
                copied.step_signals[name][parent] = scores[row]
        for name, scores in scored.leaf_signals.items():
            copied.leaf_signals[name][parent] = scores[leaf]
    return copied


@laws
@given(st.data())
def test_shared_steps_are_trained_as_their_copies_would_be(data):
    scored = draw_batch(data, SCORES)
    if data.draw(st.booleans()):
        scope = data.draw(st.sampled_from([Scope.prompt, Scope.tree, Scope.batch]))
        term = draw_term(data, level=Level.trajectory, scope=scope, reads=[Read.score], weight=1.0)
    else:
        scope = data.draw(st.sampled_from([Scope.turn_index, Scope.turn_index_padded, Scope.batch]))
        term = draw_term(
            data, level=Level.step, returns=Return.to_go, compare=Compare.returns, backup=Backup.none, scope=scope,
            reads=[Read.score], weight=1.0,
        )  # fmt: skip
    cfg = CreditConfig(terms={"x": term}, whiten=data.draw(st.booleans()))
    forest, credit = credit_of(cfg, *scored)
    apart, separate = credit_of(cfg, *[copies(each) for each in scored])
    assert credit.advantage_P.tolist() == pytest.approx(separate.advantage_P.tolist(), abs=1e-5)
    assert credit.weight_P.equal(separate.weight_P)
    # at ratio 1 the gradient of a step is its sum of weight * advantage, whatever the clip
    gradient_N = torch.zeros(len(forest.parent_N)).index_add(
        0, forest.pair_node_P, (separate.w_pos_N + separate.w_neg_N)[apart.pair_node_P]
    )
    assert (credit.w_pos_N + credit.w_neg_N).tolist() == pytest.approx(gradient_N.tolist(), abs=1e-5)
