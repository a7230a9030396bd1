"""Checkpoints that are whole or absent: written beside, checksummed, renamed into place, read back."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import CheckpointError, DiskFull, last_line
from rl.disk import is_full

logger = logging.getLogger(__name__)

STATE = "state.json"
MANIFEST = "manifest.json"
FORMAT = 2
"""Of what a checkpoint holds and where; another one is refused, not guessed at."""
STEP_FOLDER = re.compile(r"step_(\d{6,})(\.replaced)?")
UNFINISHED = ".unfinished_"
"""Prefix of folders still being written; whatever bears it was left by a killed run."""
BROKEN_WORDS = re.compile(r"input/output error", re.IGNORECASE)
"""How safetensors, which raises no OSError, tells of a disk that is broken."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk: state.json, manifest.json and the files its writer put beside them."""

    path: Path
    step: int


def save(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    state: Mapping[str, Any],
    keep: int,
    *,
    keep_best: int = 0,
    success: float | None = None,
) -> Checkpoint:
    """Write a checkpoint so that a kill at any moment leaves either all of it or none, then remove old ones.

    Args:
        root: folder of all checkpoints of the run.
        step: optimiser step it belongs to; one of the same step is replaced.
        write: puts the tensors and whatever else it likes into the folder it is given (safetensors and text; never
            pickle).
        state: everything else, as JSON values.
        keep: newest checkpoints to keep, this one included.
        keep_best: beside those, checkpoints to keep that had the highest held-out success.
        success: held-out success of this step, a share; None where it was not measured.
    Returns: the new checkpoint, read back and verified.
    Raises: DiskFull, or CheckpointError when the disk refuses otherwise; earlier checkpoints are then untouched and
        nothing half-made stays.
    """
    assert keep >= 1, f"keep={keep} would remove the checkpoint just written"
    unfinished = root / f"{UNFINISHED}step_{step:06d}"
    try:
        _remove_unfinished(root)
        unfinished.mkdir(parents=True)
        write(unfinished)
        (unfinished / STATE).write_text(json.dumps(state), encoding="utf-8")
        _seal(unfinished, step, success)
        checkpoint = _put_in_place(unfinished, root, step)
    except Exception as error:
        written_bytes = _size_bytes(unfinished)
        _remove_unfinished(root)  # first, so that the message counts its bytes as free
        if _is_disk_trouble(error):
            raise _not_written(root, step, written_bytes, error) from error
        raise
    finally:
        _remove_unfinished(root)
    _require_intact(checkpoint)
    _remove_old(root, checkpoint, keep, keep_best)
    return checkpoint


def newest(root: Path) -> Checkpoint | None:
    """The newest intact checkpoint under `root`, or None; damaged ones are skipped with a logged warning."""
    return _first_intact(reversed(checkpoints(root)), "the one before")


def best(root: Path) -> Checkpoint | None:
    """The intact checkpoint with the highest held-out success, the newest of equals; None where none was measured."""
    return _first_intact(_by_success(checkpoints(root)), "the next best")


def _first_intact(found: Iterable[Checkpoint], instead: str) -> Checkpoint | None:
    for checkpoint in found:
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("checkpoint %s is damaged (%s) and is skipped; %s is used", checkpoint.path, problem, instead)
    return None


