"""Records the advantages that TRL's GRPO trainer gives, for tests/rl/credit/test_credit_verl_trl.py.

    .venv/bin/python tests/golden/record_trl_advantages.py

Only inputs and numbers are kept. TRL has no advantage function: its trainer computes them after generating. So a
trainer with a tiny random model generates what it likes, and its reward functions say what was agreed.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from advantage_inputs import GROUP_SIZES, advantage_inputs
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from trl import GRPOConfig, GRPOTrainer

GROUPS = (0, 1)
"""TRL wants groups of one size."""
CASES: list[dict[str, Any]] = [
    *(
        {"scale_rewards": scale, "multi_objective_aggregation": "sum_then_normalize"}
        for scale in ("group", "batch", "none")
    ),
    {"scale_rewards": "group", "multi_objective_aggregation": "normalize_then_sum"},
]


def main() -> None:
    inputs = advantage_inputs()
    cases = [
        {**case, "rewards": names, "advantage": recorded(inputs, names, **case)}
        for case in CASES
        for names in chosen(case)
    ]
    made = {
        "made by": f"trl {version('trl')}, by tests/golden/record_trl_advantages.py",
        "inputs": inputs,
        "groups": GROUPS,
    }
    lines = ",\n".join(map(json.dumps, cases))
    text = json.dumps(made)[:-1] + f', "cases": [\n{lines}\n]}}\n'
    Path(__file__).with_name("trl_advantages.json").write_text(text, encoding="utf-8")


def chosen(case: dict[str, Any]) -> list[list[str]]:
    both = ["reward", "other_reward"]
    return [both] if case["multi_objective_aggregation"] == "normalize_then_sum" else [["reward"], both]


def recorded(inputs: dict[str, Any], names: list[str], **settings: Any) -> list[float]:
    """One advantage for each trajectory of the chosen groups."""
    rows = [row for row, group in enumerate(inputs["prompt"]) if group in GROUPS]
    asked = [{"prompt": f"q{inputs['prompt'][row]}", **{name: inputs[name][row] for name in names}} for row in rows]
    with TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=tiny_model(),
            reward_funcs=[named(name) for name in names],
            args=GRPOConfig(
                output_dir=folder,
                num_generations=GROUP_SIZES[0],
                per_device_train_batch_size=len(rows),
                max_completion_length=2,
                use_cpu=True,
                report_to=[],
                **settings,
            ),
            train_dataset=Dataset.from_list(asked),
            processing_class=tiny_tokenizer(),
        )
        trainer.model.train()
        return trainer._generate_and_score_completions(asked)["advantages"].tolist()


def named(name: str) -> Any:
    def reward(**columns: Any) -> list[float]:
        return columns[name]

    reward.__name__ = name
    return reward


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<end>": 0, "q0": 1, "q1": 2, "a": 3}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def tiny_model() -> Any:
    return AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=4,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


if __name__ == "__main__":
    main()
