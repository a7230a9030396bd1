"""Log-probabilities of the trained tokens, in chunks: the [rows, vocabulary] table never exists whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALE_KEYS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Where configs keep a factor of the logits: Cohere, Falcon-H1, Muse Glimmer."""
DIVISOR_KEYS = ("logits_scaling",)
"""Where they keep what the logits are divided by: Granite."""
SOFTCAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Where they keep the cap of the logits: Gemma, RecurrentGemma, xLSTM."""


@dataclass(frozen=True, slots=True)
class Head:
    """What turns a hidden state into logits: z = cap(scale * (h W' + b)), cap(u) = softcap * tanh(u / softcap)."""

    weight_VD: Tensor
    """float [V, D]."""
    bias_V: Tensor | None = None
    """float [V]."""
    softcap: float | None = None
    """None for no cap."""
    scale: float = 1.0

    @torch.no_grad()
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Logits [R, V] of hidden states [R, D], in a tensor of their own, at least float32."""
        logits_RV = (hidden_RD @ self.weight_VD.T).to(_wide(hidden_RD.dtype))
        if self.bias_V is not None:
            logits_RV += self.bias_V
        if self.scale != 1.0:
            logits_RV *= self.scale
        if self.softcap is not None:
            logits_RV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_RV


def edge_logprobs(
    hidden_TD: Tensor,
    head: Head,
    edge_row_E: Tensor,
    edge_target_E: Tensor,
    temperature: float,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each edge's target, and the entropy of the distribution it was drawn from.

    A row that several edges share (the last token before a fork) goes through the vocabulary once. Backward computes
    each chunk of logits again instead of keeping it; twice a chunk's logits are held while it is computed, three times
    with a cap.

    Args:
        hidden_TD: float [T, D], the model's last hidden states.
        head: the output layer; gradients flow into its weight and bias where they want any.
        edge_row_E: int64 [E], row of hidden_TD that predicts the edge.
        edge_target_E: int64 [E], in [0, V).
        temperature: the logits are divided by it.
        chunk_rows: rows whose logits exist at once.
    Returns: (logprob_E, entropy_E) in nats, float32, or float64 where hidden_TD is.
    """
    row_U, edge_unique_E = edge_row_E.unique(return_inverse=True)
    order_E = edge_unique_E.argsort(stable=True)
    logprob_E, entropy_U = _ChunkedLogprobs.apply(
        hidden_TD.index_select(0, row_U),
        head.weight_VD,
        head.bias_V,
        head.softcap,
        head.scale,
        edge_unique_E[order_E],
        edge_target_E[order_E],
        temperature,
        chunk_rows,
    )
    unsort_E = torch.empty_like(order_E).scatter_(0, order_E, torch.arange(len(order_E), device=order_E.device))
    return logprob_E.index_select(0, unsort_E), entropy_U.index_select(0, edge_unique_E)


def output_head(model: PreTrainedModel) -> Head:
    """The output layer of a causal LM as it is now, an adapter on it added to its weight.

    Raises: ConfigError where it is not one linear layer.
    """
    layer: Any = model.get_output_embeddings()
    linear = getattr(layer, "base_layer", layer)
    if not isinstance(linear, nn.Linear):
        raise ConfigError(
            f"{type(model).__name__} ends in {type(linear).__name__}, not in one linear layer, so log-probabilities "
            "cannot be computed in chunks. Use a causal LM such as Qwen3, Llama or Gemma."
        )
    weight_VD = linear.weight
    if layer is not linear and not layer.disable_adapters:
        for name in layer.active_adapters:
            weight_VD = weight_VD + layer.get_delta_weight(name).to(weight_VD.dtype)
    config = model.config.get_text_config()
    scale = 1.0
    for key in SCALE_KEYS:
        scale *= getattr(config, key, None) or 1.0
    for key in DIVISOR_KEYS:
        scale /= getattr(config, key, None) or 1.0
    caps = [cap for key in SOFTCAP_KEYS if (cap := getattr(config, key, None))]
    return Head(weight_VD, linear.bias, caps[0] if caps else None, scale)


@torch.no_grad()
def require_known_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not what `output_head` makes of its last hidden states, tried on four tokens.

    Raises: ConfigError with the gap; also where the output is not one linear layer.
    """
    head = output_head(model)
    hidden: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state))
    try:
        ids_T = torch.arange(4, device=head.weight_VD.device) % len(head.weight_VD)
        expected_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].to(_wide(head.weight_VD.dtype))
    finally:
        hook.remove()
    found_TV = head.logits(hidden[0][0])
    same_shape = found_TV.shape == expected_TV.shape
    gap = ((found_TV - expected_TV).abs().max() / expected_TV.std()).item() if same_shape else float("inf")
    # A model rounds each step of its head to its own dtype, we only the first.
    if not gap < (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1):
        raise ConfigError(
            f"{type(model).__name__} does something to its logits that is not a bias, a scale or a soft cap of its "
            f"config (largest gap {gap:.2g} of their spread): the learner would train other log-probabilities than the "
            "engine samples by. Use a model with a known output layer, such as Qwen3, Llama, Gemma, Cohere or Granite."
        )


class _ChunkedLogprobs(torch.autograd.Function):
    """U rows, E edges sorted by row: y = z / temperature, log-prob = y[target] - logsumexp(y), H = -sum p log p."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_UD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        scale: float,
        edge_row_E: Tensor,
        edge_target_E: Tensor,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        head, wide = Head(weight_VD, bias_V, softcap, scale), _wide(hidden_UD.dtype)
        logprob_E = hidden_UD.new_empty(len(edge_row_E), dtype=wide)
        entropy_U = hidden_UD.new_empty(len(hidden_UD), dtype=wide)
        chunks = _chunks(edge_row_E, len(hidden_UD), chunk_rows)
        for rows, edges in chunks:
            logp_RV, p_RV = _log_softmax(head.logits(hidden_UD[rows]).div_(temperature))
            logprob_E[edges] = logp_RV[edge_row_E[edges] - rows.start, edge_target_E[edges]]
            entropy_U[rows] = -p_RV.mul_(logp_RV).sum(-1)
        ctx.save_for_backward(hidden_UD, weight_VD, bias_V, edge_row_E, edge_target_E, entropy_U)
        ctx.softcap, ctx.scale, ctx.temperature, ctx.chunks = softcap, scale, temperature, chunks
        ctx.set_materialize_grads(False)
        return logprob_E, entropy_U

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """dL/dy = sum_e g_e (onehot_e - p) - g_H p (log p + H), then through cap, scale and the linear layer."""
        grad_logprob_E, grad_entropy_U = grads
        hidden_UD, weight_VD, bias_V, edge_row_E, edge_target_E, entropy_U = ctx.saved_tensors
        head = Head(weight_VD, bias_V, ctx.softcap, ctx.scale)
        wide = _wide(hidden_UD.dtype)
        grad_hidden_UD = torch.empty_like(hidden_UD)
        # Chunks are summed in the wide type: many small bfloat16 additions would lose the small ones.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and ctx.needs_input_grad[2] else None
        for rows, edges in ctx.chunks:
            logits_RV = head.logits(hidden_UD[rows])
            slope_RV = None if head.softcap is None else _cap_slope(logits_RV, head.softcap)
            logp_RV, p_RV = _log_softmax(logits_RV.div_(ctx.temperature))
            grad_z_RV = torch.zeros_like(p_RV[:, :1])
            row_E = edge_row_E[edges] - rows.start
            if grad_logprob_E is not None:
                grad_z_RV = grad_z_RV.index_add(0, row_E, grad_logprob_E[edges, None])
            if grad_entropy_U is not None:
                grad_z_RV = logp_RV.add_(entropy_U[rows, None]).mul_(grad_entropy_U[rows, None]).add_(grad_z_RV)
            grad_z_RV = p_RV.mul_(grad_z_RV).neg_()
            if grad_logprob_E is not None:
                grad_z_RV.index_put_((row_E, edge_target_E[edges]), grad_logprob_E[edges], accumulate=True)
            grad_z_RV *= head.scale / ctx.temperature
            if slope_RV is not None:
                grad_z_RV *= slope_RV
            if grad_bias_V is not None:
                grad_bias_V += grad_z_RV.sum(0)
            narrow_RV = grad_z_RV.to(weight_VD.dtype)
            grad_hidden_UD[rows] = narrow_RV @ weight_VD
            if grad_weight_VD is None:
                continue
            if grad_weight_VD.dtype == narrow_RV.dtype:
                grad_weight_VD.addmm_(narrow_RV.T, hidden_UD[rows])
            else:
                grad_weight_VD += narrow_RV.T @ hidden_UD[rows]
        return (
            grad_hidden_UD,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(weight_VD.dtype),
            *(None for _ in range(6)),
        )


def _log_softmax(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities; these take the place of the logits."""
    logp_RV = logits_RV.log_softmax(-1)
    return logp_RV, torch.exp(logp_RV, out=logits_RV)


def _cap_slope(logits_RV: Tensor, softcap: float) -> Tensor:
    """d cap(u) / du = 1 - tanh^2(u / softcap), from the capped logits."""
    return logits_RV.div(softcap).square_().neg_().add_(1.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(edge_row_E: Tensor, num_rows: int, chunk_rows: int) -> list[tuple[slice, slice]]:
    """Slices of rows, and of the sorted edges that read those rows."""
    assert chunk_rows > 0, "a chunk has at least one row"
    borders = torch.arange(0, num_rows + chunk_rows, chunk_rows, device=edge_row_E.device).clamp(max=num_rows)
    cuts = torch.searchsorted(edge_row_E, borders).tolist()
    rows = borders.tolist()
    return [
        (slice(rows[i], rows[i + 1]), slice(cuts[i], cuts[i + 1]))
        for i in range(len(rows) - 1)
        if rows[i] < rows[i + 1]
    ]
