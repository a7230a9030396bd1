"""The tree: a prompt and its steps, from growing to training.

Law: concatenating a path's tokens gives exactly what the model saw.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rollout.types import WORLD_FAILED, Prompt, StepFacts, StepKind, StopReason

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
    """The action decoded, for people and rewards; never encoded again. Behind parts of a turn, the whole turn; ""
    for a part."""
    observation_text: str = ""
    is_part: bool = False
    """True for the beginning of a turn that its children go on with: it has no observation and no facts of its own,
    and the environment answered only the turn as a whole."""
    judged: float | None = None
    """What the judge said of it while the tree grew (`rollout.judge`); None where it was not asked, or had no score."""


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
        assert not node.is_part or (node.stop is StopReason.continues and not node.observation_ids), (
            "a part of a turn is followed by the rest of it"
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

    def outcome_leaves(self) -> list[int]:
        """Trained leaves whose trajectory came to an end of its own, so that it has an outcome: all but candidates that
        were not chosen."""
        return [row for row in self.trained_leaves() if self.nodes[row].stop is not StopReason.not_chosen]

    def turn(self, row: int) -> list[int]:
        """Rows of the turn that `row` ends or is a part of, from its beginning to `row`."""
        rows = [row]
        while (parent := self.nodes[rows[-1]].parent) != ROOT and self.nodes[parent].is_part:
            rows.append(parent)
        return rows[::-1]

    def num_turns(self, row: int) -> int:
        """Whole turns from the prompt to `row`; the depth, where no turn was cut into parts."""
        return sum(not self.nodes[step].is_part for step in self.path(row))

    def num_generated_tokens(self) -> int:
        """Tokens the policy sampled, pruned steps included."""
        return sum(len(node.action_ids) for node in self.nodes)


def split(tree: Tree, row: int, token: int) -> Tree:
    """The same tree with a step cut in two behind its first `token` tokens, so that others can go on from there.

    The beginning becomes a part of a turn; the rest, its child in the next row, keeps facts, observation and children.
    Every path has the tokens and log-probabilities it had.

    Args:
        row: a step of more than `token` tokens.
        token: 1 or more.
    """
    node = tree.nodes[row]
    assert 0 < token < len(node.action_ids), (
        f"token {token} does not cut a step of {len(node.action_ids)} tokens in two"
    )
    beginning = replace(
        node,
        action_ids=node.action_ids[:token],
        action_logprobs=node.action_logprobs[:token],
        observation_ids=[],
        facts=StepFacts(kind=StepKind.unread),
        stop=StopReason.continues,
        action_text="",
        observation_text="",
        is_part=True,
        judged=None,
    )
    rest = replace(
        node,
        parent=row,
        action_ids=node.action_ids[token:],
        action_logprobs=node.action_logprobs[token:],
        # One request sampled both: all that comes before the rest was in its cache.
        num_cached_tokens=len(tree.path_ids(node.parent)) + token,
    )
    after = [replace(each, parent=each.parent + (each.parent >= row)) for each in tree.nodes[row + 1 :]]
    return replace(tree, nodes=[*tree.nodes[:row], beginning, rest, *after])
