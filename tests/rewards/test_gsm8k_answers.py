"""Judging grade-school answers: every reference of GSM8K, and solutions as models of several families write them."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from rewards.drawn import answer_facts
from rewards.numbers import number_in
from rewards.sources.outcome import numeric_match

REFERENCE = re.compile(r"####\s*(.+)$", re.MULTILINE)  # conf/task/gsm8k.yaml: answer_pattern


@pytest.fixture(scope="module")
def solutions(shared_data: Path) -> list[str]:
    with (shared_data / "gsm8k" / "test.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["answer"] for line in lines]


def reference(solution: str) -> str:
    found = REFERENCE.search(solution)
    assert found, solution
    return found[1]


def test_every_reference_solution_of_gsm8k_is_right(solutions: list[str]):
    assert len(solutions) == 1319
    for solution in solutions:
        wanted = reference(solution)
        for answer in (solution, wanted, f"The answer is {wanted}.", f"So it is \\boxed{{{wanted}}}."):
            assert numeric_match(answer_facts(answer), wanted) == 1, answer
            assert numeric_match(answer_facts(answer), solution) == 1, answer


def test_every_reference_solution_of_gsm8k_is_wrong_where_another_number_is_wanted(solutions: list[str]):
    for solution in solutions:
        number = number_in(reference(solution))
        assert number is not None
        for wanted in (number + 1, -number - 1, number * 10 + 1):
            assert numeric_match(answer_facts(solution), str(wanted)) == 0, solution


GRADED = [
    # the format that is asked for
    ("16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n9 * 2 = $<<9*2=18>>18.\n#### 18", 18),
    ("She sells 9 eggs, 9 * 2 = 18 dollars.\n#### 18 dollars per day for 7 days", 18),
    ("#### $18.00", 18),
    ("#### **18**", 18),
    ("#### \\$18", 18),
    ("####18", 18),
    ("#### 1,200", 1200),
    ("#### Answer: 18", 18),
    ("9 * 2 = 18\n#### She makes $18", 18),
    ("#### 18\n\nShe makes 18 dollars in 7 days.", 18),
    # headings that look like it
    ("#### Step 1: eggs left\n16 - 7 = 9\n#### Step 2: money\n9 * 2 = 18\n\nThe answer is 18.", 18),
    ("#### 1. Count the eggs\n16 - 7 = 9\n#### 2. Sell them\n9 * $2 = $18", 18),
    ("### Solution\n9 * 2 = 18\n\n#### Final Answer\n**18**", 18),
    # "the answer is"
    ("Janet sells 16 - 3 - 4 = 9 duck eggs a day. She makes 9 * 2 = $18 a day. The answer is 18.", 18),
    ("The answer is $18.", 18),
    ("The answer is 18 dollars for 7 days of work.", 18),
    ("The answer is 18. We checked it in 2 ways.", 18),
    ("The answer is: 18", 18),
    ("The answer is **18**.", 18),
    ("The answer is \\(18\\).", 18),
    ("the answer is $18$.", 18),
    ("The answer is 10 + 8 = 18.", 18),
    ("Therefore, the answer to the question is approximately 18.5 km.", Fraction("18.5")),
    ("The final answer is -5.", -5),
    ("The final answer is $\\boxed{18}$. I hope it is correct.", 18),
    ("The answer is 17. Wait, 9 * 2 is 18, so the answer is 18.", 18),
    ("The answer would be 70%.", 70),
    ("The correct answer is 1,234,567.", 1_234_567),
    # "Answer:"
    ("Answer: 18", 18),
    ("**Answer:** 18 eggs", 18),
    ("**Answer: $18**", 18),
    ("Final Answer: **$540**", 540),
    ("**Final Answer**\n\n$18", 18),
    ("### Answer\n18", 18),
    ("Answer: 7 (i.e. 7 of 10)", 7),
    ("Answer = 18", 18),
    ("ANSWER: 3/4", Fraction(3, 4)),
    ("Answer: Janet makes $18 every day.", 18),
    ("Answer:\n1. 16 - 7 = 9 eggs are left.\n2. 9 * 2 = 18 dollars.", 18),
    # boxes
    ("$$\\boxed{18}$$", 18),
    ("\\[ 9 \\times 2 = \\boxed{18} \\]\nSo she makes 18 dollars in 1 day.", 18),
    ("$\\boxed{18\\text{ dollars}}$", 18),
    ("\\boxed{\\text{18 eggs}}", 18),
    ("\\boxed{\\$1,080.00}", 1080),
    ("\\boxed{9 \\times 2 = 18}", 18),
    ("\\boxed{x = 18}", 18),
    ("\\boxed{1\\frac{1}{2}}", Fraction(3, 2)),
    ("\\boxed{\\frac12}", Fraction(1, 2)),
    ("\\boxed{1.5 \\times 10^{3}}", 1500),
    ("\\boxed{18 \\, \\text{cm}^2}", 18),
    ("\\boxed{1\\,200}", 1200),
    ("\\fbox{18}", 18),
    # a last sentence
    ("So the total is $540.", 540),
    ("So, James runs 3 * 3 * 60 = 540 meters a week.", 540),
    ("10 - 3 = 7", 7),
    ("= 18 eggs", 18),
    ("Therefore, Janet makes $18 every day at the farmers' market.", 18),
    ("She makes **$18** every 7 days.", 18),
    ("**Step 1:** 16 - 7 = 9\n**Step 2:** 9 * 2 = 18\n\nJanet makes **$18** per day.", 18),
    ("He has 18 apples left (see step 2).", 18),
    ("He has 18 apples left, as shown in step 2.", 18),
    ("The total is 18 (9 + 9).", 18),
    ("Carla has 18 dollars left after 7 days.", 18),
    ("She earns 18 dollars per day for 7 days.", 18),
    ("James runs 540 meters in 3 days.", 540),
    ("He bought 3 lamps for $540.", 540),
    ("He bought 3 lamps for 540 dollars.", 540),
    ("The 3 friends travel for 18 hours.", 18),
    ("It takes her 18 minutes.", 18),
    ("So 3 boxes weigh 18 pounds.", 18),
    ("It costs 18 dollars out of 50.", 18),
    ("7 of the 10 apples are red, so the share is 70%.", 70),
    ("The area is 18 cm^2.", 18),
    ("The area is 18 $\\text{cm}^{2}$.", 18),
    ("The pool holds 18 m\u00b3 of water.", 18),
    ("On the 3rd day she has 18 eggs.", 18),
    ("She has 18 eggs on the 3rd day.", 18),
    ("She leaves at 6:30 and drives for 18 minutes.", 18),
    ("Thus x = -5.", -5),
    ("The temperature is \N{MINUS SIGN}5 degrees.", -5),
    ("Each gets 1 1/2 pies.", Fraction(3, 2)),
    ("Each gets 1\u00bd pies.", Fraction(3, 2)),
    ("Each gets 0.5 of it.", Fraction(1, 2)),
    ("It costs \N{EURO SIGN}18.", 18),
    ("The total is 1\u202f200 m.", 1200),
    ("The population is 1,200,000 people.", 1_200_000),
    ("So it is 18.0", 18),
    ("18", 18),
    ("$18$", 18),
    ("\\(18\\)", 18),
    ("`18`", 18),
    ("18!", 18),
    ("- 18", 18),
    ("\\begin{align*}\n9 \\times 2 &= 18\n\\end{align*}", 18),
    ("Total: $9 \\times 2 = 18$ dollars", 18),
    ("$$\\text{Total} = 9 \\times 2 = 18 \\text{ dollars}$$", 18),
    ("If x = 5, the total is 18.", 18),
    ("The answer is clear.\n9 * 2 = 18", 18),
    ("The profit is 200,000 - 130,000 = 70,000.", 70_000),
    ("So the answer is:\n\n**18**", 18),
    ("The answer is 18\n", 18),
    ("<answer>18</answer>", 18),
    ("<answer> $18 </answer>", 18),
    ("<answer>18</answer>\nI multiplied 9 by 2.", 18),
    ("Reasoning: 9 * 2.\n\nResult: 18", 18),
    ("Let me know if you have questions on step 3.\nThe total is 18.", 18),
]


@pytest.mark.parametrize(("text", "number"), GRADED)
def test_number_of_a_worked_solution(text: str, number: Fraction | int):
    assert number_in(text) == number
    assert numeric_match(answer_facts(text), f"#### {number}") == 1
    assert numeric_match(answer_facts(text), f"#### {number + 1}") == 0


@pytest.mark.parametrize(
    "text", ["", "I do not know.", "The answer is eighteen.", "At 6:30 PM", "\\boxed{}", "x_2", "the answer is yes"]
)
def test_solution_without_a_number_is_wrong(text: str):
    assert number_in(text) is None
    assert numeric_match(answer_facts(text), "18") == 0
