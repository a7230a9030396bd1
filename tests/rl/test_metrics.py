import json

import pytest

from conf.errors import DataError
from rewards.drawn import answer_facts, call_facts, parse_scored, parse_tree
from rewards.types import Score
from rl.metrics import METRICS, MetricsLog, declared, read_metrics, reward_metrics, rollout_metrics
from rollout.types import StopReason


def test_every_metric_is_declared_once_with_a_denominator():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.what and metric.denominator for metric in METRICS)


@pytest.mark.parametrize(
    "name, declaration",
    [
        ("loss/total", "loss/total"),
        ("time/grow_seconds", "time/grow_seconds"),
        ("credit/zero_advantage_share", "credit/zero_advantage_share"),
        ("credit/outcome_abs_mean", "credit/<term>_abs_mean"),
        ("rollout/stop_call_budget_share", "rollout/stop_<reason>_share"),
        ("reward/right_tool_not_applicable_share", "reward/<source>_not_applicable_share"),
    ],
)
def test_a_name_finds_its_declaration_or_its_family(name, declaration):
    found = declared(name)
    assert found is not None
    assert found.name == declaration


@pytest.mark.parametrize(
    "name", ["loss/totl", "loss/total_nats", "reward/_mean", "reward/a/b_mean", "time/nap_seconds"]
)
def test_a_name_nobody_declared_has_no_declaration(name):
    assert declared(name) is None


def test_an_undeclared_metric_is_refused_with_the_nearest_name(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(AssertionError, match=r"'loss/totl' is not declared.*nearest: loss/total"):
        log.append(1, {"loss/totl": 1.0})
    assert log.rows == []


def test_a_row_is_on_disk_as_soon_as_it_is_appended(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, {"loss/total": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss/total": 0.5}


def test_training_and_evaluation_of_one_step_become_one_row(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, {"loss/total": 0.5})
    assert log.append(1, {"eval/success_share": 0.25}) == {"step": 1, "loss/total": 0.5, "eval/success_share": 0.25}
    log.append(2, {"loss/total": 0.4})
    assert read_metrics(log.path) == log.rows
    assert [row["step"] for row in log.rows] == [1, 2]


def test_a_step_never_goes_back(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(2, {})
    with pytest.raises(AssertionError, match="step 1 comes after step 2"):
        log.append(1, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_a_gap_and_not_a_zero(tmp_path, value):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.append(1, {"loss/kl": value}) == {"step": 1, "loss/kl": None}


def test_resuming_cuts_the_rows_that_will_be_trained_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path)
    for step in (1, 2, 3, 4):
        first.append(step, {"loss/total": float(step)})
    resumed = MetricsLog(path, resume_step=2)
    resumed.append(3, {"loss/total": 30.0})
    assert [(row["step"], row["loss/total"]) for row in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_half_a_line_of_a_killed_run_is_dropped_and_never_appended_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss/total": 0.5}\n{"step": 2, "loss/to')
    assert [row["step"] for row in read_metrics(path)] == [1]
    MetricsLog(path).append(2, {"loss/total": 0.4})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_metrics(path)


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
    counts = ("generated_tokens", "trajectories", "uncached_tokens", "cached_tokens")
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
