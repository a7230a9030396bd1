"""Is the final answer the same mathematics as the reference? LaTeX, expressions, sets, intervals, fractions, units."""

from __future__ import annotations

import logging
import re
import warnings
from functools import cache
from typing import Any

from rollout.types import StepFacts

RUNS_APART = True
"""Scored in a process that a deadline can kill: simplifying an expression takes longer than anyone can wait for some
that a policy writes, such as 9^9^9^9, and the library's own limit is an alarm that other code's alarms undo."""
MARKED = re.compile(r"####(?!#)(.*)")
FENCED = re.compile(r"\\boxed|\\\(|\\\[|\$[^$]*\$")
COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mbox|begin|end|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
FUNCTION = re.compile(r"\b(?:sqrt|sinh|cosh|tanh|asin|acos|atan|infty|infinity)\b")
PROSE = re.compile(r"[A-Za-z]{4,}|\b(?:the|is|are|so|and|or|to|she|he|it|for|per)\b", re.IGNORECASE)
"""Words that stand in no formula, commands and functions left out."""
WORD = re.compile(r"[A-Za-z]{2,}")
MAX_CHARS = 20_000
"""An answer stands at the end; the library's patterns take long on more."""


def math_match(facts: StepFacts, answer: str) -> float:
    """1 when the final answer and the reference are mathematically equal, else 0; 0 without an answer or mathematics.

    Read and compared by the library math-verify: what follows "####", else \\boxed{}, "the final answer is", else the
    last formula or number. Equal are 1/2, 0.5, \\frac12 and 50%; {1, 2} and {2, 1}; x = 3 and 3; (0, 1] and
    0 < x \\le 1; and expressions whose difference simplifies to 0. Decimals are compared to 6 places with fractions and
    other decimals, exactly with whole numbers. An answer that the library can neither read nor compare is wrong.

    Args:
        facts: of the trajectory's last step.
        answer: the reference: a formula with or without dollar signs, a number, or a solution with "####" or \\boxed{}.
    Raises: ValueError when there is no reference or no mathematics in it, which is a failed score.
    """
    if not answer.strip():
        raise ValueError("the prompt has no reference answer; name its column in task.columns.answer")
    expected = _parsed(answer)
    if not expected:
        raise ValueError(f'the reference answer "{answer[:80]}" holds no mathematics; score it with exact_match')
    given = facts.answer or ""
    found = _parsed(given) or _word(given)
    # Relations are compared with intervals both ways: x < 2 and (-oo, 2).
    return float(bool(found) and _library().verify(expected, found, allow_set_relation_comp=True, timeout_seconds=None))


def _parsed(text: str) -> list[Any]:
    """The expressions that a text gives as its answer; none where it has no mathematics."""
    text = text[-MAX_CHARS:]
    marked = [found.strip() for found in MARKED.findall(text)]
    text = _without_currency(marked[-1] if marked and marked[-1] else text).strip()
    if not text:
        return []
    if FENCED.search(text) or _is_prose(text):
        return _read(text)
    return _read(f"${text}$") or _read(text)


def _word(text: str) -> list[Any]:
    """The single word that a text is, as the library reads \\text{word}; none where it is something else."""
    word = text.strip(" \n.*")
    return _read(f"$\\text{{{word}}}$") if WORD.fullmatch(word) else []


def _without_currency(text: str) -> str:
    """Without the dollar signs that open or close no formula: "$5 and then $6" holds none."""
    text = text.replace("\\$", "")
    if "$$" in text:
        return text
    kept, *pieces = text.split("$")
    while pieces:
        piece = pieces.pop(0)
        if pieces and piece.strip() and not _is_prose(piece):
            kept += f"${piece}${pieces.pop(0)}"
        else:
            kept += piece
    return kept


def _is_prose(text: str) -> bool:
    return PROSE.search(FUNCTION.sub("", COMMAND.sub("", text))) is not None


def _read(text: str) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _library().parse(text, fallback_mode="no_fallback", parsing_timeout=None)


@cache
def _library() -> Any:
    """math-verify, imported when the first answer is read: it loads SymPy."""
    # It warns once of having no time limit, which is meant: the process has one.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import math_verify
    return math_verify
