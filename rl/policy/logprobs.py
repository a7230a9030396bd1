"""Log-probabilities of the trained tokens, in chunks: the [rows, vocabulary] table never exists whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def edge_logprobs(
    hidden_TD: Tensor,
    head_weight_VD: Tensor,
    edge_row_E: Tensor,
    edge_target_E: Tensor,
    temperature: float,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each edge's target, and the entropy of the distribution it was drawn from.

    A row that several edges share (the last token before a fork) goes through the vocabulary once. Backward computes
    each chunk of logits again instead of keeping it.

    Args:
        hidden_TD: float [T, D], the model's last hidden states.
        head_weight_VD: float [V, D], weight of the output layer, which must have no bias.
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
        head_weight_VD,
        edge_unique_E[order_E],
        edge_target_E[order_E],
        temperature,
        chunk_rows,
    )
    unsort_E = torch.empty_like(order_E).scatter_(0, order_E, torch.arange(len(order_E), device=order_E.device))
    return logprob_E.index_select(0, unsort_E), entropy_U.index_select(0, edge_unique_E)


class _ChunkedLogprobs(torch.autograd.Function):
    """U rows, E edges sorted by row: z = h W' / temperature, log-prob = z[target] - logsumexp(z), H = -sum p log p."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_UD: Tensor,
        weight_VD: Tensor,
        edge_row_E: Tensor,
        edge_target_E: Tensor,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_UD, weight_VD, edge_row_E, edge_target_E)
        ctx.temperature = temperature
        ctx.chunks = _chunks(edge_row_E, len(hidden_UD), chunk_rows)
        wide = _wide(hidden_UD.dtype)
        logprob_E = hidden_UD.new_empty(len(edge_row_E), dtype=wide)
        entropy_U = hidden_UD.new_empty(len(hidden_UD), dtype=wide)
        for rows, edges in ctx.chunks:
            logp_RV = _log_softmax(hidden_UD[rows], weight_VD, temperature)
            logprob_E[edges] = logp_RV[edge_row_E[edges] - rows.start, edge_target_E[edges]]
            entropy_U[rows] = -(logp_RV.exp() * logp_RV).sum(-1)
        return logprob_E, entropy_U

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dz = sum_e g_e (onehot_e - p) - g_H p (log p + H), then through the linear layer."""
        grad_logprob_E, grad_entropy_U = grads
        hidden_UD, weight_VD, edge_row_E, edge_target_E = ctx.saved_tensors
        wide = _wide(hidden_UD.dtype)
        grad_hidden_UD = torch.empty_like(hidden_UD)
        # Chunks are summed in the wide type: many small bfloat16 additions would lose the small ones.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        for rows, edges in ctx.chunks:
            logp_RV = _log_softmax(hidden_UD[rows], weight_VD, ctx.temperature)
            p_RV = logp_RV.exp()
            entropy_R1 = -(p_RV * logp_RV).sum(-1, keepdim=True)
            row_E = edge_row_E[edges] - rows.start
            grad_row_R1 = logp_RV.new_zeros(len(logp_RV), 1).index_add_(0, row_E, grad_logprob_E[edges, None])
            grad_z_RV = -p_RV * (grad_row_R1 + grad_entropy_U[rows, None] * (logp_RV + entropy_R1))
            grad_z_RV.index_put_((row_E, edge_target_E[edges]), grad_logprob_E[edges], accumulate=True)
            grad_z_RV /= ctx.temperature
            narrow_RV = grad_z_RV.to(weight_VD.dtype)
            grad_hidden_UD[rows] = narrow_RV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += narrow_RV.T @ hidden_UD[rows]
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_UD, grad_weight_VD, None, None, None, None


def _log_softmax(hidden_RD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits_RV = (hidden_RD @ weight_VD.T).to(_wide(hidden_RD.dtype))
    return (logits_RV / temperature).log_softmax(-1)


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
