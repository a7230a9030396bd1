import math

import pytest
from credit_forests import balanced, credit_config, credit_of, per_node, per_pair, ragged, recipe

from conf.errors import ConfigError, UnscoredNode
from rewards.drawn import parse_scored
from rewards.types import Score

FAILED = Score.failed("judge is down")
OUTCOME_TERM = {"signals": {"outcome": {}}, "normalizer": "center"}
STEP_TERM = {"level": "step", "signals": {"step": {}}, "normalizer": "center"}


def terms(**by_name):
    return credit_config({"terms": by_name})


def test_pair_whose_only_verdict_failed_is_neither_trained_nor_counted():
    tree = balanced(outcomes={"a1": FAILED, "a2": 1.0, "b1": 0.0, "b2": 0.0})
    forest, credit = credit_of(terms(trajectory=OUTCOME_TERM), tree)
    weight = per_pair(forest, credit.weight_P, tree)
    assert {pair for pair, value in weight.items() if value == 0} == {("a1", "a"), ("a1", "a1")}
    advantage = per_pair(forest, credit.advantage_P, tree)
    assert advantage["a1", "a"] == 0
    assert advantage["a2", "a"] == pytest.approx(2 / 3)  # mean of 1, 0, 0
    assert per_node(forest, credit.w0_N, tree)["a"] == 1


def test_trajectory_without_a_verdict_still_learns_from_its_steps():
    tree = balanced(
        outcomes={"a1": FAILED, "a2": 0.0, "b1": 0.0, "b2": 0.0},
        steps={"a": 1.0, "a1": 1.0, "a2": 0.0, "b": 0.0, "b1": 0.0, "b2": 0.0},
    )
    forest, credit = credit_of(terms(trajectory=OUTCOME_TERM, step=STEP_TERM), tree)
    assert per_pair(forest, credit.weight_P, tree)["a1", "a1"] == 1
    assert per_pair(forest, credit.parts["trajectory"], tree)["a1", "a1"] == 0
    assert per_pair(forest, credit.advantage_P, tree)["a1", "a1"] == pytest.approx(1 - 2 / 6)


def test_outcome_that_does_not_apply_is_no_verdict_either():
    tree = balanced(outcomes={"a1": None, "a2": 1.0, "b1": 0.0, "b2": 0.0})
    forest, credit = credit_of(terms(trajectory=OUTCOME_TERM), tree)
    assert per_pair(forest, credit.weight_P, tree)["a1", "a1"] == 0


FORK_OF_BOTH = {"level": "step", "signals": {"outcome": {}, "step": {}}, "scope": "siblings", "normalizer": "center"}


def test_step_that_its_source_has_nothing_to_say_of_is_compared_by_its_leaves_alone():
    tree = balanced(steps={"a": None, "b": 0.25})
    forest, credit = credit_of(terms(fork=FORK_OF_BOTH), tree)
    # a: .5 from its leaves; b: 0 + .25; mean .375
    advantage = per_node(forest, credit.advantage_N, tree)
    assert (advantage["a"], advantage["b"]) == (0.125, -0.125)


def test_step_whose_score_failed_is_out_of_its_fork_though_its_leaves_are_known():
    tree = balanced(steps={"a": FAILED, "b": 0.25})
    forest, credit = credit_of(terms(fork=FORK_OF_BOTH), tree)
    assert per_node(forest, credit.w0_N, tree)["a"] == 0
    assert per_node(forest, credit.advantage_N, tree)["b"] == 0  # alone in what is left of the fork
    assert per_node(forest, credit.w0_N, tree)["b"] == 2


def test_step_with_no_known_leaf_is_out_of_its_fork_though_its_own_score_is_known():
    tree = balanced(
        outcomes={"a1": FAILED, "a2": FAILED, "b1": 0.0, "b2": 0.0},
        steps={"a": 1.0, "b": 0.25},
    )
    forest, credit = credit_of(terms(fork=FORK_OF_BOTH), tree)
    assert per_node(forest, credit.w0_N, tree)["a"] == 0


