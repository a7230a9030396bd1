"""Rules about where `grove launch` starts a run, and what the run is given there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from conf.problem import Problem
from conf.schema import Config, LaunchConfig, LaunchKind, ModelKind, TrackerMode

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [environment_can_be_passed, keys_are_passed, pods_can_be_made, template_exists]


def environment_can_be_passed(cfg: Config) -> list[Problem]:
    """A variable that is to be passed has a name and, where it is read here, a value."""
    launch, found = cfg.launch, []
    for name in launch.environment:
        if not VARIABLE.fullmatch(name):
            found.append(
                Problem(
                    f'launch.environment names "{name}", which is no name of an environment variable. Give names '
                    f"alone: a value would be written into the run's config."
                )
            )
        elif launch.kind in (LaunchKind.ray, LaunchKind.slurm) and name not in os.environ:
            found.append(
                Problem(
                    f"launch.environment names {name}, which is not set here, so there is nothing to pass to the run. "
                    f"Set it, or take the name out."
                )
            )
    return found


def keys_are_passed(cfg: Config) -> list[Problem]:
    """Elsewhere the environment of this terminal does not exist: a key that the run will ask for must be passed."""
    if cfg.launch.kind is LaunchKind.local:
        return []
    needed = {
        model.api_key_env: f"rewards.models.{name}.api_key_env"
        for name, model in cfg.rewards.models.items()
        if model.kind is ModelKind.endpoint and model.api_key_env
    }
    if cfg.tracker.mode is TrackerMode.online:
        needed["WANDB_API_KEY"] = "tracker.mode=online"
    return [
        Problem(
            f"{key} will want {name}, which launch.environment does not pass: unless the nodes have it themselves, the "
            f"run cannot log in there. Use launch.environment=[{','.join([*cfg.launch.environment, name])}].",
            fatal=False,
        )
        for name, key in needed.items()
        if name not in cfg.launch.environment
    ]


def pods_can_be_made(cfg: Config) -> list[Problem]:
    """Pods need an image, a volume that outlives them, and a Secret where variables are to come from."""
    kuberay, found = cfg.launch.kuberay, []
    if cfg.launch.kind is not LaunchKind.kuberay:
        return []
    if not kuberay.image:
        found.append(
            Problem(
                'launch.kuberay.image="": pods are made of an image. Name one with Grove and its pinned dependencies.'
            )
        )
    if not kuberay.volume_claim:
        found.append(
            Problem(
                'launch.kuberay.volume_claim="": the run folder would vanish with its pod, and nothing could be '
                "resumed. Name a PersistentVolumeClaim that all pods may mount (ReadWriteMany)."
            )
        )
    if cfg.launch.environment and not kuberay.secret_name:
        found.append(
            Problem(
                f"launch.environment=[{','.join(cfg.launch.environment)}], but no launch.kuberay.secret_name: a "
                f"manifest may not hold keys. Make a Secret with these names and give its name."
            )
        )
    return found


def template_exists(cfg: Config) -> list[Problem]:
    """A template of one's own is a file."""
    path = template_of(cfg.launch)
    if not path or Path(path).is_file():
        return []
    return [Problem(f'launch.{cfg.launch.kind.value}.template="{path}" does not exist (looked in {Path.cwd()}).')]


def template_of(launch: LaunchConfig) -> str:
    """The user's own template for the kind of launch; "" where Grove's is used, or none."""
    own = {LaunchKind.slurm: launch.slurm.template, LaunchKind.kuberay: launch.kuberay.template}
    return own.get(launch.kind, "")
