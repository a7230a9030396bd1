"""A run's metrics for Prometheus: an OpenMetrics page on a port of one's own choice, or a file for node_exporter.

Names follow OpenMetrics: `rollout/tool_ok_share` is the gauge grove_rollout_tool_ok_ratio, a part that stands for any
name becomes a label (`reward/judge_mean` is grove_reward_mean{signal="judge"}), and what only grows is a counter.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

from conf.schema import TrackerConfig
from rl.metrics import Metric, declared

logger = logging.getLogger(__name__)

UNITS = ("ratio", "seconds", "tokens", "nats", "usd")
CLOSE_LIMIT_S = 5.0

Family = CounterMetricFamily | GaugeMetricFamily


class Exporter:
    """Shows the newest value of every metric. Whatever goes wrong is logged, and the run goes on without it."""

    def __init__(self, cfg: TrackerConfig, labels: Mapping[str, str]) -> None:
        """Open the port, where one is asked for.

        Args:
            cfg: metrics_host, metrics_port, metrics_file.
            labels: what is known of the run: its name, seed, task ...
        """
        self._file = Path(cfg.metrics_file) if cfg.metrics_file else None
        self._labels = dict(labels)
        self._step = 0
        self._latest: dict[str, float] = {}
        self._updated = time.time()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._server: Any = None
        self._thread: Any = None
        if cfg.metrics_port:
            self._serve(cfg.metrics_host, cfg.metrics_port)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Take in the metrics of a step; what it does not have keeps its last value."""
        self._latest = self._latest | {
            name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "step"
        }
        self._step, self._updated = step, time.time()
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_to_textfile(str(self._file), self._registry)
            except OSError as error:
                logger.warning("tracker.metrics_file=%s cannot be written (%s) and is given up", self._file, error)
                self._file = None

    def collect(self) -> Iterator[Family | InfoMetricFamily]:
        """What a scrape shows now (prometheus_client's protocol)."""
        yield InfoMetricFamily("grove_run", "The run whose metrics these are", value=self._labels)
        yield CounterMetricFamily("grove_steps", "Steps finished", value=self._step)
        yield GaugeMetricFamily(
            "grove_updated_timestamp_seconds",
            "When metrics last came in: old for a run that hangs",
            value=self._updated,
        )
        yield from families(self._latest)

    def finish(self) -> None:
        """Close the port. The file stays, with the last values. Safe to call twice."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        self._thread.join(CLOSE_LIMIT_S)

    def _serve(self, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            logger.warning(
                "tracker.metrics_port=%d cannot be opened on %s (%s); the run goes on, metrics.jsonl has all. "
                "Runs beside each other need ports of their own.",
                port, host, error,
            )  # fmt: skip


def families(metrics: Mapping[str, float]) -> list[Family]:
    """Metrics as Prometheus has them, one family for each declared metric, in the order they came."""
    found: dict[str, Family] = {}
    for name, value in metrics.items():
        metric = declared(name)
        if metric is None:
            continue
        labels = metric.parts(name)
        family_name, kind, unit = exported_name(metric)
        if family_name not in found:
            help_text = f"{metric.what}; of: {metric.denominator}"
            found[family_name] = kind(family_name, help_text, labels=list(labels), unit=unit)
        found[family_name].add_metric(list(labels.values()), value)
    return list(found.values())


def exported_name(metric: Metric) -> tuple[str, type[Family], str]:
    """Name, kind and unit ("" for none) of a declared metric's family, as OpenMetrics spells them."""
    stage, _, thing = re.sub(r"_?<\w+>", "", metric.name).partition("/")
    kind: type[Family] = GaugeMetricFamily
    if thing.startswith("total_"):
        stage, thing, kind = "run", thing.removeprefix("total_"), CounterMetricFamily
    elif thing == "total":
        thing = "whole"  # only counters may end in _total
    name = re.sub(r"[^a-z0-9]+", "_", f"grove_{stage}_{thing}".replace("/_", "/").lower())
    if name.endswith("_share"):
        name = f"{name.removesuffix('share')}ratio"
    unit = next((each for each in UNITS if name.endswith(f"_{each}")), "")
    return name, kind, unit
