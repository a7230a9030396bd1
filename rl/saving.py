"""What a run's checkpoint holds, written beside training and read back."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import CheckpointError, ConfigError, DiskFull
from conf.schema import Config
from rl import checkpoint
from rl.ahead import Grown
from rl.background import Background
from rl.checkpoint import Checkpoint
from rl.disk import once_there_is_room
from rl.generators import generators_text, restore_generators
from rl.in_flight import Kept, read_kept, write_kept
from rl.launch import Parts
from rl.policy.written import Written
from rl.run_folder import RunFolder, installed_versions

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0
"""Between two looks at whether the files are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What a resumed run goes on from, beside weights and moments."""

    checkpoint: Checkpoint
    run: dict[str, Any]
    """The run's own counters."""
    kept: list[Kept]
    """Of batches that grew ahead."""


class Saver:
    """Writes the checkpoints of a run, at most one at a time, and reads the newest back.

    Training stands still until the learner's state and the batches in flight are copied; the files are written, synced,
    checksummed and put in place meanwhile. What goes wrong there is raised by the next `begin`, `check` or `wait`.

    A checkpoint that finds the disk full is left out and training goes on; the next one waits for room, as the last one
    of a run does.
    """

    def __init__(self, cfg: Config, folder: RunFolder, parts: Parts) -> None:
        self._cfg, self._folder, self._parts = cfg, folder, parts
        self._root = folder.checkpoints.resolve()  # the learner's processes may have another working directory
        self._limit_s = cfg.run.checkpoint_timeout_s
        # Copied, then written, each within the limit; and read back.
        self._background = Background("the checkpoint", 3 * self._limit_s)
        self.left_out = False
        """The newest checkpoint, since the disk was full."""
        self._work: Callable[[Callable[[], None]], None] | None = None
        """Writes the newest checkpoint."""

    def begin(
        self,
        step: int,
        run: dict[str, Any],
        ahead: Sequence[Grown],
        success: float | None,
        patient: bool = True,
    ) -> None:
        """Save the state after `step`; returns once training may go on, with run.checkpoint_in_background=false at
        the end.

        Args:
            run: the run's own counters, as JSON values.
            ahead: batches that have begun to grow and are not trained yet.
            success: held-out success at this step, where it was measured.
            patient: where this checkpoint is to wait for room, do so for run.disk_wait_s; else try once.
        Raises: CheckpointError, of this checkpoint or of the one before; WorkerLost; WaitTimeout.
        """
        with self._left_out_where_full():
            self._background.wait()
        state = {
            "seed": self._cfg.seed,
            "run": run,
            "generators": generators_text(),
            "reward_cache": self._folder.reward_cache.name if self._folder.reward_cache.is_file() else "",
            "versions": installed_versions(),
        }
        in_flight = [(batch.step, dict(batch.calls), dict(batch.trees)) for batch in ahead]

        def work(go_on: Any) -> None:
            started = time.monotonic()

            def write(folder: Path) -> None:
                self._copy(folder)
                logger.info("checkpoint of step %d: copied in %.2f s", step, time.monotonic() - started)
                go_on()
                write_kept(folder, [self._kept(*each) for each in in_flight])
                self._await_files(step)

            keep = self._cfg.run.keep_checkpoints
            keep_best = self._cfg.run.keep_best
            checkpoint.save(self._root, step, write, state, keep, keep_best=keep_best, success=success)
            logger.info("checkpoint of step %d: written in %.2f s", step, time.monotonic() - started)

        self._work = work
        if self.left_out or not self._cfg.run.checkpoint_in_background:
            self._stand_still(patient)
        else:
            with self._left_out_where_full():
                self._background.begin(work)

    def check(self) -> None:
        """Raise what went wrong in writing, but for a disk that is full; returns at once."""
        with self._left_out_where_full():
            self._background.check()

    def wait(self) -> None:
        """Until what was begun is on the disk; raises as `begin`."""
        self._background.wait()

    def finish(self) -> None:
        """As `wait`, and where the disk is full until there is room; training has not gone on since `begin`."""
        try:
            self._background.wait()
        except DiskFull:
            self.left_out = True
        if self.left_out:
            self._stand_still(patient=True)

    def _stand_still(self, patient: bool) -> None:
        assert self._work is not None, "a checkpoint was begun"
        work = self._work

        def write() -> None:
            self._background.begin(work)
            self._background.wait()

        once_there_is_room(write, what="a checkpoint", limit_s=self._cfg.run.disk_wait_s if patient else 0.0)
        self.left_out = False

    @contextlib.contextmanager
    def _left_out_where_full(self) -> Iterator[None]:
        try:
            yield
        except DiskFull as error:
            if not self._cfg.run.disk_wait_s:
                raise
            self.left_out = True
            logger.warning("training goes on without a checkpoint, and the next one waits for room: %s", error)

    def restore(self) -> Restored | None:
        """Bring the learner, and the process reward model, to the newest intact checkpoint; None where there is none.

        Raises: ConfigError where the run's seed is another; CheckpointError for one of another format or model.
        """
        found = checkpoint.newest(self._folder.checkpoints)
        if found is None:
            return None
        stored = checkpoint.load_state(found)
        if stored["seed"] != self._cfg.seed:
            raise ConfigError(
                f"seed={self._cfg.seed} differs from the seed={stored['seed']} that {found.path} was trained with: "
                f"the resumed run would draw other prompts than the one it continues. Use seed={stored['seed']}."
            )
        self._warn_of_changes(found, stored)
        learner, prm, path = self._parts.learner, self._parts.prm, found.path.resolve()
        assert learner is not None, "a training run has a learner"
        learner.answer(learner.load(str(path)), limit_s=self._limit_s, what="the learner to load its checkpoint")
        if prm is not None:
            prm.answer(prm.load(path), "the process reward model to load its checkpoint", self._limit_s)
        restore_generators(stored["generators"])
        return Restored(checkpoint=found, run=stored["run"], kept=read_kept(found.path))

    def _copy(self, folder: Path) -> None:
        learner, prm = self._parts.learner, self._parts.prm
        assert learner is not None, "a training run has a learner"
        calls = learner.begin_save(str(folder))
        call = prm.begin_save(folder) if prm is not None else None
        learner.answer(calls, limit_s=self._limit_s, what="the learner to copy its state for a checkpoint")
        if prm is not None:
            prm.answer(call, "the process reward model to copy its state for a checkpoint", self._limit_s)

    def _await_files(self, step: int) -> None:
        started, pause_s = time.monotonic(), FIRST_PAUSE_S
        while not all(written.done for written in self._written()):
            if time.monotonic() - started > self._limit_s:
                raise CheckpointError(
                    f"the files of the checkpoint of step {step} were not written within run.checkpoint_timeout_s="
                    f"{self._limit_s:g}: the disk of {self._root} is too slow or hangs. Earlier checkpoints are "
                    "untouched; raise the limit, or choose another run.dir."
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        for written in self._written():
            if written.error:
                raise OSError(written.error) if written.by_system else RuntimeError(written.error)

    def _written(self) -> list[Written]:
        """How far each process is; told between two updates."""
        learner, prm = self._parts.learner, self._parts.prm
        assert learner is not None, "a training run has a learner"
        limit_s = self._limit_s + self._cfg.learner.update_timeout_s
        found = learner.answers(learner.saved(), limit_s=limit_s, what="the learner to say whether it has written")
        if prm is not None:
            found.append(prm.answer(prm.saved(), "the process reward model to say whether it has written", limit_s))
        return found

    def _kept(self, step: int, calls: dict[int, Any], trees: dict[int, Any]) -> Kept:
        scored = self._parts.scoring.answers_so_far(calls)
        unscored = {index: tree for index, tree in trees.items() if index not in scored}
        return Kept(step=step, trees=unscored, scored=scored)

    def _warn_of_changes(self, found: Checkpoint, stored: dict[str, Any]) -> None:
        now, then = installed_versions(), stored["versions"]
        changed = [f"{name} {was} -> {now.get(name, 'none')}" for name, was in then.items() if now.get(name) != was]
        if changed:
            what = ", ".join(changed)
            logger.warning("%s is of other versions (%s): the run goes on, but not bit for bit", found.path, what)
        cache = self._folder.path / stored["reward_cache"]
        if stored["reward_cache"] and not cache.is_file():
            logger.warning("%s is gone: scores that were given before are asked for again", cache)
