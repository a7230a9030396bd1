"""TP-GRPO's four cases: what a verdict on a step makes of the compared outcome of its trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from rl.credit.shapes import check_shapes


def four_cases(compared_P: Tensor, is_right_P: Tensor, right_share_P: Tensor, verdict_P: Tensor) -> Tensor:
    """Advantage of a step from its trajectory's compared outcome and the verdict on the step itself.

                              step good      step bad
        right trajectory      o              o - |v| * share      o the compared outcome, v the verdict
        wrong trajectory      0              o

    TP-GRPO (arXiv 2507.23317), whose r_c is |v| * share with |v| = alpha: the better the policy, the stricter. In a
    wrong trajectory a bad step is one that matches what its wrong answer rests on. The paper's placing of the rewards
    is not public; these four results are what it states. Our reading: a verdict of 0 is none, and leaves o.

    Args:
        compared_P: float [P], o, e.g. the z-score of the outcome in its group.
        is_right_P: bool [P], whether the trajectory is right.
        right_share_P: float [P], share of right trajectories in its group.
        verdict_P: float [P], above 0 good, below 0 bad.
    Returns: float [P].
    Raises: ShapeError.
    """
    check_shapes(compared_P=compared_P, is_right_P=is_right_P, right_share_P=right_share_P, verdict_P=verdict_P)
    of_right_P = compared_P + right_share_P * verdict_P.clamp(max=0)
    of_wrong_P = torch.where(verdict_P > 0, 0, compared_P)
    return torch.where(is_right_P, of_right_P, of_wrong_P)
