import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from conf.compose import compose
from conf.errors import ConfigError, DataError
from conf.schema import Config
from rewards.blend import blend
from rewards.drawn import parse_scored
from rewards.types import ScoredTree
from rl import cli
from rl.credited import credited
from rl.record import TOTAL, RecordedTree, write_records
from rl.replay import (
    agreement_numbers,
    credit_numbers,
    kendall,
    replay_run,
    replayed_config,
    replayed_trees,
    spearman,
)
from rl.replay_page import replay_rows
from rl.run_folder import RunFolder, open_run_folder
from rl.run_folder import settings as plain
from rl.shares import recorded_trees, shares_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def sample(prompt_id: str = "train/0", **outcomes: float) -> ScoredTree:
    return parse_scored(
        "q -> (a -> (a1, a2), b -> (b1, b2))",
        steps={"a": 1.0, "a1": 1.0, "a2": 0.0, "b": 0.0, "b1": 0.5, "b2": 0.0},
        outcomes={"a1": 1.0, "a2": 0.0, "b1": 1.0, "b2": 0.0} | outcomes,
        step_signal="progress",
        outcome_signal="answer",
        prompt_id=prompt_id,
    )


def recorded_step(cfg: Config, scored: list[ScoredTree]) -> list[RecordedTree]:
    """As a run of `cfg` records it."""
    scored = [blend(tree, cfg.rewards) for tree in scored]
    found = credited(scored, cfg)
    return recorded_trees(scored, found, shares_of(found, cfg))


