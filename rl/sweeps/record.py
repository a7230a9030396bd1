"""What a sweep has done so far, in sweep.json: the one place that a resumed sweep reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, DataError
from conf.sweep import Member, Sweep
from rl.run_folder import RunFolder, write_json

FILE = "sweep.json"
KEPT = ("success_before", "success_after", "success_standard_error", "steps", "generated_tokens", "seconds")
"""Of a member's summary.json; the whole of it lies in the member's folder."""


class Status(Enum):
    """How far a member is."""

    waiting = "waiting"
    running = "running"
    """Also what a killed sweep leaves behind: it is resumed."""
    stopped = "stopped"
    """By Ctrl-C or a signal; it is resumed."""
    finished = "finished"
    failed = "failed"
    pruned = "pruned"
    """Given up by a search."""
    skipped = "skipped"
    """It cannot run, and was not begun."""

    @property
    def is_over(self) -> bool:
        """True when nothing more is to be done for it."""
        return self not in (Status.waiting, Status.running, Status.stopped)


@dataclass(kw_only=True, slots=True)
class MemberRecord:
    """One member."""

    name: str
    values: dict[str, str]
    """What varies, by key."""
    overrides: list[str]
    """Its settings; those that say where it writes are left out."""
    status: Status = Status.waiting
    reason: str = ""
    """In one line, why it failed, was skipped or was pruned."""
    tries: int = 0
    """Times that it was started anew because it had failed, and the first start."""
    seconds: float = 0.0
    """That its processes ran, all tries and interruptions together."""
    summary: dict[str, Any] = field(default_factory=dict)
    trial: int | None = None
    """Number of the search's trial that it belongs to."""


@dataclass(kw_only=True, slots=True)
class SweepRecord:
    """A sweep and its members."""

    path: Path
    run_name: str
    fixed: list[str]
    """Settings that all members share."""
    keys: list[str]
    """What varies."""
    search: str
    config_dir: str = ""
    members: list[MemberRecord] = field(default_factory=list)

    def folder(self, member: MemberRecord) -> RunFolder:
        """The run folder of a member."""
        return RunFolder(self.path / member.name)

    def log(self, member: MemberRecord) -> Path:
        """What a member's process prints."""
        return self.folder(member).logs / "train.log"

    def count(self, *statuses: Status) -> int:
        """Members of these statuses."""
        return sum(each.status in statuses for each in self.members)

    def save(self) -> None:
        """Write sweep.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        plain = asdict(self, dict_factory=_plain)
        write_json(self.path / FILE, {key: value for key, value in plain.items() if key != "path"})


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value.value if isinstance(value, Enum) else value for key, value in pairs}


def read_record(path: Path) -> SweepRecord:
    """The record of a sweep's folder.

    Raises: DataError when it is damaged; FileNotFoundError when there is none.
    """
    file = path / FILE
    text = file.read_text(encoding="utf-8")
    try:
        plain = json.loads(text)
        members = [MemberRecord(**{**each, "status": Status(each["status"])}) for each in plain.pop("members")]
        return SweepRecord(path=path, members=members, **plain)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file} is no record of a sweep ({error}): which members are finished cannot be told. Restore it, or "
            f"give the sweep another folder with sweep.dir."
        ) from error


def open_record(sweep: Sweep, members: Iterable[Member], *, retry_failed: bool = False) -> SweepRecord:
    """The record to go on with: a new one, or that of the same sweep begun before, with new members added.

    Args:
        members: of the plan; those that the record has already keep what they have done.
        retry_failed: sweep.retry_failed.
    Raises: ConfigError when the folder holds another sweep; DataError.
    """
    path = Path(sweep.folder)
    new = SweepRecord(
        path=path,
        run_name=sweep.run_name,
        fixed=list(sweep.fixed),
        keys=[each.key for each in sweep.varied],
        search=sweep.settings.search.value,
        config_dir=sweep.config_dir,
    )
    record = read_record(path) if (path / FILE).exists() else new
    for what in ("fixed", "keys", "search", "run_name", "config_dir"):
        before, now = getattr(record, what), getattr(new, what)
        if before != now:
            raise ConfigError(
                f"{path} holds a sweep of other runs ({_shown(what, before)}, and now {_shown(what, now)}): their "
                f"numbers would stand in one table as if they were comparable. Use another folder with sweep.dir, or "
                f"the settings that it was begun with."
            )
    known = {each.name: each for each in record.members}
    for member in members:
        if member.name not in known:
            record.members.append(member_record(member))
    if retry_failed:
        for each in record.members:
            if each.status in (Status.failed, Status.skipped):
                each.status, each.reason, each.tries = Status.waiting, "", 0
    return record


def _shown(what: str, value: Any) -> str:
    return f"{what} {' '.join(value) if isinstance(value, list) else value or 'none'}"


def member_record(member: Member, trial: int | None = None) -> MemberRecord:
    """A member that nothing was done for yet."""
    return MemberRecord(name=member.name, values=dict(member.values), overrides=list(member.overrides), trial=trial)


def order(members: Iterable[MemberRecord]) -> list[MemberRecord]:
    """Members that are still to be run, those that were begun first."""
    todo = [each for each in members if not each.status.is_over]
    return sorted(todo, key=lambda each: each.status is Status.waiting)
