"""Estimates of a KL divergence from single samples (Schulman, "Approximating KL Divergence", 2020)."""

from __future__ import annotations

from torch import Tensor

from conf.schema import KlEstimator
from rl.policy.loss import MAX_LOG_RATIO


def k3(log_ratio_E: Tensor) -> Tensor:
    """e^x - 1 - x with x = log(p / q) of tokens that q drew: unbiased for KL(q || p), never negative.

    x counts as `MAX_LOG_RATIO` above that: finite, and without a gradient there, which would be e^20.

    Args:
        log_ratio_E: float [E].
    Returns: float [E], nats.
    """
    bounded_E = log_ratio_E.clamp(max=MAX_LOG_RATIO)
    return bounded_E.exp() - 1 - bounded_E


def divergence(logprob_E: Tensor, reference_E: Tensor, estimator: KlEstimator) -> Tensor:
    """KL(policy || reference) at each token that the policy drew, with d = log policy - log reference.

    k1        d                     unbiased value; its gradient is 0 in expectation, so as a loss it does nothing
    k2        d^2 / 2               biased value; the only one whose expected gradient is that of the KL
    k3        e^-d - 1 + d          unbiased value, never negative; its gradient, 1 - e^-d, is that of KL(reference ||
                                    policy) in expectation
    abs       |d|
    k1_plus   value of k1, gradient of k2
    k3_plus   value of k3, gradient of k2

    Of these only k3 grows exponentially; see `k3` for its bound. Trainers differ there: verl bounds d on both sides and
    the result at 10, TRL nothing.

    Args:
        logprob_E: float [E], of the policy.
        reference_E: float [E], of the frozen reference.
    Returns: float [E], nats.
    """
    difference_E = logprob_E - reference_E
    match estimator:
        case KlEstimator.k1:
            return difference_E
        case KlEstimator.k2:
            return difference_E.square() / 2
        case KlEstimator.k3:
            return k3(-difference_E)
        case KlEstimator.abs:
            return difference_E.abs()
        case KlEstimator.k1_plus:
            return _with_gradient_of_k2(difference_E, difference_E)
        case KlEstimator.k3_plus:
            return _with_gradient_of_k2(k3(-difference_E), difference_E)


def _with_gradient_of_k2(value_E: Tensor, difference_E: Tensor) -> Tensor:
    k2_E = difference_E.square() / 2
    return value_E.detach() + (k2_E - k2_E.detach())
