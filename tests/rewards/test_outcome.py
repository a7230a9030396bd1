"""Is the answer right: text and numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.drawn import answer_facts, call_facts, malformed_facts
from rewards.numbers import number_in
from rewards.sources.outcome import exact_match, numeric_match, token_f1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("so 3 * 6 = 18\n#### 18", 18),
        ("#### 17\nno, wait\n#### 18 dollars", 18),
        ("#### 1,234.50", Fraction("1234.5")),
        ("#### -7", -7),
        ("#### \N{MINUS SIGN}7", -7),
        ("#### $1,000,000", 1_000_000),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### 50%", 50),
        ("#### 18.", 18),
        ("#### 3/4", Fraction(3, 4)),
        ("#### -3 / 4", Fraction(-3, 4)),
        ("#### 1/1,000", Fraction(1, 1000)),
        ("#### .5", Fraction(1, 2)),
        (r"thus \boxed{42}", 42),
        (r"first \boxed{41}, then \boxed{42} of 43", 42),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{-\dfrac{1}{2}}", Fraction(-1, 2)),
        (r"\boxed{5 \text{ km}^2}", 5),
        (r"\boxed{\$1{,}500}", 1500),
        (r"\boxed{18\%}", 18),
        (r"\boxed{41} #### 42", 42),
        ("She has 3 apples and buys 4, so 7.", 7),
        ("it lasts from 10-12", 12),
        ("x=-5", -5),
        ("18", 18),
        ("018", 18),
        ("18.0", 18),
    ],
)
def test_number_of_an_answer(text, number):
    assert number_in(text) == number


@pytest.mark.parametrize("text", ["", "none", "#### unknown, maybe 5 or so"[:12], r"\boxed{x}", "#### 3/0", "9" * 5000])
def test_text_without_a_number(text):
    assert number_in(text) is None


@given(st.integers(-(10**12), 10**12))
def test_commas_between_thousands_change_nothing(number):
    assert number_in(f"#### {number:,}") == number_in(f"#### {number}") == number


@given(st.decimals(-10_000, 10_000, places=3))
def test_decimals_are_exact(number):
    assert number_in(f"the answer is {number:f}") == Fraction(number)


@given(st.text(r"0123456789,.-$%/# \boxed{frac}", max_size=60))
def test_no_text_breaks_the_extractor(text):
    assert number_in(text) is None or isinstance(number_in(text), Fraction)


def test_equal_numbers_match_however_they_are_written():
    assert numeric_match(answer_facts("it is $1,200.00."), "#### 1200") == 1.0
    assert numeric_match(answer_facts("0.75"), "3/4") == 1.0
    assert numeric_match(answer_facts("1201"), "1200") == 0.0


def test_trajectory_without_an_answer_is_wrong():
    for facts in (call_facts(), malformed_facts(), answer_facts("no idea")):
        assert numeric_match(facts, "18") == 0.0
        assert exact_match(facts, "18") == 0.0


def test_exact_match_ignores_case_and_white_space_only():
    assert exact_match(answer_facts("  mia   COLE\n"), "Mia Cole") == 1.0
    assert exact_match(answer_facts("Mia Cole."), "Mia Cole") == 0.0


def test_prompt_without_a_reference_is_an_error_and_not_a_wrong_answer():
    with pytest.raises(ValueError, match=r"no reference answer; name its column in task\.columns\.answer"):
        exact_match(answer_facts("Mia"), "")
    with pytest.raises(ValueError, match=r'the reference answer "Mia" holds no number; score it with exact_match'):
        numeric_match(answer_facts("3"), "Mia")


@pytest.mark.parametrize(
    ("given", "wanted", "score"),
    [
        ("the Eiffel Tower", "Eiffel Tower, Paris", 0.8),  # 2 common of 2 and 3: 2 * 2 / 5
        ("Paris", "paris.", 1.0),
        ("a cat, a cat", "cat", 2 / 3),  # the word counts as often as it stands: 2 * 1 / 3
        ("London", "Paris", 0.0),
        ("the", "a", 0.0),  # nothing is left of either, and they are not the same
        ("the", "The", 1.0),
    ],
)
def test_words_in_common(given: str, wanted: str, score: float):
    assert token_f1(answer_facts(given), wanted) == pytest.approx(score)


def test_no_answer_has_no_words_in_common_and_no_reference_is_no_score():
    assert token_f1(call_facts(), "Paris") == 0
    with pytest.raises(ValueError, match="no reference answer"):
        token_f1(answer_facts("Paris"), " ")
