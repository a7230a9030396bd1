"""The attention function that stock Hugging Face models call: a pack goes to its plan, plain sequences are done here.

Transformers makes no mask for an attention function that it does not know, so a model's sliding windows and caps of the
scores are this module's work on plain sequences too.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conf.errors import ConfigError
from rl.policy.mask import ancestor_mask

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
    module: nn.Module,
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

    Plain sequences are whole (no cache), and padded on the right if at all.

    Args:
        query, key, value: float [B, heads, T, head_dim]; a pack has B = 1.
        tree_plan: keyword argument given to the model's forward, which hands it down to here.
        scaling, sliding_window, softcap: as `AttentionPlan.attend` has them.
    Returns: (float [B, T, heads, head_dim], None).
    Raises: ConfigError for a model whose scores are changed in a way that neither path computes.
    """
    _require_known(kwargs, needs_own_kernel=tree_plan is not None or softcap is not None)
    if tree_plan is not None:
        layer = getattr(module, "layer_idx", 0)
        output = tree_plan.attend(
            query, key, value, scaling=scaling, window=sliding_window, softcap=softcap, layer=layer
        )
        return output, None
    length = query.shape[2]
    assert key.shape[2] == length, "plain sequences are computed whole, without a cache"
    mask_TT = None
    if sliding_window is not None and sliding_window < length:
        mask_TT = ancestor_mask(torch.full((length,), length, device=query.device), sliding_window)
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask_TT, scaling=scaling, **kwargs)
    return masked_attention(query, key, value, mask_TT, scaling=scaling, softcap=softcap), None


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask_QK: Tensor | None, *, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attention under a mask, by the fastest kernel of the device; capped scores are written out instead.

    Args:
        query: float [B, heads, Q, head_dim].
        key, value: float [B, as many or fewer heads, K, head_dim]; query head h reads head h // repeats.
        mask_QK: bool [Q, K], True where a query sees a key; None for causal order, with Q = K.
        scaling, softcap: see `AttentionPlan.attend`.
    Returns: float [B, Q, heads, head_dim].
    """
    repeats = query.shape[1] // key.shape[1]
    # On a GPU, kernels that take a mask take no grouped heads: torch would fall back to one that is slow.
    if repeats > 1 and (softcap is not None or (mask_QK is not None and query.device.type != "cpu")):
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if softcap is not None:
        return _capped_attention(query, key, value, mask_QK, scaling, softcap).transpose(1, 2)
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask_QK,
        is_causal=mask_QK is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask_QK: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Scores and softmax in float32 at least; [B, heads, Q, head_dim]."""
    if mask_QK is None:
        mask_QK = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)).to(wide) * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask_QK, -torch.inf)
    return scores.softmax(-1).to(value.dtype) @ value


def _require_known(kwargs: dict[str, Any], *, needs_own_kernel: bool) -> None:
    # Attention sinks (gpt-oss) are one more term of every softmax, learned by the model.
    refused = ["s_aux", *(["position_bias", "dropout"] if needs_own_kernel else [])]
    given = [name for name in refused if kwargs.get(name) is not None and not _is_zero(kwargs[name])]
    if given:
        raise ConfigError(
            f"the model's attention uses {given}, which changes its scores in a way that this trainer does not "
            "compute: it would train another model than the engine samples from. Set attention dropout to 0 in the "
            "model's config.json, or use a model with plain attention, such as Qwen3, Llama or Gemma."
        )


def _is_zero(argument: object) -> bool:
    return isinstance(argument, int | float) and argument == 0
