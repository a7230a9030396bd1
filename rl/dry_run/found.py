"""What a dry run found: its stages, what is wrong or worth knowing, and the plan of the real run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from rl.dry_run.memory import Part


class Weight(StrEnum):
    """What a finding means."""

    error = "error"
    """The run would fail, or would not be the one that was meant."""
    warning = "warning"
    note = "note"
    """What the dry run could not try."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing."""

    weight: Weight
    text: str
    is_setting: bool = False
    """Whether a setting is to be changed, rather than a file or a machine."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of the dry run that came to its end, or the one that did not."""

    name: str
    seconds: float
    detail: str = ""
    passed: bool = True


Tell = Callable[[Stage], None]
"""Told each stage as it ends."""


@dataclass(slots=True)
class DryRun:
    """All of it."""

    stages: list[Stage] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    """Settings that were changed and that nothing read: key -> value."""
    replaced: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Settings that were other ones here: key -> (of the run, of the dry run)."""
    places: str = ""
    """The run's processes and where they go, as a table."""
    memory: list[Part] = field(default_factory=list)
    tokens: dict[str, float] = field(default_factory=dict)
    """Of one step of the run, at most, by what they are (`rl.dry_run.plan.tokens_of_step`); {} where nothing bounds
    them."""

    @property
    def passed(self) -> bool:
        """Whether the run may start."""
        return not any(finding.weight is Weight.error for finding in self.findings)

    @property
    def is_refused(self) -> bool:
        """Whether a setting is what is wrong."""
        return any(finding.is_setting for finding in self.findings if finding.weight is Weight.error)

    def fail(self, text: str, *, is_setting: bool = False) -> None:
        """Note why the run may not start."""
        self.findings.append(Finding(Weight.error, text, is_setting))

    def warn(self, text: str) -> None:
        """Note what may be wrong."""
        self.findings.append(Finding(Weight.warning, text))

    def note(self, text: str) -> None:
        """Note what was not tried."""
        self.findings.append(Finding(Weight.note, text))
