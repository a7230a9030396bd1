"""docs/new_method.md, followed word by word: its files are written, its test run, its recipe composed and replayed."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from test_docs import blocks, commands, read

from conf.checks import problems
from conf.compose import compose
from rewards.drawn import parse_scored
from rl.cli import main
from rl.credit.assign import assign
from rl.credit.forest import forest_of
from rl.credited import credited
from rl.record import write_records
from rl.run_folder import open_run_folder
from rl.run_folder import settings as plain
from rl.shares import recorded_trees, shares_of

pytestmark = pytest.mark.slow

PAGE = "docs/new_method.md"
OVERRIDES = ["experiment=hop_search", "credit=shrunk"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the page's reader works, with the page's files in it."""
    for name, text in files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def files() -> dict[str, str]:
    """The page's blocks by the name in their first line."""
    bodies = [block.body for block in blocks(read(PAGE)) if block.body.startswith("# ")]
    return {body.splitlines()[0].removeprefix("# "): body for body in bodies}


def test_the_method_takes_less_than_40_lines():
    lines = [line for text in files().values() for line in text.splitlines()[1:] if line.strip()]
    assert len(files()) == 3
    assert len(lines) < 40


def test_the_pages_own_test_passes(folder: Path):
    tests = {name: test for name, test in runpy.run_path("test_my_credit.py").items() if name.startswith("test_")}
    assert len(tests) == 1
    for test in tests.values():
        test()


def test_the_recipe_is_composed_checked_and_gives_credit(folder: Path):
    cfg = compose(OVERRIDES, "my_conf")
    assert [problem.text for problem in problems(cfg) if problem.fatal] == []
    tree = parse_scored("q -> (a -> (a1, a2), b)", outcomes={"a1": 1, "a2": 1, "b": 0})
    credit = assign(forest_of([tree]), cfg.credit, cfg.rollout.max_steps)
    assert credit.advantage_N.tolist() == pytest.approx([1 / 6, 1 / 18, 1 / 18, -2 / 9])
    stronger = compose([*OVERRIDES, "credit.terms.gain.args.prior=1e9"], "my_conf")
    assert assign(forest_of([tree]), stronger.credit, 4).advantage_N.tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)


def test_a_run_is_replayed_by_the_pages_command(folder: Path, capsys: pytest.CaptureFixture[str]):
    replayed = [words[1:] for words in commands(read(PAGE)) if words[:2] == ["grove", "replay"]]
    assert len(replayed) == 1
    make_run(Path(replayed[0][1]))
    assert main(replayed[0]) == 0
    assert "sign flips" in capsys.readouterr().out


def make_run(path: Path) -> None:
    cfg = compose(["experiment=hop_search"])
    scored = parse_scored(
        "q -> (a -> (a1, a2), b -> (b1, b2))",
        steps={"a": 1.0, "a1": 1.0, "a2": 0.0, "b": 0.0, "b1": 0.5, "b2": 0.0},
        outcomes={"a1": 1.0, "a2": 0.0, "b1": 0.0, "b2": 0.0},
    )
    scored.step_scores = {"progress": scored.step_scores["step"]}
    scored.leaf_scores = {"answer": scored.leaf_scores["outcome"]}
    found = credited([scored], cfg)
    folder = open_run_folder(path, plain(cfg))
    write_records(folder.tree_file(1), recorded_trees([scored], found, shares_of(found, cfg)))
