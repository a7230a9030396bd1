"""What the learner is measured on: forests of three shapes, and plain chains that share nothing; their trajectories one
by one; and the operations that training them takes."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rl.policy.pack import PackedBatch, PathCredit, TreeCredit
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason


@dataclass(frozen=True, slots=True)
class Shape:
    """Trees of one kind, all alike."""

    name: str
    prompt_tokens: int
    action_tokens: int
    parents: tuple[int, ...]
    """Parent of each step of a tree, ROOT for the first ones."""
    observation_tokens: int = 0
    """Behind each step that has children."""
    num_trees: int = 1
    steps_alone: bool = False
    """True: every step is a trajectory of its own and trains its last step alone, as when candidates are compared one
    step at a time; False: trajectories end at the leaves and train all their steps."""

    def unique_tokens(self) -> int:
        """Tokens of the forest, each once."""
        inner = len(set(self.parents) - {ROOT})
        tree = self.prompt_tokens + len(self.parents) * self.action_tokens + inner * self.observation_tokens
        return self.num_trees * tree

    def resized(self, unique_tokens: int) -> Shape:
        """The same trees with longer or shorter parts, about `unique_tokens` together."""
        factor = unique_tokens / self.unique_tokens()
        return replace(
            self,
            prompt_tokens=max(1, round(factor * self.prompt_tokens)),
            action_tokens=max(1, round(factor * self.action_tokens)),
            observation_tokens=round(factor * self.observation_tokens),
        )


def widths(*counts: int) -> tuple[int, ...]:
    """Parents of a tree with so many steps at each depth; every step has equally many children."""
    parents: list[int] = []
    level = [ROOT]
    for count in counts:
        assert count % len(level) == 0, "every step has equally many children"
        start = len(parents)
        parents += [parent for parent in level for _ in range(count // len(level))]
        level = list(range(start, len(parents)))
    return tuple(parents)


def candidates(depth: int, count: int) -> tuple[int, ...]:
    """Parents of a comb: `count` candidates at each depth, of which the first goes on."""
    return tuple(ROOT if step == 0 else (step - 1) * count for step in range(depth) for _ in range(count))


TOOL = Shape("tool", prompt_tokens=256, action_tokens=256, parents=widths(1, 2, 4, 8))
GRPO = Shape("grpo", prompt_tokens=1024, action_tokens=256, parents=widths(8))
COMB = Shape(
    "comb", prompt_tokens=256, action_tokens=64, parents=candidates(6, 5), observation_tokens=128, steps_alone=True
)
CHAINS = Shape("chains", prompt_tokens=256, action_tokens=256, parents=widths(1), num_trees=8)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One path as a sequence of its own: T tokens, E of them trained."""

    token_ids_T: Tensor
    """int64 [T]."""
    row_E: Tensor
    """int64 [E], token that each trained token is predicted from."""
    old_logprob_E: Tensor
    """float32 [E], nats."""
    w_pos_E: Tensor
    """float32 [E], weight * max(advantage, 0) of this trajectory alone."""
    w_neg_E: Tensor
    """float32 [E], weight * min(advantage, 0)."""

    def target_E(self) -> Tensor:
        """int64 [E], ids of the trained tokens."""
        return self.token_ids_T[self.row_E + 1]


@dataclass(frozen=True, slots=True)
class Forest:
    """The same training twice: by trees and by trajectories."""

    credits: list[TreeCredit]
    """Every token once, with sums over the trajectories through it."""
    trajectories: list[Trajectory]
    """Every trajectory apart, shared tokens as often as they are shared."""


def random_forest(shape: Shape, vocabulary: int, seed: int = 0) -> Forest:
    """Trees of random tokens with an advantage for every step of every trajectory, as sampled by a random model.

    Args:
        shape: how the trees look.
        vocabulary: ids are below this; old log-probs are about -log(vocabulary), with some ratios beyond the clip.
        seed: another one gives other tokens and advantages.
    """
    rng = random.Random(seed)
    trees = [_random_tree(shape, number, vocabulary, rng) for number in range(shape.num_trees)]
    paths = [_random_paths(shape, tree, rng) for tree in trees]
    pairs = list(zip(trees, paths, strict=True))
    return Forest(
        credits=[_summed(tree, of_tree) for tree, of_tree in pairs],
        trajectories=[_trajectory(tree, path) for tree, of_tree in pairs for path in of_tree],
    )


