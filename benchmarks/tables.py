"""What every benchmark shares: a row, a printed table, and benchmarks/out/NAME.json."""

from __future__ import annotations

import json
import platform
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OUT = Path(__file__).parent / "out"

Row = dict[str, Any]
"""`name`, and where they apply `ratio`, `ideal`, `efficiency`, plus the benchmark's own figures."""


def report(name: str, title: str, rows: Sequence[Row], *, own_memory: bool = True) -> None:
    """Print the rows as a table and write them to benchmarks/out/NAME.json, with the machine they were measured on.

    Args:
        own_memory: also the peak memory of this process and its children; False where the rows say better.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    Console(width=max(Console().width, 160)).print(table)
    OUT.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "python": platform.python_version(), "system": platform.platform()}
    written: dict[str, Any] = {"title": title, "machine": machine, "rows": list(rows)}
    if own_memory:
        written["peak_mib"] = {
            "this process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "largest child": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        }
        sizes = ", ".join(f"{name} {size:,}" for name, size in written["peak_mib"].items())
        print("peak resident memory, MiB:", sizes)
    (OUT / f"{name}.json").write_text(json.dumps(written, indent=2) + "\n")


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
