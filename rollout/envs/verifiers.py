"""Tasksets of the package verifiers (0.4, `verifiers.v1`): its tasks ask, its toolsets answer, its rewards score.

What is supported is what needs no box of its own: tasks of one prompt, tools that are methods of a `Toolset`, rewards
and metrics that read the trace. Harnesses, containers and several agents are the package's own way to roll out.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, cast

from conf.errors import ConfigError, DataError, ToolError
from conf.plugin import load_object
from conf.schema import VerifiersConfig
from rollout.envs.optional import import_optional
from rollout.turns import Call, parse_hermes
from rollout.types import Prompt
from rollout.world import Fork, Observed

MAX_TASKS = 10_000
"""Tasks taken of a taskset without end."""
TOOLS_TOLD = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@lru_cache(maxsize=8)
def _tasks(spec: str, args: str) -> tuple[Any, list[Any]]:
    """A taskset and its tasks, each checked.

    Raises: ConfigError for what is no taskset, or needs more than is supported.
    """
    v1 = import_optional("verifiers.v1")
    made: Any = load_object(spec, key="task.verifiers.taskset")
    if not (inspect.isclass(made) and issubclass(made, v1.Taskset)):
        raise ConfigError(f'task.verifiers.taskset="{spec}" is no subclass of verifiers.v1.Taskset. Name its class.')
    generic = import_optional("verifiers.v1.utils.generic")
    config_type = generic.concrete_type(made, v1.TasksetConfig) or v1.TasksetConfig
    try:
        taskset: Any = cast("Any", made)(config_type(**json.loads(args)))
        tasks = list(taskset if taskset.bounded else islice(taskset, MAX_TASKS))
    except Exception as error:
        raise ConfigError(
            f'task.verifiers.taskset="{spec}" with the arguments {args} could not be loaded '
            f"({type(error).__name__}: {error})."
        ) from error
    for task in tasks[:1]:
        _require_supported(v1, task, spec)
    return taskset, tasks


def _require_supported(v1: Any, task: Any, spec: str) -> None:
    needs = [f"a {name}() of its own" for name in ("setup", "finalize") if _overrides(v1.Task, task, name)]
    if type(task).NEEDS_CONTAINER or task.data.image:
        needs.append("a container")
    for kind in ("reward", "metric"):
        for hook in task.hooks(kind):
            parameter = inspect.signature(hook).parameters.get("runtime")
            if parameter is not None and parameter.default is parameter.empty:
                needs.append(f"a runtime for its {kind} {hook.__name__}")
    if needs:
        raise ConfigError(
            f'task.verifiers.taskset="{spec}" needs {", ".join(needs)}, which only the package\'s own rollouts have. '
            "Here a task may have a prompt, toolsets, and rewards that read the trace."
        )


def _overrides(base: type, task: Any, name: str) -> bool:
    return getattr(type(task), name) is not getattr(base, name)


@dataclass
class _Session:
    """One task under way, in the package's own terms."""

    task: Any
    trace: Any
    tools: Mapping[str, Callable[..., Any]]
    num_calls: int = 0
    messages: list[Any] = field(default_factory=list)


def _toolsets(taskset: Any, task: Any) -> list[Any]:
    return [*type(taskset).toolsets(taskset.config), *type(task).toolsets(task.config)]


def _tools_of(toolsets: list[Any]) -> dict[str, Callable[..., Any]]:
    """Methods of toolsets by the name that the package tells the policy."""
    decorated = import_optional("verifiers.v1.utils.decorators").discover_decorated
    tools: dict[str, Callable[..., Any]] = {}
    for toolset in toolsets:
        prefix = f"{toolset.server_name}_" if toolset.server_name else ""
        for method in decorated(toolset, "tool"):
            tools[prefix + (getattr(method, "tool_name", None) or method.__name__)] = method
    return tools


def _schema(name: str, method: Callable[..., Any]) -> dict[str, Any]:
    parameters = import_optional("pydantic").TypeAdapter(method).json_schema()
    parameters.pop("additionalProperties", None)
    told = {"name": name, "description": inspect.cleandoc(method.__doc__ or ""), "parameters": parameters}
    return {"type": "function", "function": told}


def _question(taskset: Any, task: Any, place: str) -> str:
    """What the policy is asked: the task's prompt, behind its system prompt, before its tools.

    Raises: DataError for a task that opens otherwise than with text of the user.
    """
    data = task.data
    roles = [] if data.prompt is None or isinstance(data.prompt, str) else [each.role for each in data.prompt]
    if not data.prompt_text.strip() or any(role not in ("user", "system") for role in roles):
        raise DataError(
            f"{place}: a task must open with a user's text, and this one has the roles {roles or 'none'}. Leave it out "
            "of the taskset."
        )
    parts = [data.system_prompt, data.prompt_text] if data.system_prompt else [data.prompt_text]
    tools = _tools_of(_toolsets(taskset, task))
    told = "\n".join(json.dumps(_schema(name, method)) for name, method in tools.items())
    return "\n\n".join(parts) + (TOOLS_TOLD.format(tools=told) if tools else "")


