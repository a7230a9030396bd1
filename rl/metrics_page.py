"""The tables of docs/metrics.md, made from the declarations: `python -m rl.metrics_page docs/metrics.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from rl.exporter import exported_name
from rl.metrics import METRICS, Better, Metric

MARK = "<!-- from here on: python -m rl.metrics_page docs/metrics.md -->\n\n"
"""Before the tables."""
TITLES = {
    "eval": "Held-out prompts",
    "rollout": "Growing trees",
    "reward": "Scores",
    "credit": "Credit",
    "select": "Selection",
    "health": "Signals that are worth their weight",
    "prm": "The run's own process reward model",
    "loss": "The loss",
    "learner": "The learner",
    "weights": "New weights",
    "time": "Where the time goes",
}
ARROWS = {Better.higher: "higher", Better.lower: "lower", Better.neutral: ""}


def metrics_tables() -> str:
    """Markdown, as it should stand at the end of docs/metrics.md."""
    stages = dict.fromkeys(metric.name.partition("/")[0] for metric in METRICS)
    sections = []
    for stage in stages:
        rows = [_row(metric) for metric in METRICS if metric.name.startswith(f"{stage}/")]
        head = ["| metric | what it is | of what | better | for Prometheus |", "|---|---|---|---|---|"]
        sections.append("\n".join([f"## {TITLES[stage]}", "", *head, *rows, ""]))
    return "\n".join(sections)


def _row(metric: Metric) -> str:
    cells = (
        f"`{metric.name}`",
        metric.what,
        metric.denominator,
        ARROWS[metric.better],
        f"`{exported_name(metric)[0]}`",
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def with_tables(page: str) -> str:
    """A page with the tables behind its mark as they are now."""
    kept, mark, _ = page.partition(MARK)
    return kept + mark + metrics_tables()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(with_tables(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
