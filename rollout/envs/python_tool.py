"""Programs as a tool: Python that the policy wrote, run in the jail of `rollout.jail`."""

from __future__ import annotations

from conf.errors import ConfigError, ToolError
from conf.schema import PythonToolConfig, TaskConfig
from rollout import jail
from rollout.jail import Ended, Isolation, Limits, Outcome, run_python

NAME = "rollout.envs.python_tool:python"
MAX_OUTPUT_BYTES = 2**20
"""Of a program's output; one that writes more is ended."""


def python(code: str, *, task: TaskConfig) -> str:
    """Run a Python program and return what it prints.

    Each call is a new program: nothing is kept from earlier calls. It has the standard library, no other packages, no
    network and no files. Only what is printed is returned, so print the results.

    Args:
        code: The whole program.
    """
    settings = task.python
    limits = Limits(
        wall_s=settings.wall_s,
        cpu_s=settings.cpu_s,
        memory_mib=settings.memory_mib,
        disk_mib=settings.disk_mib,
        output_bytes=MAX_OUTPUT_BYTES,
    )
    outcome = run_python(code, limits=limits, isolation=Isolation(settings.isolation.value))
    problem = _problem(outcome, settings)
    if problem:
        raise ToolError("\n".join(each for each in (problem, _shown(outcome, settings.max_output_chars)) if each))
    return _shown(outcome, settings.max_output_chars) or "(nothing was printed)"


def _problem(outcome: Outcome, settings: PythonToolConfig) -> str:
    """Why the program came to no good end; "" when it did."""
    match outcome.ended:
        case Ended.exited:
            return f"the program ended with exit code {outcome.exit_code}" if outcome.exit_code else ""
        case Ended.signalled:
            return f"the program was ended by signal {outcome.signal}"
        case Ended.wall_time:
            return f"the program took longer than {settings.wall_s:g} s and was ended"
        case Ended.cpu_time:
            return f"the program used {settings.cpu_s:g} s of processor time and was ended"
        case Ended.memory:
            return f"the program took more than {settings.memory_mib} MiB of memory and was ended"
        case Ended.output:
            return "the program printed too much and was ended"


def _shown(outcome: Outcome, max_chars: int) -> str:
    """What the program printed, then its errors, of which the end says most."""
    stdout, stderr = outcome.stdout.rstrip(), outcome.stderr.rstrip()
    kept = _cut(stderr, max_chars // 2 if stdout else max_chars)
    return "\n".join(each for each in (_cut(stdout, max_chars - len(kept)), kept) if each)


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    head = max_chars // 2
    tail = max_chars - head
    left_out = len(text) - max_chars
    return f"{text[:head]}\n... {left_out} characters left out ...\n{text[len(text) - tail :]}"


def prepare_tools(task: TaskConfig) -> None:
    """Raises: ConfigError where programs must be isolated and this machine cannot."""
    if task.python.isolation.value != Isolation.required or NAME not in task.tools:
        return
    problem = jail.isolation_problem()
    if problem:
        raise ConfigError(
            f"task.tools names {NAME} and task.python.isolation=required, but this machine cannot isolate programs "
            f"({problem}): they could read its files and use its network. Allow user namespaces, or use "
            "task.python.isolation=off where you trust the policy's programs."
        )
