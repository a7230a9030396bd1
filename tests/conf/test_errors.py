from __future__ import annotations

from conf.errors import first_line, last_line


def test_an_error_is_told_in_one_line_and_by_its_type_where_it_says_nothing():
    error = RuntimeError("\ngone\n  Traceback\nValueError: why\n")
    assert (first_line(error), last_line(error)) == ("gone", "ValueError: why")
    assert first_line(KeyboardInterrupt()) == last_line(KeyboardInterrupt()) == "KeyboardInterrupt"
