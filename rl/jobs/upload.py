"""Which files of the working folder go to a cluster, and the archive of them."""

from __future__ import annotations

import fnmatch
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.errors import ConfigError
from conf.schema import RayJobsConfig

MIB = 2**20
NUM_SHOWN = 5
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The date of every file in the archive, so that the same files make the same archive, which is uploaded once."""


@dataclass(frozen=True, slots=True)
class Upload:
    """The files to upload, relative to the folder, and those too large to go."""

    folder: Path
    files: tuple[Path, ...]
    num_bytes: int
    too_large: tuple[tuple[Path, int], ...]
    """With their sizes in bytes."""

    def lines(self) -> list[str]:
        """What is told of it."""
        num = len(self.files)
        told = [f"uploads {num} file{'s' * (num != 1)}, {self.num_bytes / MIB:.1f} MiB, of {self.folder}"]
        if self.too_large:
            names = ", ".join(f"{path} ({size / MIB:.0f} MiB)" for path, size in self.too_large[:NUM_SHOWN])
            more = f" and {len(self.too_large) - NUM_SHOWN} more" if len(self.too_large) > NUM_SHOWN else ""
            told.append(f"leaves out, being larger than launch.ray.max_file_mib: {names}{more}")
        return told


def find_upload(folder: Path, cfg: RayJobsConfig) -> Upload:
    """The files below `folder` that no pattern of launch.ray.excludes takes out, links left out too.

    Raises: ConfigError when together they exceed launch.ray.max_upload_mib.
    """
    sizes: dict[Path, int] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_excluded(name, cfg.excludes))
        for name in sorted(names):
            path = Path(place) / name
            if not _is_excluded(name, cfg.excludes) and path.is_file() and not path.is_symlink():
                sizes[path.relative_to(folder)] = path.stat().st_size
    too_large = tuple((path, size) for path, size in sizes.items() if size > cfg.max_file_mib * MIB)
    kept = {path: size for path, size in sizes.items() if size <= cfg.max_file_mib * MIB}
    num_bytes = sum(kept.values())
    if num_bytes > cfg.max_upload_mib * MIB:
        largest = sorted(_by_first_part(kept).items(), key=lambda each: -each[1])[:NUM_SHOWN]
        shown = ", ".join(f"{name} ({size / MIB:.0f} MiB)" for name, size in largest)
        raise ConfigError(
            f"{folder} holds {num_bytes / MIB:.0f} MiB to upload, more than launch.ray.max_upload_mib="
            f"{cfg.max_upload_mib:g}: the cluster's head would hold it in memory and hand it to every node. Largest: "
            f"{shown}. Add what the run does not need to launch.ray.excludes, or launch from a folder of its own."
        )
    return Upload(folder, tuple(kept), num_bytes, too_large)


def write_archive(upload: Upload, path: Path) -> None:
    """Write the files into a zip whose bytes depend on their names, modes and contents alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in upload.files:
            whole = upload.folder / file
            entry = zipfile.ZipInfo(file.as_posix(), EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (whole.stat().st_mode & 0o777) << 16
            archive.writestr(entry, whole.read_bytes())


def _is_excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _by_first_part(sizes: dict[Path, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for path, size in sizes.items():
        total[path.parts[0]] = total.get(path.parts[0], 0) + size
    return total
