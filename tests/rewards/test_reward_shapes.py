"""What a reward may be asked about in one call: a step, two steps, all steps, a tree; and what it may return."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError
from conf.schema import PartConfig, RewardsConfig, SourceConfig
from conf.subject import Subject, subject_of
from rewards.base import Source
from rewards.blend import blend
from rewards.drawn import parse_tree
from rewards.types import Score, ScoredTree, ScoreStatus
from rollout.tree import Tree

TREE = "q -> a -> (b, cc)"
"""Rows: a is 0; b, 1, and cc, 2, end the two trajectories."""


def source(tmp_path: Path, code: str, **cfg: object) -> Source:
    path = tmp_path / f"mine_{len(list(tmp_path.iterdir()))}.py"  # a file is imported once
    path.write_text(code)
    return Source("mine", SourceConfig(fn=f"{path}:reward", **cfg))


def values(tmp_path: Path, code: str, drawn: str = TREE, **cfg: object) -> dict[int, object]:
    """Number, or reason, by row."""
    scores = source(tmp_path, code, **cfg).score_tree(parse_tree(drawn, answer="b", data={"level": 2}))
    return {row: score.value if score.is_scored else score.reason for row, score in scores.items()}


@pytest.mark.parametrize(
    ("arguments", "level", "subject"),
    [
        ("step", "", Subject.step),
        ("siblings answer", "", Subject.step),
        ("facts answer", "", Subject.trajectory),
        ("facts", "step", Subject.step),
        ("steps question", "", Subject.steps),
        ("rows tree", "", Subject.steps),
        ("rows tree", "trajectory", Subject.trajectories),
        ("trajectories", "", Subject.trajectories),
        ("step other", "", Subject.step_pair),
        ("trajectory other_trajectory", "pair", Subject.trajectory_pair),
        ("tree", "tree", Subject.tree),
        ("tree", "", Subject.trajectory),
    ],
)
def test_a_call_is_about_what_its_arguments_name(arguments, level, subject):
    assert subject_of("rewards.sources.mine", level, arguments.split()) is subject


@pytest.mark.parametrize(
    ("arguments", "level", "message"),
    [
        ("step", "turn", 'level="turn" is no level. Use step, trajectory, pair, tree'),
        ("step", "trajectory", 'asks for "step", which makes it score a step'),
        ("step", "pair", "compares nothing. Ask for `step` and `other`"),
        ("step other other_trajectory", "", "asks for both `other` and `other_trajectory`"),
        ("steps step", "", "asks for all steps at once, so there is no single `step`"),
        ("rows facts", "", "asks for all rows at once, so there is no single `facts`"),
        ("step other rows", "", "compares two (`other`), so there is no single `rows`"),
        ("tree step", "tree", "scores a whole tree, so there is no single `step`"),
        ("steps tree", "tree", "level=tree, but its function asks for a steps"),
        ("steps", "trajectory", 'asks for "steps", which makes it score a step'),
    ],
)
def test_arguments_that_contradict_each_other_or_the_level_are_refused(arguments, level, message):
    with pytest.raises(ConfigError) as refused:
        subject_of("rewards.sources.mine", level, arguments.split())
    assert message in str(refused.value)


def test_a_batch_of_steps_is_one_call_and_a_score_for_each(tmp_path):
    code = """
calls = []
def reward(steps, rows):
    calls.append(rows)
    return [len(step.action_text) + 10 * len(calls) for step in steps]
