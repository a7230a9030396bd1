"""Tools in processes of their own: what hangs, crashes or takes too much costs its own call and no other."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from chatml import encode
from templates import QWEN2, byte_tokenizer

from conf.schema import TaskConfig, ToolSandbox
from rollout.chat import ToolEnvironment
from rollout.toolbox import task_tools
from rollout.tools import Tool, ToolOutcome, ToolReply
from rollout.types import Prompt, StopReason

pytestmark = pytest.mark.slow  # each starts processes

TOOLS = '''
import asyncio, ctypes, os, subprocess, sys, time
from pathlib import Path
from conf.errors import ToolError
from conf.schema import TaskConfig

BESIDE = Path("beside.txt").read_text()


def do(what: str, *, column: str = "", task: TaskConfig) -> str:
    """Do something.

    Args:
        what: Python to evaluate.
    """
    if what == "refuse":
        raise ToolError("not today")
    return eval(what)


async def nap(seconds: float) -> list:
    """Nap.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return ["awake", os.getpid()]
'''


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Tool]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_API_KEY", "hush")
    monkeypatch.setenv("WIKI_TOKEN", "for tools")
    monkeypatch.setenv("PLAIN", "seen")
    (tmp_path / "beside.txt").write_text("beside")
    (tmp_path / "mine.py").write_text(TOOLS)
    yield task_tools(task())
    assert {each.name for each in tmp_path.iterdir()} - {"__pycache__"} == {"beside.txt", "mine.py"}


def task(**settings: Any) -> TaskConfig:
    known = {"tools": ["mine.py:do", "mine.py:nap"], "tool_sandbox": ToolSandbox.process, "tool_processes": 2}
    return TaskConfig(**known | {"tool_pass_env": ["WIKI_TOKEN"], "tool_memory_limit_mib": 512} | settings)


def call(tool: Tool, timeout_s: float = 10.0, data: dict[str, Any] | None = None, **arguments: Any) -> ToolReply:
    return asyncio.run(tool.call(arguments, data or {}, timeout_s))


def test_a_call_goes_there_and_back(tools: dict[str, Tool]):
    do = tools["do"]
    assert call(do, what="BESIDE + column", data={"column": " me"}).text == "beside me"
    assert call(do, what="task.tool_processes").text == "2"  # the task's own settings
    assert call(do, what="refuse") == ToolReply(ToolOutcome.refused, "not today")
    assert call(do, what="1 / 0") == ToolReply(ToolOutcome.crashed, "do raised ZeroDivisionError: division by zero")
    assert call(do, what="sys.exit(3)").text == "do raised SystemExit: 3"
    assert call(do).text == 'do needs the argument "what"'
    name, pid = eval(call(tools["nap"], seconds=0.0).text)
    assert name == "awake" and pid != os.getpid()
    assert call(do, what="os.getpid()").text == str(pid)  # the same process, used again


def test_it_has_no_secrets_and_an_empty_folder_that_is_gone_afterwards(tools: dict[str, Tool]):
    environ = eval(call(tools["do"], what="dict(os.environ)").text.replace("null", "None"))
    assert (environ["PLAIN"], environ["WIKI_TOKEN"]) == ("seen", "for tools")
    assert "JUDGE_API_KEY" not in environ
    assert "hush" not in call(tools["do"], what="open('/proc/self/environ').read()").text
    where = call(tools["do"], what="(open('left', 'w').write('x'), os.listdir(), os.getcwd())[1:]").text
    names, folder = eval(where)
    assert names == ["left"] and not Path(folder).exists()
    assert call(tools["do"], what="os.listdir()").text == "[]"


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("time.sleep(60)", "do did not return within 1 s"),
        ("ctypes.PyDLL(None).sleep(60)", "do did not return within 1 s"),  # holds the interpreter lock
        ("os._exit(7)", "do its process ended with exit code 7"),
        ("ctypes.string_at(0)", "do its process was ended by SIGSEGV"),
        ("os.kill(os.getpid(), 9)", "do its process was ended by SIGKILL"),
        ("len(bytearray(1 << 30))", "do raised MemoryError: "),
        ("'x' * (2 << 20)", "do returned 2097152 bytes, 1048576 is the most"),
    ],
)
def test_what_goes_wrong_crashes_its_own_call_and_the_next_one_is_made(tools: dict[str, Tool], what: str, told: str):
    started = time.monotonic()
    assert call(tools["do"], 1.0, what=what) == ToolReply(ToolOutcome.crashed, told)
    assert time.monotonic() - started < 10
    assert call(tools["do"], what="'well'").text == "well"


def test_a_hang_costs_no_call_beside_it_and_leaves_nothing(tools: dict[str, Tool]):
    async def run() -> list[ToolReply]:
        hang = "subprocess.Popen(['sleep', '61.5']).pid and time.sleep(60)"
        calls = [({"what": hang}, 1.0), ({"what": "'well'"}, 10.0), ({"what": "'also'"}, 10.0)]
        return await asyncio.gather(*(tools["do"].call(each, {}, limit_s) for each, limit_s in calls))

    hung, *others = asyncio.run(run())
    assert hung.outcome is ToolOutcome.crashed
    assert [each.text for each in others] == ["well", "also"]
    deadline = time.monotonic() + 10  # what was killed takes a moment to go
    while [each for each in commands() if "61.5" in each] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [each for each in commands() if "61.5" in each]


def commands() -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found.append((folder / "cmdline").read_text())
    return found


def test_a_wait_for_a_process_is_no_part_of_a_calls_time(tools: dict[str, Tool]):
    async def run() -> list[ToolReply]:
        return await asyncio.gather(*(tools["nap"].call({"seconds": 0.6}, {}, 1.5) for _ in range(6)))

    started = time.monotonic()
    assert [each.outcome for each in asyncio.run(run())] == [ToolOutcome.returned] * 6
    assert time.monotonic() - started > 1.8  # two at a time


def test_a_flood_of_output_is_dropped(tools: dict[str, Tool], capfd: pytest.CaptureFixture[str]):
    assert call(tools["do"], what="print('x' * (1 << 20), flush=True) or 'done'").text == "done"
    time.sleep(0.2)
    assert 0 < len(capfd.readouterr().err) < 100_000


def test_a_crash_ends_its_trajectory_by_the_worlds_fault(tools: dict[str, Tool]):
    env = ToolEnvironment(task(), byte_tokenizer(QWEN2), tools)
    text = '<tool_call>{"name": "do", "arguments": {"what": "os.abort()"}}</tool_call><|im_end|>'
    state = env.reset(Prompt(id="train/0", token_ids=(1,), question="q", answer="a"))
    turn = asyncio.run(env.act(state, encode(env.tokenizer, text), stopped=True))
    assert (turn.stop, turn.facts.tool, turn.facts.tool_ok) == (StopReason.tool_crashed, "do", None)
    assert turn.facts.error == "do its process was ended by SIGABRT"


def _state(pid: int) -> str:
    """One letter, Z for a process that ended and was not waited for; "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_processes_and_folders_end_with_the_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.txt").write_text("")
    (tmp_path / "mine.py").write_text(TOOLS)
    before = {each.name for each in Path(gettempdir()).glob("grove-tool-*")}
    tools = task_tools(task())
    pid = int(call(tools["do"], what="os.getpid()").text)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while _state(pid) not in ("Z", "") and time.monotonic() < deadline:
        time.sleep(0.01)
    again = int(call(tools["do"], what="os.getpid()").text)  # one that died between two calls costs neither
    assert again != pid
    del tools
    while _state(again) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert _state(again) == ""
    assert {each.name for each in Path(gettempdir()).glob("grove-tool-*")} - before == set()
