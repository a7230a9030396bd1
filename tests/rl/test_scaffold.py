from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from rl.cli import main


def test_a_new_reward_comes_with_a_test_that_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["new", "reward", "terseness"]) == 0
    assert "grove check-reward terseness.py:terseness" in capsys.readouterr().out
    tests = {name: test for name, test in runpy.run_path("test_terseness.py").items() if name.startswith("test_")}
    assert len(tests) == 2
    for test in tests.values():
        test()
    assert main(["check-reward", "terseness.py:terseness"]) == 0


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
