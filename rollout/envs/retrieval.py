"""Retrieval as a tool: passages of a user's file, found by their words (BM25)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import ConfigError, DataError, ToolError
from conf.schema import CorpusConfig, TaskConfig

NAME = "rollout.envs.retrieval:search"
FORMAT = 1
"""Of the stored index; a new number makes old ones anew."""
WORD = r"(?u)\b\w+\b"
STOP_WORDS = "en"


def search(query: str, *, task: TaskConfig) -> str:
    """Search the collection for passages about something.

    Args:
        query: Words that the passages should contain.
    """
    found = _index(str(index_folder(task.corpus)), str(_file(task.corpus))).best(query, task.corpus.top_k)
    if not found:
        raise ToolError(f'no passage has a word of "{query}"; try other words')
    return "\n\n".join(f"[{rank}] {_shown(row, task.corpus)}" for rank, row in enumerate(found, start=1))


def _shown(row: dict[str, Any], corpus: CorpusConfig) -> str:
    text = str(row[corpus.text_column]).strip()
    if len(text) > corpus.max_passage_chars:
        text = text[: corpus.max_passage_chars].rstrip() + " ..."
    title = str(row.get(corpus.title_column) or "").strip() if corpus.title_column else ""
    return f"{title}\n{text}" if title else text


def prepare_tools(task: TaskConfig) -> None:
    """Build the index, once on each machine.

    Raises: ConfigError without a corpus; DataError for a line that is no passage, by its number.
    """
    if NAME not in task.tools:
        return
    if not task.corpus.path:
        raise ConfigError(
            f"task.tools names {NAME}, but task.corpus.path is empty: there is nothing to search. Give "
            "task.corpus.path=passages.jsonl, with one passage in each line."
        )
    build_index(task.corpus)


def _file(corpus: CorpusConfig) -> Path:
    return Path(corpus.path).expanduser().resolve()


def index_folder(corpus: CorpusConfig) -> Path:
    """Where the index of this file, as it is now, is or will be."""
    import bm25s

    path = _file(corpus)
    try:
        stat = path.stat()
    except OSError:
        raise DataError(
            f'task.corpus.path: there is no file "{path}". Give a path relative to the folder you start in.'
        ) from None
    told = [FORMAT, bm25s.__version__, str(path), stat.st_size, stat.st_mtime_ns, WORD, STOP_WORDS]
    told += [corpus.text_column, corpus.title_column, corpus.k1, corpus.b]
    key = hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()
    return Path(corpus.cache_dir).expanduser().resolve() / f"{path.stem}-{key}"


def build_index(corpus: CorpusConfig) -> Path:
    """The folder with the index, made if it is not there; of several processes one makes it and the others wait.

    Raises: DataError for a line that is no passage, by its number, or a file without any.
    """
    folder = index_folder(corpus)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed at it
            _write_index(corpus, partial)
            partial.rename(folder)
    return folder


def _write_index(corpus: CorpusConfig, folder: Path) -> None:
    import bm25s

    offsets: list[int] = []
    texts: list[str] = []
    for offset, row in _passages(_file(corpus), corpus):
        offsets.append(offset)
        title = row.get(corpus.title_column) or "" if corpus.title_column else ""
        texts.append(f"{title} {row[corpus.text_column]}")
    if not texts:
        raise DataError(f'task.corpus.path="{corpus.path}" holds no passages. Give a file with one in each line.')
    words = bm25s.tokenize(texts, token_pattern=WORD, stopwords=STOP_WORDS, show_progress=False)
    index = bm25s.BM25(k1=corpus.k1, b=corpus.b)
    index.index(words, show_progress=False)
    index.save(str(folder), show_progress=False)
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))


def _passages(path: Path, corpus: CorpusConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield offset, _passage(line, f"{path} line {number}", corpus)
            offset += len(line)


def _passage(line: bytes, place: str, corpus: CorpusConfig) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON ({error}): every line must be one JSON object.") from error
    if not isinstance(row, dict) or not isinstance(row.get(corpus.text_column), str):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f'{place} has no text in the column "{corpus.text_column}" (it has {has or "none"}): there is nothing to '
            "find or to show. Name the right column with task.corpus.text_column."
        )
    return row


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Index:
    """An index on disk; its arrays are mapped, so that the processes of a machine hold them once."""

    def __init__(self, folder: Path, passages: Path) -> None:
        import bm25s

        self._bm25 = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self._file = os.open(passages, os.O_RDONLY)

    def best(self, query: str, num: int) -> list[dict[str, Any]]:
        """The passages that fit best, best first; of equal ones those that stand first in the file."""
        import bm25s

        tokens = bm25s.tokenize(
            [query], token_pattern=WORD, stopwords=STOP_WORDS, return_ids=False, show_progress=False
        )[0]
        known = [str(word) for word in tokens if word in self._bm25.vocab_dict]
        if not known:
            return []
        scores = self._bm25.get_scores(known)
        num = min(num, len(scores))
        least = max(np.partition(scores, len(scores) - num)[len(scores) - num], np.finfo(np.float32).tiny)
        found = np.flatnonzero(scores >= least)
        order = np.lexsort((found, -scores[found]))[:num]
        return [self._row(int(found[place])) for place in order]

    def _row(self, number: int) -> dict[str, Any]:
        # pread has no position to share: threads read side by side.
        start, line = int(self._offsets[number]), b""
        while not line.endswith(b"\n") and (found := os.pread(self._file, 65_536, start + len(line))):
            line += found
            line = line[: line.find(b"\n") + 1] if b"\n" in line else line
        return json.loads(line)


@lru_cache(maxsize=4)
def _index(folder: str, passages: str) -> Index:
    return Index(Path(folder), Path(passages))
