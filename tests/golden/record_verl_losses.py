"""Records what verl's own loss functions give, for tests/rl/policy/test_policy_loss_golden.py.

    pip install verl --no-deps; pip install --no-deps tensordict pyvers codetiming orjson
    python tests/golden/record_verl_losses.py

Only inputs and numbers are kept. verl must be importable; nothing of Grove is.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
from loss_inputs import loss_inputs
from verl.trainer.ppo.core_algos import agg_loss, compute_value_loss, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
CLIPS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}
NARROW = {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04, "clip_ratio_c": 3.0}
CORRECTIONS = {
    "token_truncate": ("token", 1.2),
    "token_mask": ("token", "0.8_1.2"),
    "sequence_truncate": ("sequence", 1.2),
    "sequence_mask": ("sequence", "0.6_1.2"),
}


def main() -> None:
    inputs = loss_inputs()
    data = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in inputs.items()}
    mask, cases = data["mask"], []

    def policy(
        kind: str, mode: str, clips: dict[str, float], weights: torch.Tensor | None = None, **case: object
    ) -> None:
        config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **clips)
        logprob = data["logprob"].clone().requires_grad_()
        loss, metrics = get_policy_loss_fn(kind)(
            data["old"], logprob, data["advantage"], mask, mode, config, rollout_is_weights=weights
        )
        record(kind, mode, loss, logprob, clips=clips, metrics=metrics, **case)

    def record(kind: str, mode: str, loss: torch.Tensor, leaf: torch.Tensor, **case: object) -> None:
        loss.backward()
        cases.append({"kind": kind, "mode": mode, "loss": loss.item(), "grad": leaf.grad.tolist(), **case})

    for mode in MODES:
        policy("vanilla", mode, CLIPS)
        policy("gpg", mode, CLIPS)
        policy("cispo", mode, CLIPS)
        policy("gspo", mode, NARROW)
    for name, (level, bounds) in CORRECTIONS.items():
        weights, _ = compute_rollout_correction_weights(data["old"] - data["engine"], mask, level, bounds)
        for kind, clips in (("vanilla", CLIPS), ("gspo", NARROW)):
            policy(kind, "token-mean", clips, weights, correction=name)
    for estimator in ("k1", "k2", "k3", "abs", "k1+", "k3+"):
        for mode in MODES[:2]:
            logprob = data["logprob"].clone().requires_grad_()
            loss = agg_loss(kl_penalty(logprob, data["reference"], estimator), mask, mode)
            record("kl", mode, loss, logprob, estimator=estimator)
    value = data["value"].clone().requires_grad_()
    loss, clip_share = compute_value_loss(value, data["target"], data["old_value"], mask, 0.2)
    record("value", "token-mean", loss, value, clip_share=float(clip_share))

    record_of = {"made by": f"verl {version('verl')}, by tests/golden/record_verl_losses.py", "inputs": inputs}
    lines = ",\n".join(json.dumps(case) for case in cases)
    text = json.dumps(record_of)[:-1] + f', "cases": [\n{lines}\n]}}\n'
    Path(__file__).with_name("verl_losses.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
