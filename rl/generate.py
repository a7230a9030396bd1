"""Trees without training: grown and scored by a policy, recorded, and written as data for other models."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from conf.checks import require_runnable
from conf.errors import ConfigError
from conf.schema import Config
from rewards.base import build_sources
from rl.batch_metrics import reward_metrics, rollout_metrics
from rl.export import write_export
from rl.launch import Parts, launched
from rl.model import resolve_model
from rl.placement import LEARNING
from rl.record import RecordedTree, read_trees, write_records
from rl.run_folder import RunFolder, route_logs, settings
from rollout.data import PromptSource, build_prompt_source
from rollout.seeds import derive_seed
from rollout.types import Prompt

logger = logging.getLogger(__name__)


def generate(
    cfg: Config,
    out: Path,
    num_prompts: int,
    *,
    held_out: bool = False,
    exports: Sequence[str] = (),
    ending: str = "jsonl",
) -> dict[str, Any]:
    """Grow and score trees of `num_prompts` prompts into a folder; the same call goes on where it was stopped.

    Batches of rollout.prompts_per_step prompts are recorded one by one in out/trees/, each in one move. A batch follows
    from the seed and its number alone, so that a stopped run ends with the same trees as an undisturbed one.

    Args:
        out: the folder; it can be given to `grove check-reward --trees`.
        held_out: prompts of the held-out split instead of the training data.
        exports: kinds of `rl.export.EXPORTS`, written beside trees/ at the end.
        ending: jsonl or parquet.
    Returns: trees, trajectories, generated tokens, seconds, the files written.
    Raises: ConfigError when the folder holds trees of other settings, or the data has fewer prompts.
    """
    require_runnable(cfg, warn=logger.debug)
    folder = RunFolder(out)
    _open(folder, cfg)
    console = Console()
    model_path = resolve_model(cfg, lambda step, steps, loss: None)
    from transformers import AutoTokenizer

    source = build_prompt_source(cfg, AutoTokenizer.from_pretrained(model_path))
    batches = _batches(source, cfg, num_prompts, held_out=held_out)
    build_sources(cfg.rewards, batches[0][0].data.keys())
    missing = [number for number in range(1, len(batches) + 1) if not folder.tree_file(number).exists()]
    put_back = route_logs(folder.logs)
    started, generated = time.monotonic(), 0
    try:
        if missing:
            with launched(cfg, model_path, folder.logs, without=LEARNING) as parts, _bar(console) as bar:
                route_logs(folder.logs)
                task = bar.add_task("trees", total=num_prompts, completed=_count(batches, missing), rate="")
                for number in missing:
                    metrics = _grow_batch(cfg, parts, batches[number - 1], number, folder)
                    generated += int(metrics["rollout/generated_tokens"])
                    rate = f"{generated / (time.monotonic() - started):,.0f} tokens/s"
                    if not console.is_terminal:
                        console.print(f"batch {number}/{len(batches)}  {rate}", highlight=False)
                    bar.update(task, advance=len(batches[number - 1]), rate=rate)
    finally:
        put_back()
    recorded = [tree for number in range(1, len(batches) + 1) for tree in read_trees(folder.tree_file(number))]
    files = {kind: out / f"{kind}.{ending}" for kind in exports}
    rows = {str(path): write_export(path, recorded, kind) for kind, path in files.items()}
    summary = _summary(recorded, time.monotonic() - started) | {"rows": rows}
    folder.write_summary(summary)
    return summary


def _open(folder: RunFolder, cfg: Config) -> None:
    """Make the folder, or see that it holds the same settings."""
    wanted = settings(cfg)
    if folder.config.exists():
        own = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        changed = [group for group in wanted if group not in ("run", "tracker") and own.get(group) != wanted[group]]
        if changed:
            raise ConfigError(
                f"{folder.path} holds trees that were grown with other settings ({', '.join(changed)}): the two would "
                f"be mixed. Use another folder, or the settings of {folder.config}."
            )
    for place in (folder.trees, folder.logs):
        place.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _batches(source: PromptSource, cfg: Config, num: int, *, held_out: bool) -> list[list[Prompt]]:
    prompts = source.held_out(num) if held_out else source.draw(0, num)
    if len(prompts) < num:
        raise ConfigError(
            f"--prompts {num}, and the held-out data has {len(prompts)}. Ask for no more, or leave --held-out away."
        )
    size = cfg.rollout.prompts_per_step
    return [prompts[first : first + size] for first in range(0, num, size)]


def _grow_batch(cfg: Config, parts: Parts, prompts: list[Prompt], number: int, folder: RunFolder) -> dict[str, float]:
    started = time.monotonic()
    seed = derive_seed(cfg.seed, "rollout", number)
    scored = parts.scoring.collect(parts.scoring.submit(parts.pool.grow(prompts, seed)))
    seconds = time.monotonic() - started
    write_records(folder.tree_file(number), [RecordedTree(scored=each) for each in scored])
    return rollout_metrics([each.tree for each in scored], seconds) | reward_metrics(scored)


def _count(batches: list[list[Prompt]], missing: list[int]) -> int:
    return sum(len(batch) for number, batch in enumerate(batches, start=1) if number not in missing)


def _summary(recorded: list[RecordedTree], seconds: float) -> dict[str, Any]:
    trees = [each.tree for each in recorded]
    metrics = rollout_metrics(trees, seconds)
    return {
        "trees": len(trees),
        "trajectories": int(metrics["rollout/trajectories"]),
        "generated_tokens": int(metrics["rollout/generated_tokens"]),
        "success_share": metrics.get("rollout/success_share"),
        "seconds": seconds,
    }


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
