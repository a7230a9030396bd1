"""Where a run's time went, for its report: the stages of a step, and who had nothing to do meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from rl.idle import PARTS
from rl.metrics import STAGES

STAGE_COLORS = ("#2563a8", "#7aa6d6", "#c9d8ea", "#d97a2b", "#efb27f", "#6b8f71", "#a9c3ad", "#8a8f98", "#c4c7cc")
BUSY_COLOR = "#2563a8"
SHOWN_PARTS = {
    "rollout": "rollout workers",
    "engine": "their engines",
    "reward": "reward service",
    "prm": "process reward model",
    "learner": "learner",
    "driver": "driver",
}

Series = Callable[[str], list[float]]
"""A metric's values over the run, steps without it left out."""


def time_section(series: Series) -> str:
    """Time per stage as one bar, and below it how busy each part was; "" where nothing was timed."""
    totals = {stage: sum(series(f"time/{stage}_seconds")) for stage in STAGES if stage != "step"}
    totals = {stage: seconds for stage, seconds in totals.items() if seconds > 0}
    whole = sum(totals.values())
    if not whole:
        return ""
    parts = list(zip(totals.items(), STAGE_COLORS, strict=False))
    bar = "".join(
        f'<i style="flex:{seconds / whole:.4f};background:{color}" title="{stage}"></i>'
        for (stage, seconds), color in parts
    )
    keys = "".join(
        f'<li><i style="background:{color}"></i>{stage} <b>{duration_text(seconds)}</b> {seconds / whole:.0%}</li>'
        for (stage, seconds), color in parts
    )
    return (
        f"<section><h2>Time per stage</h2><div class=bar>{bar}</div><ul class=key>{keys}</ul>{_parts(series)}</section>"
    )


def _parts(series: Series) -> str:
    """A bar for each part: filled for the share of the steps in which it had something to do."""
    idle = {part: fmean(shares) for part in PARTS if (shares := series(f"time/{part}_idle_share"))}
    if not idle:
        return ""
    rows = "".join(
        f"<div>{SHOWN_PARTS[part]}</div><div class=bar>"
        f'<i style="width:{1 - share:.2%};min-width:0;background:{BUSY_COLOR}"></i></div><span>{share:.0%} idle</span>'
        for part, share in idle.items()
    )
    return f"<div class=parts>{rows}</div>"


def duration_text(seconds: float) -> str:
    """Seconds as a person would say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
