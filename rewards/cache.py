"""Scores kept by the content they were given for, in a SQLite file that outlives the run."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
from collections.abc import Collection, Mapping
from pathlib import Path

from rewards.types import BROKEN, Score, ScoreStatus

logger = logging.getLogger(__name__)

WAIT_S = 30.0
"""Longest wait for another run that writes to the same file."""
MAX_NAMES = 500
"""Names in one query; SQLite takes 999 on old systems."""


class ScoreCache:
    """Name of a call's content -> what was said of its rows. Broken scores are never kept: they are asked again."""

    def __init__(self, path: Path | None = None) -> None:
        """Open a file, or keep all in memory where there is none."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(path or ":memory:", timeout=WAIT_S, check_same_thread=False, isolation_level=None)
        self._file.execute("PRAGMA journal_mode=WAL")
        self._file.execute("PRAGMA synchronous=NORMAL")  # a lost tail costs a question, not a score
        self._file.execute("CREATE TABLE IF NOT EXISTS scores (name TEXT PRIMARY KEY, said TEXT) WITHOUT ROWID")

    def found(self, names: Collection[str]) -> dict[str, list[Score]]:
        """What is kept of these names."""
        wanted, kept = list(names), {}
        for start in range(0, len(wanted), MAX_NAMES):
            part = wanted[start : start + MAX_NAMES]
            marks = ",".join("?" * len(part))
            kept |= dict(self._file.execute(f"SELECT name, said FROM scores WHERE name IN ({marks})", part).fetchall())
        return {name: [_score(each) for each in json.loads(said)] for name, said in kept.items()}

    def keep(self, answers: Mapping[str, list[Score]]) -> None:
        """Add what was said, but for answers with a broken score. A file that takes nothing, on a full disk, is logged:
        these questions will be asked again."""
        rows = [
            (name, json.dumps([_row(score) for score in scores]))
            for name, scores in answers.items()
            if not any(score.status in BROKEN for score in scores)
        ]
        if not rows:
            return
        try:
            self._file.execute("BEGIN")
            self._file.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
            self._file.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")
            logger.warning("%d scores could not be kept (%s): they will be asked for again", len(rows), error)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _row(score: Score) -> list:
    return [score.value if score.is_scored else None, score.status, score.reason, dict(score.parts)]


def _score(row: list) -> Score:
    value, status, reason, parts = row
    return Score(math.nan if value is None else value, ScoreStatus(status), reason, parts)
