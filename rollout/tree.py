"""The tree: a prompt and its steps, from growing to training.

Law: concatenating a path's tokens gives exactly what the model saw.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout.types import WORLD_FAILED, Prompt, StepFacts, StopReason

ROOT = -1
"""Parent of the first steps: the prompt itself."""


@dataclass(kw_only=True, slots=True)
class Node:
    """One step: the policy's sampled tokens, then the environment's reply (never trained)."""

    parent: int
    """Row of the parent step in `Tree.nodes`; ROOT for a first step."""
    action_ids: list[int]
    """Sampled tokens, the stop token included."""
    action_logprobs: list[float]
    """Log-probability of each action token when it was sampled."""
    observation_ids: list[int] = field(default_factory=list)
    """The environment's reply as the next step will see it; empty at a leaf."""
    facts: StepFacts
    stop: StopReason
    version: int
    """Weight version that sampled the action."""
    num_cached_tokens: int = 0
    """Context tokens the engine had cached when it sampled this step."""
    branch: int = 0
    """Which of the prompt's M trees the step belongs to (Tree-GRPO's intra-tree scope); 0 in a single tree."""
    kept: bool = True
    """False for a step that was generated and then pruned: recorded, never trained."""
    action_text: str = ""
    """The action decoded, for people and rewards; never encoded again."""
    observation_text: str = ""


@dataclass(kw_only=True, slots=True)
class Tree:
    """A prompt and its steps; parents come before children; a chain is a tree with one leaf."""

    prompt: Prompt
    nodes: list[Node] = field(default_factory=list)

    def add(self, node: Node) -> int:
        """Append a step and return its row."""
        assert ROOT <= node.parent < len(self.nodes), "a parent comes before its children"
        assert len(node.action_ids) == len(node.action_logprobs), "one log-probability per sampled token"
        assert node.parent == ROOT or self.nodes[node.parent].stop is StopReason.continues, (
            "an ended step has no children"
        )
        self.nodes.append(node)
        return len(self.nodes) - 1

    def path(self, row: int) -> list[int]:
        """Rows from the first step to `row`, both included; empty for ROOT."""
        rows = []
        while row != ROOT:
            rows.append(row)
            row = self.nodes[row].parent
        return rows[::-1]

    def path_ids(self, row: int) -> list[int]:
        """Every token from the prompt to the end of `row`'s observation: the context of its children."""
        token_ids = list(self.prompt.token_ids)
        for step in self.path(row):
            token_ids += self.nodes[step].action_ids + self.nodes[step].observation_ids
        return token_ids

    def depth(self, row: int) -> int:
        """Number of steps from the prompt to `row`, 1 for a first step, 0 for ROOT."""
        return len(self.path(row))

    def children(self, row: int) -> list[int]:
        """Rows whose parent is `row`, in the order they were added."""
        return [child for child, node in enumerate(self.nodes) if node.parent == row]

    def leaves(self) -> list[int]:
        """Rows of steps that ended a trajectory, kept or not."""
        return [row for row, node in enumerate(self.nodes) if node.stop is not StopReason.continues]

    def trained_leaves(self) -> list[int]:
        """Leaves whose trajectory may be scored and trained: kept, and ended by the policy rather than by the world."""
        return [row for row in self.leaves() if self.nodes[row].kept and self.nodes[row].stop not in WORLD_FAILED]

    def num_generated_tokens(self) -> int:
        """Tokens the policy sampled, pruned steps included."""
        return sum(len(node.action_ids) for node in self.nodes)
