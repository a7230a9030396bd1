"""A replay for people: a table for the terminal, and one page with a picture."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from rich.table import Table

from rl.replay import Replay
from rl.run_folder import RunFolder
from rl.view import STYLE

BEFORE, AFTER = "#8a8f98", "#2563a8"
MOST_POINTS = 4000
"""More make a blot, and a slow picture."""


def replay_rows(replay: Replay) -> list[tuple[str, str, str]]:
    """What is measured, as it was, as it would have been; means over the replayed steps."""
    before, after = replay.mean(lambda step: step.before), replay.mean(lambda step: step.after)
    both = replay.mean(lambda step: step.agreement)
    names = dict.fromkeys([*before, *after])
    return [
        *((name, "", f"{value:.3f}") for name, value in both.items()),
        *((name, _shown(before.get(name)), _shown(after.get(name))) for name in names),
    ]


def replay_table(replay: Replay) -> Table:
    """The comparison for the terminal (`rich.print`)."""
    table = Table(title=_title(replay), title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("run", justify="right")
    table.add_column("replay", justify="right")
    for row in replay_rows(replay):
        table.add_row(*row)
    return table


def write_replay(replay: Replay) -> Path:
    """Write replay.html into the run's folder, in the place of an earlier one, and return where it is."""
    page = RunFolder(replay.path).path / "replay.html"
    picture = base64.b64encode(replay_picture(replay)).decode("ascii")
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{before}</td><td>{after}</td></tr>"
        for name, before, after in replay_rows(replay)
    )
    page.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(_title(replay))}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><header><p class=eyebrow>Grove replay</p><h1>{escape(_title(replay))}"
        f"</h1></header>\n<section><table class=numbers><tr><th></th><th>run</th><th>replay</th></tr>{rows}</table>"
        f'</section>\n<section><img class=curve alt="Advantages and credit of the run against the replay" '
        f'src="data:image/png;base64,{picture}"></section></body></html>\n',
        encoding="utf-8",
    )
    return page


def replay_picture(replay: Replay) -> bytes:
    """A PNG: each step's advantage before and after, rank agreement over the run, and what the credit is made of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12.6, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    scatter, over_steps, bars = figure.subplots(1, 3)
    points = [point for step in replay.steps for point in step.advantages]
    points = points[:: max(1, len(points) // MOST_POINTS)]
    scatter.scatter(*zip(*points, strict=True) if points else ([], []), s=6, alpha=0.35, color=AFTER, linewidths=0)
    scatter.axhline(0, color="#d5dae1", linewidth=1, zorder=0)
    scatter.axvline(0, color="#d5dae1", linewidth=1, zorder=0)
    scatter.set(title="advantage of a step", xlabel="run", ylabel="replay")
    for name, color in (("rank agreement (Spearman)", AFTER), ("sign flips", "#d97a2b")):
        known = [(step.step, step.agreement[name]) for step in replay.steps if name in step.agreement]
        if known:
            over_steps.plot(*zip(*known, strict=True), color=color, marker="o", markersize=3, label=name)
            over_steps.legend(frameon=False)
    over_steps.set(title="run against replay", xlabel="training step", ylim=(-1.05, 1.05))
    over_steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    before, after = replay.mean(lambda step: step.before), replay.mean(lambda step: step.after)
    names = [name for name in dict.fromkeys([*before, *after]) if name != "mean |advantage|"]
    places = range(len(names))
    for numbers, shift, color, label in ((before, -0.2, BEFORE, "run"), (after, 0.2, AFTER, "replay")):
        lengths = [numbers.get(name, 0.0) for name in names]
        bars.barh([place + shift for place in places], lengths, height=0.38, color=color, label=label)
    bars.set_yticks(list(places), names)
    bars.invert_yaxis()
    bars.set(title="credit", xlim=(0, 1))
    bars.legend(frameon=False, loc="lower right")
    for axes in (scatter, over_steps, bars):
        axes.spines[["top", "right"]].set_visible(False)
    written = io.BytesIO()
    figure.savefig(written, dpi=130, format="png")
    return written.getvalue()


def _title(replay: Replay) -> str:
    first, last = replay.steps[0].step, replay.steps[-1].step
    where = f"step {first}" if first == last else f"{len(replay.steps)} steps from {first} to {last}"
    trees = sum(step.num_trees for step in replay.steps)
    return f"{replay.path.name}, {where}, {trees} trees: {' '.join(replay.changes) or 'no change'}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
