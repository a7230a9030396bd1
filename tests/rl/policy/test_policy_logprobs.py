from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl.policy.logprobs import edge_logprobs

ROWS = torch.tensor([4, 0, 2, 2, 2, 1, 4])
"""Row 2 predicts three edges, row 4 two, row 3 none; not in order."""
TARGETS = torch.tensor([3, 5, 1, 1, 0, 6, 2])
"""Two edges of row 2 even have the same target, as siblings that start with the same token do."""


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 4, dtype=dtype, requires_grad=True), torch.randn(7, 4, dtype=dtype, requires_grad=True)


def written_out(hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp[ROWS, TARGETS], -(logp.exp() * logp).sum(-1)[ROWS]


def test_equal_logits_are_a_fair_choice():
    logprob, entropy = edge_logprobs(torch.zeros(1, 2), torch.ones(8, 2), torch.tensor([0]), torch.tensor([3]), 1.0, 4)
    assert logprob.item() == pytest.approx(-math.log(8))
    assert entropy.item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunks_change_neither_values_nor_gradients(chunk_rows: int, temperature: float):
    hidden, weight = inputs()
    found = edge_logprobs(hidden, weight, ROWS, TARGETS, temperature, chunk_rows)
    expected = written_out(hidden, weight, temperature)
    torch.testing.assert_close(found, expected)
    mixing = torch.randn(2, len(ROWS), dtype=torch.float64)
    grads = torch.autograd.grad((torch.stack(found) * mixing).sum(), (hidden, weight))
    torch.testing.assert_close(grads, torch.autograd.grad((torch.stack(expected) * mixing).sum(), (hidden, weight)))


@pytest.mark.parametrize("chunk_rows", [1, 2, 64])
def test_gradients_agree_with_finite_differences(chunk_rows: int):
    def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return edge_logprobs(hidden, weight, ROWS, TARGETS, 0.7, chunk_rows)

    assert torch.autograd.gradcheck(both, inputs())


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(len(ROWS))))
def test_edges_may_come_in_any_order(order: list[int]):
    hidden, weight = inputs()
    logprob, entropy = edge_logprobs(hidden, weight, ROWS[order], TARGETS[order], 1.0, 2)
    expected_logprob, expected_entropy = written_out(hidden, weight, 1.0)
    torch.testing.assert_close(logprob, expected_logprob[order])
    torch.testing.assert_close(entropy, expected_entropy[order])


def test_narrow_weights_give_float32_log_probabilities_and_narrow_gradients():
    hidden, weight = inputs(torch.bfloat16)
    logprob, entropy = edge_logprobs(hidden, weight, ROWS, TARGETS, 1.0, 2)
    assert (logprob.dtype, entropy.dtype) == (torch.float32, torch.float32)
    logprob.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype is torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype is torch.bfloat16


def test_a_frozen_head_takes_no_gradient():
    hidden, weight = inputs()
    edge_logprobs(hidden, weight.detach(), ROWS, TARGETS, 1.0, 2)[0].sum().backward()
    assert hidden.grad is not None
