"""Files to start from: a reward with its test."""

from __future__ import annotations

import keyword
from pathlib import Path

from conf.errors import ConfigError

REWARD = '''"""A reward for `grove train`: docs/rewards.md has what a function may ask for and return."""


def {name}(step, question):
    """1 for a step no longer than the question, less for a longer one; nothing to say of a step that is no call."""
    if step.facts.tool_ok is None:
        return None
    return min(1.0, len(question) / max(1, len(step.action_text)))
'''

TEST = """from types import SimpleNamespace

from {module} import {name}


def a_step(text, tool_ok=True):
    return SimpleNamespace(action_text=text, facts=SimpleNamespace(tool_ok=tool_ok))


def test_a_short_call_earns_all_and_a_long_one_its_share():
    assert {name}(a_step("12345"), question="1234567890") == 1.0
    assert {name}(a_step("1" * 20), question="1234567890") == 0.5


def test_a_step_without_a_call_is_not_judged():
    assert {name}(a_step("42", tool_ok=None), question="6 * 7 ?") is None
"""


def new_reward(name: str, folder: Path) -> list[Path]:
    """Write NAME.py with a reward of that name, and test_NAME.py.

    Returns: the two files.
    Raises: ConfigError for a name that is none, or a file that is there already.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(
            f'"{name}" cannot be the name of a Python function. Use letters, digits and "_", as in brevity.'
        )
    files = {folder / f"{name}.py": REWARD, folder / f"test_{name}.py": TEST}
    for file in files:
        if file.exists():
            raise ConfigError(f'"{file}" is there already and is not written over. Give another name, or move it away.')
    for file, text in files.items():
        file.write_text(text.format(name=name, module=name), encoding="utf-8")
    return list(files)
