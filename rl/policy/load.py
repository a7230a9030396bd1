"""Makes the modules that a learner trains: the policy with its adapters or value head, a critic, a frozen reference."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.schema import Config, CriticKind
from rl.policy.logprobs import require_known_head
from rl.policy.lora import base_causal_lm, with_lora
from rl.policy.model import TreeCritic, TreePolicy
from rollout.seeds import derive_seed


def load_policy(cfg: Config, path: str, device: torch.device) -> TreePolicy:
    """The policy as the config wants it trained: weights in learner.weights_dtype, a frozen base in model.dtype.

    Raises: ConfigError for adapters that fit no layer, or an output layer whose log-probabilities we cannot compute.
    """
    model = load_causal_lm(path, cfg.model.dtype if cfg.model.lora.rank else cfg.learner.weights_dtype)
    require_known_head(model)
    if cfg.model.lora.rank:
        model = with_lora(model, cfg.model.lora, derive_seed(cfg.seed, "lora"))
    if cfg.learner.gradient_checkpointing:
        checkpoint_activations(base_causal_lm(model))
    has_value_head = cfg.loss.critic.kind is CriticKind.value_head
    policy = TreePolicy(model, cfg.rollout.temperature, has_value_head=has_value_head)
    return policy.to(device).train()


def load_reference(cfg: Config, path: str, device: torch.device) -> TreePolicy:
    """The first weights, frozen, in model.dtype."""
    model = load_causal_lm(path, cfg.model.dtype)
    return TreePolicy(model, cfg.rollout.temperature).requires_grad_(False).to(device).eval()


def load_critic(cfg: Config, path: str, device: torch.device) -> TreeCritic:
    """A model whose output layer is one number, 0 everywhere at first."""
    model = load_causal_lm(path, cfg.learner.weights_dtype)
    if cfg.learner.gradient_checkpointing:
        checkpoint_activations(model)
    return TreeCritic(model).to(device).train()


def load_causal_lm(path: str, dtype: str) -> PreTrainedModel:
    """A Hugging Face causal LM; the layout chooses its attention."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Compute activations again in backward instead of keeping them; with frozen embeddings too."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
