"""How much faster a run is when batches grow ahead of the learner, on a task whose tools sleep.

    python -m benchmarks.asynchronous [--steps 24] [--delay-s 0.15] [--staleness 0 1]

The demo's task and recipe, whole runs of `grove train`, one after the other on the same machine, the same prompts, with
every tool call sleeping `--delay-s`. Time is counted from the third step to the last, without start and warm-up.

- `steps_per_minute`; `ratio`: against staleness 0. `ideal`: (growing + all else) / max(growing, all else), by the
  stages of the synchronous run: what overlapping the two could give if neither slowed the other.
- `stale_share`: tokens that older weights sampled; `success`: held-out success at the end, 256 questions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.tables import OUT, Row, report

FIRST = 3
"""The first step that counts: before it caches fill and processes warm up."""


def main() -> None:
    """Train, print, write benchmarks/out/asynchronous.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--delay-s", type=float, default=0.15)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
    asked = parser.parse_args()
    runs = {staleness: trained(staleness, asked) for staleness in asked.staleness}
    rows: list[Row] = []
    first = step_rows(runs[asked.staleness[0]])
    for staleness, folder in runs.items():
        steps = step_rows(folder)
        row: Row = {"name": f"max_staleness={staleness}", "steps_per_minute": 60 / mean(steps, "time/step_seconds")}
        row["ratio"] = mean(first, "time/step_seconds") / mean(steps, "time/step_seconds")
        if staleness == 0:
            grow, whole = mean(steps, "time/grow_seconds"), mean(steps, "time/step_seconds")
            row |= {"grow_s": grow, "else_s": whole - grow, "ideal": whole / max(grow, whole - grow)}
        else:
            row |= {"wait_s": mean(steps, "time/grow_seconds"), "stale_share": mean(steps, "rollout/stale_share")}
        row["success"] = json.loads((folder / "summary.json").read_text())["success_after"]
        rows.append(row)
    report("asynchronous", f"hop_search, {asked.steps} steps, tools that sleep {asked.delay_s} s", rows)


def trained(staleness: int, asked: argparse.Namespace) -> Path:
    """The folder of a finished run."""
    folder = OUT / "asynchronous" / f"staleness_{staleness}"
    shutil.rmtree(folder, ignore_errors=True)
    settings = [
        *("experiment=hop_search", "run.eval_every_steps=0", f"run.num_steps={asked.steps}", f"run.dir={folder}"),
        *("run.checkpoint_every_steps=0", f"task.hop_search.tool_delay_s={asked.delay_s}", "tracker=disabled"),
        f"rollout.max_staleness={staleness}",
    ]
    subprocess.run([sys.executable, "-m", "rl.cli", "train", *settings], check=True)
    return folder


def step_rows(folder: Path) -> list[dict[str, float]]:
    """Metrics of the steps that count."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "time/step_seconds" in row and row["step"] >= FIRST]


def mean(rows: list[dict[str, float]], name: str) -> float:
    """Mean of a metric over steps."""
    return sum(row[name] for row in rows) / len(rows)


if __name__ == "__main__":
    main()
