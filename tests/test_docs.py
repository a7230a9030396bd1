"""The documentation runs: its Python, its `grove config` lines, its make targets, commands and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rl.cli import main

ROOT = Path(__file__).parents[1]
GUIDES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, "AGENTS.md", "CONTRIBUTING.md", "CHANGELOG.md"]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```\s*$", re.MULTILINE | re.DOTALL
)
NOT_RUN = re.compile(r"<!-- not run: \S.*-->\s*$")
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
SHELL_ENDS_HERE = {"|", ">", ">>", "&&", ";", "||"}


@dataclass
class Block:
    """One fenced block of a page."""

    language: str
    body: str
    line: int
    """Line of the page that the body starts on, 1-based."""
    runs: bool
    """False when `<!-- not run: reason -->` stands before it."""


def blocks(text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        runs = NOT_RUN.search(text[: match.start()]) is None
        yield Block(match["language"], match["body"], line, runs)


def commands(text: str) -> Iterator[list[str]]:
    """Words of every command line in a page's shell blocks and code spans, continuation lines joined."""
    shell = [block.body for block in blocks(text) if block.language in {"bash", "sh", "console"}]
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text))
    for line in [*"".join(shell).replace("\\\n", " ").splitlines(), *spans]:
        if words := first_command(line.removeprefix("$ ")):
            yield words


def first_command(line: str) -> list[str]:
    """Words of a line up to a pipe or the like; empty for a line that no shell would take."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe in a code span
        return []
    end = next((index for index, word in enumerate(words) if word in SHELL_ENDS_HERE), len(words))
    return words[:end]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def run_block(block: Block, page: str, namespace: dict[str, object]) -> None:
    if block.language == "python":
        source = "\n" * (block.line - 1) + block.body  # so that a traceback names the line of the page
        exec(compile(source, str(ROOT / page), "exec"), namespace)
    elif block.language == "bash":
        for line in block.body.replace("\\\n", " ").splitlines():
            if (words := first_command(line))[:2] == ["grove", "config"]:
                assert main(words[1:]) == 0, f"{page}: `{line}` failed"


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES)
def test_what_a_guide_shows_works_when_read_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "guide"}
    for block in blocks(read(page)):
        if block.runs:
            run_block(block, page, namespace)


def make_targets() -> set[str]:
    lines = re.findall(r"^([a-z][a-z -]*):(?!=)", read("Makefile"), re.MULTILINE)
    return {target for line in lines for target in line.split()}


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_a_page_names_exists(page: str):
    named = {word for words in commands(read(page)) if words[0] == "make" for word in words[1:] if "=" not in word}
    assert named <= make_targets()


def help_status(name: str) -> object:
    try:
        return main([name, "--help"])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("page", PAGES)
def test_every_grove_command_a_page_names_exists(page: str):
    named = {words[1] for words in commands(read(page)) if Path(words[0]).name == "grove" and len(words) > 1}
    assert {name for name in named if not name.startswith("-") and help_status(name) not in (0, None)} == set()


def anchors(text: str) -> set[str]:
    """What a link may point at within a page: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_inside_the_repository_leads_somewhere(page: str):
    for target in LINK.findall(FENCE.sub("", read(page))):
        if "://" in target or target.startswith("mailto:"):
            continue
        place, _, anchor = target.partition("#")
        file = (ROOT / page).parent / place if place else ROOT / page
        assert file.exists(), f"{page} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), (
            f"{page}: {target} has no such heading"
        )


def test_a_block_marked_not_run_is_not_run_and_line_numbers_are_the_pages():
    page = "# t\n\n```python\na = 1\n```\n\n<!-- not run: needs a GPU -->\n```python\nb = 1\n```\n"
    first, second = blocks(page)
    assert (first.body, first.line, first.runs) == ("a = 1\n", 4, True)
    assert (second.body, second.line, second.runs) == ("b = 1\n", 9, False)


def test_commands_are_found_in_shell_blocks_and_code_spans_and_end_at_a_pipe():
    page = (
        "Run `make demo SEED=1` or\n```bash\ngrove config \\\n  seed=1 | head  # top\n```\n```python\nmake = 1\n```\n"
    )
    assert list(commands(page)) == [["grove", "config", "seed=1"], ["make", "demo", "SEED=1"]]
