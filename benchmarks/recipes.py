"""Recipes of credit on the embedded task at equal generated tokens, over seeds, with intervals.

    python -m benchmarks.recipes [--recipes grpo tree_step ...] [--seeds 0 1 2] [--tokens 60000]

Each run trains `experiment=hop_search credit=NAME seed=S` with the growth that the recipe is meant for. All else is
equal: learning rate, loss (but for those with a critic), model and warm start of the seed. Where one wants a judge or a
process reward model, the task's own step score takes its place, which is always right. Recipes that grow alike take
turns on the same engines and learner, set back to the same checkpoint, since a run is shorter than their start. Runs
lie in benchmarks/out/recipes/; a finished one is not run again, so the command continues where it was stopped.

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
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from scipy.stats import t as student_t
from transformers import AutoTokenizer

from benchmarks.tables import OUT, Row, report
from conf.compose import compose
from conf.schema import Config
from rl import checkpoint
from rl.credit.measured import measurements_needed
from rl.launch import Parts, launched
from rl.loop import train_run
from rl.model import resolve_model
from rl.progress import Progress
from rl.run import Run, RunState
from rl.run_folder import RunFolder, open_run_folder, settings
from rl.saving import Saver
from rl.tracker import Tracker
from rollout.data import PromptSource, build_prompt_source

CHAINS = ("rollout=chains",)
TREES = ("rollout=tree",)
BRANCHES = ("rollout=tree_grpo",)
CRITIC = ("rollout=chains", "loss=ppo", "loss.critic.learning_rate=1.0e-3", "loss.critic.warmup_steps=5")
RECIPES: dict[tuple[str, ...], tuple[str, ...]] = {
    CHAINS: (
        *("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gdpo", "gigpo"),
        *("chain_step", "step_grpo", "grpo_process", "prorag", "pure", "prime", "match_tir", "tp_grpo"),
    ),
    TREES: ("tree_step", "tree_rl", "tree_po", "spo_tree", "tree_rpo", "portool", "slate"),
    BRANCHES: ("tree_grpo",),
    CRITIC: ("gae", "ppr"),
}
"""What is launched for them -> recipes."""
NAMES = tuple(name for names in RECIPES.values() for name in names)
STEP_SIGNALS = ("judge", "prm", "implicit", "match")
"""The task's step score again, under the names that recipes ask for."""
CHANGES = {
    # its judge scores in [0, 1], the task's steps lie in [-1, 1]: score / 2 + 1 / 2 - 1
    "ppr": ("credit.gae.signals.judge={scale: 0.5, shift: -0.5}",),
}
SOURCES = (
    *(f"rewards.sources.{name}={{fn: rewards.sources.hop_search:progress, signal: {name}}}" for name in STEP_SIGNALS),
    "rewards.sources.length={fn: rewards.sources.length:soft_overlong, signal: length, "
    "args: {max_tokens: 40, buffer_tokens: 20}}",
)


def main() -> None:
    """Train what is missing, print, write benchmarks/out/recipes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=60_000, help="generated tokens of a run (default: %(default)s)")
    options = parser.parse_args()
    for seed in options.seeds:
        for launch, names in RECIPES.items():
            chosen = [config(name, seed, options.tokens, launch) for name in names if name in options.recipes]
            missing = [cfg for cfg in chosen if not summary_of(cfg).exists()]
            if missing:
                train_in_turn(missing)
    successes: dict[str, list[float]] = {name: [] for name in NAMES if name in options.recipes}
    for seed in options.seeds:
        for launch, names in RECIPES.items():
            for name in names:
                if name in successes:
                    found = json.loads(summary_of(config(name, seed, options.tokens, launch)).read_text())
                    successes[name].append(found["success_after"])
    report("recipes", f"held-out success after {options.tokens:,} generated tokens", rows(successes))


def config(name: str, seed: int, tokens: int, launch: tuple[str, ...]) -> Config:
    """One run."""
    folder = OUT / "recipes" / f"{name}-seed{seed}"
    budget = [f"run.max_generated_tokens={tokens}", "run.eval_every_steps=0", "run.eval_prompts=256"]
    quiet = ["run.record_every_steps=0", "run.checkpoint_every_steps=0", "tracker=disabled"]
    place = [f"seed={seed}", f"run.dir={folder}", f"run.name={name}", "run.resume=true"]
    chosen = ["experiment=hop_search", *launch, f"credit={name}", *CHANGES.get(name, ()), *SOURCES]
    return compose([*chosen, *budget, *quiet, *place])


def summary_of(cfg: Config) -> Path:
    """Where a finished run says what it came to."""
    return Path(cfg.run.dir) / "summary.json"


def train_in_turn(configs: list[Config]) -> None:
    """Runs that differ in their credit alone, each from the same first checkpoint."""
    # With the reference model loaded, if one of them measures its KL.
    with started(max(configs, key=lambda cfg: measurements_needed(cfg.credit).kl)) as (parts, source, first):
        for cfg in configs:
            shutil.rmtree(cfg.run.dir, ignore_errors=True)  # of a run that was stopped
            folder = open_run_folder(Path(cfg.run.dir), settings(cfg))
            shutil.copytree(first.path, folder.checkpoints / first.path.name)
            tracker = Tracker(cfg.tracker, folder.path, cfg.run.name, settings(cfg))
            with Progress(cfg) as progress:
                run = Run(cfg, folder, source, parts, progress, tracker)
                run.restore()
                train_run(run)


@contextmanager
def started(cfg: Config) -> Iterator[tuple[Parts, PromptSource, checkpoint.Checkpoint]]:
    """The parts of a run, its prompts, and the checkpoint of its first weights."""
    place = OUT / "recipes" / "start"
    shutil.rmtree(place, ignore_errors=True)
    logs = place / "logs"
    logs.mkdir(parents=True)
    with Progress(cfg) as progress:
        model_path = resolve_model(cfg, progress.warm_start)
    source = build_prompt_source(cfg, AutoTokenizer.from_pretrained(model_path))
    with launched(cfg, model_path, logs) as parts:
        saver = Saver(cfg, RunFolder(place), parts)
        saver.begin(0, asdict(RunState()), [], None)
        saver.wait()
        first = checkpoint.newest(place / "checkpoints")
        assert first is not None, "it was just written"
        yield parts, source, first


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
