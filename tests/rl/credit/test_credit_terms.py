"""Parts of terms that no shipped method shows by itself."""

import pytest
import torch
from credit_forests import balanced, credit_config, credit_of, measured_credit, per_node, per_pair, with_lengths

from conf.errors import ConfigError
from rewards.drawn import parse_scored
from rewards.types import Score
from rl.credit.assign import assign
from rl.credit.forest import forest_of
from rl.credit.measured import Needs, measurements_needed
from rollout.tree import ROOT

FAILED = Score.failed("judge is down")


def advantages(term, tree) -> dict[str, float]:
    forest, credit = credit_of(credit_config({"terms": {"x": term}}), tree)
    return per_node(forest, credit.advantage_N, tree)


def plain(**term):
    """What a step earns or is worth, compared with nothing."""
    return {"level": "step", "normalizer": "none", **term}


BOTH = {"step": {}, "outcome": {}}


def test_last_step_earns_its_own_score_and_the_outcome_or_the_outcome_alone():
    tree = parse_scored("q -> a -> a1", steps={"a": 0.5, "a1": 0.25}, outcomes={"a1": 1.0})
    assert advantages(plain(signals=BOTH, returns="to_go"), tree) == {"a": 1.75, "a1": 1.25}
    assert advantages(plain(signals=BOTH, returns="to_go", combine="overwrite"), tree) == {"a": 1.5, "a1": 1}
    assert advantages(plain(signals=BOTH, combine="overwrite"), tree) == {"a": 1.5, "a1": 1}


def test_gate_opens_for_steps_of_right_trajectories_alone():
    tree = parse_scored(
        "q -> (a -> (a1, a2), b)", steps={"a": 0.5, "a1": 0.25, "b": 0.5}, outcomes={"a1": 1, "a2": 0, "b": 0}
    )
    term = plain(signals=BOTH, combine="gate", backup="none")
    forest, credit = credit_of(credit_config({"terms": {"x": term}}), tree)
    got = per_pair(forest, credit.advantage_P, tree)
    assert got == {("a1", "a"): 1.5, ("a1", "a1"): 1.25, ("a2", "a"): 0, ("a2", "a2"): 0, ("b", "b"): 0}
    assert advantages({**term, "backup": "leaf_mean"}, tree)["a"] == 0.75


def test_each_trajectory_through_a_step_keeps_its_own_return_without_backup():
    tree = parse_scored("q -> a -> (a1, a2)", steps={"a": 1.0, "a1": 2.0, "a2": 4.0})
    term = plain(signals={"step": {}}, returns="to_go", gamma=0.5)
    forest, credit = credit_of(credit_config({"terms": {"x": {**term, "backup": "none"}}}), tree)
    assert per_pair(forest, credit.advantage_P, tree) == {
        ("a1", "a"): 2, ("a1", "a1"): 2, ("a2", "a"): 3, ("a2", "a2"): 4
    }  # fmt: skip
    assert advantages(term, tree)["a"] == 2.5


def test_return_is_not_known_before_a_step_whose_score_failed_and_known_behind_it():
    tree = parse_scored("q -> a -> a1 -> a2", steps={"a": 1.0, "a1": FAILED, "a2": 1.0})
    forest, credit = credit_of(credit_config({"terms": {"x": plain(signals={"step": {}}, returns="to_go")}}), tree)
    assert per_node(forest, credit.w0_N, tree) == {"a": 0, "a1": 0, "a2": 1}


def test_trajectory_is_worth_the_sum_or_the_mean_of_its_steps_and_its_outcome():
    tree = parse_scored("q -> (a -> a1, b)", steps={"a": 1.0, "a1": 3.0, "b": 2.0}, outcomes={"a1": 10.0, "b": 20.0})
    term = {"signals": BOTH, "normalizer": "none"}
    assert advantages({**term, "returns": "broadcast"}, tree) == {"a": 14, "a1": 14, "b": 22}
    assert advantages({**term, "returns": "broadcast_mean"}, tree) == {"a": 12, "a1": 12, "b": 22}


def test_blend_of_outcome_and_mean_step_score_as_the_baseline_of_prof():
    steps = {"a1": 0.9, "a2": 0.8, "a3": 0.9, "b1": 0.6, "b2": 0.3}
    tree = parse_scored(
        "q -> (a1 -> a2 -> a3, b1 -> b2)", steps=steps, outcomes={"a3": 1.0, "b2": 0.0}, step_signal="prm"
    )
    term = {"signals": {"outcome": {}, "prm": {"scale": 0.8}}, "returns": "broadcast_mean", "normalizer": "none"}
    assert advantages(term, tree)["a1"] == pytest.approx(1.693333)
    assert advantages(term, tree)["b1"] == pytest.approx(0.36)


