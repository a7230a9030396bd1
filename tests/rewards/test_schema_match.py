"""Does an answer satisfy a JSON schema?"""

from __future__ import annotations

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.drawn import answer_facts, call_facts
from rewards.sources.schema_match import json_schema

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"name": "Mia", "age": 7}', 1),
        ('  {"name": "Mia"}\n', 1),
        ('Here it is:\n```json\n{"name": "Mia"}\n```\nDone.', 1),
        ('```\n{"name": "Mia"}\n```', 1),
        ('```json\n{"age": 7}\n```\nno, rather\n```json\n{"name": "Mia"}\n```', 1),  # the last block is the answer
        ('{"age": 7}', 0),
        ('{"name": "Mia", "age": -1}', 0),
        ('{"name": "Mia", "age": NaN}', 0),
        ('{"name": "Mia", "pet": "cat"}', 0),
        ('{"name": "Mia"} and more', 0),
        ("{'name': 'Mia'}", 0),
        ("", 0),
        ("[" * 100_000, 0),
        ("9" * 5000, 0),
    ],
)
def test_answer_against_a_schema(answer: str, score: float):
    assert json_schema(answer_facts(answer), PERSON) == score
    assert json_schema(answer_facts(answer), json.dumps(PERSON)) == score


def test_no_answer_is_worth_nothing():
    assert json_schema(call_facts(), PERSON) == 0


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ("{", "is no JSON"),
        ("[]", "is a list; it must be an object, true or false"),
        ({"type": "thing"}, "is not valid: 'thing' is not valid"),
    ],
)
def test_a_schema_that_is_none_is_an_error_and_not_a_wrong_answer(schema, told: str):
    for facts in (answer_facts("{}"), call_facts()):
        with pytest.raises(ValueError, match=told):
            json_schema(facts, schema)


def test_nothing_is_fetched(monkeypatch):
    def refuse(*_args, **_more):
        raise AssertionError("a schema asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for place in ("http://example.invalid/s.json", "https://example.invalid/s.json", "file:///etc/hostname"):
        with pytest.raises(ValueError, match="the schema cannot be followed"):
            json_schema(answer_facts("{}"), {"$ref": place})


def test_references_inside_a_schema_and_to_the_meta_schemas_are_followed():
    tree = {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"}
    assert json_schema(answer_facts("[[], [[]]]"), tree) == 1
    assert json_schema(answer_facts("[[], [1]]"), tree) == 0
    assert json_schema(answer_facts("[" * 600 + "]" * 600), tree) in (0, 1)
    meta = {"$ref": "https://json-schema.org/draft/2020-12/schema"}
    assert json_schema(answer_facts('{"type": "string"}'), meta) == 1
    assert json_schema(answer_facts('{"type": 3}'), meta) == 0


def test_the_draft_is_the_one_that_the_schema_names():
    # a list of schemas under "items" was a tuple before 2020-12
    pair = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "string"}, {"type": "number"}]}
    assert json_schema(answer_facts('["a", 1]'), pair) == 1
    assert json_schema(answer_facts('["a", "b"]'), pair) == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_every_value_satisfies_the_schema_that_asks_for_it_and_none_that_forbids_it(value):
    answer = answer_facts(json.dumps(value))
    assert json_schema(answer, {"const": value}) == json_schema(answer, True) == 1
    assert json_schema(answer, {"not": {"const": value}}) == json_schema(answer, False) == 0


@given(st.text(max_size=40))
def test_no_answer_breaks_it(text):
    assert json_schema(answer_facts(text), PERSON) in (0, 1)
