"""Did the edit mend what a language tool complains of? Facts of compilers, type checkers and language servers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.tree import Node


@dataclass(frozen=True, slots=True)
class Report:
    """What a language tool says of the program after a call."""

    diagnostics: int
    """D: number of relevant diagnostics."""
    safe: bool = True
    """S: all safety checks pass."""
    confidence: float = 1.0
    """conf: how sure the tool is that it changed the right place, in [0, 1]."""


class Diagnostics:
    """The step reward of Lanser-CLI (arXiv 2510.22907), from the JSON that a language tool returned.

    r = relief * (D_before - D_after) + safety * S - doubt * (1 - conf)

    Of the step's results the last one with a count of diagnostics speaks for the step; D_before is that of the steps
    before on the path, at first the column `diagnostics_before`. A step without such a result is not applicable, and
    neither is a first one of which nobody knows what was before.

    The paper's second example (D unchanged, S=0, conf .62) prints -.438, which subtracts `safety` although S is 0; by
    the formula it is -.1 * .38 = -.038, as here. The same step refutes its claim that rewards without new diagnostics
    are never negative. The formula pays `safety` again for every safe step, so that many empty edits earn much.
    `potential` pays differences only, and no more than the way from the first state to the last is worth:

    r = Phi_after - Phi_before,  Phi = -relief * D + safety * S + doubt * conf

    There, our reading: a start of which the column tells the number alone is safe and beyond doubt.
    """

    def __init__(
        self,
        relief: float = 0.5,
        safety: float = 0.4,
        doubt: float = 0.1,
        potential: bool = False,
        diagnostics_key: str = "diagnostics",
        safe_key: str = "safe",
        confidence_key: str = "confidence",
    ):
        """Set weights and names.

        Args:
            relief: reward for one diagnostic less; the paper's alpha.
            safety: reward for a state that passes all safety checks; beta.
            doubt: cost of a confidence of 0; gamma.
            potential: pay differences of all three terms.
            diagnostics_key: entry of the JSON object that counts or lists the diagnostics.
            safe_key: entry that is true or false.
            confidence_key: entry in [0, 1].
        """
        self._relief, self._safety, self._doubt, self._potential = relief, safety, doubt, potential
        self._keys = diagnostics_key, safe_key, confidence_key

    def __call__(self, step: Node, trajectory: Sequence[Node], diagnostics_before: Any = None) -> float | None:
        """What the step is worth.

        Args:
            step: the step.
            trajectory: steps from the first to `step`.
            diagnostics_before: of the program as the prompt gives it: a number, a list of diagnostics, or an object
                with the three entries of a result.
        Raises: ValueError for a result or a column that counts diagnostics and is wrong otherwise: a failed score.
        """
        after = self._last_report([step])
        if after is None:
            return None
        before = self._last_report(trajectory[:-1]) or self._start(diagnostics_before)
        if before is None:
            return None
        if self._potential:
            return self._value(after) - self._value(before)
        mended = before.diagnostics - after.diagnostics
        return self._relief * mended + self._safety * after.safe - self._doubt * (1 - after.confidence)

    def _value(self, report: Report) -> float:
        return -self._relief * report.diagnostics + self._safety * report.safe + self._doubt * report.confidence

    def _last_report(self, steps: Sequence[Node]) -> Report | None:
        for step in reversed(steps):
            results = [step.facts.result, *(each.get("result") for each in step.facts.later_calls)]
            for result in reversed(results):
                entries = _json_object(result)
                if self._keys[0] in entries:
                    return self._report(entries)
        return None

    def _start(self, before: Any) -> Report | None:
        if before is None:
            return None
        return self._report(before) if isinstance(before, Mapping) else Report(_count(before, "diagnostics_before"))

    def _report(self, entries: Mapping[str, Any]) -> Report:
        diagnostics, safe, confidence = (entries.get(key) for key in self._keys)
        if not isinstance(safe, bool):
            raise ValueError(f'"{self._keys[1]}" of the language tool is {safe!r}; it must be true or false')
        if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
            raise ValueError(f'"{self._keys[2]}" of the language tool is {confidence!r}; it must be within [0, 1]')
        return Report(_count(diagnostics, self._keys[0]), safe, float(confidence))


def _count(diagnostics: Any, name: str) -> int:
    if isinstance(diagnostics, Sequence) and not isinstance(diagnostics, str):
        return len(diagnostics)
    number = diagnostics if isinstance(diagnostics, int | float) and not isinstance(diagnostics, bool) else -1
    if number >= 0 and float(number).is_integer():
        return int(number)
    raise ValueError(f'"{name}" is {diagnostics!r}; it must be a list of diagnostics or how many there are')


def _json_object(text: str | None) -> dict[str, Any]:
    """The object that a text is; empty where it is none."""
    try:
        entries = json.loads(text or "")
    except (ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}
