"""Where the policy comes from: a folder, a hub name, or the task's own tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conf.errors import ConfigError
from conf.schema import Config


def resolve_model(cfg: Config, report: Callable[[int, int, float], None]) -> str:
    """Folder of the Hugging Face checkpoint to start from, made or downloaded when it is not there yet.

    Args:
        report: told (step, steps, loss) of a warm start.
    Raises: ConfigError when a hub name cannot be fetched.
    """
    path = cfg.model.path
    if not path:
        from rl.warm_start import warm_started_model

        return str(warm_started_model(cfg, report))
    if Path(path).is_dir():
        return str(Path(path).resolve())
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"])
    except Exception as error:
        raise ConfigError(
            f'model.path="{path}" is neither a folder on this machine nor a model that the hub gives out '
            f"({type(error).__name__}: {error}). Check the name, log in with `hf auth login` for a gated model, or "
            "give the path of a folder that holds config.json, the tokenizer and safetensors weights."
        ) from error
