"""Records what TRL's own GRPO loss gives, for tests/rl/policy/test_policy_loss_golden.py.

    .venv/bin/python tests/golden/record_trl_losses.py

Only inputs and numbers are kept. TRL's loss is a method of its trainer, so it is called on a stand-in without a model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from loss_inputs import loss_inputs
from trl.trainer.grpo_trainer import GRPOTrainer

HORIZON = 6
CASES: list[dict[str, Any]] = [
    *({"loss_type": loss_type} for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo")),
    {"loss_type": "dapo", "delta": 3.0},
    {"loss_type": "dapo", "beta": 0.1},
    {"loss_type": "dr_grpo", "beta": 0.1, "corrected": True},
    {"loss_type": "cispo", "epsilon_high": 1.5},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
]


def main() -> None:
    inputs = loss_inputs()
    data = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in inputs.items()}
    lines = ",\n".join(json.dumps(case | recorded(data, **case)) for case in CASES)
    record_of = {"made by": f"trl {version('trl')}, by tests/golden/record_trl_losses.py", "inputs": inputs}
    text = json.dumps(record_of | {"horizon": HORIZON})[:-1] + f', "cases": [\n{lines}\n]}}\n'
    Path(__file__).with_name("trl_losses.json").write_text(text, encoding="utf-8")


def recorded(
    data: dict[str, torch.Tensor],
    loss_type: str,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    delta: float | None = None,
    beta: float = 0.0,
    corrected: bool = False,
    importance_sampling_level: str = "token",
) -> dict[str, Any]:
    logprob = data["logprob"].clone().requires_grad_()
    trainer = SimpleNamespace(
        loss_type=loss_type,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta=beta,
        importance_sampling_level=importance_sampling_level,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        max_completion_length=HORIZON,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprob, torch.zeros_like(logprob), None),
    )
    ids = torch.zeros(logprob.shape, dtype=torch.int64)
    batch = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
        "tool_mask": data["mask"],
        "advantages": data["sequence_advantage" if importance_sampling_level == "sequence" else "advantage"],
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["reference"],
        "num_items_in_batch": data["mask"].sum(),
        "importance_sampling_ratio": (data["old"] - data["engine"]).exp().clamp(max=1.2),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    loss.backward()
    return {"loss": loss.item(), "grad": logprob.grad.tolist()}


if __name__ == "__main__":
    main()