def test_mean_of_steps_leaves_out_those_that_nothing_is_said_of():
    tree = parse_scored("q -> a -> a1", steps={"a": 1.0, "a1": None})
    term = {"signals": {"step": {}}, "returns": "broadcast_mean", "normalizer": "none"}
    assert advantages(term, tree) == {"a": 1, "a1": 1}


PARENT = {"level": "step", "scope": "parent_value", "normalizer": "center"}


def test_value_of_the_prompt_is_what_a_source_says_of_it():
    tree = parse_scored("q -> (a -> a1, b)", steps={"a": 0.5, "a1": 1.0, "b": 0.0})
    assert advantages({**PARENT, "signals": {"step": {}}}, tree) == {"a": 0.25, "a1": 0.5, "b": -0.25}
    tree.step_signals["step"][ROOT] = Score(0.75)
    assert advantages({**PARENT, "signals": {"step": {}}}, tree) == {"a": -0.25, "a1": 0.5, "b": -0.75}


def test_step_behind_one_without_a_value_has_nothing_to_be_compared_with():
    tree = parse_scored("q -> a -> a1", steps={"a": FAILED, "a1": 1.0})
    _, credit = credit_of(credit_config({"terms": {"x": {**PARENT, "signals": {"step": {}}}}}), tree)
    assert not credit.weight_P.any()


@pytest.mark.parametrize(("policy", "advantage", "weight"), [("zero", 0, 1), ("raw", 1, 1), ("drop", 0, 0)])
def test_step_that_is_worth_what_it_is_compared_with(policy, advantage, weight):
    tree = parse_scored("q -> a -> a1", outcomes={"a1": 1.0})
    term = {**PARENT, "signals": {"outcome": {}}, "zero_variance": policy}
    forest, credit = credit_of(credit_config({"terms": {"x": term}}), tree)
    assert per_node(forest, credit.advantage_N, tree)["a1"] == advantage
    assert per_node(forest, credit.w0_N, tree)["a1"] == weight


CRITIC = {"level": "step", "signals": {"outcome": {}}, "scope": "critic", "normalizer": "center"}


def test_term_can_be_compared_with_the_critic_who_then_learns_its_values():
    tree = with_lengths(parse_scored("q -> (a -> a1, b)", outcomes={"a1": 1.0, "b": 0.0}), {"a": 2})
    values = {"a": [0.25, 0.5], "a1": [0.75], "b": [0.5]}
    forest, credit = measured_credit(credit_config({"terms": {"x": CRITIC}}), tree, values=values)
    assert per_node(forest, credit.advantage_N, tree) == {"a": 0.75, "a1": 0.25, "b": -0.5}
    assert credit.critic is not None
    assert credit.critic.target_T.tolist() == [1, 1, 1, 0]
    assert not credit.critic.extra_T.any()


def test_critic_learns_nothing_of_a_step_without_a_value():
    tree = parse_scored("q -> (a, b)", outcomes={"a": FAILED, "b": 1.0})
    cfg = credit_config({"terms": {"x": CRITIC}})
    _, credit = measured_credit(cfg, tree, values={"a": [0.25], "b": [0.5]})
    assert credit.critic is not None
    assert credit.critic.target_T.tolist() == [0.25, 1]
    assert measurements_needed(cfg) == Needs(kl=False, value=True)


def test_running_normaliser_remembers_the_steps_before():
    term = {"signals": {"outcome": {}}, "scope": "batch", "normalizer": "running", "eps": 0.0}
    cfg = credit_config({"terms": {"x": term}})
    first, second = (
        parse_scored("q -> (a, b)", outcomes={"a": 0.0, "b": 2.0}),
        parse_scored("q -> c", outcomes={"c": 4.0}),
    )
    _, credit = credit_of(cfg, first)
    assert credit.advantage_P.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    # 0, 2 and 4: mean 2, deviation 2
    assert assign(forest_of([second]), cfg, 4, credit.history).advantage_P.tolist() == [1]
    assert credit_of(cfg, second)[1].advantage_P.tolist() == [0]  # nothing before it, no spread


def test_credit_of_other_normalisers_has_no_history():
    _, credit = credit_of(credit_config({"terms": {"x": {"signals": {"outcome": {}}}}}), balanced())
    assert credit.history == {}


