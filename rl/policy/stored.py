"""A policy in files: what a checkpoint keeps of the learner. Nothing stored is executed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from conf.schema import Config, LoraConfig
from rl.policy.load import load_causal_lm
from rl.policy.lora import base_causal_lm, load_adapter, merged_weights, save_adapter
from rl.policy.model import TreeCritic, TreePolicy
from rl.policy.optimizer import VALUE_HEAD
from rl.policy.ranks import Ranks
from rl.policy.trained import Trained

MODEL = "model"
"""Folder of the policy inside a checkpoint; loads in transformers and vLLM as it is."""
ADAPTER = "adapter"
"""Folder of the adapters alone, as peft writes them."""
HEAD_FILE, CRITIC_FILE, OPTIMIZER_FILE = "value_head.safetensors", "critic.safetensors", "optimizer.pt"
POLICY, CRITIC = "policy", "critic"
"""Whose moments are which in OPTIMIZER_FILE."""
PREFIX = "model."
"""Before the Hugging Face name of every weight of a model without adapters, in a TreePolicy."""


def write_checkpoint(
    folder: Path,
    policy: Trained[TreePolicy],
    critic: Trained[TreeCritic] | None,
    cfg: Config,
    ranks: Ranks,
    tokenizer_path: str,
) -> None:
    """Write the policy as a Hugging Face folder, and adapters, value head, critic and moments. Collective."""
    weights, states = policy.weights(), {POLICY: policy.optimizer_state()}
    critic_weights: dict[str, Tensor] = {}
    if critic is not None:
        critic_weights, states[CRITIC] = critic.weights(), critic.optimizer_state()
    if ranks.rank != 0:
        return
    model = base_causal_lm(policy.module.model)
    model.save_pretrained(folder / MODEL, state_dict=plain_weights(weights, cfg.model.lora))
    AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(folder / MODEL)
    if cfg.model.lora.rank:
        save_adapter(policy.module.model, weights, folder / ADAPTER)
    heads = {name: weight for name, weight in weights.items() if name.startswith(VALUE_HEAD)}
    for path, tensors in ((folder / HEAD_FILE, heads), (folder / CRITIC_FILE, critic_weights)):
        if tensors:
            _write(path, tensors)
    torch.save(states, folder / OPTIMIZER_FILE)


def read_checkpoint(
    folder: Path, policy: Trained[TreePolicy], critic: Trained[TreeCritic] | None, cfg: Config, ranks: Ranks
) -> None:
    """Take back what `write_checkpoint` wrote. Collective; rank 0 reads.

    Raises: CheckpointError when it is of another model or another optimiser.
    """
    weights, critic_weights, states = {}, {}, {}
    if ranks.rank == 0:
        states = torch.load(folder / OPTIMIZER_FILE, weights_only=True, map_location="cpu")
        weights = _stored_weights(folder, cfg)
        critic_weights = load_file(folder / CRITIC_FILE) if critic is not None else {}
    policy.load(weights, states.get(POLICY, {}))
    if critic is not None:
        critic.load(critic_weights, states.get(CRITIC, {}))


def plain_weights(weights: dict[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Weights of the plain model by the names transformers has in memory: adapters merged, a value head left out."""
    if lora.rank:
        return merged_weights(weights, lora)
    return {name.removeprefix(PREFIX): weight for name, weight in weights.items() if name.startswith(PREFIX)}


def _stored_weights(folder: Path, cfg: Config) -> dict[str, Tensor]:
    heads = load_file(folder / HEAD_FILE) if (folder / HEAD_FILE).is_file() else {}
    if cfg.model.lora.rank:
        return load_adapter(folder / ADAPTER) | heads
    model = load_causal_lm(str(folder / MODEL), cfg.learner.weights_dtype)
    return {PREFIX + name: weight.detach() for name, weight in model.named_parameters()} | heads


def _write(path: Path, weights: dict[str, Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, partial, metadata={"format": "pt"})
    partial.replace(path)
