import json

import pytest

from conf.errors import DataError
from rl.metrics import METRICS, MetricsLog, declared, read_metrics


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
