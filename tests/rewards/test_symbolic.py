"""Equal as mathematics: formulas, sets, intervals, units, and every reference of GSM8K and MATH-500."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.drawn import answer_facts, call_facts
from rewards.sources.symbolic import RUNS_APART, math_match

ROOT = Path(__file__).parents[2]
MATRIX = r"\begin{pmatrix} 1 & 0 \\ 0 & -1 \end{pmatrix}"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("1/2", r"\frac12"),
        ("0.5", "1/2"),
        ("50%", "1/2"),
        (r"So $\frac{1}{2}$.", "0.5"),
        ("The answer is 18.", "18"),
        ("$18.00", "18"),
        ("18 dollars", "18"),
        (r"\boxed{18\text{ cm}^2}", "18"),
        ("It costs $5 and then $6, so $11.", "11"),
        ("1,200", "1200"),
        ("9 * 2 = 18\n#### 18", "a\n#### 18"),
        (r"\boxed{x^2 - 1}", "(x-1)(x+1)"),
        ("y + x", "x+y"),
        (r"2*sqrt(2)", r"\sqrt{8}"),
        (r"3\frac{1}{2}", "7/2"),
        (r"The point is $(3, \frac{\pi}{2})$.", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
        (r"\boxed{[0, 1)}", "[0,1)"),
        ("x < 2", r"(-\infty, 2)"),
        (r"(-\infty, 2)", "x < 2"),
        ("x = 3", "3"),
        ("3", "x = 3"),
        (rf"\boxed{{{MATRIX}}}", MATRIX),
        (r"90^\circ", "90"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
        ("Evelyn", r"\text{Evelyn}"),
        ("18.0", "18"),
        ("0.3333333", "1/3"),  # equal to 6 places
    ],
)
def test_equal_answers(given: str, wanted: str):
    assert math_match(answer_facts(given), wanted) == 1


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("17", "18"),
        ("-18", "18"),
        ("4.667", "14/3"),
        ("2.0000001", "2"),
        ("q - p", "p - q"),
        ("[0, 1]", "[0, 1)"),
        (r"\{1, 2, 3\}", r"\{1, 2\}"),
        ("Briana", r"\text{Evelyn}"),
        ("x^2", "x^3"),
        ("", "18"),
        ("no idea", "18"),
        ("\\boxed{", "18"),
        ("1/0", "18"),
    ],
)
def test_different_answers(given: str, wanted: str):
    assert math_match(answer_facts(given), wanted) == 0


def test_no_answer_is_worth_nothing_and_no_reference_is_no_score():
    assert math_match(call_facts(), "18") == 0
    with pytest.raises(ValueError, match="no reference answer"):
        math_match(answer_facts("18"), " ")
    with pytest.raises(ValueError, match='the reference answer "nobody knows" holds no mathematics; score it'):
        math_match(answer_facts("18"), "nobody knows")


def test_it_asks_for_a_process_of_its_own_and_loads_nothing_before_its_first_answer():
    assert RUNS_APART
    code = "import sys, rewards.sources.symbolic; print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_it_says_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    math_match(answer_facts(r"\boxed{\frac{"), "1")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@settings(max_examples=25, deadline=None)
@given(st.integers(-9, 9), st.integers(-9, 9))
def test_a_product_equals_its_expansion_and_nothing_else(a: int, b: int):
    product = f"(x - ({a}))(x - ({b}))"
    assert math_match(answer_facts(product), f"x^2 + ({-a - b})x + ({a * b})") == 1
    assert math_match(answer_facts(product), f"x^2 + ({-a - b})x + ({a * b + 1})") == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(-99, 99), st.integers(1, 99), st.integers(1, 9))
def test_a_fraction_equals_itself_extended(numerator: int, denominator: int, factor: int):
    extended = rf"\frac{{{numerator * factor}}}{{{denominator * factor}}}"
    assert math_match(answer_facts(f"${extended}$"), f"{numerator}/{denominator}") == 1


def test_every_reference_of_gsm8k_is_right_and_wrong_where_the_next_number_is_wanted(shared_data: Path):
    with (shared_data / "gsm8k" / "test.jsonl").open(encoding="utf-8") as lines:
        solutions = [json.loads(line)["answer"] for line in lines]
    assert len(solutions) == 1319
    for solution in solutions:
        wanted = solution.partition("####")[2].strip()
        assert math_match(answer_facts(solution), wanted) == 1, solution
        assert math_match(answer_facts(solution), str(int(wanted.replace(",", "")) + 1)) == 0, solution


@pytest.mark.slow
def test_every_reference_of_math_equals_itself_in_a_sentence_and_in_a_box(shared_data: Path):
    rows = json.loads((shared_data / "math" / "math500_test.json").read_text(encoding="utf-8"))
    for wanted in (row["answer"] for row in rows):
        for answer in (wanted, f"Thus \\boxed{{{wanted}}}.", f"The answer is ${wanted}$."):
            assert math_match(answer_facts(answer), wanted) == 1, answer
