"""How long each part of a run had nothing to do, and when the driver was at which stage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

Busy = Mapping[str, Mapping[str, float]]
"""Process -> part -> seconds with something to do so far. Several processes may be of one part."""

PARTS = ("rollout", "engine", "reward", "prm", "learner", "driver")
"""Parts whose idle share is measured."""


class IdleMeter:
    """Compares what each process has done between two looks with the time between them."""

    def __init__(
        self, look: Callable[[], Busy], waited: Callable[[], float], now: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare.

        Args:
            look: asks every process; one that does not answer is absent.
            waited: seconds that the driver has waited for others so far; what is left of the time it worked itself.
        """
        self._look, self._waited, self._now = look, waited, now
        self._before: Busy = {}
        self._waited_before = self._started = 0.0

    def start(self) -> None:
        """A step begins."""
        self._before, self._waited_before, self._started = self._look(), self._waited(), self._now()

    def shares(self) -> dict[str, float]:
        """Part -> share of the time since `start` in which it had nothing to do, in the mean over its processes.

        A process that started meanwhile, anew too, counts from nothing; one that is gone is left out.
        """
        seconds, waited = self._now() - self._started, self._waited() - self._waited_before
        if seconds <= 0:
            return {}
        worked: dict[str, list[float]] = {}
        for process, parts in self._look().items():
            before = self._before.get(process, {})
            for part, total in parts.items():
                earlier = before.get(part, 0.0)
                worked.setdefault(part, []).append(total - earlier if total >= earlier else total)
        idle = {part: 1 - fmean(each) / seconds for part, each in worked.items()}
        return {part: min(1.0, max(0.0, share)) for part, share in (idle | {"driver": waited / seconds}).items()}


@dataclass(frozen=True, slots=True)
class Span:
    """The driver at one stage."""

    stage: str
    started_s: float
    seconds: float


def write_stage_trace(path: Path, spans: Sequence[Span], step: int) -> None:
    """Write the driver's stages in one step as a Chrome trace, to look at beside the learner's and Ray's."""
    events = [
        {
            "name": span.stage,
            "cat": "stage",
            "ph": "X",
            "ts": 1e6 * span.started_s,
            "dur": 1e6 * span.seconds,
            "pid": "driver",
            "tid": "stages",
            "args": {"step": step},
        }
        for span in spans
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
