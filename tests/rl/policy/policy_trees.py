"""Ragged trees with weights for every (step, trajectory) pair, and tiny models to train on them."""

from __future__ import annotations

import copy
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

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


def drawn_forest(seed: int) -> list[PairedTree]:
    """One to three trees of up to nine steps, any shape."""
    rng = random.Random(seed)
    shapes = [[rng.randint(ROOT, row - 1) for row in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 3))]
    sizes = [[(rng.randint(1, 5), rng.randint(0, 3)) for _ in parents] for parents in shapes]
    return [paired(grown(*shape, rng), rng) for shape in zip(shapes, sizes, strict=True)]


FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "gemma", "gemma2", "gemma3", "qwen3_moe", "mixtral")
"""qwen2, mistral, gemma2 and gemma3 have windows of 4 tokens, all but mistral in one layer only; gemma2 has caps."""


def tiny(family: str, dtype: torch.dtype = torch.float32, *, tied: bool = True, **changes: object) -> PreTrainedModel:
    """A random model of two layers with grouped-query heads and the tree attention."""
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
    config, own = _family(family)
    config = config(**{**sizes, **own, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).to(dtype)
    if dtype == torch.float64:  # the experts' grouped kernels know no float64
        model.set_experts_implementation("eager")
    return model


def _family(family: str) -> tuple[type[PreTrainedConfig], dict[str, object]]:
    mixed = ["sliding_attention", "full_attention"]
    experts = {"num_experts_per_tok": 2, "output_router_logits": False}
    return {
        "qwen3": (Qwen3Config, {}),
        "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "layer_types": mixed}),
        "llama": (LlamaConfig, {}),
        "mistral": (MistralConfig, {"sliding_window": 4}),
        "gemma": (GemmaConfig, {}),
        "gemma2": (
            Gemma2Config,
            {
                "sliding_window": 4,
                "layer_types": mixed,
                "query_pre_attn_scalar": 6,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
            },
        ),
        "gemma3": (Gemma3TextConfig, {"sliding_window": 4, "layer_types": mixed, "query_pre_attn_scalar": 8}),
        "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 24, **experts}),
        "mixtral": (MixtralConfig, {"num_local_experts": 4, **experts}),
    }[family]


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights behind transformers' own attention: SDPA, or the written-out one that alone knows caps."""
    plain = copy.deepcopy(model)
    has_cap = getattr(model.config, "attn_logit_softcapping", None) is not None
    plain.set_attn_implementation("eager" if has_cap else "sdpa")
    return plain


def save_whole(trained: Any, folder: Path) -> None:
    """Have a learner or a process reward model write its part of a checkpoint, to the end."""
    trained.begin_save(folder)
    while not trained.saved().done:
        time.sleep(0.002)
    assert trained.saved().error == ""


class KeepsFloat64(TorchFunctionMode):
    """Inside, float64 stays float64: transformers' norms, routers and written-out softmaxes round to float32, where a
    sum of rounded gradients is not the rounded sum.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
        return func(*args, **kwargs)
