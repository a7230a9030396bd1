"""Whether another Python will do."""

from __future__ import annotations

import subprocess
import sys

from rl.jobs.versions import differences, from_text, pinned_versions, to_text


def test_this_python_agrees_with_itself_as_text():
    here = pinned_versions()
    assert {"python", "grove-rl", "torch", "ray", "vllm"} <= here.keys()
    assert "+" not in here["torch"]
    assert differences(from_text(to_text(here)), here) == []


def test_what_is_older_or_missing_is_named():
    wanted = {"torch": "2.13.0", "trl": "1.16.0", "ray": "2.60.0"}
    assert differences(wanted, {"torch": "2.12.0", "ray": "2.60.0"}) == [
        "torch 2.13.0 is wanted, 2.12.0 is installed",
        "trl 1.16.0 is wanted, none is installed",
    ]


def test_a_job_in_the_wrong_python_says_so_before_it_imports_anything(tmp_path):
    words = ["--run-dir", str(tmp_path / "run"), "--versions", "torch==0.4.1,nothing==1.0", "--", "train"]
    # -S leaves the site-packages out, as in a Python that Grove was not installed in
    done = subprocess.run(
        [sys.executable, "-S", "-m", "rl.jobs.start", *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "nothing 1.0 is wanted, none is installed" in done.stderr
    assert "launch.python" in done.stderr
    assert '"exit_code": 2' in (tmp_path / "run/launch_ending.json").read_text()
