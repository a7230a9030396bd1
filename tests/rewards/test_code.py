"""A program against its unit tests: what passes, what does not, and what pretends to."""

from __future__ import annotations

import asyncio
import json
import textwrap
from collections import Counter, OrderedDict, namedtuple
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import SourceConfig
from rewards.base import Source
from rewards.code_harness import decoded, encoded
from rewards.drawn import answer_facts, call_facts, parse_tree
from rewards.sources.code import RUNS_APART, UnitTests, code_of
from rewards.types import Score
from rollout import jail
from rollout.jail import isolation_problem

ADD = "def add(a, b):\n    return a + b\n"
ADD_TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0\nassert add('a', 'b') == 'ab'"
CASES = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6\n", "output": "11"}]
ENDLESS = "while True: pass"
SUM = "print(sum(map(int, input().split())))"


@pytest.fixture
def isolated() -> None:
    if isolation_problem():
        pytest.skip(f"no namespaces here: {isolation_problem()}")


def score(answer: str, tests: Any, **args: Any) -> float:
    return asyncio.run(UnitTests(**args)(answer_facts(textwrap.dedent(answer)), tests))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 0\n```\nno, rather\n```Python\nx = 1\n```\nRun it:\n```bash\npython x.py\n```", "x = 1\n"),
        ("```py title=x.py\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),  # cut off by the token limit
    ],
)
def test_program_of_an_answer(answer: str, code: str):
    assert code_of(answer) == code


@pytest.mark.slow
@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize(
    ("answer", "tests", "value"),
    [
        (f"```python\n{ADD}```", ADD_TESTS, 1),
        (ADD, ADD_TESTS.splitlines(), 1),
        (ADD, json.dumps(ADD_TESTS.splitlines()), 1),
        (ADD, "import math\nn = 2\nassert add(n, math.floor(1.5)) == 3", 1),
        (ADD, "def check(f):\n    assert f(1, 2) == 3\ncheck(add)", 1),
        (ADD, "def check(f):\n    assert f(1, 2) == 4\ncheck(add)", 0),
        (ADD, "assert add(1, 2) < 4", 1),
        (ADD, "assert 3 == add(1, 2), 'message'", 1),
        (ADD, "assert add(1, 2) is 3", 1),
        (ADD, "assert add(1, 0) is True", 0),
        (ADD, "assert add(1, 0) == True", 1),
        ("def add(a, b): return a - b", ADD_TESTS, 0),
        ("def plus(a, b): return a + b", ADD_TESTS, 0),
        ("def add(a, b: return", ADD_TESTS, 0),
        ("", ADD_TESTS, 0),
        (SUM, CASES, 1),
        (SUM, json.dumps(CASES), 1),
        ("print(3)", CASES, 0),
        (SUM + "\nraise SystemExit(1)", CASES, 0),
        (SUM + "\nraise SystemExit(0)", CASES, 1),
        (ENDLESS, CASES, 0),
    ],
)
def test_program_against_tests(answer: str, tests: Any, value: float):
    # Python alone takes a second to start on a busy machine; one that never ends is not waited for that long.
    assert score(answer, tests, wall_s=1.0 if answer == ENDLESS else 20.0) == value


@pytest.mark.slow
@pytest.mark.usefixtures("isolated")
def test_the_share_of_tests_that_pass():
    # 1 + 2 is right, -1 + 1 is not 2, and strings have no absolute value
    assert score("def add(a, b): return abs(a) + abs(b)", ADD_TESTS, partial=True) == pytest.approx(1 / 3)
    assert score(SUM, [*CASES, {"input": "1", "output": "2"}, {"input": "x", "output": ""}], partial=True) == 0.5
    # the second never ends: only the first is passed
    endless = "def add(a, b):\n    while a < 0: pass\n    return a + b"
    assert score(endless, ADD_TESTS, partial=True, wall_s=1.0) == pytest.approx(1 / 3)