def _random_tree(shape: Shape, number: int, vocabulary: int, rng: random.Random) -> Tree:
    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    prompt = Prompt(id=str(number), token_ids=tuple(tokens(shape.prompt_tokens)), question="", answer="")
    tree = Tree(prompt=prompt)
    for row, parent in enumerate(shape.parents):
        ended = row not in shape.parents
        tree.add(
            Node(
                parent=parent,
                action_ids=tokens(shape.action_tokens),
                action_logprobs=[rng.gauss(-math.log(vocabulary), 0.2) for _ in range(shape.action_tokens)],
                observation_ids=[] if ended else tokens(shape.observation_tokens),
                facts=StepFacts(kind=StepKind.answer if ended else StepKind.call),
                stop=StopReason.answered if ended else StopReason.continues,
                version=0,
            )
        )
    return tree


def _random_paths(shape: Shape, tree: Tree, rng: random.Random) -> list[PathCredit]:
    """An advantage for each step and trajectory, weights so that a trajectory counts 1 however long it is."""
    paths = []
    for leaf in range(len(tree.nodes)) if shape.steps_alone else tree.leaves():
        steps = tree.path(leaf)
        trained = [row == leaf or not shape.steps_alone for row in steps]
        weight = 1 / (sum(trained) * shape.action_tokens)
        advantages = [rng.gauss(0, 1) for _ in steps]
        paths.append(PathCredit(leaf=leaf, advantage=advantages, weight=[weight * each for each in trained]))
    return paths


def _summed(tree: Tree, paths: list[PathCredit]) -> TreeCredit:
    zeros = [0.0] * len(tree.nodes)
    # Only the sums: PPO's loss needs no trajectories, and packing them would cost time that training does not need.
    return replace(TreeCredit(tree=tree, w_pos=zeros, w_neg=zeros, w0=zeros).only_paths(paths), paths=[])


def _trajectory(tree: Tree, path: PathCredit) -> Trajectory:
    token_ids = list(tree.prompt.token_ids)
    rows: list[int] = []
    old: list[float] = []
    w_pos: list[float] = []
    w_neg: list[float] = []
    for row, advantage, weight in zip(tree.path(path.leaf), path.advantage, path.weight, strict=True):
        node = tree.nodes[row]
        num_actions = len(node.action_ids)
        if weight:
            rows += range(len(token_ids) - 1, len(token_ids) - 1 + num_actions)
            old += node.action_logprobs
            w_pos += [weight * max(advantage, 0.0)] * num_actions
            w_neg += [weight * min(advantage, 0.0)] * num_actions
        token_ids += node.action_ids
        if row != path.leaf:
            token_ids += node.observation_ids
    return Trajectory(
        token_ids_T=torch.tensor(token_ids),
        row_E=torch.tensor(rows),
        old_logprob_E=torch.tensor(old),
        w_pos_E=torch.tensor(w_pos),
        w_neg_E=torch.tensor(w_neg),
    )


@dataclass(frozen=True, slots=True)
class Work:
    """What a forward pass computes, padding left out."""

    tokens: int
    """Tokens through the layers."""
    pairs: int
    """(query, key) pairs of tokens that see each other."""
    rows: int
    """Rows through the output layer."""


def packed_work(batch: PackedBatch) -> Work:
    """Of a pack: every token once, a row that predicts several tokens once."""
    pairs = int((batch.position_T[: batch.num_tokens] + 1).sum())
    return Work(tokens=batch.num_tokens, pairs=pairs, rows=len(batch.edge_row_E.unique()))


def separate_work(trajectories: Sequence[Trajectory]) -> Work:
    """Of trajectories apart."""
    lengths = [len(each.token_ids_T) for each in trajectories]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return Work(tokens=sum(lengths), pairs=pairs, rows=sum(len(each.row_E) for each in trajectories))


def operations(work: Work, config: PreTrainedConfig, *, head_passes: int) -> int:
    """Floating-point operations of one gradient, forward and backward, of a dense model with gated feed-forward layers.

        6 * weights of the layers * tokens + 12 * layers * heads * head_dim * pairs
        + 2 * head_passes * hidden * vocabulary * rows

    Args:
        work: tokens, pairs and rows.
        config: sizes of the model.
        head_passes: 3 for the products that the output layer cannot avoid, 4 with its logits computed twice, as every
            side here does.
    """
    heads_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    layer_weights = config.hidden_size * (2 * heads_width + 2 * kv_width + 3 * config.intermediate_size)
    linear = 6 * config.num_hidden_layers * layer_weights * work.tokens
    attention = 12 * config.num_hidden_layers * heads_width * work.pairs
    return linear + attention + 2 * head_passes * config.hidden_size * config.vocab_size * work.rows
