"""Reading a file while another process writes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_S = 0.2
PIECE_BYTES = 2**16


def followed(path: Path, *, is_over: Callable[[], bool]) -> Iterator[str]:
    """What a file holds and then what is added to it, in pieces, until nothing more can come.

    Args:
        path: may not be there yet.
        is_over: whether the writer has ended; asked before the file is read to its end once more.
    """
    place, rest = 0, b""
    while True:
        over = is_over()
        piece = _read(path, place)
        if piece:
            place += len(piece)
            whole, rest = _split(rest + piece)
            yield whole.decode("utf-8", errors="replace")
        elif over:
            if rest:
                yield rest.decode("utf-8", errors="replace")
            return
        else:
            time.sleep(POLL_S)


def last_lines(path: Path, num: int) -> list[str]:
    """The last lines of a file; [] where there is none."""
    try:
        size = path.stat().st_size
    except OSError:
        return []
    tail = _read(path, max(0, size - PIECE_BYTES)).decode("utf-8", errors="replace")
    return tail.splitlines()[-num:]


def _read(path: Path, place: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(place)
            return file.read(PIECE_BYTES)
    except FileNotFoundError:
        return b""


def _split(text: bytes) -> tuple[bytes, bytes]:
    """Up to the last newline, and what follows: a letter may be half there."""
    end = text.rfind(b"\n") + 1
    return text[:end], text[end:]
