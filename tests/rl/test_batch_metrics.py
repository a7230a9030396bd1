import pytest

from rewards.drawn import answer_facts, call_facts, parse_scored, parse_tree
from rewards.types import Score
from rl.batch_metrics import reward_metrics, rollout_metrics
from rl.metrics import MetricsLog
from rollout.types import StopReason


def test_rollout_metrics_of_a_tree_that_can_be_counted_by_hand():
    # q is 1 token, every step is 1 token and every reply 2: contexts are 1 for a and b, 1+1+2=4 for a1 and a2.
    tree = parse_tree(
        "q -> (a -> (a1, a2), b)",
        facts={"a1": answer_facts(" Yes "), "a2": answer_facts("no"), "b": call_facts(ok=False)},
        stops={"b": StopReason.call_budget},
        observation_tokens=2,
        answer="yes",
    )
    tree.nodes[1].num_cached_tokens = 3
    metrics = rollout_metrics([tree], seconds=2.0)
    assert metrics["rollout/generated_tokens"] == 4
    assert metrics["rollout/tokens_per_second"] == 2.0
    assert metrics["rollout/trajectories"] == 3
    assert metrics["rollout/success_share"] == pytest.approx(1 / 3)
    assert metrics["rollout/steps_per_trajectory"] == pytest.approx((2 + 2 + 1) / 3)
    assert metrics["rollout/cached_token_share"] == pytest.approx(3 / (1 + 4 + 4 + 1))
    assert (metrics["rollout/trees"], metrics["rollout/requests"]) == (1, 4)
    assert (metrics["rollout/tokens_per_prompt"], metrics["rollout/tokens_per_turn"]) == (1, 1)
    assert metrics["rollout/tokens_per_reply"] == 2
    assert metrics["rollout/tool_ok_share"] == pytest.approx(1 / 2)
    assert metrics["rollout/stop_answered_share"] == pytest.approx(2 / 3)
    assert metrics["rollout/stop_call_budget_share"] == pytest.approx(1 / 3)
    assert metrics["rollout/stop_deadline_share"] == 0.0


def test_a_trajectory_whose_world_failed_is_counted_as_stopped_but_not_as_trained():
    tree = parse_tree("q -> (a, b)", stops={"b": StopReason.tool_crashed}, answer="a")
    metrics = rollout_metrics([tree], seconds=1.0)
    assert metrics["rollout/trajectories"] == 1
    assert metrics["rollout/success_share"] == 1.0
    assert metrics["rollout/stop_tool_crashed_share"] == 0.5


def test_a_pruned_leaf_is_generated_but_neither_trained_nor_counted_as_stopped():
    metrics = rollout_metrics([parse_tree("q -> (a, b)", pruned=["b"])], seconds=1.0)
    assert metrics["rollout/generated_tokens"] == 2
    assert metrics["rollout/trajectories"] == 1
    assert metrics["rollout/stop_answered_share"] == 1.0


def test_a_share_of_nothing_is_left_out_rather_than_called_zero():
    without_reference = rollout_metrics([parse_tree("q -> a")], seconds=1.0)
    assert "rollout/success_share" not in without_reference
    assert "rollout/tool_ok_share" not in without_reference
    counts = ("generated_tokens", "trajectories", "trees", "requests", "uncached_tokens", "cached_tokens")
    assert rollout_metrics([], seconds=0.0) == {f"rollout/{name}": 0 for name in counts}


def test_failed_scores_are_counted_and_pull_no_mean_towards_zero():
    scored = parse_scored(
        "q -> (a -> a1, b -> b1)",
        steps={"a": 1.0, "b": Score.failed("HTTP 500"), "a1": None, "b1": Score.timed_out("10 s")},
        outcomes={"a1": 1.0, "b1": 0.0},
    )
    metrics = reward_metrics([scored])
    assert metrics["reward/step_mean"] == 1.0
    assert metrics["reward/step_failed_share"] == 0.25
    assert metrics["reward/step_timed_out_share"] == 0.25
    assert metrics["reward/step_not_applicable_share"] == 0.25
    assert metrics["reward/outcome_mean"] == 0.5


def test_a_source_that_never_scored_has_shares_and_no_mean():
    metrics = reward_metrics([parse_scored("q -> a", steps={"a": Score.failed("down")})])
    assert metrics["reward/step_failed_share"] == 1.0
    assert "reward/step_mean" not in metrics


def test_a_signal_has_a_mean_of_its_own():
    scored = parse_scored("q -> a", steps={"a": 0.5})
    scored.step_signals = {"quality": {0: Score(2.0)}}
    metrics = reward_metrics([scored])
    assert metrics["reward/quality_mean"] == 2.0
    assert metrics["reward/step_mean"] == 0.5
    assert "reward/quality_failed_share" not in metrics


def test_all_that_the_helpers_compute_may_be_logged(tmp_path):
    scored = parse_scored("q -> (a, b)", steps={"a": 1.0}, outcomes={"a": 1.0, "b": 0.0}, answer="a")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, rollout_metrics([scored.tree], 1.0) | reward_metrics([scored]))
    assert log.rows[-1]["reward/outcome_mean"] == 0.5