CHEATS = [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "print('3\\n0\\nab\\n1 passed')",
    "def add(a, b):\n    raise SystemExit(0)",
    "def add(a, b):\n    import os\n    os._exit(0)",
    """
    class Same:
        def __eq__(self, other): return True
        def __lt__(self, other): return True
        def __bool__(self): return True
    def add(a, b): return Same()
    """,
    """
    class Three(int):
        def __eq__(self, other): return True
    def add(a, b): return Three(7)
    """,
    "import atexit, os\natexit.register(os._exit, 0)",
    # writes what the harness would, without its number and without the values
    """
    import json, os
    for fd in range(3, 64):
        for item in range(3):
            try: os.write(fd, json.dumps({"nonce": "", "item": item, "value": ["none"]}).encode() + b"\\n")
            except OSError: pass
    """,
    # replaces what the harness uses
    "import builtins, json, os\njson.dumps = lambda *a: '{}'\nbuiltins.eval = builtins.exec = lambda *a: 3",
    # reads the request again
    "import os\nos.lseek(3, 0, 0)",
    # finds the number, but not the values
    """
    import json, os, sys
    def add(a, b):
        frame = sys._getframe()
        while frame:
            if "nonce" in frame.f_locals:
                for item in range(3):
                    line = {"nonce": frame.f_locals["nonce"], "item": item, "value": ["bool", True]}
                    os.write(frame.f_locals["answers"], json.dumps(line).encode() + b"\\n")
            frame = frame.f_back
        os._exit(0)
    """,
]


@pytest.mark.slow
@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize("program", CHEATS)
def test_a_program_that_pretends_fails(program: str):
    assert score(program, ADD_TESTS) == 0
    assert score(program, ADD_TESTS, partial=True) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize("program", CHEATS[:5])
def test_a_program_that_leaves_early_fails_tests_without_a_literal_too(program: str):
    assert score(program, "def check(f):\n    assert f(1, 2) < 4\ncheck(add)") == 0


def test_no_answer_is_worth_nothing():
    assert asyncio.run(UnitTests()(call_facts(), ADD_TESTS)) == 0


@pytest.mark.parametrize(
    ("tests", "told"),
    [
        ("assert add(1, ==", "the tests are no Python"),
        ("# nothing", "a program without a test would pass"),
        ("", "a program without a test would pass"),
        ([], "give assertions as text or a list, or a list of cases"),
        (None, "give assertions as text"),
        ([{"in": "1"}], 'write {"input": text, "output": text}'),
        ([{"input": "1", "output": 1}], "write"),
    ],
)
def test_tests_that_cannot_be_read_are_no_verdict(tests: Any, told: str):
    for facts in (answer_facts(ADD), call_facts()):
        with pytest.raises(ValueError, match=told):
            asyncio.run(UnitTests()(facts, tests))


def test_a_jail_that_cannot_be_built_is_a_failed_score(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jail, "_run", lambda *_: "no namespaces")
    tree = parse_tree("q -> a", facts={"a": answer_facts(ADD)}, data={"tests": ADD_TESTS})
    (failed,) = Source("code", SourceConfig(target="rewards.sources.code.UnitTests")).score_tree(tree).values()
    assert failed.status == "failed"
    assert "JailError: the jail could not be built, so nothing is known of the program: no namespaces" in failed.reason


@pytest.mark.slow
@pytest.mark.usefixtures("isolated")
def test_programs_of_a_tree_run_at_the_same_time():
    assert RUNS_APART
    facts = {"right": answer_facts(ADD), "wrong": answer_facts("x = 1"), "late": answer_facts("while True: pass")}
    tree = parse_tree("q -> (right, wrong, late)", facts=facts, data={"tests": ADD_TESTS})
    source = Source("code", SourceConfig(target="rewards.sources.code.UnitTests", args={"wall_s": 1.0}))
    for _ in range(2):  # each in an event loop of its own
        assert source.score_tree(tree) == {0: Score(1.0), 1: Score(0.0), 2: Score(0.0)}


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "value",
    [Counter("aab"), OrderedDict(a=1), Pair(1, 2), Fraction(1, 3), Decimal("0.1"), {1, 2}, {}.keys(), frozenset("ab")],
)
def test_values_of_derived_types_arrive_as_what_they_equal(value: Any):
    assert decoded(json.loads(json.dumps(encoded(value)))) == value


def test_a_value_of_another_type_does_not_arrive():
    for value in (object(), [object()], lambda: 0, range(3), (each for each in ())):
        with pytest.raises(TypeError, match="none of Python's own types"):
            encoded(value)
    for told in ([], ["what", 1], 7, ["set", [["list", []]]], ["int", "x"], ["list", 3]):
        with pytest.raises((ValueError, TypeError)):
            decoded(told)  # pyright: ignore[reportArgumentType]


NUMBERS = st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
ATOMS = st.none() | st.booleans() | NUMBERS | st.text() | st.binary()
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(ATOMS, inner, max_size=3)
        | st.sets(ATOMS, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_every_value_of_pythons_own_types_arrives(value: Any):
    found = decoded(json.loads(json.dumps(encoded(value))))
    assert found == value and type(found) is type(value)
