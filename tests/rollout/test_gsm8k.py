from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ToolError
from conf.schema import DataConfig
from rollout.data import read_rows, reference_answer
from rollout.envs.gsm8k import calculator
from rollout.tools import make_tool

DATA = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the GSM8K files are not beside the repository")
PATTERN = r"####\s*(.+)$"


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48 + 24", "72"),
        ("(1 + 2) * -3", "-9"),
        ("7 / 2", "3.5"),
        ("8 / 2", "4"),
        ("7 // 2 + 7 % 2", "4"),
        ("2^10", "1024"),
        ("$1,250 * 2", "2500"),
        ("3 \u00d7 4 \u00f7 6", "2"),
        ("0.1 + 0.2", "0.3"),
        ("1e3 + .5", "1000.5"),
        ("2 ** -1", "0.5"),
    ],
)
def test_arithmetic(expression: str, result: str):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1 / 0", "divides by zero"),
        ("two + two", "only numbers"),
        ("__import__('os').system('ls')", "only numbers"),
        ("(1).__class__", "only numbers"),
        ("[1, 2]", "only numbers"),
        ("1 if 2 else 3", "only numbers"),
        ("3(4)", "only numbers"),
        ("True + 1", "only numbers"),
        ("1j * 2", "only numbers"),
        ("x := 3", "only numbers"),
        ("e", "only numbers"),
        ("()", "only numbers"),
        ("2 3", "not an arithmetic expression"),
        ("2 +", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        ("9 ** 9 ** 9", "the exponent 387420489 is too large"),
        ("9 ** 64 ** 2", "too large"),
        ("(9 ** 64) ** 64", "is too large"),
        ("1e308 * 10", "is too large"),
        ("(-8) ** 0.5", "no real power"),
        ("(" * 150 + "1" + ")" * 150, "is the most; split it up"),
        ("9" * 150, "is too large"),
    ],
)
def test_anything_else_is_refused_in_words(expression: str, message: str):
    with pytest.raises(ToolError, match=message):
        calculator(expression)


@given(st.text("0123456789+-*/%(). e$,^", max_size=60) | st.text(max_size=60))
def test_whatever_is_written_gives_a_number_or_a_refusal(expression: str):
    try:
        float(calculator(expression))
    except ToolError as refusal:
        assert str(refusal)


def test_the_policy_is_told_what_it_may_write():
    assert make_tool(calculator).required == ["expression"]


@needs_data
@pytest.mark.parametrize(("name", "num_rows"), [("train", 7473), ("test", 1319)])
def test_every_reference_answer_is_a_number(name: str, num_rows: int):
    rows = read_rows(DataConfig(path=str(DATA / f"{name}.jsonl")), "task.train")
    answers = [reference_answer(row["answer"], PATTERN) for row in rows.rows]
    assert len(answers) == num_rows
    assert all(float(answer) == float(answer) for answer in answers)


@needs_data
def test_the_calculator_agrees_with_the_worked_solutions():
    rows = read_rows(DataConfig(path=str(DATA / "test.jsonl")), "task.train")
    agree = total = 0
    for row in rows.rows:
        for expression, result in re.findall(r"<<([^=>]+)=([^>]+)>>", row["answer"]):
            total += 1
            agree += is_close(expression, result)
    assert total > 3000
    assert agree / total > 0.98  # the solutions round, and some write units into their arithmetic


def is_close(expression: str, result: str) -> bool:
    try:
        return abs(float(calculator(expression)) - float(calculator(result))) < 0.01
    except ToolError:
        return False
