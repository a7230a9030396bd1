"""A file is read while it grows."""

from __future__ import annotations

from pathlib import Path

from rl.jobs.follow import followed, last_lines


def test_what_is_added_comes_until_the_writer_has_ended(tmp_path: Path):
    file, turns = tmp_path / "log", iter(["one\nhal", "f\ntwo \xe9\n", "last"])

    def writes_more() -> bool:
        piece = next(turns, None)
        if piece is not None:
            with file.open("a", encoding="utf-8") as log:
                log.write(piece)
        return piece is None

    assert "".join(followed(file, is_over=writes_more)) == "one\nhalf\ntwo \xe9\nlast"


def test_a_file_that_never_came_is_empty(tmp_path: Path):
    assert list(followed(tmp_path / "none", is_over=lambda: True)) == []
    assert last_lines(tmp_path / "none", 3) == []


def test_the_last_lines(tmp_path: Path):
    (tmp_path / "log").write_text("a\nb\nc\n")
    assert last_lines(tmp_path / "log", 2) == ["b", "c"]
