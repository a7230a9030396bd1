"""An evaluation for people, in the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conf.schema import RunConfig
from rl.estimates import Estimate
from rl.evaluate import Evaluated
from rl.statistics import CONFIDENCE, POWER

MAX_REASONS = 5
"""Reasons of unknown outcomes that are listed."""


def evaluation_table(done: Evaluated) -> RenderableType:
    """What was measured, how sure it is, and what an evaluation of this kind can tell apart."""
    return Group(*_parts(done))


def _parts(done: Evaluated) -> Iterator[RenderableType]:
    found, run = done.found, done.cfg.run
    sampling = "greedy" if run.eval_temperature == 0 else f"temperature {run.eval_temperature:g}"
    yield Text(f"{done.model}", style="dim", overflow="fold")
    yield Text(
        f"{found.num_prompts} prompts x {run.eval_samples} samples, {sampling}, "
        f"{found.mean_tokens:.0f} tokens a sample, {done.seconds:.0f} s"
    )
    if found.unknown:
        reasons = list(found.unknown.items())
        shown = ", ".join(f"{reason} ({num})" for reason, num in reasons[:MAX_REASONS])
        more = f", and {len(reasons) - MAX_REASONS} other reasons" if len(reasons) > MAX_REASONS else ""
        yield Text(
            f"{sum(found.unknown.values())} of {found.num_samples} samples have no known outcome and count neither as "
            f"success nor as failure: {shown}{more}",
            style="yellow",
        )
    yield _estimates(found.estimates, run)
    yield from _power(done)
    if done.outcomes is not None:
        yield Text(f"each prompt's samples: {done.outcomes}", style="dim", overflow="fold")


def _estimates(estimates: dict[str, Estimate], run: RunConfig) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("")
    for title in ("share", f"{CONFIDENCE:.0%} interval", "prompts"):
        table.add_column(title, justify="right")
    for name, each in estimates.items():
        bounds = f"{each.interval.low:.1%} to {each.interval.high:.1%}"
        table.add_row(shown_name(name, run), f"{each.value:.1%}", bounds, str(each.num_prompts))
    return table


def shown_name(name: str, run: RunConfig) -> str:
    """An estimate's name as papers write it."""
    by = f" by {run.eval_score}" if run.eval_score else ""
    if name == "success":
        return "success, pass@1"
    if name == "majority":
        return f"majority of {run.eval_samples}"
    if name == "weighted_vote":
        return f"vote of {run.eval_samples} weighted{by}"
    name = re.sub(r"^pass_at_(\d+)$", r"pass@\1", name)
    name = re.sub(r"^pass_all_(\d+)$", r"pass^\1", name)
    return re.sub(r"^best_of_(\d+)$", rf"best of \1{by}", name)


def _power(done: Evaluated) -> Iterator[RenderableType]:
    found, samples = done.found, done.cfg.run.eval_samples
    if found.spread is not None and found.spread.between + found.spread.within > 0:
        worth = samples / found.spread.design_effect(samples)
        yield Text(
            f"\nsamples of a prompt correlate by {found.spread.correlation:.2f}: {samples} of one prompt are worth "
            f"{worth:.1f} of different prompts"
        )
    rows = found.power_table()
    if not rows:
        yield Text("\nevery sample came out alike: this says nothing of what a difference would take")
        return
    smallest = 100 * found.detectable_difference(samples)
    yield Text(
        f"\ntells two models apart that differ by {smallest:.1f} points or more (found {POWER:.0%} of the time)\n"
        "prompts for each of two models, to find a difference of"
    )
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("points", justify="right")
    for number in rows[0].prompts:
        table.add_column(f"{number} sample{'s' if number > 1 else ''} each", justify="right")
    for row in rows:
        table.add_row(f"{100 * row.difference:g}", *(f"{prompts:,}" for prompts in row.prompts.values()))
    yield table
    yield Text(
        "fewer are enough where both answer the same prompts and are compared in pairs (grove compare)", style="dim"
    )
