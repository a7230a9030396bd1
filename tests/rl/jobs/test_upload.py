"""What goes to a cluster, and what stays."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from conf.errors import ConfigError
from conf.schema import RayJobsConfig
from rl.jobs.upload import MIB, find_upload, write_archive


def fill(folder: Path, **sizes: int) -> None:
    for name, size in sizes.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def test_code_goes_and_environments_runs_keys_and_hidden_files_stay(tmp_path: Path):
    fill(tmp_path, my_rewards_dot_py=3, conf__a_dot_yaml=4, _dot_env=1, _dot_venv__bin__python=1, runs__x__metrics=1)
    fill(tmp_path, server_dot_pem=1, deep___dot_git__HEAD=1, model_dot_safetensors=1)
    (tmp_path / "link").symlink_to("/etc/passwd")
    upload = find_upload(tmp_path, RayJobsConfig())
    assert [str(path) for path in upload.files] == ["my_rewards.py", "conf/a.yaml"]
    assert upload.num_bytes == 7


def test_a_large_file_stays_and_is_named(tmp_path: Path):
    fill(tmp_path, small=10, large=2 * MIB)
    upload = find_upload(tmp_path, RayJobsConfig(max_file_mib=1))
    assert [str(path) for path in upload.files] == ["small"]
    assert upload.lines()[1] == "leaves out, being larger than launch.ray.max_file_mib: large (2 MiB)"


def test_too_much_is_refused_with_what_takes_the_most(tmp_path: Path):
    fill(tmp_path, data__a=2 * MIB, data__b=2 * MIB, code=MIB)
    with pytest.raises(ConfigError, match=r"holds 5 MiB .* Largest: data \(4 MiB\), code \(1 MiB\)"):
        find_upload(tmp_path, RayJobsConfig(max_upload_mib=4))


def test_the_same_files_make_the_same_archive_whenever_they_were_written(tmp_path: Path):
    fill(tmp_path / "from", b=2, a__run_dot_sh=3)
    (tmp_path / "from/a/run.sh").chmod(0o755)
    made = []
    for number in (1, 2):
        os.utime(tmp_path / "from/b", (number * 1e8, number * 1e8))
        write_archive(find_upload(tmp_path / "from", RayJobsConfig()), tmp_path / f"{number}.zip")
        made.append((tmp_path / f"{number}.zip").read_bytes())
    assert made[0] == made[1]
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.read("a/run.sh") == b"xxx"
        assert archive.getinfo("a/run.sh").external_attr >> 16 == 0o755