def make_run(path: Path, *overrides: str, steps: int = 3) -> Path:
    cfg = compose(["experiment=hop_search", *overrides])
    folder = open_run_folder(path, plain(cfg))
    for step in range(1, steps + 1):
        trees = [sample(f"train/{step}/0"), sample(f"train/{step}/1", a2=float(step > 1))]
        write_records(folder.tree_file(step), recorded_step(cfg, trees))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained on tree_step, which is never changed by a test."""
    return make_run(tmp_path_factory.mktemp("runs") / "toy-seed0")


# What would have changed


def test_without_a_change_the_replay_is_the_run_to_the_last_bit(run: Path):
    replay = replay_run(run, [])
    assert [step.step for step in replay.steps] == [1, 2, 3]
    for step in replay.steps:
        assert step.before == step.after
        assert step.agreement == approx(
            {"rank agreement (Spearman)": 1.0, "rank agreement (Kendall)": 1.0, "sign flips": 0.0}
        )
        assert all(first == second for first, second in step.advantages)


def test_a_recipe_takes_the_place_of_the_whole_credit(run: Path):
    cfg = replayed_config(run, ["credit=grpo", "credit.terms.trajectory.weight=2"])
    assert list(cfg.credit.terms) == ["trajectory"]
    assert (cfg.credit.terms["trajectory"].weight, cfg.run.name) == (2.0, "hop_search")
    after = replay_run(run, ["credit=grpo"], "1").steps[0].after
    assert after["trajectory, share of credit"] == 1.0
    assert "fork, share of credit" not in after


def test_a_weight_of_a_source_is_blended_again(run: Path):
    replay = replay_run(run, ["rewards.sources.progress.weight=-1"], "1")
    before, after = replay.steps[0].before, replay.steps[0].after
    assert after["step agrees with outcome"] == approx(1 - before["step agrees with outcome"])
    assert replay.steps[0].agreement["rank agreement (Kendall)"] < 1


def test_a_selection_is_counted(run: Path):
    after = replay_run(run, ["select=balanced", "select.num_kept=2"], "1").steps[0].after
    assert after["left out: outranked"] == 0.5
    assert after["steps without credit"] > 0


def test_a_run_with_a_selection_is_replayed_with_it(tmp_path: Path):
    run = make_run(tmp_path / "r", "select=balanced", "select.num_kept=2", steps=1)
    assert replay_run(run, []).steps[0].before["left out: outranked"] == 0.5
    again = replay_run(run, []).steps[0]
    assert again.before == again.after
    assert "left out: outranked" not in replay_run(run, ["select=none"]).steps[0].after


def test_a_running_normaliser_remembers_the_steps_before_and_tells_when_it_cannot(run: Path):
    running = ["credit=grpo", "credit.terms.trajectory.normalizer=running", "credit.terms.trajectory.scope=batch"]
    warnings: list[str] = []
    whole = replay_run(run, running, "", warnings.append)
    assert warnings == []
    alone = replay_run(run, running, "3", warnings.append)
    assert "from step 3" in warnings[0]
    assert whole.steps[2].advantages != alone.steps[0].advantages


# Worked numbers


def table(**totals: float) -> RecordedTree:
    """A tree "q -> (a, b, c)" with advantages of its own; a and b are right."""
    scored = parse_scored("q -> (a, b, c)", outcomes={"a": 1.0, "b": 1.0, "c": 0.0})
    advantages = {
        "abc".index(name): {"one": total / 4, "two": total * 3 / 4, TOTAL: total} for name, total in totals.items()
    }
    return RecordedTree(scored=scored, advantages=advantages)


def test_credit_in_numbers():
    found = credit_numbers([table(a=1.0, b=-2.0)])  # c was not trained
    assert found == approx(
        {
            "steps without credit": 1 / 3,
            "mean |advantage|": 1.5,
            "one, share of credit": 0.25,
            "two, share of credit": 0.75,
        }
    )
    assert credit_numbers([table(a=1.0, b=-2.0, c=0.0)])["advantage agrees with outcome"] == 0.5


def test_agreement_is_over_the_steps_that_both_train():
    before = [table(a=3.0, b=1.0, c=-1.0), table(a=1.0, b=1.0)]
    after = [table(a=-1.0, b=1.0, c=-3.0), table(b=1.0, c=2.0)]
    # ranks 3 2 1 against 2 3 1; the second tree shares one step, which tells nothing apart but is one of four
    assert agreement_numbers(before, after) == approx(
        {"rank agreement (Spearman)": 0.5, "rank agreement (Kendall)": 1 / 3, "sign flips": 1 / 4}
    )


def test_credits_that_share_no_step_have_no_agreement():
    assert agreement_numbers([table(a=1.0)], [table(b=1.0)]) == {}


values = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=8).filter(
    lambda pairs: all(len(set(column)) > 1 for column in zip(*pairs, strict=True))
)


def slow_ranks(values: tuple[int, ...]) -> list[float]:
    """1-based places; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [(ordered.index(value) + 1 + len(ordered) - ordered[::-1].index(value)) / 2 for value in values]


@settings(max_examples=60, deadline=None)
@given(values)
def test_rank_correlations_are_the_textbooks(pairs: list[tuple[int, int]]):
    first, second = zip(*pairs, strict=True)
    first_X, second_X = (torch.tensor(column, dtype=torch.float64) for column in (first, second))
    ranks = torch.tensor([slow_ranks(first), slow_ranks(second)])
    assert spearman(first_X, second_X) == approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-6)
    score = ties_first = ties_second = 0
    count = len(pairs)
    for place, (one, other) in enumerate(pairs):
        for third, fourth in pairs[:place]:
            score += ((one > third) - (one < third)) * ((other > fourth) - (other < fourth))
            ties_first += one == third
            ties_second += other == fourth
    whole = count * (count - 1) / 2
    assert kendall(first_X, second_X) == approx(score / math.sqrt((whole - ties_first) * (whole - ties_second)))


# Steps


@pytest.mark.parametrize(("steps", "expected"), [("2", [2]), ("2:3", [2, 3]), ("0:1", [1]), ("", [1, 2, 3])])
def test_steps_are_one_or_a_range_with_both_ends(run: Path, steps: str, expected: list[int]):
    assert [step.step for step in replay_run(run, [], steps).steps] == expected