class VerifiersRows:
    """Tasks of a taskset; one in `held_out_every` is never trained on."""

    def __init__(self, config: VerifiersConfig, seed: int, split: str) -> None:
        """Args: split is "train" or "eval". Raises: ConfigError for a taskset that cannot be used."""
        assert split in ("train", "eval"), f"unknown split {split}"
        self._spec, self._args = config.taskset, json.dumps(dict(config.args), sort_keys=True)
        self._taskset, self._tasks = _tasks(self._spec, self._args)
        every = config.held_out_every
        self._indices = [each for each in range(len(self._tasks)) if (each % every == 0) == (split == "eval")]
        if not self._indices:
            raise ConfigError(
                f'task.verifiers.taskset="{self._spec}" has {len(self._tasks)} tasks, which leaves none for {split} '
                f"with task.verifiers.held_out_every={every}. Use more tasks, or another share."
            )
        self.num_rows: int | None = len(self._indices)

    def row(self, index: int) -> dict[str, Any]:
        """Columns question, answer (""), taskset, args and task."""
        number = self._indices[index]
        question = _question(self._taskset, self._tasks[number], f"{self._spec} task {number}")
        return {"question": question, "answer": "", "taskset": self._spec, "args": self._args, "task": number}


class VerifiersWorld:
    """Answers a turn's tool calls; a turn without one is the final answer, and the task's rewards score the trace."""

    fork = Fork.replay

    def reset(self, prompt: Prompt) -> tuple[_Session, str]:
        """A trace that holds the task's prompt.

        Raises: DataError for a row without its columns.
        """
        missing = [name for name in ("taskset", "args", "task") if name not in prompt.data]
        if missing:
            raise DataError(
                f'prompt "{prompt.id}" has no column "{missing[0]}": this world scores the tasks that '
                "task.generator=verifiers makes."
            )
        taskset, tasks = _tasks(prompt.data["taskset"], prompt.data["args"])
        task = tasks[prompt.data["task"]]
        toolsets = _toolsets(taskset, task)
        v1 = import_optional("verifiers.v1")
        trace = v1.Trace(
            task=v1.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
            state=import_optional("verifiers.v1.state").state_cls(type(task))(),
            agent=v1.AgentInfo(config=v1.AgentConfig()),
        )
        session = _Session(task, trace, _tools_of(toolsets))
        question = _question(taskset, task, prompt.id)
        if task.data.system_prompt:
            session.messages.append(v1.SystemMessage(content=task.data.system_prompt))
        session.messages.append(v1.UserMessage(content=task.data.prompt_text))

        async def set_up() -> None:
            for toolset in toolsets:
                await toolset.setup()
                await toolset.setup_task(task.data)

        asyncio.run(set_up())
        return session, question

    def act(self, session: _Session, action: str) -> Observed:
        """Run the turn's calls, or score the answer.

        Raises: ToolError for a turn that cannot be read.
        """
        parsed = parse_hermes(action)
        if parsed.error:
            raise ToolError(parsed.error)
        v1 = import_optional("verifiers.v1")
        if parsed.answer is not None:
            session.messages.append(v1.AssistantMessage(content=parsed.answer))
            reward = asyncio.run(self._scored(session))
            return Observed(done=True, score=reward, answer=parsed.answer)
        calls = [
            v1.ToolCall(id=f"call_{number}", name=call.tool, arguments=json.dumps(call.arguments))
            for number, call in enumerate(parsed.calls, session.num_calls)
        ]
        session.num_calls += len(calls)
        session.messages.append(v1.AssistantMessage(content=action.partition("<tool_call>")[0], tool_calls=calls))
        texts, refused = [], False
        for call, made in zip(parsed.calls, calls, strict=True):
            text, failed = asyncio.run(self._called(session, call))
            texts.append(text)
            refused = refused or failed
            session.messages.append(v1.ToolMessage(tool_call_id=made.id, content=text, name=call.tool))
        told = "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in texts)
        return Observed(text=told, score=0.0, refused=refused)

    async def _called(self, session: _Session, call: Call) -> tuple[str, bool]:
        """A call's text, and whether it was refused: as in the package, what a tool raises is told to the policy."""
        method = session.tools.get(call.tool)
        if method is None:
            return f'error: there is no tool "{call.tool}", the tools are {", ".join(session.tools) or "none"}', True
        state = import_optional("verifiers.v1.mcp.server")._call_state
        token = state.set(session.trace.state)
        try:
            result = import_optional("pydantic").validate_call(method)(**call.arguments)
            if inspect.isawaitable(result):
                result = await result
        except Exception as error:
            return f"error: {error}", True
        finally:
            state.reset(token)
        return (result if isinstance(result, str) else json.dumps(result, default=str)), False

    async def _scored(self, session: _Session) -> float:
        node = import_optional("verifiers.v1").MessageNode
        session.trace.nodes = [
            node(parent=number - 1 if number else None, message=message, sampled=message.role == "assistant")
            for number, message in enumerate(session.messages)
        ]
        session.trace.is_completed = session.trace.ok = True
        await session.task.score(session.trace)
        return float(session.trace.reward)
