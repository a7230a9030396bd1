"""How a user's function becomes a source: arguments by name, level by signature, errors as scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from conf.errors import ConfigError
from conf.schema import Level, RewardsConfig, SourceConfig
from rewards.base import Source, build_sources
from rewards.drawn import parse_tree, row_of
from rewards.types import Score, ScoreStatus
from rollout.types import StopReason

FORKED = "q -> a -> (a1, a2)"


@pytest.fixture
def write(tmp_path: Path):
    """Writes a user's file and returns "file.py:name"."""

    def _write(code: str, name: str = "reward") -> str:
        path = tmp_path / f"mine_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(code)
        return f"{path}:{name}"

    return _write


def source(fn: str, columns=None, **cfg) -> Source:
    return Source("mine", SourceConfig(fn=fn, **cfg), columns)


def by_name(tree, scores: dict[int, Score]) -> dict[str, Score]:
    return {tree.nodes[row].action_text: score for row, score in scores.items()}


def test_function_that_asks_for_a_step_scores_every_step_once(write):
    mine = source(write("def reward(step): return len(step.action_text)"))
    tree = parse_tree(FORKED)
    assert mine.level is Level.step
    assert by_name(tree, mine.score_tree(tree)) == {"a": Score(1.0), "a1": Score(2.0), "a2": Score(2.0)}


def test_function_that_asks_for_siblings_scores_steps(write):
    mine = source(write("def reward(siblings): return len(siblings)"))
    tree = parse_tree("q -> a -> (a1, a2, a3)", pruned=["a3"])
    # a has none beside it; a1 has a2 and the pruned a3, which is not asked about itself.
    assert by_name(tree, mine.score_tree(tree)) == {"a": Score(0.0), "a1": Score(2.0), "a2": Score(2.0)}


def test_function_without_a_step_scores_whole_trajectories(write):
    mine = source(write("def reward(trajectory, facts): return len(trajectory) if facts.answer == 'b' else 0"))
    tree = parse_tree("q -> (a -> b, c)")
    assert mine.level is Level.trajectory
    assert by_name(tree, mine.score_tree(tree)) == {"b": Score(2.0), "c": Score(0.0)}


def test_level_step_gives_a_function_of_the_trajectory_its_prefixes(write):
    mine = source(write("def reward(trajectory): return len(trajectory)"), level="step")
    tree = parse_tree(FORKED)
    assert by_name(tree, mine.score_tree(tree)) == {"a": Score(1.0), "a1": Score(2.0), "a2": Score(2.0)}


def test_arguments_are_filled_by_name(write):
    code = """
def reward(step, tree, prompt, question, answer, facts, relations, bonus, spare=3):
    assert step is tree.nodes[0] and facts is step.facts and prompt is tree.prompt
    assert (question, answer, relations) == ("q", "Mia", ["boss"])
    return bonus + spare
"""
    tree = parse_tree("q -> a", answer="Mia", data={"relations": ["boss"]})
    assert source(write(code), args={"bonus": 4}).score_tree(tree) == {0: Score(7.0)}


def test_column_fills_an_argument_that_has_a_default(write):
    mine = source(write("def reward(step, spare=3): return spare"))
    assert mine.score_tree(parse_tree("q -> a", data={"spare": 5})) == {0: Score(5.0)}


def test_class_is_made_with_args_and_called_for_each_step(write):
    code = """
class reward:
    def __init__(self, bonus): self.bonus, self.calls = bonus, 0
    def __call__(self, step):
        self.calls += 1
        return self.bonus + self.calls
"""
    tree = parse_tree(FORKED)
    assert source(write(code), args={"bonus": 10}).score_tree(tree) == {0: Score(11.0), 1: Score(12.0), 2: Score(13.0)}


def test_async_scores_of_a_tree_are_awaited_together(write):
    code = """
import asyncio
waiting = asyncio.Barrier(3)
async def reward(step):
    await waiting.wait()  # opens only when all three steps have come
    return 1
"""
    assert set(source(write(code)).score_tree(parse_tree(FORKED)).values()) == {Score(1.0)}


def test_step_that_only_leads_to_a_trajectory_the_world_broke_is_not_asked_about(write):
    mine = source(write("def reward(step): return 1"))
    tree = parse_tree("q -> (a -> a1, b -> b1)", stops={"b1": StopReason.tool_crashed})
    assert by_name(tree, mine.score_tree(tree)) == {"a": Score(1.0), "a1": Score(1.0)}


@pytest.mark.parametrize(
    ("returned", "score"),
    [
        ("True", Score(1.0)),
        ("3", Score(3.0)),
        ("0.0", Score(0.0)),
        ("None", Score.not_applicable()),
        ("Score(0.5)", Score(0.5)),
        ("Score.failed('judge is down')", Score.failed("judge is down")),
    ],
)
def test_number_none_and_score_are_scores(write, returned, score):
    mine = source(write(f"from rewards.types import Score\ndef reward(step): return {returned}"))
    found = mine.score_tree(parse_tree("q -> a"))[0]
    assert (found.status, found.reason) == (score.status, score.reason)
    assert found.value == score.value or (math.isnan(found.value) and math.isnan(score.value))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return 'good'", "it returned a str; a reward is a number, None, a Score or named parts"),
        ("return float('nan')", "it returned nan; return None when there is nothing to say"),
        ("return 10 ** 400", "OverflowError: int too large to convert to float"),
        ("raise ValueError('no verdict')", "ValueError: no verdict (mine_0.py:2)"),
        ("import sys; sys.exit(3)", "SystemExit: 3 (mine_0.py:2)"),
    ],
)
def test_anything_else_is_a_failed_score_and_never_zero(write, body, reason):
    score = source(write(f"def reward(step):\n  {body}")).score_tree(parse_tree("q -> a"))[0]
    assert score.status is ScoreStatus.failed
    assert score.reason.startswith(reason)


