"""No setting without a reader: each is named by the code of a run, and the whole suite together reads every one.

The second half is kept by `tests/conftest.py`: when all tests are run, they note what is read (`conf.reads`), in every
process, and the session tells at its end which keys are missing; with GROVE_REQUIRE_KEYS=1 it then fails.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from key_reads import missing_keys
from test_layers import ROOT, sources, tree_of

from conf.keys import all_keys

LOOKING_ON = ("conf/schema.py", "conf/check", "conf/problem.py", "rl/dry_run/")
"""Code that goes over settings without using them."""


def names_read() -> set[str]:
    """Attributes that the code of a run takes of anything, and names that it asks for as text."""
    names: set[str] = set()
    for file in sources():
        if file.startswith(LOOKING_ON):
            continue
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                names |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    for template in (ROOT / "rl" / "jobs" / "templates").iterdir():
        names |= set(re.findall(r"\.(\w+)", template.read_text(encoding="utf-8")))
    return names


def test_every_setting_is_named_by_code_that_could_use_it():
    read = names_read()
    assert [key.name for key in all_keys() if key.name.rpartition(".")[2] not in read] == []


def test_a_setting_that_nothing_reads_would_be_found():
    assert "no_code_has_this_name" not in names_read()
    assert Path(ROOT, "conf/schema.py").is_file()


def test_the_sessions_reads_are_held_against_every_key(tmp_path: Path):
    everything = [key.name.replace("<name>", "mine") for key in all_keys()]
    (tmp_path / "keys.txt").write_text("\n".join(everything))
    assert missing_keys(tmp_path) == []
    (tmp_path / "keys.txt").write_text("\n".join(key for key in everything if key != "rewards.sources.mine.weight"))
    assert missing_keys(tmp_path) == ["rewards.sources.<name>.weight"]
    with (tmp_path / "keys.txt").open("a") as file:
        file.write("\nSourceConfig:weight\n")  # of a record that a test made itself
    assert missing_keys(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "is_whole"),
    [
        ([], True),
        (["-n", "auto", "--dist", "loadgroup"], True),
        (["tests"], True),
        (["tests/conf"], False),
        (["-m", "not slow"], False),
        (["-k", "compose"], False),
        (["--collect-only"], False),
        (["-x"], False),
    ],
)
def test_only_the_whole_suite_is_held_to_it(arguments: list[str], is_whole: bool, pytestconfig: pytest.Config):
    from key_reads import is_whole_suite

    parsed = pytestconfig._parser.parse_known_args(arguments)
    assert is_whole_suite(parsed) is is_whole
