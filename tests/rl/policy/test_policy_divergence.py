from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from conf.schema import KlEstimator
from rl.policy.divergence import divergence, k3

nats = st.floats(-15, 15, allow_subnormal=False)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "estimator, expected",
    [
        (KlEstimator.k1, [0.3, -0.5]),
        (KlEstimator.k2, [0.045, 0.125]),
        (KlEstimator.k3, [0.040818, 0.148721]),
        (KlEstimator.abs, [0.3, 0.5]),
        (KlEstimator.k1_plus, [0.3, -0.5]),
        (KlEstimator.k3_plus, [0.040818, 0.148721]),
    ],
)
def test_published_values(estimator: KlEstimator, expected: list[float]):
    assert_close(divergence(tensor(-1, -2), tensor(-1.3, -1.5), estimator), tensor(*expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimator", list(KlEstimator))
def test_a_policy_at_its_reference_has_diverged_by_nothing(estimator: KlEstimator):
    assert divergence(tensor(-1.5), tensor(-1.5), estimator).item() == 0.0


@settings(max_examples=20, deadline=None)
@given(nats, nats)
def test_k3_is_never_negative_and_below_k2_exactly_where_the_policy_is_likelier(logprob: float, reference: float):
    found = {kind: divergence(tensor(logprob), tensor(reference), kind).item() for kind in KlEstimator}
    assert all(found[kind] >= -1e-12 for kind in (KlEstimator.k2, KlEstimator.k3, KlEstimator.abs))
    assert abs(found[KlEstimator.k1]) == found[KlEstimator.abs]
    if logprob >= reference:
        assert found[KlEstimator.k3] <= found[KlEstimator.k2] + 1e-12
    else:
        assert found[KlEstimator.k3] >= found[KlEstimator.k2] - 1e-12


def expected_gradient(estimator: KlEstimator, logit_V: Tensor, reference_V: Tensor) -> Tensor:
    """Mean over all tokens, by their chances, of the gradient of each one's estimate."""
    logprob_V = logit_V.log_softmax(0)
    estimate_V = divergence(logprob_V, reference_V, estimator)
    return torch.autograd.grad((logprob_V.exp().detach() * estimate_V).sum(), logit_V)[0]


def test_values_and_gradients_in_expectation():
    logit_V, reference_V = tensor(0.5, -0.3, 1.1).requires_grad_(), tensor(0.2, 0.4, -0.6).log_softmax(0)
    logprob_V = logit_V.log_softmax(0)
    kl = (logprob_V.exp() * (logprob_V - reference_V)).sum()
    reverse = (reference_V.exp() * (reference_V - logprob_V)).sum()
    for unbiased in (KlEstimator.k1, KlEstimator.k3, KlEstimator.k1_plus, KlEstimator.k3_plus):
        assert_close((logprob_V.exp() * divergence(logprob_V, reference_V, unbiased)).sum(), kl)
    (kl_grad,) = torch.autograd.grad(kl, logit_V, retain_graph=True)
    (reverse_grad,) = torch.autograd.grad(reverse, logit_V)
    for like_k2 in (KlEstimator.k2, KlEstimator.k1_plus, KlEstimator.k3_plus):
        assert_close(expected_gradient(like_k2, logit_V, reference_V), kl_grad)
    assert_close(expected_gradient(KlEstimator.k1, logit_V, reference_V), torch.zeros(3).double())
    assert_close(expected_gradient(KlEstimator.k3, logit_V, reference_V), reverse_grad)


def test_k3_pulls_the_policy_to_the_reference():
    logprob = tensor(-1.0, -3.0).requires_grad_()
    divergence(logprob, tensor(-2.0, -2.0), KlEstimator.k3).sum().backward()
    # 1 - e^(reference - logprob): positive where the policy is too likely
    assert_close(logprob.grad, tensor(1 - math.exp(-1), 1 - math.exp(1)))


def test_k3_by_hand_and_at_its_bound():
    # x = log 2: 2 - 1 - log 2
    assert k3(tensor(math.log(2))).item() == pytest.approx(1 - math.log(2))
    assert k3(tensor(1000.0)).item() == pytest.approx(math.exp(20) - 21)
