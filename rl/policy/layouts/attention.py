"""The attention function that stock Hugging Face models call: it hands a pack to its plan, and leaves the rest alone."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION_NAME = "grove_tree"
"""Value of attn_implementation that selects `tree_attention`."""


class AttentionPlan(Protocol):
    """What one pack's attention needs; made once per pack, used by every layer."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        layer: int,
    ) -> Tensor:
        """One layer's attention over the pack.

        Args:
            query: float [1, heads, T, head_dim]; key and value with as many or fewer (grouped-query) heads.
            scaling: factor of the scores; None for 1 / sqrt(head_dim).
            window: a token sees only the `window` nearest tokens of its own path, itself included; None for all.
            softcap: scores become softcap * tanh(scores / softcap); None for no cap.
            layer: index of the layer.
        Returns: float [1, T, heads, head_dim].
        """
        ...


def register_tree_attention() -> None:
    """Make attn_implementation="grove_tree" known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, tree_attention)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_plan: AttentionPlan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface; without a plan, the ordinary causal attention of plain sequences.

    Args:
        tree_plan: keyword argument given to the model's forward, which hands it down to here.
        query, key, value, scaling, sliding_window, softcap: as `AttentionPlan.attend` has them.
    Returns: (float [1, T, heads, head_dim], None).
    """
    if tree_plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    layer = getattr(module, "layer_idx", 0)
    output = tree_plan.attend(query, key, value, scaling=scaling, window=sliding_window, softcap=softcap, layer=layer)
    return output, None
