"""docs/launch.md, followed word by word in one shell: two Ray nodes here, a run on both, one node lost and found."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port
from test_docs import blocks, read

PAGE = "docs/launch.md"
NODE = "127.0.0.2"
SECTION = "## On a Ray cluster, gone through on one machine"
LIMIT_S = 600
DONE = "=== end of block ==="


def steps() -> list[tuple[str, list[str]]]:
    """The section's commands, block by block, each with the lines that the page says they print."""
    section = read(PAGE).partition(SECTION)[2].partition("\n## ")[0]
    found: list[tuple[str, list[str]]] = []
    for block in blocks(section):
        if block.language == "bash":
            found.append((block.body, []))
        elif block.language == "text":
            found[-1][1].extend(block.body.splitlines())
    return found


@pytest.fixture
def short_room() -> Iterator[Path]:
    """A folder with a short name: the path of a socket has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


def shape(line: str) -> str:
    """A line without what differs from one time to the next: numbers, widths, the folder."""
    line = re.sub(r" of /\S+$", " of FOLDER", line)
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "#", line)).strip()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 60)
def test_the_pages_commands_print_what_the_page_says(tmp_path: Path, short_room: Path):
    script = "set -eu\n" + "".join(
        f"{commands}\necho '{DONE}'\necho $SECONDS >> ../seconds\n" for commands, _ in steps()
    )
    for known, own in (
        ("6390", free_port(NODE)),
        ("8265", free_port(NODE)),
        ("52365", free_port(NODE)),
        ("52366", free_port(NODE)),
        ("/tmp/grove_", f"{short_room}/"),
    ):
        script = script.replace(known, str(own))
    launching = re.compile(r"^(grove launch ray.*?)( \\)?$", re.MULTILINE)
    port = re.search(r"--dashboard-port=(\d+)", script)
    assert port is not None
    script = launching.sub(rf"\1 launch.ray.address=http://127.0.0.1:{port[1]}\2", script)
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "walk.sh").write_text(script)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (tmp_path / "errors").open("w") as errors:
        shell = subprocess.Popen(
            ["bash", "../walk.sh"],
            cwd=work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = shell.communicate(timeout=LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)  # Ray's nodes too, should the shell have ended early
    told = (tmp_path / "errors").read_text()[-3000:]
    assert shell.returncode == 0, f"{printed[-3000:]}\n{told}"
    for (commands, expected), out in zip(steps(), printed.split(DONE), strict=False):
        lines = [shape(line) for line in out.splitlines()]
        wanted = [re.sub(r" launch\.ray\.address=\S+", "", shape(line)) for line in expected]
        lines = [re.sub(r" launch\.ray\.address=\S+", "", line) for line in lines]
        missing = [line for line in wanted if line not in lines]
        assert missing == [], f"{commands}\nprinted\n{out}\n{told}"
