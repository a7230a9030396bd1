"""What a sweep shows: a line for each member and a bar while it runs, a table at its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from conf.errors import DataError
from rl.metrics import read_metrics
from rl.sweeps.record import MemberRecord, Status, SweepRecord
from rl.view import duration_text

COLORS = {
    Status.waiting: "dim",
    Status.running: "yellow",
    Status.stopped: "yellow",
    Status.finished: "green",
    Status.failed: "red",
    Status.pruned: "dim",
    Status.skipped: "magenta",
}
MAX_LINES = 30
"""Members in the live view: those that run, failed or came to an end last."""


class Show:
    """Shows a sweep while the `with` block lasts."""

    def __init__(self, record: SweepRecord, console: Console | None = None):
        self._record, self._console = record, console or Console()
        self._live: Live | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Show:
        """Show the panel; without a terminal one line is printed for each event instead."""
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=1)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the panel away: the table follows it."""
        if self._live is not None:
            self._live.transient = True
            self._live.stop()
            self._live = None

    def tell(self, member: MemberRecord) -> None:
        """A member's status has changed."""
        if self._live is None:
            done = self._record.count(*(status for status in Status if status.is_over))
            self.note(f"{done}/{len(self._record.members)}  {member_line(member)}")

    def note(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(self) -> None:
        """Print how many members came to what, and the table of them."""
        self.note(f"{self._record.path}: {status_counts(self._record.members)}")
        self._console.print(members_table(self._record))

    def _panel(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        for member in shown_members(self._record.members):
            grid.add_row(
                Text(member.status.value, style=COLORS[member.status]), Text(member.name), Text(self._doing(member))
            )
        over = self._record.count(*(status for status in Status if status.is_over))
        bar = Table.grid(padding=(0, 1))
        total = len(self._record.members)
        elapsed = duration_text(time.monotonic() - self._started)
        bar.add_row(ProgressBar(total=max(1, total), completed=over, width=40), f"{over}/{total} members, {elapsed}")
        return Group(grid, bar)

    def _doing(self, member: MemberRecord) -> str:
        return progress_text(self._record, member) if member.status is Status.running else outcome_text(member)


def shown_members(members: list[MemberRecord], limit: int = MAX_LINES) -> list[MemberRecord]:
    """Members that fit, in their order: those that run or failed, then the last that ended, then others."""
    rank = {Status.running: 0, Status.failed: 1, Status.skipped: 2, Status.finished: 3, Status.pruned: 3}
    places = sorted(range(len(members)), key=lambda place: (rank.get(members[place].status, 4), -place))
    return [members[place] for place in sorted(places[:limit])]


def progress_text(record: SweepRecord, member: MemberRecord) -> str:
    """How far a running member is."""
    file, rows = record.folder(member).metrics, []
    with contextlib.suppress(OSError, DataError):
        rows = read_metrics(file)
    if not rows:
        return "starts"
    success = next((row["eval/success_share"] for row in reversed(rows) if row.get("eval/success_share")), None)
    return f"step {rows[-1]['step']}" + (f", success {success:.1%}" if success is not None else "")


def outcome_text(member: MemberRecord) -> str:
    """What a member came to, in a few words."""
    if member.status is Status.finished:
        before, after = member.summary.get("success_before"), member.summary.get("success_after")
        success = f"success {before:.1%} -> {after:.1%}, " if before is not None and after is not None else ""
        return f"{success}{duration_text(member.seconds)}"
    return member.reason


def member_line(member: MemberRecord) -> str:
    """A member on one line, for logs."""
    outcome = outcome_text(member)
    return f"{member.name}  {member.status.value}" + (f": {outcome}" if outcome else "")


def members_table(record: SweepRecord) -> Table:
    """All members with what they came to."""
    table = Table(box=None, pad_edge=False)
    for column in ("member", "status"):
        table.add_column(column)
    for column in ("before", "after", "tokens", "time", "tries"):
        table.add_column(column, justify="right")
    table.add_column("", overflow="fold")
    for each in record.members:
        tokens = each.summary.get("generated_tokens")
        table.add_row(
            Text(each.name),
            Text(each.status.value, style=COLORS[each.status]),
            _percent(each.summary.get("success_before")),
            _percent(each.summary.get("success_after")),
            "" if tokens is None else f"{tokens:,}",
            duration_text(each.seconds) if each.seconds else "",
            str(each.tries) if each.tries else "",
            Text(each.reason, style="dim"),
        )
    return table


def status_counts(members: Iterable[MemberRecord]) -> str:
    """E.g. "11 finished, 1 failed"."""
    counts = dict.fromkeys((Status.finished, Status.failed, Status.pruned, Status.skipped, *Status), 0)
    for each in members:
        counts[each.status] += 1
    return ", ".join(f"{count} {status.value}" for status, count in counts.items() if count)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
