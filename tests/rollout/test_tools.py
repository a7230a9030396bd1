from __future__ import annotations

import asyncio
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError, ToolError
from rollout.tools import ToolOutcome, load_tools, make_tool


def shop(item: str, count: int = 1, *, city: str, currency: str = "EUR") -> str:
    """Buy something.

    Args:
        item: What to buy.
        count: How many.
    """
    if item == "sword":
        raise ToolError("we sell no weapons")
    if item == "ghost":
        raise KeyError(item)
    return f"{count} {item} in {city} for {currency}"


def call(function: Any, arguments: dict[str, Any], data: dict[str, Any] | None = None, timeout_s: float = 5.0) -> Any:
    return asyncio.run(make_tool(function).call(arguments, data or {"city": "Rome"}, timeout_s))


def test_schema_tells_the_policy_what_it_may_fill_and_hides_keyword_only_parameters():
    schema = make_tool(shop).schema["function"]
    assert (schema["name"], schema["description"]) == ("shop", "Buy something.")
    assert schema["parameters"]["properties"] == {
        "item": {"type": "string", "description": "What to buy."},
        "count": {"type": "integer", "description": "How many."},
    }
    assert schema["parameters"]["required"] == ["item"]


def test_hidden_parameters_come_from_the_rows_columns():
    assert call(shop, {"item": "bread", "count": 2}).text == "2 bread in Rome for EUR"
    assert call(shop, {"item": "bread"}, {"city": "Oslo", "currency": "NOK"}).text == "1 bread in Oslo for NOK"


def test_a_missing_column_stops_the_run_and_names_the_nearest():
    with pytest.raises(ConfigError, match=r'shop has the keyword-only parameter "city".*Did you mean "citty"'):
        call(shop, {"item": "bread"}, {"citty": "Rome", "question": "?"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, 'shop needs the argument "item"'),
        ({"item": "bread", "size": 3}, 'shop has no argument "size", it takes item, count'),
        ({"item": "bread", "city": "Oslo"}, 'shop has no argument "city", it takes item, count'),
        ({"item": "bread", "count": "two"}, 'shop: "count" must be integer, not "two"'),
        ({"item": "bread", "count": True}, 'shop: "count" must be integer, not true'),
        ({"item": 7}, 'shop: "item" must be string, not 7'),
        ({"item": "sword"}, "we sell no weapons"),
    ],
)
def test_refusals_are_told_to_the_policy(arguments: dict[str, Any], message: str):
    reply = call(shop, arguments)
    assert (reply.outcome, reply.text) == (ToolOutcome.refused, message)


def test_any_other_exception_is_a_crash():
    reply = call(shop, {"item": "ghost"})
    assert (reply.outcome, reply.text) == (ToolOutcome.crashed, "shop raised KeyError: 'ghost'")


def test_a_tool_that_exits_the_process_only_crashes_itself():
    def leave() -> str:
        """Leave."""
        sys.exit(3)

    assert call(leave, {}).text == "leave raised RuntimeError: SystemExit: 3"


def test_a_plain_function_that_hangs_is_given_up_in_time():
    gate = threading.Event()

    def wait() -> str:
        """Wait."""
        gate.wait(30)
        return "done"

    started = time.monotonic()
    reply = call(wait, {}, timeout_s=0.05)
    gate.set()
    assert (reply.outcome, reply.text) == (ToolOutcome.crashed, "wait did not return within 0.05 s")
    assert time.monotonic() - started < 5


def test_an_async_function_that_hangs_is_cancelled():
    cancelled = []

    async def wait() -> str:
        """Wait."""
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return "done"

    async def run() -> Any:
        reply = await make_tool(wait).call({}, {}, 0.01)
        await asyncio.sleep(0)
        return reply

    assert asyncio.run(run()).outcome is ToolOutcome.crashed
    assert cancelled == [True]


def test_an_async_function_returns_and_a_timeout_of_its_own_is_named_as_such():
    async def add(a: int, b: int) -> int:
        """Add.

        Args:
            a: One.
            b: Other.
        """
        if a == b:
            raise TimeoutError("upstream")
        return a + b

    assert call(add, {"a": 1, "b": 2}).text == "3"
    assert call(add, {"a": 1, "b": 1}).text == "add raised TimeoutError: upstream"