"""
    assert values(tmp_path, code) == {0: 11.0, 1: 11.0, 2: 12.0}


def test_a_batch_of_trajectories_gives_each_its_own(tmp_path):
    code = "def reward(trajectories, answer): return [float(t[-1].facts.answer == answer) for t in trajectories]"
    assert values(tmp_path, code) == {1: 1.0, 2: 0.0}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[1.0]", "it returned 1 scores for 3 steps: which is whose would be a guess"),
        ("1.0", "it returned a float; a reward of all steps returns a list"),
        ("'abc'", "it returned a str; a reward of all steps returns a list"),
    ],
)
def test_a_batch_of_another_length_is_failed_whole(tmp_path, body, reason):
    assert values(tmp_path, f"def reward(steps): return {body}") == dict.fromkeys((0, 1, 2), reason)


def test_in_a_batch_what_is_no_number_fails_alone(tmp_path):
    found = source(tmp_path, "def reward(steps): return [1, None, 'x']").score_tree(parse_tree(TREE))
    assert [score.status for score in found.values()] == ["scored", "not_applicable", "failed"]


def test_siblings_are_compared_in_both_orders_so_that_a_liking_for_the_first_cancels(tmp_path):
    # b against cc: 1 - 2 + .5; cc against b: 2 - 1 + .5; half the difference of the orders is -1 and +1
    code = "def reward(step, other): return len(step.action_text) - len(other.action_text) + 0.5"
    assert values(tmp_path, code) == {0: "nothing to compare with", 1: -1.0, 2: 1.0}


def test_trajectories_of_a_prompt_are_compared_with_all_others(tmp_path):
    code = "def reward(trajectory, other_trajectory): return len(trajectory) - len(other_trajectory)"
    # lengths 1, 2, 2: (1 - 2 + 1 - 2) / 2, (2 - 1 + 2 - 2) / 2, the same
    assert values(tmp_path, code, "q -> (a, b -> (c, d))") == {0: -1.0, 2: 0.5, 3: 0.5}


def test_a_comparison_that_failed_leaves_no_mean_over_the_rest(tmp_path):
    code = """
def reward(step, other):
    if "c" in step.action_text + other.action_text:
        raise ValueError("no verdict")
    return 1.0
"""
    found = source(tmp_path, code).score_tree(parse_tree("q -> (a, b, c)"))
    assert {score.status for score in found.values()} == {ScoreStatus.failed}


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=5))
def test_comparisons_of_a_fork_sum_to_nothing(qualities):
    # Whatever one gains against the other, the other loses.
    names = [f"s{number}" for number in range(len(qualities))]
    tree = parse_tree(f"q -> ({', '.join(names)})", data={"quality": dict(zip(names, qualities, strict=True))})
    found = Source("mine", SourceConfig(fn=f"{__name__}:by_quality")).score_tree(tree)
    assert sum(score.value for score in found.values()) == pytest.approx(0)


def by_quality(step, other, quality):
    return quality[step.action_text] - quality[other.action_text]


def test_a_tree_has_one_number_for_all_its_trajectories_or_one_for_each(tmp_path):
    assert values(tmp_path, "def reward(tree): return len(tree.nodes)", level="tree") == {1: 3.0, 2: 3.0}
    some = values(tmp_path, "def reward(tree, rows): return {rows[0]: 0.5}", level="tree")
    assert some == {1: 0.5, 2: ""}  # of the other there is nothing to say
    strange = values(tmp_path, "def reward(tree): return {7: 0.5}", level="tree")
    assert strange == dict.fromkeys((1, 2), "it returned a score of row 7, which is no trajectory's end")


def test_named_parts_are_kept_apart_and_their_sum_is_the_score(tmp_path):
    found = source(tmp_path, "def reward(step): return {'right': 1.0, 'style': 0.5, 'unasked': None}").score_tree(
        parse_tree("q -> a")
    )
    assert found[0] == Score(1.5, parts={"right": 1.0, "style": 0.5})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{'right': 'yes'}", 'part "right": it returned a str'),
        ("{'right': float('nan')}", 'part "right": it returned nan'),
        ("{1: 0.5}", "it returned a mapping with the key 1; parts are named by text"),
        ("{'a': {'b': 1.0}}", 'its part "a" has parts of its own'),
        ("{str(n): 1.0 for n in range(65)}", "it returned 65 named parts; 64 are the most"),
    ],
)
def test_parts_that_are_no_numbers_fail_the_score(tmp_path, body, reason):
    assert str(values(tmp_path, f"def reward(step): return {body}", "q -> a")[0]).startswith(reason)


def parted(score: Score) -> ScoredTree:
    return ScoredTree(tree=parse_tree("q -> a"), step_scores={"judge": {0: score}})


def signals(score: Score, **parts: PartConfig) -> dict[str, Score]:
    cfg = RewardsConfig(sources={"judge": SourceConfig(weight=2.0, parts=parts)})
    return {name: by_row[0] for name, by_row in blend(parted(score), cfg).step_signals.items()}


def test_each_part_has_a_weight_and_may_feed_a_signal_of_its_own():
    score = Score(1.5, parts={"right": 1.0, "style": 0.5})
    assert signals(score) == {"step": Score(3.0)}
    assert signals(score, style=PartConfig(weight=0.0)) == {"step": Score(2.0)}
    apart = signals(score, style=PartConfig(weight=4.0, signal="style"))
    assert apart == {"step": Score(2.0), "style": Score(4.0)}  # 2 * 1; 2 * 4 * .5


def test_a_failed_score_leaves_every_signal_of_its_parts_unknown():
    found = signals(Score.failed("down"), style=PartConfig(signal="style"))
    assert {name: score.status for name, score in found.items()} == {"step": "failed", "style": "failed"}


def test_a_function_that_awaits_is_cancelled_at_its_limit_and_what_was_answered_counts(tmp_path):
    code = """
