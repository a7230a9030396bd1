"""TextWorld: does a policy get better at games it never played, and which rewards make it?

    python -m benchmarks.textworld [--seeds 0 1 2] [--rewards progress points outcome] [--steps 40] [KEY=VALUE ...]

Each run is `experiment=textworld_small seed=S` with other credit: `outcome` is GRPO on whether the game was won,
`progress` adds whether each command brought the end nearer, which the package knows (the experiment as it is), and
`points` adds the game's points instead. All else is equal, warm start and engines of the seed too.
Runs lie in benchmarks/out/textworld/; a finished one is not run again, so the command continues where it was stopped.
Writes the curve, docs/images/textworld.svg, and plays one held-out game.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.recipes import summary_of, train_in_turn
from benchmarks.tables import OUT, Row, report
from conf.compose import compose
from conf.schema import Config
from rl import checkpoint
from rl.metrics import read_metrics
from rl.run_folder import RunFolder

REWARDS = {
    "progress": ("credit=chain_step",),
    "points": (
        "credit=chain_step",
        "~credit.terms.step.signals.step",
        "+credit.terms.step.signals.points={}",
    ),
    "outcome": ("credit=grpo",),
}
LABELS = {
    "progress": "outcome and progress of each command",
    "points": "outcome and the game's points",
    "outcome": "outcome alone (GRPO)",
}
COLOURS = {"points": "#2563a8", "progress": "#2e8b57", "outcome": "#c2571a"}
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "textworld.svg"

Curve = dict[int, float]
"""Step -> held-out success."""


def main() -> None:
    """Train what is missing, print, draw, play, write benchmarks/out/textworld.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rewards", nargs="+", default=["progress", "outcome"], choices=list(REWARDS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=40, help="of a run (default: %(default)s)")
    parser.add_argument("--image", type=Path, default=IMAGE, help="where the curve goes (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of every run")
    options = parser.parse_intermixed_args()
    further = [f"run.num_steps={options.steps}", *options.overrides]
    chosen = {name: [config(name, seed, further) for seed in options.seeds] for name in options.rewards}
    for of_a_seed in zip(*chosen.values(), strict=True):
        missing = [cfg for cfg in of_a_seed if not summary_of(cfg).exists()]
        if missing:
            train_in_turn(missing)
    curves = {name: [curve(cfg) for cfg in configs] for name, configs in chosen.items()}
    report("textworld", f"held-out success by step, {options.steps} steps", rows(chosen, curves), own_memory=False)
    draw(curves, options.image)
    print(f"\n{options.image}\n")
    print(played(next(iter(chosen.values()))[0]))


def config(name: str, seed: int, further: list[str]) -> Config:
    """One run."""
    folder = OUT / "textworld" / f"{name}-seed{seed}"
    quiet = ["run.record_every_steps=0", "run.checkpoint_every_steps=0", "tracker=disabled"]
    place = [f"seed={seed}", f"run.dir={folder}", f"run.name={name}", "run.resume=true"]
    # Runs that take turns share the parts that score, so all of them score everything.
    scored = ["rewards.sources.score.weight=1"]
    return compose(["experiment=textworld_small", *REWARDS[name], *scored, *quiet, *place, *further])


def curve(cfg: Config) -> Curve:
    """Held-out success of each evaluation."""
    found = read_metrics(RunFolder(Path(cfg.run.dir)).metrics)
    return {int(row["step"]): row["eval/success_share"] for row in found if row.get("eval/success_share") is not None}


def rows(configs: dict[str, list[Config]], curves: dict[str, list[Curve]]) -> list[Row]:
    """One line for each run, and one for the mean of each kind of reward."""
    found: list[Row] = []
    for name, of_name in curves.items():
        for cfg, of_run in zip(configs[name], of_name, strict=True):
            summary = json.loads(summary_of(cfg).read_text())
            row = {"name": name, "seed": cfg.seed, **{f"step {step}": share for step, share in of_run.items()}}
            found.append(row | {"tokens": summary["generated_tokens"], "seconds": summary["seconds"]})
        steps = sorted(set.intersection(*map(set, of_name)))
        means = {f"step {step}": statistics.fmean(each[step] for each in of_name) for step in steps}
        found.append({"name": name, "seed": "mean", **means})
    return found


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Success by step: the mean over seeds, and between the lowest and the highest seed a band."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grove", "font.size": 10}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for name, of_name in curves.items():
            steps = sorted(set.intersection(*map(set, of_name)))
            values = [[each[step] for each in of_name] for step in steps]
            axes.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=COLOURS[name], alpha=0.15
            )
            axes.plot(steps, [statistics.fmean(v) for v in values], color=COLOURS[name], marker="o", label=LABELS[name])
        axes.set(xlabel="training steps", ylabel="held-out games won")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def played(cfg: Config) -> str:
    """A held-out game as a finished run plays it, by its likeliest tokens: the longest that it wins of the first 20."""
    newest = checkpoint.newest(RunFolder(Path(cfg.run.dir)).checkpoints)
    assert newest is not None, "a finished run has a checkpoint"
    texts = asyncio.run(_games(cfg, str(newest.path / "model")))
    return max(texts, key=len, default="none of 20 held-out games was won")


async def _games(cfg: Config, model: str) -> list[str]:
    from transformers import AutoTokenizer

    from rollout.chat import build_environment
    from rollout.data import build_prompt_source
    from rollout.expand import build_expander
    from rollout.grow import grow_tree
    from rollout.hf_engine import TransformersEngine

    cfg.rollout.num_leaves, cfg.rollout.temperature = 1, 0.0
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    engine, env = TransformersEngine(cfg, model), build_environment(cfg, tokenizer)
    texts = []
    for prompt in build_prompt_source(cfg, tokenizer).held_out(20):
        tree = await grow_tree(prompt, engine, env, build_expander(cfg.rollout, 0), cfg.rollout, 0)
        if tree.nodes[-1].facts.won:
            said = [f"    {prompt.question}"]
            for node in tree.nodes:
                said += [f"    > {node.facts.arguments['action']}", f"    {node.facts.result}"]
            texts.append("\n".join(said))
    return texts


if __name__ == "__main__":
    main()
