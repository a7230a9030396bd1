"""Programs as a tool: what the policy is told of them, and what they cannot do to us."""

from __future__ import annotations

import asyncio
import json
import textwrap
import time
from pathlib import Path

import pytest
from chatml import encode
from templates import QWEN2, byte_tokenizer

from conf.compose import compose
from conf.errors import ConfigError
from conf.schema import Isolation, PythonToolConfig, TaskConfig
from rollout import jail
from rollout.chat import build_environment
from rollout.data import build_prompt_source
from rollout.environment import Turn
from rollout.envs import python_tool
from rollout.envs.python_tool import NAME
from rollout.toolbox import task_tools
from rollout.tools import Tool, ToolOutcome, ToolReply
from rollout.types import StopReason


def tool(**settings: float) -> Tool:
    config = PythonToolConfig(**settings)  # type: ignore[arg-type]
    return task_tools(TaskConfig(tools=[NAME], python=config))["python"]


def run(code: str, **settings: float) -> ToolReply:
    return asyncio.run(tool(**settings).call({"code": textwrap.dedent(code)}, {}, 30.0))


@pytest.fixture(autouse=True)
def isolated(request: pytest.FixtureRequest) -> None:
    if "slow" in request.keywords and jail.isolation_problem():
        pytest.skip(f"no namespaces here: {jail.isolation_problem()}")


def test_a_machine_that_cannot_isolate_programs_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jail, "isolation_problem", lambda: "unshare: Operation not permitted")
    with pytest.raises(ConfigError, match=r"isolation=required, but this machine cannot .*unshare.*isolation=off"):
        tool()
    assert task_tools(TaskConfig(tools=[NAME], python=PythonToolConfig(isolation=Isolation.off)))


def test_a_jail_that_breaks_is_the_worlds_fault(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise jail.JailError("the jail could not be built")

    monkeypatch.setattr(python_tool, "run_python", broken)
    reply = asyncio.run(
        task_tools(TaskConfig(tools=[NAME], python=PythonToolConfig(isolation=Isolation.off)))["python"].call(
            {"code": ""}, {}, 5.0
        )
    )
    assert reply == ToolReply(ToolOutcome.crashed, "python raised JailError: the jail could not be built")


def test_the_policy_is_told_of_code_alone():
    python = task_tools(TaskConfig(tools=[NAME], python=PythonToolConfig(isolation=Isolation.off)))["python"]
    assert list(python.parameters) == ["code"]
    assert python.columns == ()


@pytest.mark.slow
def test_what_is_printed_is_the_result_and_nothing_is_kept_between_calls():
    assert run("import math\nprint(math.comb(5, 2))") == ToolReply(ToolOutcome.returned, "10")
    assert run("x = 1; open('x', 'w').write('1')").text == "(nothing was printed)"
    assert "NameError: name 'x' is not defined" in run("print(x)").text
    assert run("import os; print(os.listdir())").text == "['main.py']"


@pytest.mark.slow
def test_a_program_that_fails_is_a_refusal_with_its_traceback():
    reply = run("print('so far')\n1 / 0")
    assert reply.outcome is ToolOutcome.refused
    first, said, *_, last = reply.text.splitlines()
    assert (first, said) == ("the program ended with exit code 1", "so far")
    assert last == "ZeroDivisionError: division by zero"
    assert "SyntaxError" in run("def f(:").text


@pytest.mark.slow
def test_long_output_is_cut_in_the_middle():
    text = run("print('a' * 300 + 'b' * 300)", max_output_chars=100).text
    assert text == "a" * 50 + "\n... 500 characters left out ...\n" + "b" * 50
    both = run("print('a' * 300); raise ValueError('b' * 300)", max_output_chars=100).text
    assert both.count("characters left out") == 2 and len(both) < 250


HOSTILE = {
    "fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "fill the disk": "f = open('big', 'wb')\nwhile True: f.write(b'x' * 2**20); f.flush()",
    "many files": "i = 0\nwhile True:\n  open(str(i), 'w').write('x' * 4096); i += 1",
    "memory": "x = []\nwhile True: x.append(bytearray(2**24))",
    "flood": "while True: print('x' * 10000)",
    "spin": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "read our environment": "print(open('/proc/1/environ', 'rb').read())",
    "read our parent's environment": "import os; print(open(f'/proc/{os.getppid()}/environ', 'rb').read())",
    "kill the parent": "import os\nos.kill(os.getppid(), 9); os.kill(1, 9)\nraise SystemExit(9)",
    "kill everything": "import os; os.kill(-1, 9)\nraise SystemExit(9)",
    "network": "import socket; socket.create_connection(('1.1.1.1', 80), timeout=2)",
    "our own network": "import socket; socket.create_connection(('127.0.0.1', 22), timeout=2)",
    "passwords": "print(open('/etc/shadow').read())",
    "write to Python": "import os; open(os.__file__, 'a').write('x')",
    "recursion": "def f(): f()\nimport sys; sys.setrecursionlimit(10**9); f()",
    "daemon": "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(1000)\nraise SystemExit(9)",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_programs_are_refused_and_cost_nothing_else(what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_KEY", "hush-hush")
    started = time.monotonic()
    reply = run(HOSTILE[what], cpu_s=1.0, wall_s=2.0, memory_mib=128, disk_mib=4)
    assert reply.outcome is ToolOutcome.refused, reply
    assert reply.text.startswith("the program ") and "hush" not in reply.text
    assert time.monotonic() - started < 20
    assert run("print(1)").text == "1"


@pytest.mark.slow
def test_the_shipped_task_answers_a_word_problem_with_a_program(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Ann has 48 clips and 24 more. How many?", "answer": "48 + 24.\n#### 72"}))
    cfg = compose(["experiment=python", f"task.train.path={path}", f"task.eval.path={path}"])
    tokenizer = byte_tokenizer(QWEN2)
    (prompt,) = build_prompt_source(cfg, tokenizer).draw(0, 1)
    assert prompt.answer == "72" and "Run a Python program" in tokenizer.decode(prompt.token_ids)
    env = build_environment(cfg, tokenizer)
    call = '<tool_call>{"name": "python", "arguments": {"code": "x = 48\\nprint(x + 24)"}}</tool_call><|im_end|>'

    async def play() -> list[Turn]:
        first = await env.act(env.reset(prompt), encode(tokenizer, call), stopped=True)
        return [first, await env.act(first.state, encode(tokenizer, "So\n#### 72<|im_end|>"), stopped=True)]

    called, answered = asyncio.run(play())
    assert (called.facts.result, called.facts.tool_ok) == ("72", True)
    assert "<tool_response>\n72\n</tool_response>" in called.observation_text
    assert (answered.stop, answered.facts.answer) == (StopReason.answered, "So\n#### 72")
