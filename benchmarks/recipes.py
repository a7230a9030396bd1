"""Recipes of credit on the embedded task at equal generated tokens, over seeds, with intervals.

    python -m benchmarks.recipes [--recipes grpo tree_step ...] [--seeds 0 1 2] [--tokens 60000]

Each run is `grove train experiment=hop_search credit=NAME seed=S` with the growth that the recipe is meant for; all
else is equal: learning rate, loss (but for those with a critic), model and warm start of the seed. Where one wants a
judge or a process reward model, the task's own step score takes its place, which is always right. Runs lie in
benchmarks/out/recipes/; a finished one is not run again, so the command continues where it was stopped.

- `after`: mean held-out success over seeds; `interval`: half of its 95 % interval by Student's t, from its seeds alone.
- `pooled`: the same from the deviation of all recipes' seeds together, which three seeds cannot estimate one by one.
- `against_grpo`: difference of the means; beyond `noise` it is told apart from 0 by the pooled deviation.

Not here, because nothing serves their signal yet: pav, vine_ppo and vsrm (values by fresh rollouts), spa_rl (a model of
progress), arena_rl (a tournament).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from scipy.stats import t as student_t

from benchmarks.methods import train_once
from benchmarks.tables import OUT, Row, report

CHAINS, TREES, BRANCHES = "rollout=chains", "rollout=tree", "rollout=tree_grpo"
OUTCOME_ALONE = "rewards.sources.progress.weight=0"
CRITIC = ("loss=ppo", "loss.critic.learning_rate=1.0e-3", "loss.critic.warmup_steps=5")


def step_signal(name: str) -> str:
    """The task's step score, under the name that a recipe asks for."""
    return f"rewards.sources.progress.signal={name}"


LENGTH = (
    "rewards.sources.length={fn: rewards.sources.length:soft_overlong, signal: length, "
    "args: {max_tokens: 96, buffer_tokens: 48}}"
)
RECIPES: dict[str, tuple[str, ...]] = {
    "grpo": (CHAINS, OUTCOME_ALONE),
    "dr_grpo": (CHAINS, OUTCOME_ALONE),
    "rloo": (CHAINS, OUTCOME_ALONE),
    "reinforce_pp": (CHAINS, OUTCOME_ALONE),
    "reinforce_pp_baseline": (CHAINS, OUTCOME_ALONE),
    "gdpo": (CHAINS, OUTCOME_ALONE, LENGTH),
    "gae": (CHAINS, OUTCOME_ALONE, *CRITIC),
    "gigpo": (CHAINS, OUTCOME_ALONE),
    "tree_grpo": (BRANCHES, OUTCOME_ALONE),
    "tree_rl": (TREES, OUTCOME_ALONE),
    "tree_po": (TREES, OUTCOME_ALONE),
    "spo_tree": (TREES, OUTCOME_ALONE),
    "tree_rpo": (TREES, OUTCOME_ALONE),
    "portool": (TREES,),
    "tree_step": (TREES,),
    "chain_step": (CHAINS,),
    "slate": (TREES, step_signal("judge")),
    "step_grpo": (CHAINS, step_signal("judge")),
    "grpo_process": (CHAINS, step_signal("prm")),
    "prorag": (CHAINS, step_signal("prm")),
    "pure": (CHAINS, step_signal("prm")),
    "prime": (CHAINS, step_signal("implicit")),
    "match_tir": (CHAINS, step_signal("match")),
    "tp_grpo": (CHAINS, step_signal("judge")),
    # its judge scores in [0, 1], the task's steps lie in [-1, 1]: score / 2 + 1 / 2 - 1
    "ppr": (CHAINS, step_signal("judge"), *CRITIC, "credit.gae.signals.judge={scale: 0.5, shift: -0.5}"),
}


def main() -> None:
    """Train what is missing, print, write benchmarks/out/recipes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=60_000, help="generated tokens of a run (default: %(default)s)")
    options = parser.parse_args()
    budget = [f"run.max_generated_tokens={options.tokens}", "run.eval_every_steps=0", "run.eval_prompts=256"]
    quiet = ["run.record_every_steps=0", "run.checkpoint_every_steps=0"]
    successes: dict[str, list[float]] = {name: [] for name in options.recipes}
    for seed in options.seeds:  # so that a table of all recipes is there after the first seed
        for name in options.recipes:
            overrides = [f"credit={name}", *RECIPES[name], *budget, *quiet, f"run.name={name}"]
            folder = train_once(OUT / "recipes" / f"{name}-seed{seed}", "hop_search", seed, overrides)
            successes[name].append(success(folder))
    report("recipes", f"held-out success after {options.tokens:,} generated tokens", rows(successes))


def success(folder: Path) -> float:
    """Held-out success of a finished run."""
    return json.loads((folder / "summary.json").read_text())["success_after"]


def rows(successes: dict[str, list[float]]) -> list[Row]:
    """One line for each recipe, the best first.

    Args:
        successes: recipe -> success of each seed, as many for every recipe.
    """
    num_seeds = min(map(len, successes.values()))
    variances = [statistics.variance(each) for each in successes.values()] if num_seeds > 1 else []
    pooled = math.sqrt(statistics.fmean(variances)) if variances else math.nan
    means = {name: statistics.fmean(each) for name, each in successes.items()}
    found: list[Row] = []
    for name in sorted(successes, key=lambda name: -means[name]):
        row: Row = {"name": name, "after": means[name], "by_seed": " ".join(f"{each:.2f}" for each in successes[name])}
        if num_seeds > 1:
            own = statistics.stdev(successes[name])
            row["interval"] = half_width(own, num_seeds, num_seeds - 1)
            row["pooled"] = half_width(pooled, num_seeds, (num_seeds - 1) * len(successes))
        if "grpo" in means and num_seeds > 1:
            row["against_grpo"] = means[name] - means["grpo"]
            row["noise"] = row["pooled"] * math.sqrt(2)
        found.append(row)
    return found


def half_width(deviation: float, num_seeds: int, freedom: int) -> float:
    """Of the 95 % interval of a mean: t * s / sqrt(n)."""
    return float(student_t.ppf(0.975, freedom)) * deviation / math.sqrt(num_seeds)


if __name__ == "__main__":
    main()
