"""Is the final answer right?"""

from __future__ import annotations

import string
from collections import Counter

from rewards.numbers import number_in
from rollout.types import StepFacts

PUNCTUATION = frozenset(string.punctuation)
ARTICLES = frozenset({"a", "an", "the"})


def exact_match(facts: StepFacts, answer: str) -> float:
    """1 when the final answer is the reference up to case and white space, else 0; 0 without an answer.

    Raises: ValueError when the prompt has no reference answer, which is a failed score and not a wrong answer.
    """
    _require_reference(answer)
    return float(facts.answer is not None and normalized(facts.answer) == normalized(answer))


def numeric_match(facts: StepFacts, answer: str) -> float:
    """1 when the final answer and the reference are the same number, else 0; 0 without an answer or a number in it.

    Which number of a text that is: `rewards.numbers.number_in`.

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


def _require_reference(answer: str) -> None:
    if not answer.strip():
        raise ValueError("the prompt has no reference answer; name its column in task.columns.answer")
