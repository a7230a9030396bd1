"""Runs the members of a sweep: as many at once as asked, each failure kept to itself, everything resumable."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from conf.check_machine import num_gpus
from conf.compose import compose
from conf.errors import ConfigError
from conf.schema import SearchKind
from conf.sweep import Sweep
from rl.exit_codes import INTERRUPTED, REFUSED
from rl.interrupts import end_as_interrupt
from rl.locks import locked
from rl.sweeps.plan import Plan, plan, problem, resource_warnings
from rl.sweeps.process import (
    Launch,
    Process,
    gpu_slots,
    launch_locally,
    reason_of,
)
from rl.sweeps.record import (
    KEPT,
    MemberRecord,
    Status,
    SweepRecord,
    member_record,
    open_record,
    order,
)
from rl.sweeps.show import Show

if TYPE_CHECKING:
    from rl.sweeps.search import Search

logger = logging.getLogger(__name__)

POLL_S = 0.2
JUDGE_EVERY_S = 2.0
"""Between two looks at the curves of running members."""


@dataclass(slots=True)
class _Running:
    """A member that runs."""

    member: MemberRecord
    process: Process
    place: int
    started: float
    seconds_before: float
    stop_by: float | None = None
    """When a member that was told to stop is killed."""
    becomes: Status = Status.stopped
    """Of a member that was told to stop."""
    why: str = ""


@dataclass(slots=True)
class SweepRun:
    """The state of the loop. Time and processes are given, so that a test can play a day in a moment."""

    sweep: Sweep
    record: SweepRecord
    show: Show
    search: Search | None = None
    launch: Launch = launch_locally
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    slots: list[str | None] = field(default_factory=list)
    """CUDA_VISIBLE_DEVICES of each place; empty where members see all GPUs."""
    only: frozenset[str] | None = None
    """Members to run, by name; None for all of the record."""
    _running: list[_Running] = field(default_factory=list)
    _judged: float = 0.0

    def run(self) -> None:
        """Run until nothing is left to do.

        Raises: KeyboardInterrupt once all members have stopped.
        """
        try:
            while self._fill() or self._running:
                self._poll()
                self._judge()
                self.sleep(POLL_S)
        except KeyboardInterrupt:
            self.stop()
            raise

    def stop(self) -> None:
        """Let every running member write its checkpoint and end. A second interrupt kills them at once."""
        if self._running:
            self.show.note(f"stopping {len(self._running)} members; they write their checkpoints")
        for each in self._running:
            self._tell_to_stop(each, Status.stopped, "")
        try:
            while self._running:
                self._poll()
                self.sleep(POLL_S)
        except KeyboardInterrupt:
            for each in self._running:
                each.process.kill()
                each.member.status = Status.stopped
            self.record.save()
            raise

    def _fill(self) -> bool:
        """Start members while there is a place; False when none is left to start."""
        while len(self._running) < self.sweep.settings.parallel:
            member = self._next()
            if member is None:
                return False
            self._start(member)
        return True

    def _next(self) -> MemberRecord | None:
        waiting = self._waiting()
        while waiting is None and self.search is not None:
            self.search.settle()
            members = self.search.ask()
            if members is None:
                return None
            number = self.search.trial_of(members)
            self.record.members += [member_record(each, number) for each in members]
            for planned, member in zip(members, self.record.members[-len(members) :], strict=True):
                if reason := problem(self.sweep, planned, {}):
                    self._end(member, Status.skipped, reason)
            self.record.save()
            waiting = self._waiting()
        return waiting

    def _waiting(self) -> MemberRecord | None:
        running = {each.member.name for each in self._running}
        todo = (each for each in order(self.record.members) if self.only is None or each.name in self.only)
        return next((each for each in todo if each.name not in running), None)

    def _start(self, member: MemberRecord) -> None:
        taken = {each.place for each in self._running}
        place = next(place for place in range(self.sweep.settings.parallel) if place not in taken)
        if member.status is Status.waiting:  # what was stopped goes on with the same try
            member.tries += 1
        member.status, member.reason = Status.running, ""
        self.record.save()
        process = self.launch(self.record, member, self.slots[place] if self.slots else None)
        self._running.append(_Running(member, process, place, self.clock(), member.seconds))
        self.show.tell(member)

    def _poll(self) -> None:
        for each in list(self._running):
            each.member.seconds = each.seconds_before + self.clock() - each.started
            code = each.process.poll()
            if code is not None:
                self._running.remove(each)
                self._ended(each, code)
            elif each.stop_by is not None:
                if self.clock() > each.stop_by:
                    logger.warning("%s did not stop in time and is killed", each.member.name)
                    each.process.kill()
            elif (silent_s := each.process.silent_s()) > self.sweep.settings.max_silent_s:
                why = f"silent for {silent_s:.0f} s, more than sweep.max_silent_s={self.sweep.settings.max_silent_s:g}"
                self._tell_to_stop(each, Status.failed, why)

    def _tell_to_stop(self, each: _Running, becomes: Status, why: str) -> None:
        if each.stop_by is None:
            each.stop_by, each.becomes, each.why = self.clock() + self.sweep.settings.stop_timeout_s, becomes, why
            each.process.stop()

    def _ended(self, each: _Running, code: int) -> None:
        member, settings = each.member, self.sweep.settings
        summary = self.record.folder(member).read_summary()
        if code == 0 and summary:
            member.summary = {key: summary.get(key) for key in KEPT}
            self._end(member, Status.finished, "")
            return
        if each.stop_by is not None and each.becomes is not Status.failed:
            self._end(member, each.becomes, each.why)
            return
        reason = each.why or reason_of(self.record.log(member), code)
        if code == INTERRUPTED and not each.why:
            self._end(member, Status.stopped, "interrupted from outside")
            raise KeyboardInterrupt  # whoever stops a member by hand, or the whole machine, means the sweep
        if code != REFUSED and member.tries <= settings.max_retries:
            self._end(member, Status.waiting, f"try {member.tries} failed: {reason}")
        else:
            self._end(member, Status.failed, reason)

    def _end(self, member: MemberRecord, status: Status, reason: str) -> None:
        member.status, member.reason = status, reason
        self.record.save()
        self.show.tell(member)

    def _judge(self) -> None:
        """Stop what a search gives up."""
        if self.search is None or self.clock() - self._judged < JUDGE_EVERY_S:
            return
        self._judged = self.clock()
        for member in self.search.hopeless():
            running = next((each for each in self._running if each.member is member), None)
            if running is not None:
                self._tell_to_stop(running, Status.pruned, "its curve fell behind earlier trials")
            else:
                self._end(member, Status.pruned, "the trial's first seed fell behind earlier trials")


def run_sweep(sweep: Sweep, warn: Callable[[str], None], launch: Launch = launch_locally) -> SweepRecord:
    """Plan, check and run a sweep, or go on with one that was begun.

    Returns: its record, with every member done.
    Raises: ConfigError before anything starts; KeyboardInterrupt once its members have stopped.
    """
    planned = plan(sweep)
    for text in [*resource_warnings(sweep), *_warnings(planned)]:
        warn(text)
    with _alone(Path(sweep.folder)):
        record = open_record(sweep, planned.members, retry_failed=sweep.settings.retry_failed)
        _record_skipped(record, planned)
        record.save()
        visible = [] if _joins_cluster(sweep, planned) else visible_gpus()
        slots = gpu_slots(visible, sweep.settings.parallel)
        with Show(record) as shown, end_as_interrupt():
            search = _search(sweep, record)
            only = None if search is not None else frozenset(each.name for each in planned.members)
            run = SweepRun(sweep, record, shown, search, launch, slots=slots, only=only)
            done = record.count(*(status for status in Status if status.is_over))
            begun = record.count(Status.running, Status.stopped)
            if done or begun:
                shown.note(f"{record.path}: {done} members are done, {begun} were begun and go on")
            run.run()
            if run.search is not None:
                run.search.settle()
        shown.table()
        best = run.search.best() if run.search is not None else None
        if best is not None:
            number, value, values = best
            settings = " ".join(f"{key}={text}" for key, text in values.items())
            shown.note(f"best: trial {number} with {sweep.settings.metric}={value:.4g}: {settings}")
    return record


def _search(sweep: Sweep, record: SweepRecord) -> Search | None:
    if sweep.settings.search is SearchKind.grid:
        return None
    from rl.sweeps.search import Search, check_search

    cfg = compose(list(sweep.fixed), sweep.config_dir)
    check_search(sweep, cfg.run.eval_every_steps)
    return Search(sweep, record, cfg.run.num_steps, cfg.run.max_generated_tokens)


def _joins_cluster(sweep: Sweep, planned: Plan) -> bool:
    overrides = planned.members[0].overrides if planned.members else sweep.fixed
    return bool(compose(list(overrides), sweep.config_dir).cluster.address)


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(num_gpus())]
    return [name for name in named.split(",") if name not in ("", "-1")][: num_gpus()]


def _warnings(planned: Plan) -> list[str]:
    found = []
    for text, names in planned.warnings.items():
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        found.append(f"{names[0]}{others}: {text}")
    for key, names in planned.dropped.items():
        found.append(f"{key} is left out of {len(names)} combinations that have no such part; equal ones became one.")
    return found


def _record_skipped(record: SweepRecord, planned: Plan) -> None:
    known = {each.name: each for each in record.members}
    for member, reason in planned.skipped:
        if member.name not in known:
            record.members.append(member_record(member))
            known[member.name] = record.members[-1]
        known[member.name].status, known[member.name].reason = Status.skipped, reason


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else runs the sweep of this folder meanwhile; the lock goes with the process, however it ends.

    Raises: ConfigError.
    """
    try:
        file = locked(folder)
    except OSError as error:
        raise ConfigError(
            f"the sweep's folder {folder} cannot be written ({error}): a sweep that leaves nothing behind is lost. "
            f"Choose another with sweep.dir."
        ) from error
    if file is None:
        raise ConfigError(
            f"another process runs the sweep in {folder}: two would train the same members. Wait for it, stop it, "
            f"or use another sweep.dir."
        )
    with file:
        yield
