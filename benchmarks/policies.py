"""Models with random weights that the learner is measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from rl.policy.layouts.attention import ATTENTION_NAME, register_tree_attention
from rl.policy.model import TreePolicy


@dataclass(frozen=True, slots=True)
class Size:
    """A Qwen3 with grouped-query attention and tied embeddings."""

    name: str
    """About how many parameters."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    def config(self) -> Qwen3Config:
        """For transformers."""
        return Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate,
            tie_word_embeddings=True,
        )


TINY = Size("tiny", hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=64, vocabulary=128)
SMALL = Size("4M", hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate=768, vocabulary=4096)
MEDIUM = Size("52M", hidden=640, layers=10, heads=10, kv_heads=2, head_dim=64, intermediate=1920, vocabulary=8192)
LARGE = Size("0.6B", hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, intermediate=3072, vocabulary=151_936)


def random_policy(
    size: Size,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> TreePolicy:
    """A policy of this size, ready to train; always the same weights on one device.

    Args:
        size: of the model.
        device: where it is made.
        dtype: of weights and gradients.
        checkpointing: activations are computed again in backward instead of being kept.
    """
    register_tree_attention()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(size.config(), dtype=dtype, attn_implementation=ATTENTION_NAME)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return TreePolicy(model, temperature=1.0).train()
