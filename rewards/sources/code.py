"""Does the program in the answer pass its unit tests?"""

from __future__ import annotations

import ast
import asyncio
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewards import code_harness
from rollout.jail import Isolation, Limits, Outcome, run_python
from rollout.types import StepFacts

RUNS_APART = True
"""Scored in a process that a deadline can kill: programs of a model are waited for."""
FENCED = re.compile(r"```([A-Za-z0-9_+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
PYTHON_NAMES = frozenset({"python", "py", "python3"})
HARNESS = Path(code_harness.__file__)
NUM_TEST_TEXTS = 256


class UnitTests:
    """1 when the program in the final answer passes all of its tests, else 0; with `partial` the share that it passes.

    The program is the last block of the answer fenced by ```python, else the last fenced block, else the whole answer.
    It runs in a jail (`rollout.jail`) with Python's standard library; a program that crashes, hangs or takes too much
    fails the tests that it did not get to, which is a real 0. Tests are one of

    - cases of input and output: [{"input": "1 2\\n", "output": "3\\n"}, ...]. The program is run once for each and must
      exit with 0; lines are compared without white space at their ends.
    - assertions as text, or a list of such texts. Each `assert` at the top level is a test; other statements are run in
      between. A text without any is one test: that it runs to its end (`def check(f): ...; check(add)`).

    The program does not see what `assert f(x) == literal` expects: it computes f(x), which is compared outside the
    jail, so that neither printing nor sys.exit, os._exit or an object that equals everything passes such a test. Cases
    of input and output are compared outside as well. Any other test (`assert f(x) < 3`, `check(f)`) is judged beside
    the program, which answers for it with a number drawn for the run: a program that leaves early fails, but one
    written to search the interpreter for that number, or to replace what a test calls, could pass. Compare with
    literals where the policy might learn to.
    """

    def __init__(
        self,
        partial: bool = False,
        isolation: str = "required",
        wall_s: float = 5.0,
        cpu_s: float = 5.0,
        memory_mib: int = 512,
        num_parallel: int = 2,
    ):
        """Set limits.

        Args:
            partial: pay the share of the tests that pass, which a policy can collect by special cases.
            isolation: `required`, `preferred` or `off`: whether programs must be cut off from the network, our files
                and our processes (`rollout.jail.Isolation`).
            wall_s: longest run: of each case, or of all assertions. The source's own timeout_s must be longer than that
                of all trajectories of a tree together, `num_parallel` at a time.
            cpu_s: processor time of it.
            memory_mib: memory of it.
            num_parallel: programs of a tree that run at a time.
        """
        self._partial = partial
        self._isolation = Isolation(isolation)
        self._limits = Limits(wall_s=wall_s, cpu_s=cpu_s, memory_mib=memory_mib)
        self._threads = ThreadPoolExecutor(num_parallel, thread_name_prefix="unit-tests")

    async def __call__(self, facts: StepFacts, tests: Any) -> float:
        """What the trajectory is worth.

        Args:
            facts: of its last step.
            tests: as above, or the same as JSON text.
        Raises: ValueError for tests that cannot be read; JailError when no program can be run. Both are failed scores.
        """
        found = _parsed(tests)
        if facts.answer is None:
            return 0.0
        program = code_of(facts.answer)
        passed = await asyncio.get_running_loop().run_in_executor(self._threads, self._num_passed, program, found)
        total = len(found.tests) if isinstance(found, Assertions) else len(found)
        return passed / total if self._partial else float(passed == total)

    def _num_passed(self, program: str, tests: Assertions | list[Case]) -> int:
        if isinstance(tests, Assertions):
            return self._num_assertions_passed(program, tests)
        passed = 0
        for case in tests:
            outcome = run_python(program, stdin=case.input, limits=self._limits, isolation=self._isolation)
            if outcome.ok and _lines(outcome.stdout) == _lines(case.output):
                passed += 1
            elif not self._partial:
                break
        return passed

    def _num_assertions_passed(self, program: str, tests: Assertions) -> int:
        nonce = secrets.token_hex()
        request = {"nonce": nonce, "program": program, "items": tests.items}
        outcome = run_python(
            _harness(), limits=self._limits, isolation=self._isolation, channel=json.dumps(request).encode()
        )
        values = _values(outcome, nonce)
        return sum(place in values and _is_expected(values[place], test) for place, test in tests.tests.items())


@dataclass(frozen=True, slots=True)
class Case:
    """What a program reads, and what it must write."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Expected:
    """What the value of an item must be: equal to a literal, or just there."""

    value: Any = None
    same_type: bool = False
    """True for `is`: 1 equals True and is not True."""
    any_value: bool = False
    """True where getting to its end is the test."""


@dataclass(frozen=True, slots=True)
class Assertions:
    """Items that the harness runs, and what is expected of those that are tests."""

    items: list[dict[str, str]]
    tests: dict[int, Expected]


def code_of(answer: str) -> str:
    """The program in an answer: its last Python block, else its last block, else all of it."""
    blocks = [(name.casefold(), code) for name, code in FENCED.findall(answer)]
    python = [code for name, code in blocks if name in PYTHON_NAMES]
    return python[-1] if python else blocks[-1][1] if blocks else answer


def _parsed(tests: Any) -> Assertions | list[Case]:
    if isinstance(tests, str):
        listed = _json_list(tests)
        if listed is None:
            return _assertions(tests)
        tests = listed
    if not isinstance(tests, Sequence) or not tests:
        raise ValueError(f"the tests are {str(tests)[:80]!r}; give assertions as text or a list, or a list of cases")
    if all(isinstance(each, str) for each in tests):
        return _assertions("\n".join(tests))
    return [_case(each) for each in tests]


def _json_list(text: str) -> list[Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, list) else None


def _case(case: Any) -> Case:
    if not isinstance(case, Mapping) or not all(isinstance(case.get(name), str) for name in ("input", "output")):
        raise ValueError(f'a test is {str(case)[:80]!r}; write {{"input": text, "output": text}}')
    return Case(case["input"], case["output"])


@lru_cache(NUM_TEST_TEXTS)
def _assertions(text: str) -> Assertions:
    """Tests as items.

    Raises: ValueError for text that is empty or no Python.
    """
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"the tests are no Python: {error}") from error
    if not statements:
        raise ValueError("the tests hold no statement, and a program without a test would pass")
    if not any(isinstance(each, ast.Assert) for each in statements):
        return Assertions([{"run": text}], {0: Expected(any_value=True)})
    items, tests = [], {}
    for statement in statements:
        if isinstance(statement, ast.Assert):
            asked, tests[len(items)] = _question(statement)
            items.append(asked)
        else:
            items.append({"run": ast.unparse(statement)})
    return Assertions(items, tests)


def _question(statement: ast.Assert) -> tuple[dict[str, str], Expected]:
    """What to compute inside the jail, and what it must be."""
    test = statement.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is):
        for asked, literal in ((test.left, test.comparators[0]), (test.comparators[0], test.left)):
            try:
                expected = Expected(ast.literal_eval(literal), same_type=isinstance(test.ops[0], ast.Is))
            except (ValueError, TypeError, SyntaxError, RecursionError):
                continue
            return {"value": ast.unparse(asked)}, expected
    return {"run": ast.unparse(statement)}, Expected(any_value=True)


def _values(outcome: Outcome, nonce: str) -> dict[int, Any]:
    """Item -> what the harness told of it; the first word on each counts."""
    values: dict[int, Any] = {}
    for line in outcome.reply.splitlines():
        try:
            told = json.loads(line)
            if told["nonce"] == nonce:
                values.setdefault(told["item"], code_harness.decoded(told["value"]))
        except (ValueError, TypeError, KeyError, RecursionError, ZeroDivisionError):
            continue  # not from the harness, or cut off where the program was ended
    return values


def _is_expected(value: Any, expected: Expected) -> bool:
    if expected.any_value:
        return True
    return bool(value == expected.value) and (type(value) is type(expected.value) or not expected.same_type)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


@lru_cache(1)
def _harness() -> str:
    return HARNESS.read_text(encoding="utf-8")
