from __future__ import annotations

from pathlib import Path

from rl.metrics import METRICS
from rl.metrics_page import TITLES, metrics_tables

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_is_what_the_declarations_say():
    _, _, tables = PAGE.read_text().partition("<!-- from here on: python -m rl.metrics_page -->\n\n")
    assert tables == metrics_tables(), "put there what the command prints"


def test_every_metric_has_a_row_and_every_title_a_metric():
    page = metrics_tables()
    assert all(f"| `{metric.name}` |" in page for metric in METRICS)
    assert set(TITLES) == {metric.name.partition("/")[0] for metric in METRICS}
