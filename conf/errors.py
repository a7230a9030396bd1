"""Errors a user or the world can cause. Each message says what (with the value), why it matters, and what to do."""

from __future__ import annotations


class GroveError(Exception):
    """Base of every error Grove raises on purpose; the command line prints it without a traceback."""


class ConfigError(GroveError, ValueError):
    """A configuration that cannot run: unknown key, impossible value or combination."""


class DataError(GroveError, ValueError):
    """A data file or row that cannot be used, named by file and line."""


class ShapeError(GroveError, ValueError):
    """Two tensors that disagree on a size they share."""


class UnscoredNode(GroveError, ValueError):
    """A value that credit needs was never scored."""


class RewardFailed(GroveError, RuntimeError):
    """A reward source failed more often than its failure budget allows."""


class ToolError(GroveError, RuntimeError):
    """A tool's own refusal, told to the model as the observation (a wrong argument, nothing found)."""


class ToolCrashed(GroveError, RuntimeError):
    """A tool raised something it did not mean to, more often than the failure budget allows."""


class StaleWeights(GroveError, RuntimeError):
    """The engines and the learner disagree about the policy after a weight update."""


class DamagedWeights(GroveError, RuntimeError):
    """Published weights that did not arrive as they were sent."""


class LineBroken(GroveError, RuntimeError):
    """A line between the learner and the engines on which a version of the weights did not come through."""


class WorkerLost(GroveError, RuntimeError):
    """A rollout worker died more often than the run may restart one."""


class EngineLost(GroveError, RuntimeError):
    """An engine that can sample no more; its worker is replaced."""


class WaitTimeout(GroveError, TimeoutError):
    """Something awaited did not come within its limit."""


class CheckpointError(GroveError, RuntimeError):
    """A checkpoint that could not be written, or does not match its checksum."""


class DiskFull(CheckpointError):
    """A checkpoint for which there was no room."""


class LaunchError(GroveError, RuntimeError):
    """A place that runs jobs refused one, lost it, or does not answer."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """What one says that carries its traceback, as an actor's does."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]