def test_slow_calls_of_different_trees_wait_side_by_side():
    def nap() -> str:
        """Nap."""
        time.sleep(0.2)
        return "awake"

    async def run() -> list[Any]:
        tool = make_tool(nap)
        return await asyncio.gather(*(tool.call({}, {}, 5.0) for _ in range(20)))

    started = time.monotonic()
    assert [reply.text for reply in asyncio.run(run())] == ["awake"] * 20
    assert time.monotonic() - started < 2.0  # one after the other would take 4 s


def test_results_that_are_not_text_are_written_as_json():
    def table() -> dict[str, Any]:
        """Make a table."""
        return {"größe": [1, None, True], "at": Path("a")}

    assert call(table, {}).text == '{"größe": [1, null, true], "at": "a"}'


def test_words_fill_parameters_in_order_and_the_last_takes_the_rest():
    def office(relation: str, person: str) -> str:
        """Ask.

        Args:
            relation: A relation.
            person: A name.
        """
        return relation + person

    tool = make_tool(office)
    assert tool.arguments_from_words(["boss", "Anna", "Reed"]) == {"relation": "boss", "person": "Anna Reed"}
    assert tool.arguments_from_words(["boss"]) == {"relation": "boss"}
    assert tool.problem(tool.arguments_from_words(["boss"])) == 'office needs the argument "person"'


def test_words_become_numbers_where_the_parameter_is_one():
    tool = make_tool(shop)
    assert tool.arguments_from_words(["42", "3"]) == {"item": "42", "count": 3}
    assert tool.problem(tool.arguments_from_words(["bread", "three"])) == 'shop: "count" must be integer, not "three"'


def test_words_for_a_tool_without_parameters_are_refused():
    def ping() -> str:
        """Ping."""
        return "pong"

    tool = make_tool(ping)
    assert tool.problem(tool.arguments_from_words([])) == ""
    assert tool.problem(tool.arguments_from_words(["now"])) == 'ping has no argument "", it takes no arguments'


def pick(kind: Literal["a", "b"], sizes: list[int] | None = None, ratio: float | str = 0.5) -> str:
    """Pick.

    Args:
        kind: Which.
        sizes: How large.
        ratio: Share.
    """
    return f"{kind}{sizes}{ratio}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "a", "sizes": None, "ratio": 1}, ""),
        ({"kind": "b", "sizes": [1, 2], "ratio": "half"}, ""),
        ({"kind": "c"}, 'pick: "kind" must be one of "a", "b", not "c"'),
        ({"kind": "a", "sizes": [1, "x"]}, 'pick: "sizes" must be array, not [1, "x"]'),
        ({"kind": "a", "ratio": [1]}, 'pick: "ratio" must be number or string, not [1]'),
    ],
)
def test_choices_lists_and_unions_are_checked(arguments: dict[str, Any], message: str):
    assert make_tool(pick).problem(arguments) == message


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=5)


@given(st.dictionaries(st.sampled_from(["item", "count", "other"]), JSON))
def test_whatever_the_policy_writes_is_accepted_or_refused_and_never_crashes(arguments: dict[str, Any]):
    tool = make_tool(shop)
    accepted = isinstance(arguments.get("item"), str) and type(arguments.get("count", 1)) is int
    assert (tool.problem(arguments) == "") == (accepted and "other" not in arguments)


def no_docstring(item: str) -> str:
    return item


def no_type(item) -> str:
    """Do.

    Args:
        item: Which.
    """
    return item


def no_argument_line(item: str) -> str:
    """Do."""
    return item


def many(*items: str) -> str:
    """Do."""
    return str(items)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_docstring, "no_docstring cannot be described.*no docstring.*like:\ndef search"),
        (no_type, "no_type cannot be described.*missing a type hint"),
        (no_argument_line, "no description for the argument 'item'"),
        (many, r"many takes \*items: 'str'"),
        (Path, "is not a function"),
    ],
)
def test_a_function_that_cannot_be_described_says_what_to_add(function: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        make_tool(function)


def test_tools_are_loaded_from_files_by_name_and_names_must_differ(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(
        'def find(query: str) -> str:\n    """Find.\n\n    Args:\n        query: What.\n    """\n    return query\n'
    )
    tools = load_tools([f"{file}:find", "rollout.envs.hop_search:office"])
    assert list(tools) == ["find", "office"]
    assert asyncio.run(tools["find"].call({"query": "x"}, {}, 1.0)).text == "x"
    with pytest.raises(ConfigError, match=r"task.tools\[1\].*already a tool called find"):
        load_tools([f"{file}:find", f"{file}:find"])
