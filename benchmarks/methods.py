"""Which recipe learns faster where: whole training runs at equal generated tokens, over seeds.

    python -m benchmarks.methods [--seeds 0 1 2] [--experiments hop_search hop_search_grpo ...]

Each run is `grove train experiment=NAME seed=S` in benchmarks/out/methods/; a finished run is not run again, so the
command continues where it was stopped. Minutes for each run on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.tables import OUT, Row, report

EXPERIMENTS = (
    "hop_search",
    "hop_search_grpo",
    "hop_search_long",
    "hop_search_long_steps",
    "hop_search_long_grpo",
)
GOALS = {"hop_search": 0.85, "hop_search_grpo": 0.85}
"""Success whose token cost is reported; 0.5 on the long task."""


def train_once(folder: Path, experiment: str, seed: int, overrides: list[str]) -> Path:
    """The folder of one finished run, training it first, or on, where it is not finished yet."""
    if not (folder / "summary.json").exists():
        resume = folder.exists()
        command = [sys.executable, "-m", "rl.cli", "train", f"experiment={experiment}", f"seed={seed}"]
        command += [f"run.dir={folder}", f"run.resume={str(resume).lower()}", *overrides]
        subprocess.run(command, check=True)
    return folder


def curve(folder: Path) -> list[tuple[float, float]]:
    """(generated tokens, held-out success) of each evaluation."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(row.get("rollout/total_generated_tokens"), row.get("eval/success_share")) for row in rows]
    return [(tokens, success) for tokens, success in found if tokens is not None and success is not None]


def tokens_to(points: list[tuple[float, float]], goal: float) -> float | None:
    """Tokens at which the curve first passes `goal`, by linear interpolation; None when it never does."""
    for (tokens_a, success_a), (tokens_b, success_b) in itertools.pairwise(points):
        if success_b >= goal:
            share = (goal - success_a) / (success_b - success_a) if success_b > success_a else 1.0
            return tokens_a + max(0.0, share) * (tokens_b - tokens_a)
    return None


def row(experiment: str, folders: list[Path]) -> Row:
    """One experiment over its seeds."""
    summaries: list[dict[str, Any]] = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    goal = GOALS.get(experiment, 0.5)
    reached = [tokens_to(curve(folder), goal) for folder in folders]
    return {
        "name": experiment,
        "before": statistics.fmean(each["success_before"] for each in summaries),
        "after": statistics.fmean(each["success_after"] for each in summaries),
        "after_by_seed": " ".join(f"{each['success_after']:.2f}" for each in summaries),
        "goal": goal,
        "k_tokens_to_goal": " ".join("never" if each is None else f"{each / 1000:.0f}" for each in reached),
        "mean_k_tokens_to_goal": statistics.fmean(each or 0.0 for each in reached) / 1000 if all(reached) else None,
        "k_tokens": statistics.fmean(each["generated_tokens"] for each in summaries) / 1000,
        "seconds": statistics.fmean(each["seconds"] for each in summaries),
    }


def with_ratios(rows: list[Row]) -> list[Row]:
    """`ratio`: tokens that GRPO needs to the goal over tokens that the recipe needs, where both got there each time."""
    needed = {each["name"]: each["mean_k_tokens_to_goal"] for each in rows}
    for each in rows:
        baseline = needed.get("hop_search_long_grpo" if "_long" in each["name"] else "hop_search_grpo")
        own = each["mean_k_tokens_to_goal"]
        each["ratio"] = baseline / own if baseline and own else None
    return rows


def main() -> None:
    """Train what is missing, print, write benchmarks/out/methods.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--experiments", nargs="+", default=list(EXPERIMENTS))
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every run")
    options = parser.parse_args()
    folders = {
        experiment: [
            train_once(OUT / "methods" / f"{experiment}-seed{seed}", experiment, seed, options.overrides)
            for seed in options.seeds
        ]
        for experiment in options.experiments
    }
    rows = [row(name, runs) for name, runs in folders.items()]
    report("methods", "success on held-out questions", with_ratios(rows))


if __name__ == "__main__":
    main()
