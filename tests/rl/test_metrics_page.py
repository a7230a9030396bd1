from __future__ import annotations

from pathlib import Path

from rl.metrics import METRICS
from rl.metrics_page import MARK, TITLES, metrics_tables, with_tables

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_is_what_the_declarations_say():
    page = PAGE.read_text(encoding="utf-8")
    assert MARK in page
    assert page == with_tables(page), "make it anew: python -m rl.metrics_page docs/metrics.md"


def test_every_metric_has_a_row_and_every_title_a_metric():
    tables = metrics_tables()
    assert all(f"| `{metric.name}` |" in tables for metric in METRICS)
    assert set(TITLES) == {metric.name.partition("/")[0] for metric in METRICS}


def test_what_stands_before_the_tables_is_kept():
    assert with_tables(f"# Mine\n{MARK}old\n") == f"# Mine\n{MARK}{metrics_tables()}"
