"""A comparison for people: a table and sentences for the terminal, a picture of the curves, one page, one JSON."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rl.compare import CONFIDENCE, MAX_SEEDS, Comparison, Difference, Result
from rl.curves import is_better_high
from rl.run_folder import write_json
from rl.statistics import POWER, Interval
from rl.view import STYLE

COLORS = ("#8a8f98", "#2563a8", "#d97a2b", "#6b8f71", "#8e5aa8", "#c2476b", "#3aa6a0", "#a3861f")
COLUMNS = ("", "seeds", "mean", f"{CONFIDENCE:.0%} interval", "by seed", "difference", "its interval", "")


def comparison_table(found: Comparison) -> Table:
    """For the terminal (`rich.print`)."""
    table = Table(title=title(found), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if place in (0, 4, 7) else "right", overflow="fold")
    for row in rows(found):
        table.add_row(*map(Text, row))
    return table


def title(found: Comparison) -> str:
    """What is compared where."""
    unit = "steps" if found.by_steps else "generated tokens"
    return f"{found.metric} at {found.place:,.0f} {unit}"


def rows(found: Comparison) -> list[tuple[str, ...]]:
    """One for each group."""
    by_group = {id(each.group): each for each in found.differences}
    return [_row(each, by_group.get(id(each.group)), found.metric) for each in found.results]


def _row(each: Result, against: Difference | None, metric: str) -> tuple[str, ...]:
    shown = [_number(value, metric) for value in each.values]
    cells = [each.group.label, str(len(shown)), _number(each.mean, metric), _interval(each.interval, metric)]
    cells.append(" ".join(shown))
    if against is None:
        return (*cells, "baseline", "", "")
    if against.refused:
        return (*cells, "", "", "not comparable")
    verdict = "within noise" if against.is_noise else _verdict(against, metric)
    return (*cells, _signed(against.mean, metric), _interval(against.interval, metric, signed=True), verdict)


def _verdict(against: Difference, metric: str) -> str:
    return "better" if (against.mean > 0) == is_better_high(metric) else "worse"


def sentences(found: Comparison) -> list[str]:
    """What may be said, in words."""
    said = [_sentence(each, found) for each in found.differences]
    known = [each for each in found.results if each.num_prompts]
    if known:
        prompts = sorted({each.num_prompts for each in known})
        said.append(f"Intervals are over seeds and over {', '.join(map(str, prompts))} held-out prompts.")
    else:
        said.append("Intervals are over seeds alone: the runs have recorded no outcomes of single prompts for this.")
    told = [each for each in found.differences if not each.refused]
    if len(told) > 1:
        said.append(
            f"These are {len(told)} comparisons: by chance alone one in {round(1 / (1 - CONFIDENCE))} passes for a "
            f"difference."
        )
    return [*said, *(f"{note[0].upper()}{note[1:]}." for note in found.notes)]


def _sentence(each: Difference, found: Comparison) -> str:
    base, name, metric = found.results[0].group.label, each.group.label, found.metric
    if each.refused:
        return f'"{name}" and "{base}" cannot be compared: {each.refused}.'
    amount = f"{100 * abs(each.mean):.1f} points" if _is_share(metric) else _number(abs(each.mean), metric)
    if not each.mean:
        return f'"{name}" and "{base}" come to the same.'
    way = _verdict(each, metric)
    if not each.is_noise:
        return f'"{name}" is {way} than "{base}" by {amount}, which is more than noise.'
    if each.deviation is None:
        return f'"{name}" looks {way} than "{base}" by {amount}, but one seed says nothing of the next: train more.'
    return (
        f'"{name}" looks {way} than "{base}" by {amount}, which is within noise. {_seeds(each)} {_caveat(each)}'.strip()
    )


def _seeds(each: Difference) -> str:
    needed = each.seeds_needed
    if needed is None:
        return "Its seeds agree to the last digit, so more of them would say nothing."
    number = f"more than {MAX_SEEDS}" if needed > MAX_SEEDS else f"about {needed}"
    return (
        f"If that is the true difference, {number} seeds of each would settle it (power {POWER:.0%}"
        f"{', the same seeds on both sides' if each.is_paired else ''})."
    )


def _caveat(each: Difference) -> str:
    """Where the seeds would already settle it, it is the prompts that do not."""
    needed, trained = each.seeds_needed, len(each.group.runs)
    if needed is not None and needed <= trained:
        return f"There are {trained} already: more held-out prompts (run.eval_prompts) are needed too."
    return ""


def _is_share(metric: str) -> bool:
    return metric.endswith("_share")


def _number(value: float, metric: str) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f} %" if _is_share(metric) else f"{value:.4g}"


def _signed(value: float, metric: str) -> str:
    return f"{100 * value:+.1f}" if _is_share(metric) else f"{value:+.4g}"


def _interval(interval: Interval | None, metric: str, *, signed: bool = False) -> str:
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    shown = (100 * end if _is_share(metric) else end for end in (interval.low, interval.high))
    return " to ".join(f"{end:{sign}.1f}" if _is_share(metric) else f"{end:{sign}.4g}" for end in shown)


def write_comparison(found: Comparison, folder: Path) -> Path:
    """Write compare.html, compare.png and compare.json into a folder, in the place of earlier ones.

    Returns: the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "compare.png"
    draw_curves(found, picture)
    write_json(folder / "compare.json", as_plain(found))
    image = base64.b64encode(picture.read_bytes()).decode("ascii")
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows(found))
    said = "".join(f"<li>{escape(text)}</li>" for text in sentences(found))
    page = folder / "compare.html"
    page.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title(found))}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><header><p class=eyebrow>Grove comparison</p>"
        f"<h1>{escape(title(found))}</h1></header>\n<section><table class=numbers><tr>{head}</tr>{body}</table>"
        f"</section>\n<section><ul>{said}</ul></section>\n<section><img class=curve alt='Curves of all groups' "
        f'src="data:image/png;base64,{image}"></section></body></html>\n',
        encoding="utf-8",
    )
    return page