def test_steps_that_were_not_recorded_are_refused(run: Path):
    with pytest.raises(ConfigError, match=r"--steps 7:9 holds no recorded step: .* has 3, from 1 to 3"):
        replay_run(run, [], "7:9")
    with pytest.raises(ConfigError, match=r'--steps "all" is neither a step nor a range'):
        replay_run(run, [], "all")


# What cannot be replayed


def test_a_run_without_recorded_trees_and_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no recorded trees.*run.record_every_steps=1"):
        replay_run(make_run(tmp_path / "r", steps=0), [])
    (tmp_path / "bare/trees").mkdir(parents=True)
    write_records(RunFolder(tmp_path / "bare").tree_file(1), [])
    with pytest.raises(DataError, match=r"holds no run \(there is no config.yaml\)"):
        replay_run(tmp_path / "bare", [])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rollout.num_leaves=4", '"rollout.num_leaves=4" cannot be replayed'),
        ("loss=grpo", "only rewards, select, credit can be changed"),
        ("credit=gae", "needs the values of a critic"),
        ("credit=rloo", "needs the KL to the first weights"),
        ("credit=gpro", 'Did you mean "grpo"?'),
        ("credit.terms.fork.wieght=1", "is no setting"),
        ("rewards.sources.judge={fn: my.py:judge}", "rewards.sources.judge is not in the record.*answer, progress"),
        ("rewards.sources.tool_success.weight=1", "rewards.sources.tool_success is not in the record"),
        ("rewards.sources.progress.fn=my.py:progress", "progress has another function"),
        ("credit.terms.fork.signals.tone={}", 'names "tone", which no tree of the batch has'),
        ("credit.terms.fork.ddof=2", "ddof=2 must be"),
        ("select=prof", "names no source of steps"),
    ],
)
def test_what_the_record_cannot_answer_is_refused(run: Path, override: str, told: str):
    with pytest.raises(ConfigError, match=told if "*" in told else re.escape(told)):
        replay_run(run, [override])


def test_a_source_that_was_recorded_with_weight_0_can_be_given_one(tmp_path: Path):
    run = make_run(tmp_path / "r", "rewards.sources.progress.weight=0", "credit=grpo", steps=1)
    step = replay_run(run, ["rewards.sources.progress.weight=1", "credit=tree_step"]).steps[0]
    assert "step agrees with outcome" not in step.before
    assert step.after["step agrees with outcome"] > 0.5 and step.after["step, share of credit"] > 0


def test_a_selection_that_does_nothing_is_told(run: Path):
    warnings: list[str] = []
    replay_run(run, ["select=balanced", "select.num_kept=8"], "1", warnings.append)
    assert len(warnings) == 1 and "changes nothing" in warnings[0]


def test_a_step_without_trees_is_replayed_as_nothing():
    assert replayed_trees([], compose(["credit=grpo"])) == ([], {})


# The command


def test_the_command_prints_a_table_and_writes_a_page(run: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["replay", str(run), "credit=grpo", "--steps", "1:2"]) == 0
    told = capsys.readouterr().out
    assert "toy-seed0, 2 steps from 1 to 2, 4 trees: credit=grpo" in " ".join(told.split())
    assert re.search(r"fork, share of credit +0\.\d{3} +-", told)
    assert told.rstrip().endswith("replay.html")
    page = (run / "replay.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "rank agreement (Kendall)" in page and "http" not in page


def test_a_row_that_only_one_side_has_shows_a_dash_on_the_other(run: Path):
    rows = {name: values for name, *values in replay_rows(replay_run(run, ["credit=grpo"], "1"))}
    assert rows["fork, share of credit"][1] == "-"
    assert rows["sign flips"][0] == ""


def test_a_folder_that_is_not_there_is_a_bad_setting(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["replay", "runs/nothing"]) == 2
    assert 'no run folder "runs/nothing" to replay' in capsys.readouterr().err


def test_a_replay_needs_no_engine_and_no_model():
    code = "import sys, rl.replay_page; print({'ray', 'vllm', 'transformers', 'peft', 'wandb'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
