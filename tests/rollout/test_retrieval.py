"""Retrieval as a tool: a user's passages, indexed once and found by their words."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from pathlib import Path

import pytest

from conf.errors import ConfigError, DataError
from conf.schema import CorpusConfig, TaskConfig
from rollout.envs import retrieval
from rollout.envs.retrieval import NAME, build_index
from rollout.toolbox import task_tools
from rollout.tools import ToolOutcome, ToolReply

PASSAGES = [
    {"title": "Oak", "text": "The oak is a tree that bears acorns."},
    {"title": "Pine", "text": "The pine is a tree that keeps its needles in winter."},
    {"title": "Graph", "text": "In mathematics a tree is a graph without cycles."},
    {"title": "", "text": "Zürich liegt am See."},
]


def corpus(folder: Path, rows: list[dict[str, str]] | None = None, **settings: object) -> CorpusConfig:
    path = folder / "passages.jsonl"
    if not path.exists():
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows or PASSAGES), encoding="utf-8")
    return CorpusConfig(path=str(path), cache_dir=str(folder / "cache"), **settings)  # type: ignore[arg-type]


def find(config: CorpusConfig, query: str) -> ToolReply:
    tool = task_tools(TaskConfig(tools=[NAME], corpus=config))["search"]
    assert list(tool.parameters) == ["query"]
    return asyncio.run(tool.call({"query": query}, {}, 30.0))


def test_the_best_passages_come_first(tmp_path: Path):
    text = find(corpus(tmp_path, top_k=2), "trees with acorns, an oak tree").text
    assert text.startswith("[1] Oak\nThe oak is a tree that bears acorns.\n\n[2] ")
    assert find(corpus(tmp_path), "zürich").text == "[1] Zürich liegt am See."  # no title; the others have no such word


def test_of_equal_passages_those_that_stand_first_are_shown(tmp_path: Path):
    same = [{"title": str(number), "text": "all the same words"} for number in range(9)]
    assert find(corpus(tmp_path, same, top_k=3), "same").text.count("all the same") == 3
    assert [line[4:] for line in find(corpus(tmp_path, top_k=3), "same").text.splitlines()[::3]] == ["0", "1", "2"]


def test_a_query_that_finds_nothing_is_told(tmp_path: Path):
    for query in ("quasar", "", "the of and"):
        reply = find(corpus(tmp_path), query)
        assert reply == ToolReply(ToolOutcome.refused, f'no passage has a word of "{query}"; try other words')


def test_more_passages_than_there_are_and_long_ones(tmp_path: Path):
    assert find(corpus(tmp_path, top_k=50), "tree").text.count("tree") == 3
    assert find(corpus(tmp_path, top_k=1, max_passage_chars=7), "acorns").text == "[1] Oak\nThe oak ..."
    long = [{"title": "Long", "text": "word " * 50_000 + "end"}, *PASSAGES]  # longer than one read
    (tmp_path / "passages.jsonl").unlink()
    assert find(corpus(tmp_path, long, max_passage_chars=10**6, top_k=1), "end").text.endswith(" end")


def test_the_index_is_made_once_and_anew_when_the_file_or_a_setting_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[Path] = []
    write = retrieval._write_index
    monkeypatch.setattr(retrieval, "_write_index", lambda config, path: (made.append(path), write(config, path)))
    config = corpus(tmp_path)
    first = build_index(config)
    assert (build_index(config), len(made)) == (first, 1)
    assert build_index(corpus(tmp_path, k1=0.9)) != first
    Path(config.path).write_text(json.dumps({"text": "something else"}) + "\n")
    assert build_index(config) != first and len(made) == 3
    assert find(config, "else").text == "[1] something else"


@pytest.mark.slow
def test_processes_that_start_together_make_one_index(tmp_path: Path):
    config = corpus(tmp_path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(build_index, [config] * 4))) == 1
    assert [each.suffix for each in (tmp_path / "cache").iterdir() if each.suffix != ".lock"] == [""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "passages.jsonl line 2 is not JSON"),
        ("[1]", r'line 2 has no text in the column "text" \(it has list\)'),
        ('{"body": "x"}', r'line 2 has no text in the column "text" \(it has body\).*task.corpus.text_column'),
    ],
)
def test_a_line_that_is_no_passage_is_named(tmp_path: Path, line: str, message: str):
    (tmp_path / "passages.jsonl").write_text(json.dumps(PASSAGES[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        find(corpus(tmp_path), "x")
    assert not list((tmp_path / "cache").glob("*/offsets.npy"))


def test_a_corpus_that_is_not_there_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"task.corpus.path is empty: there is nothing to search"):
        find(CorpusConfig(), "x")
    with pytest.raises(DataError, match=r'there is no file ".*nowhere.jsonl"'):
        find(CorpusConfig(path=str(tmp_path / "nowhere.jsonl")), "x")
    (tmp_path / "passages.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no passages"):
        find(corpus(tmp_path), "x")


def test_seven_thousand_questions_are_found_by_their_words(tmp_path: Path, shared_data: Path):
    rows = json.loads((shared_data / "hotpotqa" / "dev.json").read_text(encoding="utf-8"))
    config = corpus(tmp_path, [{"title": "", "text": row["question"]} for row in rows], top_k=1)
    asked = rows[:200]
    hits = sum(find(config, row["question"]).text == f"[1] {row['question'].strip()}" for row in asked)
    assert hits == 200
