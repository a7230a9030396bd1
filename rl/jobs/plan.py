"""What a launch will do, decided before anything is done: which job, of what words, in which folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from conf.compose import INTERPOLATION
from conf.errors import ConfigError
from conf.schema import Config, LaunchConfig, LaunchKind
from rl.run_folder import HIDDEN, settings

OF_ITS_OWN = ("run", "launch", "cluster", "tracker")
"""Groups that may differ from one launch of a run to the next: how long, where and how it is watched."""
NAMED_BY_THE_USER = ("rewards.sources.", "rewards.models.", "credit.terms.")
"""Where an entry that is new or gone is another run; elsewhere it is another version of Grove."""
CACHE = ".cache_dir"
"""What settings of folders of things made once end in."""
JOB_NAME_CHARS = 47
"""Of a RayJob, so that the names of its pods still fit Kubernetes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One launch."""

    job: str
    """Name for people and schedulers: letters, digits and dashes."""
    here: Path
    """The run's folder on this machine, absolute; it holds launch.json even where the run writes elsewhere."""
    there: str
    """The same folder as the job sees it."""
    words: tuple[str, ...]
    """Of the grove command that the job runs."""
    launch: LaunchConfig
    num_steps: int
    command: str
    """What the user typed, in effect; it continues the run."""

    def start_words(self, python: str, versions: str = "") -> list[str]:
        """The job's own command line.

        Args:
            python: interpreter there.
            versions: what must be installed there (`rl.jobs.versions.to_text`); "" for anything.
        """
        words = [python, "-P", "-m", "rl.jobs.start", "--run-dir", self.there]
        return [*words, *(["--versions", versions] if versions else []), "--", *self.words]


def plan_launch(
    cfg: Config, overrides: Sequence[str], config_dir: str, where: str, folder: Path, now: datetime
) -> Plan:
    """The plan of a launch.

    Args:
        cfg: the composed configuration, launch settings included.
        overrides: the settings it was composed of.
        config_dir: the user's own groups; "" for none.
        where: the choice of the group `launch`.
        folder: where the command was given.
    Raises: ConfigError for a secret among the settings, or a config folder that cannot go where the run does.
    """
    _require_no_secret(cfg)
    launch, own = cfg.launch, Path(cfg.run.dir)
    here = folder / own
    there = str(here if own.is_absolute() or not launch.run_root else PurePosixPath(launch.run_root) / own)
    words = ["train", *(text for text in overrides if not _is_of_launch(text)), f"run.dir={quoted(there)}"]
    if launch.kind in (LaunchKind.ray, LaunchKind.kuberay):
        words += _caches_there(cfg, launch.run_root or str(folder))
    if joins_a_cluster(cfg):
        words.append("cluster=existing")
    if config_dir:
        words += ["--config-dir", _config_dir_there(config_dir, launch.kind, folder)]
    settings_typed = [text for text in overrides if not text.startswith("launch=")]
    typed = ["grove", "launch", where, *settings_typed, *(["--config-dir", config_dir] if config_dir else [])]
    return Plan(
        job=job_name(own.name, now),
        here=here,
        there=there,
        words=tuple(words),
        launch=launch,
        num_steps=cfg.run.num_steps,
        command=shlex.join(typed),
    )


def joins_a_cluster(cfg: Config) -> bool:
    """Whether the job finds a Ray cluster that is already up, rather than starting Ray on its machine."""
    launch = cfg.launch
    if cfg.cluster.address or launch.kind is LaunchKind.local:
        return False
    return launch.kind is not LaunchKind.slurm or launch.slurm.nodes > 1


def job_name(run: str, now: datetime) -> str:
    """The run's name and the time, as every scheduler takes it."""
    stamp = now.strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-") or "run"
    if not name[0].isalpha():
        name = f"run-{name}"
    return f"{name[: JOB_NAME_CHARS - len(stamp) - 1].rstrip('-')}-{stamp}"


def quoted(value: str) -> str:
    """A text as the right side of a setting."""
    if re.fullmatch(r"[A-Za-z0-9_./-]+", value):
        return value
    plain = INTERPOLATION.sub(r"\1\1\\${", value)
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), plain)
    return f'"{escaped}"'


def changed_settings(cfg: Config, stored: Mapping[str, Any]) -> list[str]:
    """One line for each setting that makes a run what it is and differs from the one in its config.yaml."""
    now, before = _flat(settings(cfg)), _flat(stored)
    lines = []
    for key in sorted(now.keys() | before.keys()):
        same = now.get(key) == before.get(key) or key.partition(".")[0] in OF_ITS_OWN
        if same or key.endswith(CACHE) or not ((key in now and key in before) or key.startswith(NAMED_BY_THE_USER)):
            continue
        lines.append(f"{key}={now.get(key, '(none)')}, and it was {before.get(key, '(none)')}")
    return lines


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    if isinstance(values, Mapping) and values:
        return {
            inner: value
            for name, item in values.items()
            for inner, value in _flat(item, f"{key}.{name}" if key else str(name)).items()
        }
    return {key: values}


def _caches_there(cfg: Config, root: str) -> list[str]:
    """Settings that put caches beside the runs: a job's own folder is another on each node, and gone after it."""
    caches = {key: value for key, value in _flat(settings(cfg)).items() if key.endswith(CACHE)}
    return [
        f"{key}={quoted(str(PurePosixPath(root) / value))}"
        for key, value in caches.items()
        if value and not PurePosixPath(value).is_absolute()
    ]


def _is_of_launch(text: str) -> bool:
    return re.match(r"[+~]*launch[.=]", text) is not None


def _require_no_secret(cfg: Config) -> None:
    hidden = [key for key, value in _flat(settings(cfg)).items() if value == HIDDEN]
    if hidden:
        raise ConfigError(
            f"{hidden[0]} holds a secret: settings are written into the job's command line and into launch.json, where "
            f"others can read them. Put it into an environment variable, name that in the settings (as api_key_env "
            f"does), and pass it with launch.environment=[NAME]."
        )


def _config_dir_there(config_dir: str, kind: LaunchKind, folder: Path) -> str:
    path = (folder / config_dir).resolve()
    if kind in (LaunchKind.local, LaunchKind.slurm):
        return str(path)
    if not path.is_relative_to(folder.resolve()):
        raise ConfigError(
            f'--config-dir "{config_dir}" lies outside of {folder}, and only what is inside goes to the cluster. '
            f"Move it there, or give the command from a folder above both."
        )
    return str(path.relative_to(folder.resolve()))
