"""A run's model as a folder for the Hugging Face hub: weights, tokenizer, configs and a card of how it came about.

Nothing in it names this machine: paths, addresses and hidden settings stay behind.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.compose import from_yaml
from conf.errors import CheckpointError, ConfigError
from conf.reads import changed
from conf.schema import Config
from rl import checkpoint
from rl.checkpoint import Checkpoint
from rl.run_folder import HIDDEN, RunFolder, settings

MODEL, ADAPTER = "model", "adapter"
"""Folders inside a checkpoint, as `rl.policy.stored` writes them."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OF_THIS_MACHINE = ("run", "cluster", "tracker")
"""Groups of settings that say where and how often, not what was trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a card tells of a checkpoint."""

    cfg: Config
    step: int
    run: Mapping[str, Any]
    """The run's counters at the checkpoint, as state.json has them."""
    versions: Mapping[str, str]
    base_model: str
    """Name on the hub; "" for one that only this machine has."""
    license: str
    """As the hub names it; "" where the user said none."""
    is_adapter: bool
    name: str


def export_model(
    run_dir: Path,
    out: Path,
    *,
    step: int | None = None,
    best: bool = False,
    adapter: bool = False,
    license: str = "",
    base_model: str = "",
) -> dict[str, Any]:
    """Write the model of one of a run's checkpoints as a folder to upload.

    Args:
        run_dir: the run's folder.
        out: made, or empty.
        step: of the checkpoint; the newest by default.
        best: take the one with the highest held-out success.
        adapter: the adapters alone, of a run that trained some; else they are merged.
        license: for the card, as the hub names licences.
        base_model: name on the hub of the model that was trained; by default model.path, where that is one.
    Returns: step, held-out success, folder and size.
    Raises: ConfigError, CheckpointError when there is nothing to export, or it has no place.
    """
    folder = RunFolder(run_dir)
    if not folder.config.is_file():
        raise ConfigError(f'"{run_dir}" is no run folder (it has no config.yaml): there is no model to export.')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f'"{out}" is there already: two models would be mixed in one folder. Give another, or remove it.'
        )
    cfg = from_yaml(folder.config, [])
    found = _chosen(folder, step, best)
    state = checkpoint.load_state(found)
    base = base_model or hub_name(cfg.model.path)
    if adapter:
        _require_adapter(found, cfg, base)
    facts = Facts(
        cfg=cfg,
        step=found.step,
        run=state["run"],
        versions=state["versions"],
        base_model=base,
        license=license,
        is_adapter=adapter,
        name=out.resolve().name,
    )
    beside = out.with_name(out.name + ".unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        _copy(found.path / (ADAPTER if adapter else MODEL), beside, base if adapter else "")
        if adapter:  # who loads it needs the tokenizer it was trained with
            _copy(found.path / MODEL, beside, "", weights=False)
        (beside / "README.md").write_text(card(facts), encoding="utf-8")
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {
        "step": found.step,
        "success_share": success_at(facts),
        "folder": str(out),
        "size_mib": sum(path.stat().st_size for path in out.iterdir()) / 2**20,
    }


def hub_name(path: str) -> str:
    """The name on the hub that a model.path is; "" for a folder, or none."""
    return path if HUB_NAME.fullmatch(path) and not Path(path).exists() else ""


def success_at(facts: Facts) -> float | None:
    """Held-out success at the checkpoint's own step, where it was measured."""
    return facts.run["success_after"] if facts.run["evaluated_step"] == facts.step else None


def card(facts: Facts) -> str:
    """README.md: what the hub reads, then what people read."""
    cfg, run = facts.cfg, facts.run
    what = "Low-rank adapters" if facts.is_adapter else "A causal language model"
    of = f" of [{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else ""
    lines = [
        f"---\n{_metadata(facts)}---",
        f"# {facts.name}",
        f"{what}{of}, trained by reinforcement learning with Grove on the task `{cfg.task.name}`: every trajectory "
        "grows as part of a tree, every step of it gets a score, and the policy learns on that same tree.",
        "## Held-out success",
        _success_table(facts),
        "## How it was trained",
        f"Checkpoint of step {facts.step}, after {run['generated_tokens']:,} sampled and {run['trained_tokens']:,} "
        f"trained tokens. Seed {cfg.seed}.",
        _table(
            ("", ""),
            [
                ("task", cfg.task.name),
                ("base model", facts.base_model or _own_base(cfg)),
                ("prompts in a step", cfg.rollout.prompts_per_step),
                ("tree", f"{cfg.rollout.expander.value}, {cfg.rollout.num_leaves} leaves"),
                ("reward sources", ", ".join(cfg.rewards.sources) or "none"),
                ("credit terms", ", ".join(cfg.credit.terms) or "none"),
                ("loss", f"{cfg.loss.kind.value}, KL coefficient {cfg.loss.kl_coef:g}"),
                ("learning rate", f"{cfg.learner.learning_rate:g}"),
                ("adapters", f"rank {cfg.model.lora.rank}" if cfg.model.lora.rank else "none, all weights are trained"),
            ],
        ),
        "Every setting that differs from Grove's defaults, but for those of the machine:",
        "\n".join(["```yaml", *(f"{key}: {json.dumps(value)}" for key, value in recipe(cfg).items()), "```"]),
        "## How to use it",
        _usage(facts),
        "## Versions",
        _table(("library", "version"), list(facts.versions.items())),
    ]
    if not facts.license:
        lines.append("No licence was stated. That of the base model and of the training data holds.")
    return "\n\n".join(lines) + "\n"


def recipe(cfg: Config) -> dict[str, Any]:
    """Settings that differ from the defaults, by dotted name, without those of the machine and without secrets."""
    shown = _flat(settings(cfg))
    found: dict[str, Any] = {}
    for changed_key in changed(cfg):
        found |= {key: value for key, value in shown.items() if key == changed_key or key.startswith(f"{changed_key}.")}
    return {
        key: value
        for key, value in found.items()
        if key.partition(".")[0] not in OF_THIS_MACHINE
        and not key.endswith((".url", "_dir"))
        and not _is_local(value)
        and value != HIDDEN
    }


def _chosen(folder: RunFolder, step: int | None, best: bool) -> Checkpoint:
    there = checkpoint.checkpoints(folder.checkpoints)
    if step is not None:
        found = next((each for each in there if each.step == step), None)
        if found is None:
            steps = ", ".join(str(each.step) for each in there) or "none"
            raise CheckpointError(f"{folder.path} has no checkpoint of step {step}; there are: {steps}.")
        problem = checkpoint.damage(found)
        if problem is not None:
            raise CheckpointError(f"checkpoint {found.path} is damaged ({problem}). Export another.")
        return found
    found = checkpoint.best(folder.checkpoints) if best else checkpoint.newest(folder.checkpoints)
    if found is None:
        needed = "checkpoint whose held-out success was measured" if best else "intact checkpoint"
        raise CheckpointError(
            f"{folder.path} holds no {needed}: there is nothing to export. Train it further with run.resume=true"
            f"{', with run.eval_every_steps a divisor of run.checkpoint_every_steps' if best else ''}."
        )
    return found


def _require_adapter(found: Checkpoint, cfg: Config, base: str) -> None:
    if not (found.path / ADAPTER).is_dir():
        raise ConfigError(
            f"{found.path} holds no adapters: the run trained all weights (model.lora.rank={cfg.model.lora.rank}). "
            "Export the model, without --adapter."
        )
    if not base:
        raise ConfigError(
            f"adapters are of no use without the model they belong on, and model.path={cfg.model.path or '(none)'} is "
            "on this machine alone. Name that model on the hub by --base-model, or export the merged model."
        )


def _copy(source: Path, out: Path, base: str, *, weights: bool = True) -> None:
    """Copy a model's files; JSON files lose what names this machine.

    Args:
        base: name of the base model, for adapters.
        weights: False for the tokenizer's files alone.
    """
    for path in sorted(source.iterdir()):
        is_described = path.name in ("config.json", "generation_config.json")
        if not weights and (path.suffix == ".safetensors" or is_described or "index" in path.name):
            continue
        if path.suffix == ".json" and path.name not in ("tokenizer.json", "vocab.json"):
            read = json.loads(path.read_text(encoding="utf-8"))
            if base and "base_model_name_or_path" in read:
                read["base_model_name_or_path"] = base
            (out / path.name).write_text(json.dumps(_without_local(read), indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copy2(path, out / path.name)


def _without_local(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_local(item) for key, item in value.items() if not _is_local(item)}
    if isinstance(value, list):
        return [_without_local(item) for item in value]
    return value


def _is_local(value: Any) -> bool:
    """A path of this machine, or a list with one: from its root or a home, or one that is there."""
    if isinstance(value, list):
        return any(map(_is_local, value))
    if not isinstance(value, str) or len(value) > 4096 or "\n" in value:
        return False
    return value.startswith(("/", "~", "./", "../")) or ("/" in value and Path(value).exists())


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        key: item for part, each in value.items() for key, item in _flat(each, f"{name}.{part}".lstrip(".")).items()
    }


def _metadata(facts: Facts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    success, results = success_at(facts), None
    if success is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=facts.cfg.task.name,
                dataset_name=f"{facts.cfg.task.name}, held out",
                metric_type="success",
                metric_name="success share",
                metric_value=round(success, 4),
            )
        ]
    data = ModelCardData(
        license=facts.license or None,
        base_model=facts.base_model or None,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["grove", "reinforcement-learning", "process-rewards", f"task:{facts.cfg.task.name}"],
        model_name=facts.name if results else None,
        eval_results=results,
    )
    relation = {"base_model_relation": "adapter" if facts.is_adapter else "finetune"} if facts.base_model else {}
    for key, value in relation.items():
        data[key] = value
    return data.to_yaml() + "\n"


def _success_table(facts: Facts) -> str:
    num, run = facts.cfg.run.eval_prompts, facts.run
    rows = []
    if run["success_before"] is not None:
        before = run["success_before"]
        rows.append(("before training", f"{before:.3f} ± {math.sqrt(before * (1 - before) / num):.3f}"))
    after = success_at(facts)
    if after is not None:
        rows.append((f"step {facts.step}", f"{after:.3f} ± {run['success_standard_error']:.3f}"))
    if not rows:
        return "It was not measured at this step."
    note = f"Share of {num} held-out prompts, one trajectory each; ± one standard error over prompts."
    if after is None:
        note += f" It was not measured at step {facts.step}."
    return f"{note}\n\n{_table(('policy', 'success'), rows)}"


def _own_base(cfg: Config) -> str:
    if cfg.model.path:
        return "not on the hub"
    return "a tiny model, made for the task and taught its format by demonstrations"


def _usage(facts: Facts) -> str:
    if facts.is_adapter:
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{facts.base_model}")',
            f'model = PeftModel.from_pretrained(base, "{facts.name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}")',
        ]
    else:
        code = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{facts.name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}")',
        ]
    served = "" if facts.is_adapter else f"\n\nIt loads in vLLM as it is: `vllm serve {facts.name}`."
    return "\n".join(["```python", *code, "```"]) + served


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
