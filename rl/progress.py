"""What a run shows while it runs: one live panel in a terminal, one plain line per step anywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from conf.schema import Config
from rl.batch_metrics import slowest_reward

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_STEPS = 40
"""Newest steps in the training curve; more would not fit a narrow terminal."""
SLOW_REWARD_S = 0.1
"""Seconds a tree above which the slowest reward is named."""
WARM_START_LINES = 10
"""Lines that a warm start prints where there is no live panel."""


class Progress:
    """Shows a run while the `with` block lasts. A refresh thread reads it, so its parts are replaced, never changed."""

    def __init__(self, cfg: Config, console: Console | None = None):
        """Prepare the panel of one run; `console` is the terminal unless a test gives another."""
        self._cfg = cfg
        self._console = console or Console()
        self._step = 0
        self._latest: dict[str, float] = {}
        self._train_success: list[float] = []
        self._first_success: float | None = None
        self._stage_seconds: dict[str, float] = {}
        self._running: tuple[str, float] | None = None
        self._detail = ""
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        """Show the panel; without a terminal nothing is shown yet."""
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the panel's last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in metrics of a step, named as in `rl.metrics`; several goes for one step add up."""
        self._step = step
        self._latest = self._latest | dict(metrics)
        if "rollout/success_share" in metrics:
            self._train_success = [*self._train_success, metrics["rollout/success_share"]][-SPARK_STEPS:]
        if self._first_success is None:
            self._first_success = metrics.get("eval/success_share")
        if self._live is None:
            self._print(step_line(step, self._cfg.run.num_steps, metrics))

    def note(self, text: str) -> None:
        """Tell one thing that stays on the screen, above the panel."""
        self._print(text)

    def warm_start(self, step: int, steps: int, loss: float) -> None:
        """Show how far the supervised warm start has come."""
        self._detail = f"warm start {step}/{steps}, loss {loss:.3f}"
        every = max(1, steps // WARM_START_LINES)
        if self._live is None and (step % every == 0 or step == steps):
            self._print(self._detail)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show that a stage runs and for how long; its time adds to the panel's shares. Stages may be nested."""
        before, started = self._running, time.monotonic()
        self._running, self._detail = (name, started), ""
        try:
            yield
        finally:
            seconds = self._stage_seconds.get(name, 0.0) + time.monotonic() - started
            self._stage_seconds = self._stage_seconds | {name: seconds}
            self._running, self._detail = before, ""

    def _print(self, text: str) -> None:
        # No markup and no wrapping: a path in brackets must stay a path, and a line of a log must stay one line.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _panel(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        for name, value in self._rows():
            grid.add_row(name, value)
        cfg = self._cfg
        title = " · ".join(
            part for part in (cfg.run.name, cfg.credit.name, cfg.rollout.expander.value, f"seed {cfg.seed}") if part
        )
        return Panel(grid, title=Text(title), title_align="left", border_style="dim", expand=False, width=self._width())

    def _width(self) -> int:
        return min(self._console.width, 100)

    def _rows(self) -> Iterator[tuple[str, RenderableType]]:
        yield "step", self._bar(self._step, self._cfg.run.num_steps)
        limit = self._cfg.run.max_generated_tokens
        tokens = int(self._latest.get("rollout/total_generated_tokens", 0))
        yield "tokens", self._bar(tokens, limit) if limit else Text(f"{tokens:,}")
        yield "held-out", self._held_out()
        yield "training", self._training()
        rewards = reward_parts(self._latest)
        yield "rewards", Text("   ".join(rewards) or "-")
        slowest = slowest_reward(self._latest)
        if slowest is not None and slowest[1] >= SLOW_REWARD_S:
            yield "slowest", Text(f"{slowest[0]} {slowest[1]:.1f} s a tree")
        speed = self._latest.get("rollout/tokens_per_second")
        yield "speed", Text("-" if speed is None else f"{speed:,.0f} tokens/s")
        yield "time", Text(stage_shares(self._stage_seconds) or "-")
        yield "now", self._now()

    def _bar(self, done: int, total: int) -> RenderableType:
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(total=max(total, 1), completed=done, width=SPARK_STEPS), f"{done:,}/{total:,}")
        return row

    def _held_out(self) -> Text:
        now = self._latest.get("eval/success_share")
        if now is None or self._first_success is None:
            return Text("-")
        text = Text(f"{now:.1%}", style="bold")
        if now != self._first_success:
            text.append(f"   from {self._first_success:.1%}", style="not bold dim")
        return text

    def _training(self) -> Text:
        if not self._train_success:
            return Text("-")
        return Text(f"{self._train_success[-1]:.1%}   ").append(sparkline(self._train_success), style="cyan")

    def _now(self) -> Text:
        if self._running is None:
            return Text("-")
        name, started = self._running
        detail = f"   {self._detail}" if self._detail else ""
        return Text(f"{name} {time.monotonic() - started:.0f} s{detail}", style="yellow")


def sparkline(shares: list[float]) -> str:
    """Shares as a row of blocks, on the scale 0 to 1 so that noise does not look like progress."""
    top = len(SPARKS) - 1
    return "".join(SPARKS[round(min(max(share, 0.0), 1.0) * top)] for share in shares)


def reward_parts(metrics: Mapping[str, float]) -> list[str]:
    """Each signal's and source's mean, with the share of its scores that failed or timed out when there are any."""
    names = [name[len("reward/") : -len("_mean")] for name in metrics if _is_mean(name)]
    parts = []
    for name in names:
        lost = metrics.get(f"reward/{name}_failed_share", 0.0) + metrics.get(f"reward/{name}_timed_out_share", 0.0)
        parts.append(f"{name} {metrics[f'reward/{name}_mean']:.3f}" + (f" ({lost:.1%} lost)" if lost else ""))
    return parts


def _is_mean(name: str) -> bool:
    return name.startswith("reward/") and name.endswith("_mean")


def stage_shares(stage_seconds: Mapping[str, float]) -> str:
    """Stages by their share of the time, largest first."""
    total = sum(stage_seconds.values())
    ordered = sorted(stage_seconds.items(), key=lambda stage: -stage[1])
    return "   ".join(f"{name} {seconds / total:.0%}" for name, seconds in ordered if seconds >= 0.005 * total > 0)


def step_line(step: int, num_steps: int, metrics: Mapping[str, float]) -> str:
    """One step on one line, for logs."""
    parts = [f"step {step}/{num_steps}"]
    if "eval/success_share" in metrics:
        parts.append(f"held-out {metrics['eval/success_share']:.1%}")
    if "rollout/success_share" in metrics:
        parts.append(f"training {metrics['rollout/success_share']:.1%}")
    parts += reward_parts(metrics)
    slowest = slowest_reward(metrics)
    if slowest is not None and slowest[1] >= SLOW_REWARD_S:
        parts.append(f"slowest reward {slowest[0]} {slowest[1]:.1f} s a tree")
    if "rollout/tokens_per_second" in metrics:
        parts.append(f"{metrics['rollout/tokens_per_second']:,.0f} tokens/s")
    if "time/step_seconds" in metrics:
        parts.append(f"{metrics['time/step_seconds']:.1f} s")
    return "  ".join(parts)
