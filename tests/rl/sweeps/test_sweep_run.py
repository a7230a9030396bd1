"""The sweep's loop over played processes: failures, retries, interrupts, resuming. No process is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from conf.errors import ConfigError
from conf.sweep import Sweep, read_sweep
from rl.sweeps.process import gpu_slots, reason_of
from rl.sweeps.record import MemberRecord, Status, SweepRecord, open_record, read_record
from rl.sweeps.run import SweepRun
from rl.sweeps.show import Show, member_line, shown_members, status_counts

OK, CRASH, BAD_CONFIG, KILLED, INTERRUPTED = 0, 1, 2, -9, 130


@dataclass
class Played:
    """A process that lives for some polls and then ends with a code; told to stop, it ends at once."""

    code: int
    polls: int
    silent: float = 0.0
    heeds: bool = True
    """Whether it ends when it is told to."""
    on_end: Callable[[int], None] = lambda code: None
    stopped: bool = False
    killed: bool = False

    def poll(self) -> int | None:
        if self.killed or (self.stopped and self.heeds):
            return KILLED if self.killed else INTERRUPTED
        self.polls -= 1
        if self.polls > 0:
            return None
        self.on_end(self.code)
        return self.code

    def silent_s(self) -> float:
        return self.silent

    def stop(self) -> None:
        self.stopped = True

    def kill(self) -> None:
        self.killed = True


@dataclass
class Stage:
    """Starts played processes by a script: member -> codes of its tries, in order; OK when nothing is said."""

    script: dict[str, list[int]] = field(default_factory=dict)
    polls: int = 3
    silent: dict[str, float] = field(default_factory=dict)
    heeds: bool = True
    started: list[str] = field(default_factory=list)
    gpus: list[str | None] = field(default_factory=list)
    alive: list[Played] = field(default_factory=list)
    most_at_once: int = 0
    interrupt_at: int = 0
    """Raise KeyboardInterrupt, as Ctrl-C does, at this many sleeps."""
    now: float = 0.0
    sleeps: int = 0

    def launch(self, record: SweepRecord, member: MemberRecord, gpus: str | None) -> Played:
        self.started.append(member.name)
        self.gpus.append(gpus)
        codes = self.script.get(member.name, [])
        folder = record.folder(member)

        def end(code: int) -> None:
            self.alive.remove(played)
            if code == OK:
                folder.path.mkdir(parents=True, exist_ok=True)
                folder.write_summary({"success_after": 0.5, "steps": 1, "versions": {}})

        silent = self.silent.get(member.name, 0.0)
        played = Played(codes.pop(0) if codes else OK, self.polls, silent, self.heeds, end)
        self.alive.append(played)
        self.most_at_once = max(self.most_at_once, len(self.alive))
        return played

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1
        if self.sleeps == self.interrupt_at:
            raise KeyboardInterrupt


def sweep_of(folder: Path, *words: str) -> Sweep:
    return read_sweep([f"sweep.dir={folder}", *words])


def play(sweep: Sweep, stage: Stage, slots: list[str | None] | None = None) -> SweepRecord:
    record = open_record(sweep, sweep.members(), retry_failed=sweep.settings.retry_failed)
    show = Show(record, Console(quiet=True))
    run = SweepRun(sweep, record, show, None, stage.launch, lambda: stage.now, stage.sleep, slots or [])
    run.run()
    return record


def statuses(record: SweepRecord) -> dict[str, str]:
    return {each.name: each.status.value for each in record.members}


SEEDS = "seed=1,2,3,4,5,6,7,8,9,10,11,12"


def test_a_failed_member_does_not_stop_the_rest_and_is_recorded_with_its_reason(tmp_path: Path):
    stage = Stage({"seed5": [CRASH, CRASH]})
    record = play(sweep_of(tmp_path, SEEDS), stage)
    assert (record.count(Status.finished), record.count(Status.failed)) == (11, 1)
    poisoned = record.members[4]
    assert (poisoned.status, poisoned.tries, poisoned.reason) == (Status.failed, 2, "exit code 1")
    assert stage.started.count("seed5") == 2 and len(stage.started) == 13
    assert read_record(tmp_path).members == record.members
    assert record.members[0].summary["success_after"] == 0.5 and "versions" not in record.members[0].summary


def test_a_member_that_fails_once_goes_on_and_a_wrong_configuration_is_not_tried_again(tmp_path: Path):
    stage = Stage({"seed1": [KILLED], "seed2": [BAD_CONFIG]})
    record = play(sweep_of(tmp_path, "seed=1,2,3", "sweep.max_retries=3"), stage)
    assert statuses(record) == {"seed1": "finished", "seed2": "failed", "seed3": "finished"}
    assert [each.tries for each in record.members] == [2, 1, 1]


def test_as_many_members_run_at_once_as_asked_each_with_gpus_of_its_own(tmp_path: Path):
    stage = Stage()
    play(sweep_of(tmp_path, "seed=1,2,3,4,5", "sweep.parallel=2"), stage, slots=["0,1", "2,3"])
    assert stage.most_at_once == 2
    assert stage.gpus[:2] == ["0,1", "2,3"] and set(stage.gpus[2:]) == {"0,1", "2,3"}


def test_an_interrupt_stops_members_and_the_same_sweep_goes_on_without_repeating(tmp_path: Path):
    sweep, stage = sweep_of(tmp_path, SEEDS), Stage(interrupt_at=17)  # three polls a member: five are done by then
    with pytest.raises(KeyboardInterrupt):
        play(sweep, stage)
    before = read_record(tmp_path)
    done = [each.name for each in before.members if each.status is Status.finished]
    assert len(done) == 5 and before.count(Status.stopped) == 1
    again = Stage()
    record = play(sweep, again)
    assert record.count(Status.finished) == 12
    assert again.started[0] == "seed6", "what was begun goes first"
    assert not set(done) & set(again.started) and len(again.started) == 7
    assert record.members[5].tries == 1, "going on is no new try"


def test_what_a_killed_sweep_left_as_running_is_resumed(tmp_path: Path):
    sweep = sweep_of(tmp_path, "seed=1,2")
    record = open_record(sweep, sweep.members())
    record.members[0].status, record.members[0].tries = Status.running, 1
    record.save()
    stage = Stage()
    assert statuses(play(sweep, stage)) == {"seed1": "finished", "seed2": "finished"}
    assert stage.started == ["seed1", "seed2"]


def test_a_failed_member_stays_failed_unless_asked(tmp_path: Path):
    play(sweep_of(tmp_path, "seed=1,2", "sweep.max_retries=0"), Stage({"seed2": [CRASH]}))
    stage = Stage()
    assert statuses(play(sweep_of(tmp_path, "seed=1,2"), stage)) == {"seed1": "finished", "seed2": "failed"}
    assert stage.started == []
    record = play(sweep_of(tmp_path, "seed=1,2", "sweep.retry_failed=true"), stage)
    assert statuses(record) == {"seed1": "finished", "seed2": "finished"} and stage.started == ["seed2"]


def test_a_sweep_grows_by_more_seeds(tmp_path: Path):
    play(sweep_of(tmp_path, "seed=1,2"), Stage())
    stage = Stage()
    record = play(sweep_of(tmp_path, "seed=1,2,3"), stage)
    assert stage.started == ["seed3"] and len(record.members) == 3


def test_a_folder_of_other_runs_is_refused(tmp_path: Path):
    play(sweep_of(tmp_path, "run.num_steps=1", "seed=1,2"), Stage())
    with pytest.raises(ConfigError, match=r"a sweep of other runs \(fixed run.num_steps=1, and now fixed run.num"):
        play(sweep_of(tmp_path, "run.num_steps=2", "seed=1,2"), Stage())
    with pytest.raises(ConfigError, match=r"keys seed, and now keys learner\.epochs"):
        play(sweep_of(tmp_path, "run.num_steps=1", "learner.epochs=1,2"), Stage())


def test_a_silent_member_is_stopped_and_has_failed(tmp_path: Path):
    stage = Stage(silent={"seed1": 101.0})
    record = play(sweep_of(tmp_path, "seed=1,2", "sweep.max_silent_s=100", "sweep.max_retries=0"), stage)
    assert statuses(record) == {"seed1": "failed", "seed2": "finished"}
    assert record.members[0].reason == "silent for 101 s, more than sweep.max_silent_s=100"


def test_a_member_that_does_not_stop_in_time_is_killed(tmp_path: Path):
    stage = Stage(polls=10_000, heeds=False, interrupt_at=4)
    with pytest.raises(KeyboardInterrupt):
        play(sweep_of(tmp_path, "seed=1,2", "sweep.stop_timeout_s=30"), stage)
    assert stage.alive[0].killed and 30 <= stage.now < 35
    assert read_record(tmp_path).members[0].status is Status.stopped


def test_gpus_are_dealt_out_and_left_alone_where_there_is_nothing_to_deal():
    assert gpu_slots(["0", "1", "2", "3", "4"], 2) == ["0,1,2", "3,4"]
    assert gpu_slots(["0", "1"], 1) == [None] and gpu_slots([], 3) == [None, None, None]


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        ("step 1\nerror: the judge is gone\nmore\n", 1, "the judge is gone (exit code 1)"),
        ("Traceback\n  File x\nValueError: bad\nlast words\n", 1, "ValueError: bad (exit code 1)"),
        ("step 1\nstep 2\n", -9, "step 2 (killed by SIGKILL, as the kernel does when memory runs out)"),
        ("", -11, "killed by SIGSEGV"),
        ("error: of an earlier try\n$ grove train seed=1\nstep 3\n", 3, "step 3 (exit code 3)"),
        ("\x1b[31merror: in color\x1b[0m\n", 1, "in color (exit code 1)"),
    ],
)
def test_a_failure_has_its_reason_in_one_line(tmp_path: Path, text: str, code: int, reason: str):
    (tmp_path / "log").write_text(text)
    assert reason_of(tmp_path / "log", code) == reason


def member(name: str, status: Status, **more: object) -> MemberRecord:
    return MemberRecord(name=name, values={}, overrides=[], status=status, **more)  # type: ignore[arg-type]


def test_lines_and_counts_say_what_became_of_members():
    good = member("a", Status.finished, summary={"success_before": 0.4, "success_after": 0.625}, seconds=75.0)
    bad = member("b", Status.failed, reason="exit code 1")
    assert member_line(good) == "a  finished: success 40.0% -> 62.5%, 1 min 15 s"
    assert member_line(bad) == "b  failed: exit code 1"
    assert status_counts([good, bad, good]) == "2 finished, 1 failed"


def test_a_long_sweep_shows_those_that_run_or_failed_before_the_others():
    many = [member(str(number), Status.finished) for number in range(50)]
    many[3].status, many[40].status = Status.failed, Status.running
    assert [each.name for each in shown_members(many, 4)] == ["3", "40", "48", "49"]


def test_a_damaged_record_is_told(tmp_path: Path):
    (tmp_path / "sweep.json").write_text(json.dumps({"members": 3}))
    with pytest.raises(Exception, match="is no record of a sweep"):
        read_record(tmp_path)
