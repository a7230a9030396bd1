"""A taskset for the package verifiers: sums to be worked out with a tool that counts its calls.

    grove train task=verifiers task.verifiers.taskset=examples/verifiers_taskset.py:Sums \\
        rewards=world_total rollout=chains credit=grpo model=qwen3_0_6b
"""

from __future__ import annotations

from collections.abc import Iterable

import verifiers.v1 as vf


class SumData(vf.TaskData):
    """One sum."""

    total: int


class SumState(vf.State):
    """What a rollout's tools and rewards share."""

    num_calls: int = 0


class Adder(vf.Toolset[vf.ToolsetConfig, SumState]):
    """Adds."""

    TOOL_PREFIX = None

    @vf.tool
    async def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        self.state.num_calls += 1
        return a + b


class SumTask(vf.Task[SumData, SumState, vf.TaskConfig]):
    """Worked out right, and with the tool."""

    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        """1 for the right number as the last word."""
        return float(trace.last_reply.split()[-1:] == [str(self.data.total)])

    @vf.reward(weight=0.5)
    async def used_the_tool(self, trace: vf.Trace) -> float:
        """1 when the tool was called."""
        return float(trace.state.num_calls > 0)

    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        """One adder for each rollout."""
        return [Adder(vf.ToolsetConfig())]


class SumsConfig(vf.TasksetConfig):
    """How many sums."""

    num_tasks: int = 40


class Sums(vf.Taskset[SumTask, SumsConfig]):
    """Sums of two numbers."""

    def load(self) -> Iterable[SumTask]:
        """One task for each number."""
        for number in range(self.config.num_tasks):
            a, b = number + 2, 3 * number + 5
            yield SumTask(SumData(prompt=f"What is {a} + {b}?", total=a + b), self.config.task)
