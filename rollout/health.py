"""Whether the world held up while trees grew."""

from __future__ import annotations

from collections.abc import Iterable

from conf.errors import ToolCrashed
from conf.schema import TaskConfig
from rollout.tree import Tree
from rollout.types import StopReason


def check_tool_crashes(trees: Iterable[Tree], cfg: TaskConfig) -> None:
    """Stop a run whose tools break: their trajectories train nothing, and soon nothing would be left.

    Raises: ToolCrashed naming tool, arguments and error when more than task.max_tool_crashes_share of the calls did.
    """
    called = [(tree, node) for tree in trees for node in tree.nodes if node.facts.tool]
    crashed = [(tree, node) for tree, node in called if node.stop is StopReason.tool_crashed]
    if len(crashed) <= cfg.max_tool_crashes_share * len(called):
        return
    tree, node = crashed[0]
    raise ToolCrashed(
        f'tool "{node.facts.tool}" crashed or hung in {len(crashed)} of {len(called)} calls, above '
        f"task.max_tool_crashes_share={cfg.max_tool_crashes_share}: those trajectories end there and train nothing. "
        f"First: prompt {tree.prompt.id}, arguments {node.facts.arguments}, {node.facts.error}. "
        "Fix the tool, or let it raise conf.errors.ToolError for what the model should be told."
    )