def _cells(row: Iterable[str]) -> str:
    first, *others = map(escape, row)
    return f"<th>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in others)


def draw_curves(found: Comparison, path: Path) -> None:
    """Each group's mean curve over the points that all its runs have reached, with a thin line for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, each in enumerate(found.results):
        color = COLORS[number % len(COLORS)]
        for run in each.group.runs:
            axes.plot(*zip(*run.curve, strict=True), color=color, alpha=0.3, linewidth=0.9)
        axes.plot(*zip(*mean_curve(each), strict=True), color=color, linewidth=2.2, label=each.group.label)
    axes.axvline(found.place, color="#b3bac4", linewidth=1, linestyle=":")
    axes.set(xlabel="steps" if found.by_steps else "generated tokens", ylabel=found.metric)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if _is_share(found.metric):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def mean_curve(each: Result) -> list[tuple[float, float]]:
    """Mean over a group's runs wherever one of them was measured and all have been."""
    runs = each.group.runs
    first, last = max(run.curve[0][0] for run in runs), min(run.curve[-1][0] for run in runs)
    places = sorted({place for run in runs for place, _ in run.curve if first <= place <= last})
    return [(place, sum(run.value_at(place) for run in runs) / len(runs)) for place in places]


def as_plain(found: Comparison) -> dict[str, Any]:
    """Everything that was found, for scripts; what is not known is None."""
    by_group = {id(each.group): each for each in found.differences}
    groups = []
    for each in found.results:
        against = by_group.get(id(each.group))
        groups.append(
            {
                "label": each.group.label,
                "runs": [str(run.folder) for run in each.group.runs],
                "seeds": each.group.seeds,
                "values": each.values,
                "mean": each.mean,
                "interval": asdict(each.interval) if each.interval else None,
                "prompts": each.num_prompts,
                "against_baseline": None if against is None else _plain_difference(against),
            }
        )
    return {
        "metric": found.metric,
        "at": found.place,
        "unit": "steps" if found.by_steps else "tokens",
        "groups": groups,
        "said": sentences(found),
    }


def _plain_difference(each: Difference) -> dict[str, Any]:
    if each.refused:
        return {"refused": each.refused}
    return {
        "difference": each.mean,
        "interval": asdict(each.interval) if each.interval else None,
        "within_noise": each.is_noise,
        "paired": each.is_paired,
        "seeds_needed": each.seeds_needed,
    }
