"""Ragged trees with weights for every (step, trajectory) pair, and tiny models to train on them."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from rl.policy.layouts.attention import ATTENTION_NAME, register_tree_attention
from rl.policy.pack import TreeCredit
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason

VOCABULARY = 40


@dataclass
class PairedTree:
    """A tree and, for each step of each trajectory, a weight and an advantage."""

    tree: Tree
    pairs: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    """(row of the step, row of the leaf) -> (weight, advantage)."""

    def credit(self) -> TreeCredit:
        rows = range(len(self.tree.nodes))
        of_row = [[pair for (step, _), pair in self.pairs.items() if step == row] for row in rows]
        return TreeCredit(
            tree=self.tree,
            w_pos=[sum(weight * max(advantage, 0.0) for weight, advantage in pairs) for pairs in of_row],
            w_neg=[sum(weight * min(advantage, 0.0) for weight, advantage in pairs) for pairs in of_row],
            w0=[sum(weight for weight, _ in pairs) for pairs in of_row],
        )


def grown(
    parents: list[int], sizes: list[tuple[int, int]], rng: random.Random, prompt_tokens: int = 3, name: str = "test/0"
) -> Tree:
    """A tree of random tokens: row's parent, and how many action and observation tokens it has."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    prompt = Prompt(id=name, token_ids=tuple(tokens(prompt_tokens)), question="q", answer="")
    tree = Tree(prompt=prompt)
    for row, (parent, (num_actions, num_observed)) in enumerate(zip(parents, sizes, strict=True)):
        ended = row not in parents
        tree.add(
            Node(
                parent=parent,
                action_ids=tokens(num_actions),
                # Around the entropy of the untrained model, so that some ratios are clipped on either side.
                action_logprobs=[rng.gauss(-3.7, 0.4) for _ in range(num_actions)],
                observation_ids=[] if ended else tokens(num_observed),
                facts=StepFacts(kind=StepKind.answer if ended else StepKind.call),
                stop=StopReason.answered if ended else StopReason.continues,
                version=0,
            )
        )
    return tree


def paired(tree: Tree, rng: random.Random, trained_share: float = 1.0) -> PairedTree:
    """Random weights and advantages for a share of the trajectories, at least one."""
    leaves = tree.leaves()
    trained = [leaf for leaf in leaves if rng.random() < trained_share] or leaves[:1]
    pairs = {(row, leaf): (rng.uniform(0.2, 1.0), rng.gauss(0.0, 1.0)) for leaf in trained for row in tree.path(leaf)}
    return PairedTree(tree=tree, pairs=pairs)


@st.composite
def paired_trees(draw: st.DrawFn, max_steps: int = 9) -> PairedTree:
    """Any shape: chains of single children, forks at the root, one-token steps, steps without observation."""
    num_steps = draw(st.integers(1, max_steps))
    parents = [draw(st.integers(ROOT, row - 1)) for row in range(num_steps)]
    sizes = [(draw(st.integers(1, 5)), draw(st.integers(0, 3))) for _ in range(num_steps)]
    rng = random.Random(draw(st.integers(0, 2**32)))
    tree = grown(parents, sizes, rng, prompt_tokens=draw(st.integers(1, 6)))
    return paired(tree, rng, trained_share=draw(st.sampled_from([0.5, 1.0])))


def forests(max_trees: int = 3, max_steps: int = 9) -> st.SearchStrategy[list[PairedTree]]:
    return st.lists(paired_trees(max_steps), min_size=1, max_size=max_trees)


def tiny(family: str, dtype: torch.dtype = torch.float32, *, tied: bool = True, **changes: object) -> PreTrainedModel:
    """A random Qwen3 or Llama with grouped-query heads and the tree attention."""
    register_tree_attention()
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = {"qwen3": Qwen3Config, "llama": LlamaConfig}[family](**{**sizes, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).to(dtype)


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights behind transformers' own causal attention ("eager" would round its softmax to float32)."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    return plain
