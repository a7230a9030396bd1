from __future__ import annotations

import re
import shlex
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import judge_server
import pytest
from judge_server import JudgeServer

from conf.subject import LEVELS
from rl.cli import main


def judged(messages: judge_server.Messages, body: Mapping[str, Any]) -> dict[str, Any]:
    """A reply of whatever form is asked for, that differs from one conversation to another."""
    text = messages[-1]["content"]
    name, kind = next(iter(body["response_format"]["json_schema"]["schema"]["properties"].items()))
    match name:
        case "better":
            return {name: kind["enum"][zlib.crc32(text.encode()) % 3]}
        case "scores":
            return {name: [number % 11 for number in range(len(re.findall("\u27e6answer", text)))]}
        case _:
            return {name: len(text) % 11}


@pytest.mark.slow
@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_a_new_reward_comes_with_a_test_that_passes_and_is_fit_for_a_run(
    level: str, model: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    name = f"mine_{level}_{model}".lower()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["new", "reward", name, "--level", level, *(["--model"] if model else [])]) == 0
    typed = capsys.readouterr().out.splitlines()[-1]
    assert typed.startswith(f"  grove check-reward {name}.py:{name}")
    assert pytest.main(["-q", "-p", "no:cacheprovider", f"test_{name}.py"]) == 0
    with JudgeServer(judged) as server:
        words = [f"{{url: {server.url}, path: judge}}" if word.startswith("{") else word for word in shlex.split(typed)]
        assert main(words[1:]) == 0
    shown = capsys.readouterr().out
    assert "fit for a run" in shown and "always" not in shown and " not applicable, " not in shown
    linter = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=120", "--select=E,F,B,UP", "."]
    assert subprocess.run(linter, check=False).returncode == 0


def test_a_new_reward_scores_steps_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "reward", "terseness"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  grove check-reward terseness.py:terseness"
    assert "def terseness(step, letters=20):" in (tmp_path / "terseness.py").read_text()


def test_a_name_that_hides_a_module_of_python_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "reward", "json"]) == 2
    assert '"json.py" would hide the module "json" of Python' in capsys.readouterr().err


def test_nothing_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_brief.py").write_text("mine")
    assert main(["new", "reward", "brief"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert not (tmp_path / "brief.py").exists()


@pytest.mark.parametrize("name", ["2brief", "my-reward", "class"])
def test_a_name_that_python_refuses_is_refused(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["new", "reward", name]) == 2
    assert f'"{name}" cannot be the name of a Python function' in capsys.readouterr().err
