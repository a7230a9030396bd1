"""Experiment tracking by wandb and Prometheus. The run never waits for them, stops for them, or hands them a secret."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from conf.errors import first_line
from conf.schema import TrackerConfig, TrackerMode
from rl.exporter import Exporter
from rl.metrics import METRICS, Better

logger = logging.getLogger(__name__)

INIT_TIMEOUT_S = 30.0
"""Longest wait for the tracker's server at the start of a run."""
TOKENS = "rollout/total_generated_tokens"
FINISH_TIMEOUT_S = 60.0
"""Longest wait for the last upload at the end of a run."""


class Tracker:
    """Sends metrics to wandb, offline into the run folder unless asked otherwise, and to Prometheus where asked.

    Whatever goes wrong there (no network, no account, its process killed) is logged once and turns tracking off: the
    metrics are in metrics.jsonl in any case.
    """

    def __init__(self, cfg: TrackerConfig, run_dir: Path, name: str, config: Mapping[str, Any]):
        """Start tracking.

        Args:
            cfg: where to.
            run_dir: run folder; wandb's own files go to its folder wandb/.
            name: name of the run.
            config: settings to show beside it, with secrets already hidden (`rl.run_folder.settings`).
        """
        self._run: Any = None
        self._dir = run_dir
        self._exporter = Exporter(cfg, {"run": name, "folder": str(run_dir)})
        if cfg.mode is TrackerMode.disabled:
            return
        options = {"project": cfg.project, "entity": cfg.entity or None, "name": name, "config": dict(config)}
        if cfg.mode is TrackerMode.online:
            self._guard("start online", lambda: self._start("online", options))
        if self._run is None:
            self._guard("start", lambda: self._start("offline", options))

    @property
    def is_on(self) -> bool:
        """Of wandb: false when disabled, finished, or given up."""
        return self._run is not None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send one step's metrics; those that were not finite numbers (None) are left out."""
        self._exporter.log(metrics, step)
        numbers = {name: value for name, value in metrics.items() if name != "step" and value is not None}
        if self._run is not None and not self._guard("log", lambda: self._run.log(numbers, step=step)):
            self._give_up()

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Show the run's last numbers where wandb lists runs."""
        if self._run is not None and not self._guard("summarize", lambda: self._run.summary.update(dict(summary))):
            self._give_up()

    def finish(self) -> None:
        """Close the page and the run, waiting at most FINISH_TIMEOUT_S for the last upload. Safe to call twice."""
        self._exporter.finish()
        if self._run is None:
            return
        run, self._run = self._run, None
        if not _within(FINISH_TIMEOUT_S, lambda: self._guard("finish", run.finish)):
            logger.warning(
                "wandb had not finished after %.0f s; send the rest with: wandb sync %s",
                FINISH_TIMEOUT_S,
                Path(run.dir).parent,
            )
        self._stop_service()

    def _start(self, mode: Literal["online", "offline"], options: dict[str, Any]) -> None:
        # Silent before the import, because wandb reads it there; a failure is told by our own log, once.
        os.environ["WANDB_SILENT"] = "true"
        import wandb

        # Asked before wandb does: in a terminal it would prompt for the key and the run would wait for a person.
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise PermissionError("no API key was found; run `wandb login` or set WANDB_API_KEY")
        chosen = wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S, disable_git=True)
        run = wandb.init(mode=mode, dir=str(self._dir), settings=chosen, **options)
        define_metrics(run)
        self._run = run

    def _guard(self, doing: str, action: Callable[[], Any]) -> bool:
        """Run `action` and return True; log what it raised and return False."""
        try:
            action()
        except Exception as error:
            # Any exception: wandb raises its own, the system's and its protocol's, and none of them is worth a run.
            why = f"{type(error).__name__}: {first_line(error)}"
            logger.warning("wandb could not %s (%s); the run goes on, metrics.jsonl has all", doing, why)
            return False
        return True

    def _give_up(self) -> None:
        self._run = None
        self._stop_service()

    def _stop_service(self) -> None:
        """Take wandb's exit hook down now: at exit it would wait for, or print the traceback of, a dead process."""
        _within(FINISH_TIMEOUT_S / 6, _teardown)


def define_metrics(run: Any) -> None:
    """Tell wandb what to draw against what: success against generated tokens, which runs of different sizes share; and
    of metrics with a good direction the best value beside the last."""
    run.define_metric(TOKENS)
    best = {Better.higher: "last,max", Better.lower: "last,min", Better.neutral: "last"}
    run.define_metric("eval/*", step_metric=TOKENS)
    for metric in METRICS:
        if "<" in metric.name or metric.name == TOKENS:
            continue  # wandb knows no pattern but a trailing star
        axis = {"step_metric": TOKENS} if metric.name.startswith("eval/") else {}
        run.define_metric(metric.name, summary=best[metric.better], **axis)


def _teardown() -> None:
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _within(limit_s: float, action: Callable[[], Any]) -> bool:
    """Run `action` in a thread of its own; False when it has not ended in time. The thread does not keep us alive."""
    thread = threading.Thread(target=action, daemon=True, name="tracker")
    thread.start()
    thread.join(limit_s)
    return not thread.is_alive()
