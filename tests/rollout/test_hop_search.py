from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, ToolError
from conf.schema import HopSearchConfig
from rollout.envs import hop_search
from rollout.envs.hop_search import RELATIONS, TOOLS, HopSearchRows, World, demonstration, parse_world


def train_row(index: int = 0, seed: int = 0, **config: Any) -> dict[str, Any]:
    return HopSearchRows(HopSearchConfig(**config), seed, "train").row(index)


def ask(tool: str, relation: str, person: str, world: World) -> str:
    return getattr(hop_search, tool)(relation, person, world=str(world))


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(1, 5))
def test_walking_the_chain_with_the_right_tools_finds_the_answer(index: int, hops: int):
    row = train_row(index, hops=[hops])
    world = parse_world(row["world"])
    person = row["people"][0]
    for relation in row["relations"]:
        person = ask(world.tool_of(relation) or "", relation, person, world)
    assert person == row["answer"] == row["people"][-1]
    assert len(row["people"]) == hops + 1
    assert row["max_calls"] == hops + 2


def test_a_question_reads_as_its_chain():
    row = train_row(hops=[2])
    first, second = row["relations"]
    assert row["question"] == f"who is {row['people'][0]} 's {first} 's {second} ?"


def test_every_other_tool_refuses():
    world = World("train", 0, 12, 4)
    person = world.people[0]
    for relation in RELATIONS:
        served = [tool for tool in TOOLS if answers(tool, relation, person, world)]
        assert served == [world.tool_of(relation)]


def answers(tool: str, relation: str, person: str, world: World) -> bool:
    try:
        return bool(ask(tool, relation, person, world))
    except ToolError:
        return False


@pytest.mark.parametrize(("num_relations", "num_tools"), [(12, 4), (12, 6), (8, 4), (3, 1)])
def test_tools_serve_equally_many_relations_and_the_sizes_reach_them_by_the_world(num_relations: int, num_tools: int):
    world = parse_world(str(World("eval", 3, num_relations, num_tools)))
    served = Counter(world.tool_of(relation) for relation in RELATIONS[:num_relations])
    assert served == dict.fromkeys(TOOLS[:num_tools], num_relations // num_tools)
    assert all(world.tool_of(relation) is None for relation in RELATIONS[num_relations:])


def test_an_unknown_person_is_refused_by_the_right_tool():
    world = World("train", 0, 12, 4)
    with pytest.raises(ToolError, match='nobody is called "Anna"'):
        ask(world.tool_of("boss") or "", "boss", "Anna", world)


def test_held_out_names_never_occur_in_training():
    known = set(World("train", 0, 12, 4).people)
    held_out = set(World("eval", 0, 12, 4).people)
    assert not known & held_out
    assert len(known | held_out) == 32 * 32
    assert 200 < len(held_out) < 312  # one in four of 1024, by hash
    rows = HopSearchRows(HopSearchConfig(), 0, "train")
    seen = {name for index in range(300) for name in rows.row(index)["people"]}
    assert seen <= known
    rows = HopSearchRows(HopSearchConfig(), 0, "eval")
    assert {name for index in range(300) for name in rows.row(index)["people"]} <= held_out


def test_training_uses_its_worlds_and_evaluation_another():
    rows = HopSearchRows(HopSearchConfig(num_worlds=4), 0, "train")
    assert {rows.row(index)["world"] for index in range(100)} == {f"train/{number}/12x4" for number in range(4)}
    assert HopSearchRows(HopSearchConfig(), 0, "eval").row(5)["world"] == "eval/0/12x4"


def test_worlds_differ_in_their_facts():
    person = World("train", 0, 12, 4).people[0]
    assert len({World("train", number, 12, 4).follow("boss", person) for number in range(20)}) > 15


def test_rows_follow_from_seed_and_index_and_held_out_rows_from_the_index_alone():
    assert train_row(3, seed=1) == train_row(3, seed=1)
    assert train_row(3, seed=1) != train_row(3, seed=2)
    held_out = [HopSearchRows(HopSearchConfig(), seed, "eval").row(3) for seed in (1, 2)]
    assert held_out[0] == held_out[1]


def test_facts_are_the_same_in_every_process_and_version():
    row = train_row(hops=[3])
    assert (row["world"], row["question"]) == ("train/58/12x4", "who is Liv Xu 's doctor 's boss 's rival ?")
    assert row["people"] == ["Liv Xu", "Meg Mann", "Sam Frey", "Hal Hart"]


@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_demonstrations_end_at_the_answer_and_never_ask_a_tool_twice_at_a_hop(index: int, share: float):
    row = train_row(index)
    messages = demonstration(row, share, random.Random(index))
    assert messages[-1] == ("assistant", f"<answer> {row['answer']} </answer>")
    calls = [text for role, text in messages if role == "assistant"][:-1]
    assert len(calls) == len(set(calls))
    found = [text for role, text in messages if role == "tool" and text != "error"]
    assert found == row["people"][1:]
    assert all(before[0] != after[0] for before, after in pairwise(messages))


def test_demonstrations_are_of_the_quality_asked_for():
    def calls_per_hop(share: float) -> float:
        rng = random.Random(0)
        calls = [len(demonstration(train_row(index), share, rng)) // 2 for index in range(400)]
        return sum(calls) / (3 * len(calls))

    assert calls_per_hop(1.0) == 1.0
    assert calls_per_hop(0.0) == pytest.approx(2.5, abs=0.1)  # right tool equally likely 1st, 2nd, 3rd or 4th


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_tools": 7}, "num_tools=7 but there are 6 tools"),
        ({"num_relations": 3}, "num_relations=3: every tool needs a relation"),
        ({"hops": [13]}, "uses each relation at most once"),
        ({"hops": []}, "give at least one"),
        ({"num_worlds": 0}, "num_worlds=0 must be at least 1"),
    ],
)
def test_sizes_that_make_no_question_are_refused(config: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        HopSearchRows(HopSearchConfig(**config), 0, "train")
