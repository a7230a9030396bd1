"""Comparing runs: grouping, points that all have reached, intervals, noise, and how many seeds would settle it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.errors import ConfigError
from rl.compare import (
    Comparison,
    Difference,
    Result,
    common_place,
    compare,
    difference,
    t_interval,
    welch_interval,
    widest,
)
from rl.compare_page import as_plain, mean_curve, rows, sentences, write_comparison
from rl.compared import ComparedRun, Group, differing, flat, groups_of, incomparable
from rl.curves import value_at
from rl.outcomes import PromptOutcome, Sample, write_outcomes
from rl.run_folder import RunFolder
from rl.statistics import Interval
from rl.sweeps.record import MemberRecord, Status, SweepRecord

POINTS = ((0, 0, 0.25), (1, 100, 0.5), (2, 200, 0.75))
"""(step, tokens, success) of a run that answers 1, 2, then 3 of four prompts."""


def written(
    folder: Path,
    name: str,
    seed: int,
    points: Sequence[tuple[int, float, float]] = POINTS,
    *,
    prompts: int = 4,
    **settings: Any,
) -> Path:
    """A run folder with metrics, settings, and outcomes of as many prompts, of which the first ones succeed."""
    run = RunFolder(folder / f"{name}-seed{seed}")
    run.evaluations.mkdir(parents=True)
    config = {"seed": seed, "run": {"name": name, "dir": str(run.path)}, "credit": {"name": name}, **settings}
    run.config.write_text(yaml.safe_dump(config))
    lines = []
    for step, tokens, success in points:
        row = {"step": step, "rollout/total_generated_tokens": tokens, "eval/success_share": success}
        lines.append(json.dumps(row) + "\n")
        right = round(success * prompts)
        outcomes = [
            PromptOutcome(prompt=f"eval/{number}", reference="", samples=[Sample(success=number < right)])
            for number in range(prompts)
        ]
        if prompts:
            write_outcomes(run.evaluation_file(step), outcomes)
    run.metrics.write_text("".join(lines))
    return run.path


def ended(success: float) -> tuple[tuple[int, float, float], ...]:
    return (0, 0, 0.25), (1, 100, success)


def run_of(seed: int, value: float, **settings: Any) -> ComparedRun:
    return ComparedRun(Path(f"run{seed}"), {"seed": seed, **settings}, [(0.0, 0.0), (100.0, value)], [])


def result_of(label: str, values: dict[int, float], **settings: Any) -> Result:
    group = Group(label, [run_of(seed, value, **settings) for seed, value in values.items()])
    return Result(group, list(values.values()), None, 0)


def against(base: dict[int, float], other: dict[int, float]) -> Difference:
    return difference(result_of("a", base), result_of("b", other), 100.0, "loss/total")


def test_a_curve_is_read_between_its_points_on_a_straight_line():
    curve = [(0.0, 0.2), (100.0, 0.6), (200.0, 0.5)]
    assert value_at(curve, 25.0) == pytest.approx(0.3) and value_at(curve, 100.0) == 0.6
    assert value_at(curve, 200.0) == 0.5 and value_at(curve, 201.0) is None and value_at([(5.0, 1.0)], 5.0) == 1.0


def test_runs_that_differ_by_seed_place_and_tracker_alone_are_a_group(tmp_path: Path):
    for name in ("grpo", "tree"):
        for seed in (0, 1):
            written(tmp_path, name, seed, tracker={"mode": "offline" if seed else "disabled"})
    found = compare(sorted(tmp_path.iterdir()))
    assert [(each.group.label, each.group.seeds) for each in found.results] == [("grpo", [0, 1]), ("tree", [0, 1])]


def test_groups_are_called_by_what_the_sweep_varies_then_by_name_then_by_what_differs():
    same = [run_of(0, 0.5, rate=1), run_of(0, 0.5, rate=2)]
    assert [group.label for group in groups_of(same)] == ["rate=1", "rate=2"]
    recipes = [run_of(0, 0.5, **{"credit.name": name, "credit.terms.x.weight": name}) for name in ("a", "b")]
    assert [group.label for group in groups_of(recipes)] == ["credit.name=a", "credit.name=b"]


def test_runs_are_compared_where_the_shortest_ends(tmp_path: Path):
    short = written(tmp_path, "short", 0, POINTS[:2])
    long = written(tmp_path, "long", 0, ((0, 0, 0.25), (1, 50, 0.25), (2, 150, 0.75)))
    found = compare([short, long])
    assert found.place == 100
    assert [each.mean for each in found.results] == pytest.approx([0.5, 0.5])  # half-way from 0.25 to 0.75
    assert any("compared at 100 generated tokens, where" in note for note in found.notes)
    by_steps = compare([short, long], by_steps=True)
    assert (by_steps.place, [each.mean for each in by_steps.results]) == (1, [0.5, 0.25])


def test_a_run_that_ends_before_others_begin_is_refused():
    late = ComparedRun(Path("late"), {}, [(200.0, 0.5)], [])
    with pytest.raises(ConfigError, match="ends at 100 generated tokens, before others have a first value"):
        common_place([run_of(0, 0.5), late], by_steps=False)


def test_students_interval_of_three_values():
    # mean 2, deviation 1, t of two degrees of freedom 4.3027
    half = 4.302653 / math.sqrt(3)
    assert t_interval([1.0, 2.0, 3.0]) == Interval(pytest.approx(2 - half), pytest.approx(2 + half))


def test_welchs_interval_of_equal_spreads_is_students_of_two_samples():
    # both have variance 1 and three values: error sqrt(2/3), four degrees of freedom, t 2.7764
    half = 2.776445 * math.sqrt(2 / 3)
    found = welch_interval([4.0, 5.0, 6.0], [1.0, 2.0, 3.0])
    assert found == Interval(pytest.approx(3 - half), pytest.approx(3 + half))
    assert welch_interval([2.0, 2.0], [1.0, 1.0]) == Interval(1.0, 1.0)


def test_two_intervals_are_spanned():
    assert widest([Interval(0.0, 2.0), Interval(1.0, 3.0)]) == Interval(0.0, 3.0) and widest([]) is None


def test_the_same_seeds_are_compared_one_by_one():
    found = against({0: 0.1, 1: 0.5, 2: 0.9}, {0: 0.2, 1: 0.6, 2: 1.0})
    # each seed gains 0.1, so that the spread of seeds, 0.4, drops out
    assert found.is_paired and found.mean == pytest.approx(0.1) and found.deviation == pytest.approx(0.0, abs=1e-9)
    assert not found.is_noise
    apart = against({0: 0.1, 1: 0.5, 2: 0.9}, {3: 0.2, 4: 0.6, 5: 1.0})
    assert not apart.is_paired and apart.is_noise and apart.deviation == pytest.approx(0.4)


def test_how_many_seeds_would_settle_it():
    # spec: 2 (2.80 s / D)^2 seeds a side; s = 1.5 points: D = 1 -> 36, 2 -> 9, 3 -> 4
    for points, seeds in ((1, 36), (2, 9), (3, 4)):
        assert Difference(Group("b"), "", points / 100, None, False, 0.015).seeds_needed == seeds
    # paired: (2.80 s / D)^2, s of the differences
    assert Difference(Group("b"), "", 0.01, None, True, 0.015).seeds_needed == 18
    assert Difference(Group("b"), "", 0.5, None, True, 0.015).seeds_needed == 2, "one seed is none"
    assert Difference(Group("b"), "", 0.0, None, True, 0.015).seeds_needed is None


def test_one_seed_is_never_more_than_noise(tmp_path: Path):
    one, other = written(tmp_path, "a", 0, ended(0.0), prompts=100), written(tmp_path, "b", 0, ended(1.0), prompts=100)
    found = compare([one, other])
    assert found.differences[0].interval == Interval(pytest.approx(1.0), pytest.approx(1.0))
    assert found.differences[0].is_noise
    assert '"b" looks better than "a" by 100.0 points, but one seed says nothing of the next' in sentences(found)[0]


def test_no_success_at_all_still_has_an_interval(tmp_path: Path):
    runs = [written(tmp_path, "a", seed, ((0, 0, 0.0), (1, 100, 0.0)), prompts=32) for seed in (0, 1)]
    # Wilson of 0 of 32: z^2 / (n + z^2) = 3.8415 / 35.8415
    assert compare(runs).results[0].interval == Interval(0.0, pytest.approx(3.8415 / 35.8415, abs=1e-4))


def test_tasks_count_beside_seeds(tmp_path: Path):
    paths = [written(tmp_path, "a", seed, ended(0.5)) for seed in range(3)]
    paths += [written(tmp_path, "b", seed, ended(0.75)) for seed in range(3)]
    found = compare(paths)
    # every seed agrees that one prompt of four was won; four prompts are too few to call that a difference
    assert found.results[0].num_prompts == 4 and found.differences[0].deviation == 0
    assert found.differences[0].is_noise and found.differences[0].interval is not None
    assert found.differences[0].interval.low == 0.0 and found.differences[0].mean == 0.25


def test_runs_without_outcomes_of_prompts_are_compared_over_seeds_alone(tmp_path: Path):
    paths = [written(tmp_path, "a", seed, ended(0.5 + seed / 100), prompts=0) for seed in range(3)]
    paths += [written(tmp_path, "b", seed, ended(0.75 + seed / 100), prompts=0) for seed in range(3)]
    found = compare(paths)
    assert found.results[0].num_prompts == 0 and not found.differences[0].is_noise
    said = sentences(found)
    assert said[0] == '"b" is better than "a" by 25.0 points, which is more than noise.'
    assert "over seeds alone" in said[1]


def test_outcomes_between_two_evaluations_lie_on_the_line_that_their_mean_lies_on(tmp_path: Path):
    found = compare([written(tmp_path, "a", 0), written(tmp_path, "b", 0, ((0, 0, 0.25), (1, 150, 0.5)))])
    run = found.results[0].group.runs[0]
    # prompts 0 and 1 are right at 100 tokens, prompt 2 only at 200: half of it at 150
    assert run.outcomes_at(150.0) == {"eval/0": 1.0, "eval/1": 1.0, "eval/2": 0.5, "eval/3": 0.0}
    assert sum(run.outcomes_at(150.0).values()) / 4 == run.value_at(150.0) == 0.625
    assert run.outcomes_at(250.0) == {}


def test_other_tasks_models_and_evaluations_are_said_and_not_compared(tmp_path: Path):
    paths = [written(tmp_path, "a", 0, task={"name": "hops", "train": {"path": "x"}}, model={"path": "m"})]
    paths += [written(tmp_path, "b", 0, task={"name": "maths", "train": {"path": "x"}}, model={"path": "m"})]
    paths += [written(tmp_path, "c", 0, task={"name": "hops", "train": {"path": "y"}}, model={"path": "m"})]
    found = compare(paths)
    assert found.differences[0].refused == "task.name is hops and maths"
    assert sentences(found)[0] == '"b" and "a" cannot be compared: task.name is hops and maths.'
    assert rows(found)[1][-1] == "not comparable"
    assert found.differences[1].refused == "", "other training data is what one may want to compare"


def test_what_differs_is_shortened():
    one = Group("a", [run_of(0, 0.5, **{f"task.{letter}": 1 for letter in "vwxyz"})])
    two = Group("b", [run_of(0, 0.5, **{f"task.{letter}": 2 for letter in "vwxyz"})])
    assert (
        incomparable(one, two) == "task.v is 1 and 2; task.w is 1 and 2; task.x is 1 and 2, and 2 more settings differ"
    )
    assert incomparable(one, one) == ""


def test_settings_lie_flat_by_dotted_key():
    assert flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1}]) == ["b"]


def test_a_sweeps_folder_stands_for_its_finished_members(tmp_path: Path):
    members = []
    for name, status in (("grpo", Status.finished), ("tree", Status.finished), ("bad", Status.failed)):
        for seed in (0, 1):
            folder = written(tmp_path, name, seed)
            reason = "the judge is gone" if status is Status.failed else ""
            values = {"credit": name, "learner.epochs": "2", "seed": str(seed)}
            members.append(MemberRecord(name=folder.name, values=values, overrides=[], status=status, reason=reason))
    keys = ["credit", "learner.epochs", "seed"]
    SweepRecord(path=tmp_path, run_name="run", fixed=[], keys=keys, search="grid", members=members).save()
    found = compare([tmp_path], baseline="tree epochs=2")
    assert [each.group.label for each in found.results] == ["tree epochs=2", "grpo epochs=2"]
    assert found.notes[0] == "bad-seed0 is left out: it is failed (the judge is gone)"
    with pytest.raises(ConfigError, match='no group is called "x"; there are "grpo epochs=2", "tree epochs=2"'):
        compare([tmp_path], baseline="x")


def test_what_is_no_run_and_what_is_no_metric_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="is neither a run's folder"):
        compare([tmp_path])
    run = written(tmp_path, "a", 0)
    with pytest.raises(ConfigError, match="none of the runs has any rollout/success_share"):
        compare([run], "rollout/success_share")
    with pytest.raises(ConfigError, match='the metric "eval/succes" is written by no run'):
        compare([run], "eval/succes")


@pytest.fixture
def found(tmp_path: Path) -> Comparison:
    values = {"a": (0.5, 0.25, 0.5), "b": (0.5, 0.5, 0.75)}
    return compare([written(tmp_path, name, seed, ended(values[name][seed])) for name in "ab" for seed in range(3)])


def test_a_difference_within_noise_says_how_many_seeds_would_settle_it(found: Comparison):
    # differences 0, 0.25, 0.25: mean 1/6, deviation 0.1443, so (2.802 * 0.1443 / 0.1667)^2 = 5.9 seeds
    assert sentences(found)[0] == (
        '"b" looks better than "a" by 16.7 points, which is within noise. If that is the true difference, about 6 '
        "seeds of each would settle it (power 80%, the same seeds on both sides)."
    )
    assert [row[:3] for row in rows(found)] == [("a", "3", "41.7 %"), ("b", "3", "58.3 %")]
    assert rows(found)[1][4] == "50.0 % 50.0 % 75.0 %" and rows(found)[1][5] == "+16.7"
    assert rows(found)[1][-1] == "within noise"


def test_the_mean_curve_goes_through_every_point_that_all_runs_have_passed(found: Comparison):
    assert mean_curve(found.results[0]) == [(0.0, 0.25), (100.0, pytest.approx(1.25 / 3))]


def test_page_picture_and_numbers_are_written(found: Comparison, tmp_path: Path):
    page = write_comparison(found, tmp_path / "out")
    text = page.read_text()
    assert "within noise" in text and "data:image/png;base64," in text and "http" not in text.split("</style>")[1]
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    plain = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert plain == json.loads(json.dumps(as_plain(found)))
    assert plain["groups"][1]["against_baseline"]["seeds_needed"] == 6 and plain["groups"][0]["seeds"] == [0, 1, 2]
