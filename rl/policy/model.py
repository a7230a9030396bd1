"""The policy as one module: a pack goes in, log-probabilities, entropies and values of its trained tokens come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from conf.schema import Layout
from rl.policy.layouts.hidden import tree_forward, tree_hidden
from rl.policy.logprobs import edge_logprobs, output_head
from rl.policy.lora import base_causal_lm
from rl.policy.pack import PackedBatch

HEAD_CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that exist at once; two to three times as many floats are held while a chunk is computed."""


@dataclass(frozen=True, slots=True)
class EdgeOutputs:
    """What the model says of each trained token of a pack; float32, or float64 where the model is."""

    logprob_E: Tensor
    """Nats, at the sampling temperature."""
    entropy_E: Tensor
    """Nats, of the distribution the token was drawn from."""
    value_E: Tensor | None = None
    """Value of the state before the token, in reward units; None without a value head."""
    router_loss: Tensor | None = None
    """Load-balancing loss of a mixture of experts, times its coefficient; None unless its config asks for it."""


class TreePolicy(nn.Module):
    """A causal LM, and a value head when asked for; the root that FSDP shards, so that the output layer's weight is
    whole wherever `forward` reads it.

    Args:
        model: loaded with attn_implementation="grove_tree"; with adapters or without.
        temperature: the logits are divided by it.
        has_value_head: adds a linear layer on the last hidden state.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, temperature: float, *, has_value_head: bool = False) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.value_head = zero_head(base_causal_lm(model)) if has_value_head else None

    def forward(
        self, batch: PackedBatch, layout: Layout, *, temperature: float | None = None, trains_trunk: bool = True
    ) -> EdgeOutputs:
        """Log-probability, entropy and value of every edge; shapes as `EdgeOutputs`.

        Args:
            temperature: other than the policy's own.
            trains_trunk: False keeps the gradient of the values in the value head.
        """
        model = base_causal_lm(self.model)
        found = tree_forward(model.base_model, batch, layout)
        hidden_TD, router_loss = found.hidden_TD, found.router_loss
        if router_loss is not None:
            router_loss = model.config.get_text_config().router_aux_loss_coef * router_loss
        head = output_head(model)
        logprob_E, entropy_E = edge_logprobs(
            hidden_TD,
            head,
            batch.edge_row_E,
            batch.edge_target_E,
            self.temperature if temperature is None else temperature,
            chunk_rows=max(1, HEAD_CHUNK_LOGITS[hidden_TD.device.type] // len(head.weight_VD)),
        )
        value_E = None
        if self.value_head is not None:
            value_E = row_values(self.value_head, hidden_TD if trains_trunk else hidden_TD.detach(), batch.edge_row_E)
        return EdgeOutputs(logprob_E, entropy_E, value_E, router_loss)


class TreeCritic(nn.Module):
    """A model of its own that says what a state is worth; `value_head` takes the place of the output layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = cast(PreTrainedModel, model.base_model)
        self.value_head = zero_head(model)

    def forward(self, batch: PackedBatch, layout: Layout, *, rows: Tensor | None = None) -> Tensor:
        """Value [E] of the state before each trained token, in reward units; at least float32.

        Args:
            rows: int64 [R], tokens of the pack behind which a value is wanted, instead of the trained tokens.
        Returns: float [E], or [R].
        """
        hidden_TD = tree_hidden(self.backbone, batch, layout)
        return row_values(self.value_head, hidden_TD, batch.edge_row_E if rows is None else rows)


def zero_head(model: PreTrainedModel) -> nn.Linear:
    """A linear layer [1, D], at least float32, that says 0 of every state: a new critic is no worse than none."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, dtype=dtype)
    for weight in head.parameters():
        nn.init.zeros_(weight)
    return head


def row_values(head: nn.Linear, hidden_TD: Tensor, row_R: Tensor) -> Tensor:
    """The head's value [R] of the state behind each of these tokens, at least float32."""
    hidden_RD = hidden_TD.index_select(0, row_R).to(head.weight.dtype)
    return head(hidden_RD).sum(-1)  # of one column; a sum, because FSDP takes no views out of a module
