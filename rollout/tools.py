"""Tools: plain typed Python functions that the policy may call.

    def office(relation: str, person: str, *, world: str) -> str:
        '''Ask the office who stands in a relation to a person.

        Args:
            relation: One relation, such as boss or friend.
            person: First and last name of the person asked about.
        '''

The policy is told of `relation` and `person`. Keyword-only parameters are hidden from it: each is filled from the
column of that name in the prompt's row, or, where its type is TaskConfig, with the task's settings.

A module may define `prepare_tools(task: TaskConfig)`: it is called once when its tools are loaded, to look at the
settings and to build what they need.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import queue
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from typing import Any, ClassVar, get_type_hints

from conf.errors import ConfigError, ToolError
from conf.plugin import load_object
from conf.schema import TaskConfig
from rollout.apart import CallFailed, as_text

EXAMPLE = (
    "def search(query: str) -> str:\n"
    '    """Find pages about something.\n\n    Args:\n        query: What to look for.\n    """'
)
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
    "null": (type(None),),
}


class ToolOutcome(Enum):
    """How a call ended."""

    returned = "returned"
    refused = "refused"
    """The arguments or the tool said no; the policy is told and goes on."""
    crashed = "crashed"
    """The tool raised what it did not mean to, or took too long: the world's fault, not the policy's."""


@dataclass(frozen=True, slots=True)
class ToolReply:
    """What a call came to."""

    outcome: ToolOutcome
    text: str
    """The result, the refusal, or why it crashed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function with the JSON schema that chat templates show to the policy."""

    name: str
    schema: dict[str, Any]
    """{"type": "function", "function": {"name", "description", "parameters"}}."""
    function: Callable[..., Any]
    columns: tuple[str, ...]
    """Keyword-only parameters, filled from the row."""
    optional_columns: frozenset[str]
    """Those of `columns` that have a default and may be missing from a row."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword-only parameters that are filled with the task's settings."""
    runner: Callable[[dict[str, Any], float], Awaitable[Any]] | None = None
    """What makes the call, from arguments and time limit, where that is not done here: in a process, or on a server.
    It keeps the limit itself and raises as a function would."""

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """JSON schema of each parameter the policy fills, in order."""
        return self.schema["function"]["parameters"]["properties"]

    @property
    def required(self) -> list[str]:
        """Parameters without a default."""
        return self.schema["function"]["parameters"].get("required", [])

    def arguments_from_words(self, words: Sequence[str]) -> dict[str, Any]:
        """Arguments by position, one word each; the last parameter takes all that is left.

        Words beyond a tool without parameters come back under the name "" and are refused like any unknown argument.
        """
        names = list(self.parameters)
        if not names:
            return {"": " ".join(words)} if words else {}
        head, rest = list(words[: len(names) - 1]), words[len(names) - 1 :]
        values = head + ([" ".join(rest)] if rest else [])
        return {name: _from_word(value, self.parameters[name]) for name, value in zip(names, values, strict=False)}

    def problem(self, arguments: Mapping[str, Any]) -> str:
        """Why these arguments cannot be used, for the policy; "" when they can."""
        unknown = [name for name in arguments if name not in self.parameters]
        if unknown:
            known = ", ".join(self.parameters) or "no arguments"
            near = get_close_matches(unknown[0], self.parameters, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f'{self.name} has no argument "{unknown[0]}", it takes {known}{hint}'
        missing = [name for name in self.required if name not in arguments]
        if missing:
            return f'{self.name} needs the argument "{missing[0]}"'
        for name, value in arguments.items():
            if not _fits(value, self.parameters[name]):
                wanted = _type_name(self.parameters[name])
                return f'{self.name}: "{name}" must be {wanted}, not {json.dumps(value, default=str)}'
        return ""

    async def call(self, arguments: Mapping[str, Any], data: Mapping[str, Any], timeout_s: float) -> ToolReply:
        """Check the arguments, run the function, and tell a refusal from a crash.

        A plain function runs in a thread, so that one slow call neither holds up the other trees nor the
        time limit. A thread cannot be killed: a call that hangs is given up after `timeout_s`, and its thread lives on,
        without any effect on the tree, until it returns or the process ends. A function that never releases the
        interpreter lock holds up everything. An `async` function runs on the event loop and is cancelled.

        Args:
            arguments: by parameter name, as the policy wrote them.
            data: columns of the prompt's row.
            timeout_s: longest wait, in seconds.
        Raises: ConfigError when the row lacks a column that the tool needs.
        """
        hidden = self.hidden_arguments(data)
        problem = self.problem(arguments)
        if problem:
            return ToolReply(ToolOutcome.refused, problem)
        filled = {**arguments, **hidden, **self.settings}
        try:
            result = await self._run(filled, timeout_s)
            return ToolReply(ToolOutcome.returned, as_text(result))
        except ToolError as error:
            return ToolReply(ToolOutcome.refused, str(error))
        except CallFailed as error:
            return ToolReply(ToolOutcome.crashed, f"{self.name} {error}")
        except TimeUpError:
            return ToolReply(ToolOutcome.crashed, f"{self.name} did not return within {timeout_s:g} s")
        except Exception as error:
            return ToolReply(ToolOutcome.crashed, f"{self.name} raised {type(error).__name__}: {error}")

    async def _run(self, arguments: dict[str, Any], timeout_s: float) -> Any:
        if self.runner is not None:
            return await self.runner(arguments, timeout_s)
        run = _run_async if inspect.iscoroutinefunction(self.function) else run_in_thread
        return await run(self.function, arguments, timeout_s)

    def hidden_arguments(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword-only arguments, from the row's columns.

        Raises: ConfigError naming the first column that the row lacks.
        """
        for name in self.columns:
            if name not in data and name not in self.optional_columns:
                near = get_close_matches(name, list(data), n=1)
                hint = f' Did you mean "{near[0]}"?' if near else ""
                raise ConfigError(
                    f'The tool {self.name} has the keyword-only parameter "{name}", which is filled from the column '
                    f"of that name, but the row has only {', '.join(data) or 'no columns'}.{hint} Add the column to "
                    "the data, give the parameter a default, or move it before the * so that the policy fills it."
                )
        return {name: data[name] for name in self.columns if name in data}


async def run_apart(call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Wait for a blocking call that keeps its own time limit, without holding up the event loop."""
    return await run_in_thread(call, arguments, None)


class TimeUpError(Exception):
    """Our own limit passed, as opposed to a TimeoutError that the tool raised."""


async def _run_async(function: Callable[..., Any], arguments: dict[str, Any], timeout_s: float) -> Any:
    task = asyncio.ensure_future(function(**arguments))
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
    finally:
        task.cancel()  # does nothing to a finished task; a tool that swallows it is left behind, not waited for
    if not done:
        raise TimeUpError
    return task.result()


class _ToolThread:
    """Makes one call at a time and is then used again: to start a thread for each call would cost more than the call.

    One whose call hangs is left behind and never handed out, so hung calls cannot fill up a pool; daemons do not keep
    the interpreter from exiting.
    """

    idle: ClassVar[deque[_ToolThread]] = deque()

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="tool", daemon=True).start()

    def make(self, call: Callable[[], None]) -> None:
        """Make `call`, then be idle."""
        self._calls.put(call)

    def _run(self) -> None:
        while True:
            self._calls.get()()
            self.idle.append(self)


def idle_thread() -> _ToolThread:
    """A thread that waits for work, a new one where none does."""
    try:
        return _ToolThread.idle.pop()
    except IndexError:
        return _ToolThread()


async def run_in_thread(function: Callable[..., Any], arguments: dict[str, Any], timeout_s: float | None) -> Any:
    """What a plain function returns, called on a thread that is left behind where it takes too long.

    Raises: TimeUpError past `timeout_s` (None for no limit); whatever the function raises.
    """
    loop = asyncio.get_running_loop()
    finished: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def settle(outcome: tuple[Any, BaseException | None]) -> None:
        if not finished.done():
            finished.set_result(outcome)

    def work() -> None:
        try:
            outcome = (function(**arguments), None)
        except BaseException as error:  # sys.exit() in a tool is a crash of that tool, not the end of the worker
            outcome = (None, error)
        with suppress(RuntimeError):  # the loop was closed while the call hung: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    idle_thread().make(work)
    done, _ = await asyncio.wait({finished}, timeout=timeout_s)
    if not done:
        raise TimeUpError
    result, error = finished.result()
    if isinstance(error, Exception):
        raise error
    if error is not None:
        raise RuntimeError(f"{type(error).__name__}: {error}")
    return result


def _from_word(word: str, schema: Mapping[str, Any]) -> Any:
    if _fits(word, schema):
        return word
    with suppress(ValueError):
        return json.loads(word)
    return word


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    if value is None and schema.get("nullable"):
        return True
    if "anyOf" in schema:
        return any(_fits(value, option) for option in schema["anyOf"])
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = schema.get("type")
    if kinds is None:
        return True
    if not any(_is_kind(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    items = schema.get("items")
    return not (items and isinstance(value, list)) or all(_fits(item, items) for item in value)


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):  # a bool is an int to Python, not to JSON
        return kind == "boolean"
    return isinstance(value, JSON_TYPES.get(kind, (object,)))


def _type_name(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type_name(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(choice) for choice in schema["enum"])
    kinds = schema["type"]
    return kinds if isinstance(kinds, str) else " or ".join(kinds)


def make_tool(function: Callable[..., Any], task: TaskConfig | None = None) -> Tool:
    """Read name, description and parameters from the function's signature and docstring.

    Args:
        function: what the policy calls.
        task: for the parameters that ask for settings; the defaults when it is not given.
    Raises: ConfigError saying what the signature or the docstring lacks.
    """
    if not inspect.isfunction(function):
        raise ConfigError(
            f"task.tools: {function!r} is not a function, so it has no parameters to tell the policy about. Name a "
            f"function like:\n{EXAMPLE}"
        )
    told: list[inspect.Parameter] = []
    hidden: list[inspect.Parameter] = []
    settings: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(
                f"task.tools: {function.__name__} takes {parameter}, which the policy cannot fill by name. Give each "
                "parameter its own name and type."
            )
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.annotation in (TaskConfig, "TaskConfig"):
            settings[parameter.name] = task or TaskConfig()
        else:
            (hidden if parameter.kind is parameter.KEYWORD_ONLY else told).append(parameter)
    return Tool(
        name=function.__name__,
        schema=_schema(function, told),
        function=function,
        columns=tuple(parameter.name for parameter in hidden),
        optional_columns=frozenset(each.name for each in hidden if each.default is not each.empty),
        settings=settings,
    )


def _schema(function: Callable[..., Any], told: list[inspect.Parameter]) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import get_json_schema

    def stub() -> None: ...

    # transformers describes every parameter it sees: it is shown a signature without the hidden ones.
    stub.__name__, stub.__doc__ = function.__name__, function.__doc__
    stub.__signature__ = inspect.Signature(told)  # type: ignore[attr-defined]
    try:
        hints = get_type_hints(function)
        stub.__annotations__ = {each.name: hints[each.name] for each in told if each.name in hints}
        return get_json_schema(stub)
    except Exception as error:  # it raises classes of its own that it does not export, and NameError for a lost type
        raise ConfigError(
            f"task.tools: {function.__name__} cannot be described to the policy ({error}). Give every parameter a "
            f"type and a line under Args in the docstring, like:\n{EXAMPLE}"
        ) from error


def load_tools(specs: Sequence[str], task: TaskConfig | None = None) -> dict[str, Tool]:
    """The tools that `task.tools` names, by name.

    Args:
        specs: "file.py:function" or "package.module:function".
        task: its settings; with them, the modules' `prepare_tools` are called.
    Raises: ConfigError for a spec that names nothing, a function that cannot be described, or a name used twice.
    """
    tools: dict[str, Tool] = {}
    for number, spec in enumerate(specs):
        function = load_object(spec, key=f"task.tools[{number}]")
        tool = make_tool(function, task)
        prepare = getattr(inspect.getmodule(function), "prepare_tools", None)
        if task is not None and prepare is not None:
            prepare(task)
        if tool.name in tools:
            raise ConfigError(
                f'task.tools[{number}]="{spec}": there is already a tool called {tool.name}, and the policy calls '
                "tools by name. Rename one of the two functions."
            )
        tools[tool.name] = tool
    return tools