def test_step_that_nothing_speaks_for_is_not_trained():
    tree = balanced(steps={"a": None, "a1": 1.0, "a2": 0.0})
    forest, credit = credit_of(terms(step=STEP_TERM), tree)
    assert per_node(forest, credit.w0_N, tree) == {"a": 0, "a1": 1, "a2": 1, "b": 0, "b1": 0, "b2": 0}


def test_bound_squeezes_a_signal_below_the_smallest_decayed_outcome():
    fork = {"level": "step", "signals": {"step": {"bound": True}}, "gamma": 0.5, "normalizer": "none"}
    tree = parse_scored("prompt -> (a, b)", steps={"a": 1.0, "b": -1.0})
    forest, credit = credit_of(terms(fork=fork), tree, max_steps=3)
    assert per_node(forest, credit.advantage_N, tree) == {"a": 0.0625, "b": -0.0625}  # 0.5^3 / 2


def test_best_leaf_is_best_by_the_sum_of_its_signals():
    tree = parse_scored("prompt -> a -> (a1, a2)", outcomes={"a1": 1.0, "a2": 0.0})
    brevity = parse_scored("prompt -> a -> (a1, a2)", outcomes={"a1": 0.0, "a2": 3.0}, outcome_signal="brevity")
    tree.leaf_signals |= brevity.leaf_signals
    best = {"level": "step", "signals": {"outcome": {}, "brevity": {}}, "backup": "max", "normalizer": "none"}
    forest, credit = credit_of(terms(best=best), tree)
    assert per_node(forest, credit.advantage_N, tree)["a"] == 3  # 0 + 3, not 1 + 3


@pytest.mark.parametrize(
    ("rule", "weight_of_one", "weight_of_all"),
    [("per_leaf", 1, 4), ("sqrt_leaf", 0.5, 2), ("unique", 0.25, 1)],
)
def test_step_shared_by_four_trajectories_counts_by_the_rule(rule, weight_of_one, weight_of_all):
    leaves = {"s1": 1.0, "s2": 0.0, "s3": 0.0, "s4": 0.0}
    tree = parse_scored("prompt -> s -> (s1, s2, s3, s4)", outcomes=leaves)
    cfg = credit_config({"shared_token_weight": rule, "terms": {"trajectory": OUTCOME_TERM}})
    forest, credit = credit_of(cfg, tree)
    assert per_pair(forest, credit.weight_P, tree)["s1", "s"] == weight_of_one
    assert per_node(forest, credit.w0_N, tree) == {"s": weight_of_all, "s1": 1, "s2": 1, "s3": 1, "s4": 1}
    # advantages .75, -.25, -.25, -.25
    assert per_node(forest, credit.w_pos_N, tree)["s"] == 0.75 * weight_of_one
    assert per_node(forest, credit.w_neg_N, tree)["s"] == -0.75 * weight_of_one
    assert per_node(forest, credit.advantage_N, tree)["s"] == 0


def test_step_counts_once_when_one_of_its_trajectories_has_no_verdict():
    tree = balanced(outcomes={"a1": FAILED, "a2": 1.0, "b1": 0.0, "b2": 0.0})
    cfg = credit_config({"shared_token_weight": "unique", "terms": {"trajectory": OUTCOME_TERM}})
    forest, credit = credit_of(cfg, tree)
    assert per_node(forest, credit.w0_N, tree) == {"a": 1, "a1": 0, "a2": 1, "b": 1, "b1": 1, "b2": 1}


def test_parts_carry_their_weights_and_add_up():
    tree = ragged(steps=dict.fromkeys(["p", "q", "q1", "q2", "r", "r1", "r2"], 1.0))
    forest, credit = credit_of(recipe("portool"), tree)
    assert list(credit.parts) == ["trajectory", "fork"]
    assert (sum(credit.parts.values()) - credit.advantage_P).abs().max() < 1e-6
    assert per_pair(forest, credit.parts["trajectory"], tree)["p", "p"] == pytest.approx(0.25, abs=1e-5)


