"""Is the final answer right?"""

from __future__ import annotations

import re
import string
from collections import Counter
from fractions import Fraction

from rollout.types import StepFacts

UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(rf"(?<![\w.])(-?\$?-?)({UNSIGNED})(?:\s?/\s?({UNSIGNED}))?")
"""Sign and dollar, digits with thousands' commas and decimals, and the lower half of a fraction."""
MARKED = re.compile(r"####(.*)")
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
PUNCTUATION = frozenset(string.punctuation)
ARTICLES = frozenset({"a", "an", "the"})
MAX_DIGITS = 100
"""Longer digit strings are no answer; Python refuses to convert those above 4,300."""


def exact_match(facts: StepFacts, answer: str) -> float:
    """1 when the final answer is the reference up to case and white space, else 0; 0 without an answer.

    Raises: ValueError when the prompt has no reference answer, which is a failed score and not a wrong answer.
    """
    _require_reference(answer)
    return float(facts.answer is not None and normalized(facts.answer) == normalized(answer))


def numeric_match(facts: StepFacts, answer: str) -> float:
    """1 when the final answer and the reference are the same number, else 0; 0 without an answer or a number in it.

    Raises: ValueError when the reference holds no number, which is a failed score and not a wrong answer.
    """
    _require_reference(answer)
    expected = number_in(answer)
    if expected is None:
        raise ValueError(f'the reference answer "{answer[:80]}" holds no number; score it with exact_match')
    return float(facts.answer is not None and number_in(facts.answer) == expected)


def token_f1(facts: StepFacts, answer: str) -> float:
    """Overlap of the final answer's words with the reference's, in [0, 1]; 0 without an answer.

    F1 = 2 |common| / (|answer| + |reference|), words counted as often as they stand, after lower case and without
    punctuation and the articles a, an, the; SQuAD, arXiv 1606.05250. Where both are empty after that, exact match.

    Raises: ValueError when the prompt has no reference answer, which is a failed score and not a wrong answer.
    """
    _require_reference(answer)
    if facts.answer is None:
        return 0.0
    given, wanted = _words(facts.answer), _words(answer)
    if not given and not wanted:
        return float(normalized(facts.answer) == normalized(answer))
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


def _words(text: str) -> Counter[str]:
    words = "".join(" " if letter in PUNCTUATION else letter for letter in text.casefold()).split()
    return Counter(word for word in words if word not in ARTICLES)


def normalized(text: str) -> str:
    """Lower case, single spaces, none at the ends."""
    return " ".join(text.casefold().split())


def number_in(text: str) -> Fraction | None:
    """The number that a text gives as its answer, exactly.

    The number after the last "####", else the one in the last \\boxed{}, else the last number of the text. Commas
    between thousands, a dollar sign, a percent sign and a trailing dot are dropped (50% is 50); a/b is a fraction.

    Returns: None where there is no number, or an impossible one such as 3/0.
    """
    text = _plain(text)
    for marker in (MARKED, BOXED):
        marked = marker.findall(text)
        if marked:
            return _first(list(NUMBER.finditer(marked[-1])))
    return _first(list(NUMBER.finditer(text))[-1:])


def _plain(text: str) -> str:
    text = LATEX_FRACTION.sub(r"\1/\2", text)
    for latex, plain in ((r"\$", "$"), ("{,}", ","), (r"\!", ""), (r"\,", ""), ("\N{MINUS SIGN}", "-")):
        text = text.replace(latex, plain)
    return text


def _first(found: list[re.Match[str]]) -> Fraction | None:
    if not found or len(found[0].group()) > MAX_DIGITS:
        return None
    sign, digits, denominator = found[0].groups()
    value, divisor = _fraction(digits), _fraction(denominator or "1")
    if divisor == 0:
        return None
    return -value / divisor if "-" in sign else value / divisor


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _require_reference(answer: str) -> None:
    if not answer.strip():
        raise ValueError("the prompt has no reference answer; name its column in task.columns.answer")
