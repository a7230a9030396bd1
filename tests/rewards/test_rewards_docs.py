"""The documentation of rewards runs as written, and so do the examples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conf.schema import RewardsConfig, SourceConfig
from rewards.base import Source, build_sources
from rewards.drawn import answer_facts, call_facts, parse_tree
from rewards.types import Score, ScoreStatus

ROOT = Path(__file__).parents[2]


def example(name: str, **args: object) -> Source:
    return Source("mine", SourceConfig(fn=f"{ROOT}/examples/my_rewards.py:{name}", args=args))


def test_python_blocks_of_the_rewards_page_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/rewards.md").read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/rewards.md", "exec"), names)
    assert len(blocks) > 5


def test_brief_pays_short_trajectories():
    tree = parse_tree("q -> (a, b -> c -> d)")
    # 1 step of 2: 2 - 1/2, cut to 1; 3 steps: 2 - 3/2
    assert list(example("brief", max_steps=2).score_tree(tree).values()) == [Score(1.0), Score(0.5)]


def test_no_repeat_punishes_the_second_of_two_equal_calls():
    facts = {"a": call_facts("look", at="x"), "b": call_facts("look", at="y"), "c": call_facts("look", at="x")}
    scores = example("no_repeat").score_tree(parse_tree("q -> a -> b -> c -> end", facts=facts))
    assert [scores[row].value for row in (0, 1, 2)] == [0.0, 0.0, -1.0]
    assert scores[3].status is ScoreStatus.not_applicable


def test_vocabulary_is_read_once_and_scores_answers(tmp_path):
    (tmp_path / "words.txt").write_text("Tom Hill")
    tree = parse_tree("q -> a", facts={"a": answer_facts("tom cole")})
    assert example("Vocabulary", path=str(tmp_path / "words.txt")).score_tree(tree) == {0: Score(0.5)}


def test_judged_overlaps_its_waits():
    tree = parse_tree("q -> a -> (yes, no)")
    assert set(example("judged", judge_delay_s=0.0).score_tree(tree).values()) == {Score(1.0)}


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("hop_search", ["question", "answer", "world", "relations", "people", "max_calls"]),
        ("gsm8k", ["question", "answer"]),
        ("custom", []),
    ],
)
def test_shipped_configs_name_sources_that_the_columns_can_fill(file, columns):
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ROOT / f"conf/rewards/{file}.yaml").read_text())
    sources = {name: SourceConfig(**each) for name, each in found["sources"].items()}
    built = build_sources(RewardsConfig(sources=sources), columns)
    assert all(source.runs_here for source in built)
    assert [source.name for source in built] == list(sources)
