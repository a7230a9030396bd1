import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import DataError
from rewards.drawn import parse_scored
from rewards.types import Cost, Origin, Score, ScoredTree, ScoreStatus
from rl.record import Advantages, RecordedTree, read_trees, write_records
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason


def write_trees(path: Path, scored: list[ScoredTree], advantages: list[Advantages]) -> None:
    found = zip(scored, advantages, strict=True)
    write_records(path, [RecordedTree(scored=tree, advantages=table) for tree, table in found])


# Lone surrogates too: a model can write half a character in a call's arguments.
texts = st.text(st.characters(codec=None), max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(texts, json_values, max_size=3)
scores = st.one_of(
    st.builds(Score, numbers, reason=texts),
    st.builds(Score.failed, texts),
    st.builds(Score.timed_out, texts),
    st.builds(Score.not_applicable, texts),
)
score_tables = st.dictionaries(texts, st.dictionaries(st.integers(0, 5), scores, max_size=3), max_size=2)
facts = st.builds(
    StepFacts,
    kind=st.sampled_from(StepKind),
    tool=texts,
    arguments=json_objects,
    tool_ok=st.none() | st.booleans(),
    result=st.none() | texts,
    answer=st.none() | texts,
    error=texts,
)
token_ids = st.lists(st.integers(0, 200_000), max_size=4)
prompts = st.builds(Prompt, id=texts, token_ids=token_ids.map(tuple), question=texts, answer=texts, data=json_objects)


@st.composite
def nodes(draw: st.DrawFn, row: int) -> Node:
    action_ids = draw(token_ids)
    return Node(
        parent=draw(st.integers(ROOT, row - 1)),
        action_ids=action_ids,
        action_logprobs=[draw(st.floats(max_value=0.0, allow_nan=False)) for _ in action_ids],
        observation_ids=draw(token_ids),
        facts=draw(facts),
        stop=draw(st.sampled_from(StopReason)),
        version=draw(st.integers(0, 9)),
        num_cached_tokens=draw(st.integers(0, 9)),
        branch=draw(st.integers(0, 3)),
        kept=draw(st.booleans()),
        action_text=draw(texts),
        observation_text=draw(texts),
    )


@st.composite
def recorded_trees(draw: st.DrawFn) -> RecordedTree:
    tree = Tree(prompt=draw(prompts), nodes=[draw(nodes(row)) for row in range(draw(st.integers(0, 3)))])
    scored = ScoredTree(
        tree=tree,
        step_scores=draw(score_tables),
        leaf_scores=draw(score_tables),
        step_signals=draw(score_tables),
        leaf_signals=draw(score_tables),
        costs=draw(st.dictionaries(texts, st.builds(Cost, seconds=numbers, calls=st.integers(0, 9)), max_size=2)),
        origins=draw(st.dictionaries(texts, st.builds(Origin, source=texts, version=texts), max_size=2)),
    )
    advantages = draw(st.dictionaries(st.integers(0, 5), st.dictionaries(texts, numbers, max_size=2), max_size=3))
    return RecordedTree(scored=scored, advantages=advantages)


@settings(max_examples=60, deadline=None)
@given(st.lists(recorded_trees(), max_size=2))
def test_what_is_read_equals_what_was_written(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("trees") / "step_000001.jsonl.gz"
    write_trees(path, [each.scored for each in written], [each.advantages for each in written])
    assert read_trees(path) == written


def sample() -> tuple[ScoredTree, dict[int, dict[str, float]]]:
    scored = parse_scored(
        "q -> (a -> a1, b)",
        steps={"a": 0.0, "a1": Score.failed("HTTP 500"), "b": None},
        outcomes={"a1": 1.0, "b": Score.timed_out("10 s")},
    )
    return scored, {0: {"outcome": 0.5, "fork": -0.25, "total": 0.25}}


def test_a_failed_score_comes_back_failed_and_a_zero_comes_back_zero(tmp_path):
    scored, advantages = sample()
    write_trees(tmp_path / "t.jsonl.gz", [scored], [advantages])
    steps = read_trees(tmp_path / "t.jsonl.gz")[0].scored.step_scores["step"]
    assert [steps[row].status for row in (0, 1, 2)] == [
        ScoreStatus.scored,
        ScoreStatus.failed,
        ScoreStatus.not_applicable,
    ]
    assert steps[0].value == 0.0
    assert steps[1].reason == "HTTP 500"


def test_a_record_tells_the_advantage_of_a_step_and_none_where_it_was_not_trained():
    scored, advantages = sample()
    recorded = RecordedTree(scored=scored, advantages=advantages)
    assert recorded.total(0) == 0.25
    assert recorded.total(1) is None
    assert recorded.tree is scored.tree


def test_the_same_trees_give_the_same_bytes(tmp_path):
    scored, advantages = sample()
    for name in ("one.jsonl.gz", "two.jsonl.gz"):
        write_trees(tmp_path / name, [scored], [advantages])
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_every_line_is_json_that_other_tools_can_read(tmp_path):
    scored, advantages = sample()
    write_trees(tmp_path / "t.jsonl.gz", [scored, scored], [advantages, {}])
    lines = gzip.decompress((tmp_path / "t.jsonl.gz").read_bytes()).decode("ascii").splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["advantages"] for line in lines] == [
        {"0": {"outcome": 0.5, "fork": -0.25, "total": 0.25}},
        {},
    ]


def test_a_column_that_json_cannot_hold_is_named_by_its_prompt_and_leaves_no_file(tmp_path):
    scored = parse_scored("q -> a", prompt_id="train/17", data={"when": object()})
    with pytest.raises(DataError, match=r"prompt train/17 cannot be recorded.*run.record_every_steps=0"):
        write_trees(tmp_path / "t.jsonl.gz", [scored], [{}])
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_short_is_named_by_its_line(tmp_path):
    scored, advantages = sample()
    path = tmp_path / "t.jsonl.gz"
    write_trees(path, [scored], [advantages])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="line 1 is not a recorded tree"):
        read_trees(path)


@pytest.mark.parametrize("content", [b"", b"{}", gzip.compress(b"{}\n", mtime=0), gzip.compress(b"[1]\n", mtime=0)])
def test_a_file_that_holds_something_else_is_refused(tmp_path, content):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(content)
    if content:
        with pytest.raises(DataError, match="another version of Grove"):
            read_trees(path)
    else:
        assert read_trees(path) == []