FAULTS = [
    ({**PARENT, "signals": {"outcome": {"read": "difference"}}}, "it would be taken twice"),
    ({"level": "step", "combine": "gate"}, "combine=gate combines signals of steps with those of trajectories"),
    ({"level": "step", "returns": "broadcast"}, "returns=broadcast gives a trajectory one value"),
    ({"returns": "to_go"}, "returns=to_go differs from step to step"),
    ({"combine": "renorm"}, "combine=renorm says what steps earn"),
    ({"level": "step", "scope": "ancestors"}, "scope=ancestors compares whole trajectories"),
    ({"scope": "siblings"}, "scope=siblings compares steps, but level=trajectory"),
    ({"level": "step", "compare": "rewards"}, "compare=rewards takes the return of what was compared"),
    ({"level": "step", "scope": "root_value"}, "scope=root_value is one value and has no deviation"),
    ({**PARENT, "gamma": 0.9}, "decay would look like progress"),
    ({**PARENT, "backup": "none"}, "without backup a step has no one value"),
    ({"level": "step", "scope": "turn_index_padded"}, "scope=turn_index_padded counts trajectories"),
    ({"scope": "ancestors", "normalizer": "center_batch_std"}, "normalizer=center_batch_std takes the deviation"),
    ({"normalizer": "token_leave_one_out"}, "is a mean reward per token of other trajectories"),
    ({"normalizer": "running"}, "normalizer=running compares with all that the run has seen"),
    ({"level": "step", "combine": "four_cases", "scope": "siblings"}, "combine=four_cases starts from trajectories"),
    ({"token_weighted": True, "normalizer": "rank"}, "token_weighted=true weighs the mean of a group"),
    ({"signals": {"outcome": {"best_of": 0}}}, "signals.outcome.best_of=0 must be 1 or more"),
]


@pytest.mark.parametrize(("term", "text"), FAULTS)
def test_term_that_cannot_do_what_it_says_is_refused(term, text):
    with pytest.raises(ConfigError, match=r"credit\.terms\.x") as error:
        credit_of(credit_config({"terms": {"x": {"signals": {"outcome": {}}, **term}}}), balanced())
    assert text in str(error.value)


def test_two_that_learn_from_one_critic_are_refused():
    cfg = credit_config({"terms": {"x": CRITIC}, "gae": {"level": "step", "signals": {"outcome": {}}}})
    with pytest.raises(ConfigError, match="more than one thing that compares with the critic"):
        credit_of(cfg, balanced())


def test_gae_compares_no_trajectories():
    cfg = credit_config({"gae": {"level": "step", "signals": {"outcome": {}}, "combine": "gate"}})
    with pytest.raises(ConfigError, match=r"credit\.gae\.combine=gate compares trajectories"):
        credit_of(cfg, balanced())


def test_outcome_has_no_steps_to_read_a_difference_from():
    term = {"signals": {"outcome": {"read": "difference"}}}
    with pytest.raises(
        ConfigError, match=r"terms.x.signals.outcome has read=difference and best_of=1, but it scores whole"
    ):
        credit_of(credit_config({"terms": {"x": term}}), balanced())


# ---- a shared step and its copies ----


def test_training_a_shared_step_once_is_training_its_copies_at_ratio_1_and_not_under_the_clip():
    tree = parse_scored("q -> a -> (a1, a2)", outcomes={"a1": 1.0, "a2": -0.5})
    term = {"signals": {"outcome": {}}, "normalizer": "none"}
    forest, credit = credit_of(credit_config({"terms": {"x": term}}), tree)
    shared = forest.pair_node_P == 0

    def surrogate(ratio: torch.Tensor, advantage: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        clipped = ratio.clamp(0.8, 1.2)
        return (weight * torch.minimum(ratio * advantage, clipped * advantage)).sum()

    def slopes(old_ratio: float) -> tuple[float, float]:
        found = []
        for advantage, weight in (
            (credit.advantage_P[shared], credit.weight_P[shared]),
            (credit.advantage_N[:1], credit.w0_N[:1]),
        ):
            ratio = torch.tensor(old_ratio, requires_grad=True)
            surrogate(ratio, advantage, weight).backward()
            assert ratio.grad is not None
            found.append(ratio.grad.item())
        return found[0], found[1]

    copies, once = slopes(1.0)
    assert copies == once == 0.5
    copies, once = slopes(1.3)
    assert copies != once  # what is positive is clipped, what is negative is not
    assert copies == -0.5  # and the two sums that the learner gets keep the two apart
    assert (credit.w_pos_N[0].item(), credit.w_neg_N[0].item()) == (1, -0.5)