def test_term_of_weight_zero_is_as_good_as_absent():
    tree = balanced(
        outcomes={"a1": FAILED, "a2": 1.0, "b1": 0.0, "b2": 0.0}, steps={"a": 1.0, "a1": 0.5, "a2": 0.0, "b": 0.0}
    )
    _, alone = credit_of(terms(trajectory=OUTCOME_TERM), tree)
    _, silenced = credit_of(terms(trajectory=OUTCOME_TERM, step={**STEP_TERM, "weight": 0.0}), tree)
    assert silenced.advantage_P.equal(alone.advantage_P)
    assert silenced.weight_P.equal(alone.weight_P)


RECIPES = ["grpo", "portool", "tree_grpo", "tree_step", "chain_step", "dr_grpo", "reinforce_pp_baseline"]


@pytest.mark.parametrize("name", RECIPES)
def test_batch_without_a_trained_trajectory_has_empty_credit(name):
    _, credit = credit_of(recipe(name))
    assert credit.advantage_P.shape == credit.weight_P.shape == credit.w0_N.shape == (0,)


@pytest.mark.parametrize("name", RECIPES)
def test_batch_in_which_everything_failed_trains_nothing(name):
    steps = dict.fromkeys(["a", "a1", "a2", "b", "b1", "b2"], FAILED)
    tree = balanced(steps=steps, outcomes=dict.fromkeys(["a1", "a2", "b1", "b2"], FAILED))
    _, credit = credit_of(recipe(name), tree)
    for tensor in (
        credit.advantage_P,
        credit.weight_P,
        credit.w_pos_N,
        credit.w_neg_N,
        credit.w0_N,
        credit.advantage_N,
    ):
        assert not tensor.any()


def test_unknown_signal_is_refused_with_what_there_is_and_what_is_near():
    with pytest.raises(ConfigError) as error:
        credit_of(terms(trajectory={"signals": {"outcomes": {}}}), balanced(steps={"a": 1.0}))
    assert str(error.value) == (
        'credit.terms.trajectory.signals names "outcomes", which no tree of the batch has, so the term could train '
        'nothing. Available: outcome, step. Did you mean "outcome"? Name one of these, or add a source that feeds it.'
    )


def test_step_signal_in_a_trajectory_term_is_refused():
    with pytest.raises(ConfigError, match=r'terms.x.signals names "step", which scores steps.*Use level=step'):
        credit_of(terms(x={"signals": {"step": {}}}), balanced(steps={"a": 1.0}))


def test_signal_that_is_both_a_steps_and_a_trajectorys_is_refused_in_a_step_term():
    tree = balanced(steps={"a": 1.0}, step_signal="outcome")
    with pytest.raises(ConfigError, match="fed by sources of steps and by sources of trajectories"):
        credit_of(terms(x={"level": "step", "signals": {"outcome": {}}}), tree)


def test_credit_without_terms_and_a_term_without_signals_are_refused():
    with pytest.raises(ConfigError, match=r"credit.terms is empty"):
        credit_of(credit_config({}), balanced())
    with pytest.raises(ConfigError, match=r"credit.terms.x.signals is empty"):
        credit_of(terms(x={}), balanced())


def test_advantages_never_carry_nan_into_the_learner():
    tree = parse_scored("prompt -> a", outcomes={"a": 1.0})
    _, credit = credit_of(recipe("grpo"), tree)
    assert credit.advantage_P.tolist() == [0.0]
    assert not math.isnan(credit.advantage_N.item())
    assert credit.weight_P.tolist() == [1.0]


def test_score_that_overflows_its_scale_is_an_error_and_not_an_advantage():
    tree = balanced(outcomes={"a1": 1e308, "a2": 0.0, "b1": 0.0, "b2": 0.0})
    with pytest.raises(UnscoredNode, match="row 0 is inf"):
        credit_of(terms(trajectory={"signals": {"outcome": {"scale": 10.0}}}), tree)
