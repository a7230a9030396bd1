"""Records what verl's own advantage functions give, for tests/rl/credit/test_credit_verl_trl.py.

    pip install verl --no-deps; pip install --no-deps tensordict pyvers codetiming orjson
    python tests/golden/record_verl_advantages.py

Only inputs and numbers are kept. verl must be importable; nothing of Grove is.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from advantage_inputs import advantage_inputs
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

CASES: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {}),
    ("grpo", {"norm_adv_by_std_in_grpo": False}),
    ("grpo_vectorized", {}),
    ("rloo", {}),
    ("rloo_vectorized", {}),
    ("opo", {}),
    ("reinforce_plus_plus", {}),
    ("reinforce_plus_plus_baseline", {}),
    ("gdpo", {}),
    ("gae", {"gamma": 1.0, "lam": 1.0}),
    ("gae", {"gamma": 0.9, "lam": 0.8}),
]


def main() -> None:
    inputs = advantage_inputs()
    lines = ",\n".join(
        json.dumps({"kind": kind, **settings, **recorded(inputs, kind, settings)}) for kind, settings in CASES
    )
    made = {"made by": f"verl {version('verl')}, by tests/golden/record_verl_advantages.py", "inputs": inputs}
    text = json.dumps(made)[:-1] + f', "cases": [\n{lines}\n]}}\n'
    Path(__file__).with_name("verl_advantages.json").write_text(text, encoding="utf-8")


def recorded(inputs: dict[str, Any], kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The advantage of every token of every trajectory."""
    lengths = [sum(steps) for steps in inputs["steps"]]
    mask = torch.tensor([[float(token < length) for token in range(max(lengths))] for length in lengths]).double()
    rewards = at_the_end(inputs["reward"], lengths, mask)
    index = np.array(inputs["prompt"])
    arguments: dict[str, Any] = {"token_level_rewards": rewards, "response_mask": mask, **settings}
    if kind == "gae":
        values = torch.zeros_like(mask)
        for row, of_tokens in enumerate(inputs["value"]):
            values[row, : len(of_tokens)] = torch.tensor(of_tokens, dtype=mask.dtype)
        arguments["values"] = values
    elif kind == "reinforce_plus_plus":
        arguments["config"] = SimpleNamespace(gamma=1.0)
    else:
        arguments["index"] = index
    if kind == "gdpo":
        arguments["config"] = {"gdpo_reward_keys": ["reward", "other_reward"]}
        arguments["non_tensor_batch"] = {key: np.array(inputs[key]) for key in ("reward", "other_reward")}
        arguments["batch"] = {"prompts": torch.zeros(len(lengths), 0), "attention_mask": mask.long()}
    advantage, _ = get_adv_estimator_fn(kind)(**arguments)
    return {"advantage": [row[:length].tolist() for row, length in zip(advantage, lengths, strict=True)]}


def at_the_end(rewards: list[float], lengths: list[int], like: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(like)
    found[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = torch.tensor(rewards, dtype=like.dtype)
    return found


if __name__ == "__main__":
    main()
