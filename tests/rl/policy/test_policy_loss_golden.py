"""The same numbers through Grove, from pairs of steps and trajectories on, as verl and TRL gave for them.

`tests/golden/record_verl_losses.py` and `record_trl_losses.py` made the recorded losses and gradients; their headings
say how to run them. Each recorded sequence is a tree here, of one trajectory whose steps have one token.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_forests import credits_of, numbers, packed, totals_of
from policy_trees import PairedTree, grown
from torch import Tensor
from torch.testing import assert_close

from conf.schema import Aggregation, Correction, CriticConfig, KlEstimator, LossConfig, LossKind
from rl.policy.model import EdgeOutputs
from rl.policy.objective import Objective, objective
from rollout.tree import ROOT

GOLDEN = Path(__file__).parents[2] / "golden"
VERL = json.loads((GOLDEN / "verl_losses.json").read_text(encoding="utf-8"))
TRL = json.loads((GOLDEN / "trl_losses.json").read_text(encoding="utf-8"))
CLOSE = {"rtol": 1e-6, "atol": 1e-12}
"""verl adds 1e-8 to the number of tokens of a sequence."""

AGGREGATION = {
    "token-mean": Aggregation.token_mean,
    "seq-mean-token-mean": Aggregation.seq_mean_token_mean,
    "seq-mean-token-sum": Aggregation.seq_mean_token_sum,
    "seq-mean-token-sum-norm": Aggregation.seq_mean_token_sum_norm,
    # TRL's loss types
    "grpo": Aggregation.seq_mean_token_mean,
    "bnpo": Aggregation.token_mean,
    "dapo": Aggregation.token_mean,
    "cispo": Aggregation.token_mean,
    "dr_grpo": Aggregation.seq_mean_token_sum_norm,
}
KINDS = {"vanilla": LossKind.ppo_clip, "gpg": LossKind.reinforce, "cispo": LossKind.cispo, "gspo": LossKind.gspo}
CORRECTION_BOUNDS = {
    "token_truncate": (0.0, 1.2),
    "token_mask": (0.8, 1.2),
    "sequence_truncate": (0.0, 1.2),
    "sequence_mask": (0.6, 1.2),
}


class Recorded:
    """The recorded sequences as a forest, and their trained tokens, all sequences one after the other."""

    def __init__(self, inputs: dict[str, list[list[float]]], advantage: str) -> None:
        self.kept = torch.tensor(inputs["mask"]) > 0
        self.inputs = inputs
        self.forest = []
        for row, mask in enumerate(inputs["mask"]):
            columns = [column for column, kept in enumerate(mask) if kept]
            last = len(columns) - 1
            tree = grown([ROOT, *range(last)], [(1, 0)] * len(columns), random.Random(0))
            for node, column in zip(tree.nodes, columns, strict=True):
                node.action_logprobs = [inputs["engine"][row][column]]
            pairs = {(step, last): (1.0, inputs[advantage][row][column]) for step, column in enumerate(columns)}
            self.forest.append(PairedTree(tree, pairs))

    def flat(self, values: list[list[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[self.kept]

    def objective(self, cfg: LossConfig, horizon: int = 0, *, trains_policy: bool = True) -> tuple[Objective, Tensor]:
        """Of all sequences in one pack, and its gradient to the log-probabilities, or to the values."""
        table = numbers([each.tree for each in self.forest])
        table.logprob = self.flat(self.inputs["logprob"]).requires_grad_()
        table.value = self.flat(self.inputs["value"]).requires_grad_()
        table.old, table.reference = self.flat(self.inputs["old"]), self.flat(self.inputs["reference"])
        table.old_value, table.target = self.flat(self.inputs["old_value"]), self.flat(self.inputs["target"])
        table.token_advantage = torch.zeros_like(table.target)
        credits = credits_of(self.forest, cfg.aggregation, horizon, critic=None if trains_policy else table)
        batch, outputs = packed(credits, table, cfg)
        if trains_policy:
            outputs = EdgeOutputs(outputs.logprob_E, outputs.entropy_E)
        found = objective(outputs, batch, cfg, totals_of(credits), trains_policy=trains_policy)
        (grad,) = torch.autograd.grad(found.loss, table.logprob if trains_policy else table.value)
        return found, grad


def named(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values() if isinstance(value, str))


def check(recorded: Recorded, case: dict[str, Any], found: Objective, grad: Tensor) -> None:
    assert_close(found.loss.item(), case["loss"], **CLOSE)
    assert_close(grad, recorded.flat(case["grad"]), **CLOSE)


@pytest.mark.parametrize("case", [case for case in VERL["cases"] if case["kind"] in KINDS], ids=named)
def test_policy_losses_of_verl(case: dict[str, Any]):
    recorded = Recorded(VERL["inputs"], "advantage")
    low, high = CORRECTION_BOUNDS.get(case.get("correction", ""), (0.0, 2.0))
    cfg = LossConfig(
        kind=KINDS[case["kind"]],
        aggregation=AGGREGATION[case["mode"]],
        clip_low=case["clips"]["clip_ratio_low"],
        clip_high=case["clips"]["clip_ratio_high"],
        dual_clip=case["clips"]["clip_ratio_c"],
        correction=Correction(case.get("correction", "none")),
        correction_min=low,
        correction_max=high,
    )
    found, grad = recorded.objective(cfg, horizon=len(VERL["inputs"]["mask"][0]))
    check(recorded, case, found, grad)
    if case["kind"] == "vanilla" and case["mode"] == "token-mean" and "correction" not in case:
        shares = case["metrics"]["actor/pg_clipfrac"], case["metrics"]["actor/pg_clipfrac_lower"]
        assert found.parts["loss/clip_share"] == pytest.approx(sum(shares))


@pytest.mark.parametrize("case", [case for case in VERL["cases"] if case["kind"] == "kl"], ids=named)
def test_divergences_of_verl(case: dict[str, Any]):
    # Without advantages only the KL is left.
    nothing = [[0.0] * len(row) for row in VERL["inputs"]["mask"]]
    recorded = Recorded(VERL["inputs"] | {"nothing": nothing}, "nothing")
    cfg = LossConfig(
        aggregation=AGGREGATION[case["mode"]],
        kl_coef=1.0,
        kl_estimator=KlEstimator(case["estimator"].replace("+", "_plus")),
    )
    found, grad = recorded.objective(cfg)
    check(recorded, case, found, grad)


def test_the_value_loss_of_verl():
    (case,) = [case for case in VERL["cases"] if case["kind"] == "value"]
    recorded = Recorded(VERL["inputs"], "advantage")
    found, grad = recorded.objective(LossConfig(critic=CriticConfig(clip=0.2)), trains_policy=False)
    check(recorded, case, found, grad)
    assert found.parts["loss/value_clip_share"] == pytest.approx(case["clip_share"])


@pytest.mark.parametrize("case", TRL["cases"], ids=named)
def test_policy_losses_of_trl(case: dict[str, Any]):
    of_sequences = "importance_sampling_level" in case
    recorded = Recorded(TRL["inputs"], "sequence_advantage" if of_sequences else "advantage")
    cfg = LossConfig(
        aggregation=AGGREGATION[case["loss_type"]],
        clip_low=case.get("epsilon_low", 0.2),
        clip_high=case.get("epsilon_high", 0.28),
        dual_clip=case.get("delta", 0.0),
        kl_coef=case.get("beta", 0.0),
        correction=Correction.token_truncate if "corrected" in case else Correction.none,
        correction_max=1.2,
    )
    if case["loss_type"] == "cispo":  # the bound itself, and none below
        cfg.kind, cfg.clip_low, cfg.clip_high = LossKind.cispo, 1.0, case["epsilon_high"] - 1
    elif of_sequences:
        cfg.kind = LossKind.gspo
    found, grad = recorded.objective(cfg, horizon=TRL["horizon"])
    check(recorded, case, found, grad)