def success_of(checkpoint: Checkpoint) -> float | None:
    """Held-out success at its step, a share; None where it was not measured, or the checkpoint is damaged."""
    try:
        return _manifest(checkpoint)["success"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checkpoints(root: Path) -> list[Checkpoint]:
    """Every checkpoint folder under `root`, oldest step first, not yet verified."""
    folders = [(STEP_FOLDER.fullmatch(path.name), path) for path in root.iterdir()] if root.exists() else []
    found = [(int(name[1]), not name[2], path) for name, path in folders if name]
    return [Checkpoint(path, step) for step, _, path in sorted(found)]  # one that was replaced counts as older


def load_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The state that `save` was given.

    Raises: CheckpointError when the file is gone, is not the one that was written, or is of another format.
    """
    _require_format(checkpoint)
    try:
        text = (checkpoint.path / STATE).read_bytes()
        expected = _manifest(checkpoint)["files"][STATE]["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(checkpoint, f"{type(error).__name__}: {error}") from error
    if hashlib.sha256(text).hexdigest() != expected:
        raise _unreadable(checkpoint, f"{STATE} does not match its checksum")
    return json.loads(text)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint on disk, every file compared with its checksum; None when it is intact."""
    try:
        files = _manifest(checkpoint)["files"]
        for name, expected in files.items():
            path = checkpoint.path / name
            size_bytes = path.stat().st_size
            if size_bytes != expected["size_bytes"]:
                return f"{name} has {size_bytes} bytes, not {expected['size_bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or a file cannot be read: {error}"
    return None


def _seal(folder: Path, step: int, success: float | None) -> None:
    """Write the manifest of a folder and force all of it to the disk, so that the rename cannot overtake the data."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "size_bytes": path.stat().st_size}
        for path in paths
    }
    manifest = {"format": FORMAT, "step": step, "success": success, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    for path in (*paths, folder / MANIFEST, *folders, folder):
        _fsync(path)


def _put_in_place(unfinished: Path, root: Path, step: int) -> Checkpoint:
    place, aside = root / f"step_{step:06d}", root / f"step_{step:06d}.replaced"
    if place.exists():
        # a folder cannot be renamed onto a full one; killed between the two renames, the old one is still found aside
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
    unfinished.rename(place)
    _fsync(root)
    return Checkpoint(place, step)


def _require_intact(checkpoint: Checkpoint) -> None:
    problem = damage(checkpoint)
    if problem:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} reads back differently than it was written ({problem}): the disk cannot be "
            f"trusted with the only copy of the run. Earlier checkpoints were kept; move run.dir to another disk."
        )


def _remove_old(root: Path, new: Checkpoint, keep: int, keep_best: int) -> None:
    """Keep `new`, the `keep` - 1 before it and the best. Later steps are of a future that resuming left behind."""
    earlier = [checkpoint for checkpoint in checkpoints(root) if checkpoint.step < new.step]
    kept = {new, *earlier[max(len(earlier) - keep + 1, 0) :], *_by_success([*earlier, new])[:keep_best]}
    for checkpoint in checkpoints(root):
        if checkpoint not in kept:
            shutil.rmtree(checkpoint.path, ignore_errors=True)


def _by_success(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those whose success was measured, the best first and the newest of equals before the others."""
    measured = [(success, each.step, each) for each in found if (success := success_of(each)) is not None]
    return [each for _, _, each in sorted(measured, key=lambda row: row[:2], reverse=True)]


def _require_format(checkpoint: Checkpoint) -> None:
    try:
        found = _manifest(checkpoint).get("format", 1)
    except (OSError, ValueError, AttributeError) as error:
        raise _unreadable(checkpoint, f"{type(error).__name__}: {error}") from error
    if found != FORMAT:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is of format {found} and this version of Grove reads format {FORMAT}: what "
            f"it holds of the optimiser would be guessed at. Resume with the version that wrote it, or start a new run "
            f"from its weights with model.path={checkpoint.path / 'model'}."
        )


def _remove_unfinished(root: Path) -> None:
    for path in root.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _is_disk_trouble(error: Exception) -> bool:
    return isinstance(error, OSError) or is_full(error) or BROKEN_WORDS.search(str(error)) is not None


def _not_written(root: Path, step: int, written_bytes: int, error: Exception) -> CheckpointError:
    last = newest(root)
    if last is None:
        needed = f"more than {written_bytes:,} bytes are needed"
        survivor = "There is no earlier checkpoint, so the run can only start again."
    else:
        needed = f"at least {max(_size_bytes(last.path), written_bytes):,} bytes are needed"
        survivor = f"The last good checkpoint is untouched: {last.path} (step {last.step}); run.resume=true uses it."
    why = last_line(error)
    free_bytes = shutil.disk_usage(root).free if root.exists() else 0
    kind = DiskFull if is_full(error) else CheckpointError
    return kind(
        f"checkpoint of step {step} could not be written to {root} ({why}): {needed} and {free_bytes:,} are free. "
        f"{survivor} Free some space, lower run.keep_checkpoints or choose another run.dir, then resume."
    )


def _unreadable(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {checkpoint.path} cannot be read ({why}): resuming from it would train another run than the one "
        f"that stopped. Remove that folder and resume from the one before."
    )


def _manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    return json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