def test_error_inside_an_async_function_fails_only_its_own_step(write):
    code = "async def reward(step):\n  return 1 / (len(step.action_text) - 1)"
    tree = parse_tree("q -> a -> bc")
    scores = by_name(tree, source(write(code)).score_tree(tree))
    assert scores["a"].reason == "ZeroDivisionError: division by zero (mine_0.py:2)"
    assert scores["bc"] == Score(1.0)


def test_class_whose_set_up_raises_fails_every_score_and_is_tried_again(write, tmp_path):
    code = f"""
from pathlib import Path
class reward:
    def __init__(self): Path({str(tmp_path / "ready")!r}).read_text()
    def __call__(self, step): return 1
"""
    mine, tree = source(write(code)), parse_tree("q -> a")
    assert mine.score_tree(tree)[0].reason.startswith("set-up: FileNotFoundError")
    (tmp_path / "ready").write_text("")
    assert mine.score_tree(tree) == {0: Score(1.0)}


def test_prompt_without_the_column_is_a_failed_score_with_a_hint(write):
    mine = source(write("def reward(step, relation): return 1"))
    score = mine.score_tree(parse_tree("q -> a", data={"relations": []}))[0]
    assert score.reason == (
        'prompt "test/0" has no column "relation" for the argument of that name. Did you mean "relations"?'
    )


def test_misspelt_argument_is_refused_at_once_where_columns_are_known(write):
    with pytest.raises(ConfigError, match=r'nothing can fill the argument "trajctory".*Did you mean "trajectory"\?'):
        source(write("def reward(trajctory): return 1"), columns=["question", "answer"])


@pytest.mark.parametrize(
    ("code", "cfg", "message"),
    [
        ("def reward(step): return 1", {"level": "trajectory"}, 'level=trajectory, but its function asks for "step"'),
        ("def reward(step): return 1", {"level": "turn"}, 'level="turn" is no level'),
        ("def reward(step): return 1", {"timeout_s": -1.0}, "timeout_s=-1.0 leaves no time"),
        ("def reward(step): return 1", {"weight": math.nan}, "weight=nan"),
        ("def reward(step): return 1", {"args": {"stp": 1}}, r'args.stp is no argument.*Did you mean "step"\?'),
        ("def reward(step): return 1", {"args": {"step": 1}}, "args.step would hide what the tree says"),
        ("def reward(*nodes): return 1", {}, r'"\*nodes" cannot be filled by name'),
        ("reward = 3", {}, "is a int; a reward is a function or a class"),
        ("class reward: pass", {}, "class reward has no __call__"),
        ("import sys; sys.exit(2)", {}, r"called sys.exit\(2\)"),
        (
            "class reward:\n def __init__(self, url): ...\n def __call__(self, step): ...",
            {"args": {"uri": ""}},
            "does not fit the constructor of reward.*Its arguments: url",
        ),
    ],
)
def test_source_that_cannot_run_is_refused(write, code, cfg, message):
    with pytest.raises(ConfigError, match=message):
        source(write(code), **cfg)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (SourceConfig(), "rewards.sources.mine names no function"),
        (SourceConfig(fn="a.py:f", target="a.f"), 'has both fn="a.py:f" and _target_="a.f"'),
    ],
)
def test_source_names_exactly_one_function(cfg, message):
    with pytest.raises(ConfigError, match=message):
        Source("mine", cfg)


def test_target_is_the_same_function_as_a_dotted_path():
    mine = Source("mine", SourceConfig(target="rewards.sources.format.format_ok"))
    assert mine.runs_here
    assert mine.score_tree(parse_tree("q -> a")) == {0: Score(1.0)}


def test_file_is_found_again_from_another_folder(write, tmp_path, monkeypatch):
    spec = write("def reward(step): return 1")
    monkeypatch.chdir(tmp_path)
    relative = Source("mine", SourceConfig(fn=Path(spec).name))
    monkeypatch.chdir("/")
    again = Source("mine", relative.cfg)
    assert not again.runs_here
    assert again.score_tree(parse_tree("q -> a")) == {0: Score(1.0)}


def test_problems_of_all_sources_are_told_together(write):
    cfg = RewardsConfig(sources={"one": SourceConfig(), "two": SourceConfig(fn=write("reward = 3"))})
    with pytest.raises(ConfigError, match=r"(?s)rewards.sources.one names no function.*rewards.sources.two"):
        build_sources(cfg)


def test_step_and_trajectory_sources_cannot_feed_one_signal(write):
    of_step = SourceConfig(fn=write("def reward(step): return 1"), signal="both")
    of_path = SourceConfig(fn=write("def reward(trajectory): return 1"), signal="both")
    with pytest.raises(ConfigError, match=r'signal "both" is fed by rewards\.sources\.one, which scores a step'):
        build_sources(RewardsConfig(sources={"one": of_step, "two": of_path}))
    of_path.weight = 0.0
    assert len(build_sources(RewardsConfig(sources={"one": of_step, "two": of_path}))) == 2


def test_row_of_finds_steps_by_name():
    tree = parse_tree("q -> (a -> (a1, a2), b -> (b1, b2))", branches={"b": 1})
    assert [tree.nodes[row_of(tree, name)].parent for name in ("a", "a2", "b", "b2")] == [-1, 0, -1, 3]
    assert [node.branch for node in tree.nodes] == [0, 0, 0, 1, 1, 1]