import asyncio
async def reward(step):
    await asyncio.sleep(60 * (step.action_text == "b"))
    return 1.0
"""
    found = values(tmp_path, code, timeout_s=0.2)
    assert found == {0: 1.0, 1: "no answer within timeout_s=0.2", 2: 1.0}


def test_a_stranger_names_siblings_and_a_column_and_gets_them(tmp_path):
    code = "def reward(step, siblings, level): return level * sum(step.action_text != s.action_text for s in siblings)"
    assert values(tmp_path, code) == {0: 0.0, 1: 2.0, 2: 2.0}


def test_what_is_awaited_cannot_be_asked_for_by_a_plain_function(tmp_path):
    with pytest.raises(ConfigError, match=r"asks for `engine`, whose answers are awaited\. Write it as `async def`"):
        source(tmp_path, "def reward(step, engine): return 1.0")
    with pytest.raises(ConfigError, match="asks for `model`, and no model is named"):
        source(tmp_path, "async def reward(step, model): return 1.0")
    with pytest.raises(ConfigError, match=r'model="judge" is never asked'):
        source(tmp_path, "def reward(step): return 1.0", model="judge")


def test_versions_follow_the_file_the_arguments_and_the_files_they_name(tmp_path):
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("be brief")
    code = "def reward(step, rubric=''): return 1.0"

    def version(code: str = code, **args: object) -> str:
        path = tmp_path / "versioned.py"
        path.write_text(code)
        return Source("mine", SourceConfig(fn=f"{path}:reward", args=args)).origin().version

    first = version(rubric=str(rubric))
    assert first == version(rubric=str(rubric))
    assert version(rubric="other") != first
    rubric.write_text("be kind")
    assert version(rubric=str(rubric)) != first
    assert version(code + "  # another text", rubric=str(rubric)) != version(rubric=str(rubric))


def digests(tmp_path: Path, code: str, tree: Tree) -> list[str]:
    made = source(tmp_path, code)
    return made.digests(tree, made.calls(tree), "v1")


def test_equal_content_has_one_name_and_other_content_another(tmp_path):
    code = "def reward(step, answer): return 1.0"
    same = parse_tree("q -> a -> (b, b)", answer="b", logprob=-1.0)
    names = digests(tmp_path, code, same)
    assert names[1] == names[2] != names[0]
    later = parse_tree("q -> a -> (b, b)", answer="b", logprob=-2.0, version=7)
    assert digests(tmp_path, code, later) == names  # log-probabilities and versions of weights are no content
    assert digests(tmp_path, code, parse_tree("q -> a -> (b, b)", answer="c")) != names
    # A function that sees the path tells equal steps behind other steps apart.
    both = parse_tree("q -> (a -> b, c -> b)")
    path = digests(tmp_path, "def reward(step, trajectory): return 1.0", both)
    alone = digests(tmp_path, code, both)
    assert alone[1] == alone[3]
    assert path[1] != path[3]


def test_settled_awaitables_leave_no_task_behind(tmp_path):
    code = "import asyncio\nasync def reward(step): await asyncio.sleep(60)"

    async def tasks_after() -> int:
        made = source(tmp_path, code, timeout_s=0.05)
        tree = parse_tree(TREE)
        await made.answers(tree, made.calls(tree), {})
        return len(asyncio.all_tasks())

    assert asyncio.run(tasks_after()) == 1
