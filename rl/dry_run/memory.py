"""How much memory each process of a run needs, from the model's config alone: no weight is loaded.

Numbers are bytes. They hold for the tensors that the arithmetic names; CUDA's own context (about half a GiB), kernels'
workspaces and fragmentation come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conf.check_machine import DTYPE_BYTES
from conf.schema import Config, CriticKind, EngineKind, ModelKind, OptimizerKind, PrmKind
from rl.policy.model import HEAD_CHUNK_LOGITS

FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A model in numbers."""

    parameters: int
    """All of them, a tied output layer once."""
    block_parameters: int
    """Of one transformer block, the largest."""
    adapter_parameters: int
    """Of the LoRA adapters that the config asks for; 0 without."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the feed-forward layer that one token passes through; of a mixture, of all experts it goes to."""
    vocabulary: int
    normalises_heads: bool = False
    """Whether queries and keys are normalised, as Qwen3 does."""


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of process: how many there are, and what each holds."""

    name: str
    num: int
    bytes_of: dict[str, int]
    """What for -> bytes."""
    note: str = ""

    @property
    def total(self) -> int:
        """Bytes of one such process."""
        return sum(self.bytes_of.values())


def memory(cfg: Config, policy: Sizes, *, on_gpu: bool, gpu_bytes: int = 0) -> list[Part]:
    """Every kind of process that holds a model of the policy's size.

    Args:
        cfg: the run.
        policy: of the model at model.path; critic, reference and process reward model are taken to be as large.
        on_gpu: whether the processes have GPUs.
        gpu_bytes: memory of one GPU, where known: it bounds an engine's cache.
    """
    parts = [learner_part(cfg, policy, on_gpu=on_gpu), engine_part(cfg, policy, on_gpu=on_gpu, gpu_bytes=gpu_bytes)]
    if cfg.prm.kind is not PrmKind.none:
        parts.append(prm_part(cfg, policy, on_gpu=on_gpu))
    return parts


def learner_part(cfg: Config, sizes: Sizes, *, on_gpu: bool) -> Part:
    """One learner process: its share of weights, gradients and moments, and what one pack of trees takes."""
    learner, ranks = cfg.learner, cfg.learner.num_processes
    kept, computed = DTYPE_BYTES[learner.weights_dtype], DTYPE_BYTES[cfg.model.dtype]
    is_sharded = ranks > 1 or kept != computed or learner.offload
    trained = sizes.adapter_parameters or sizes.parameters
    frozen = sizes.parameters if sizes.adapter_parameters else 0
    waits_on_host = learner.offload and on_gpu
    found = {
        "weights": 0 if waits_on_host else (trained * kept + frozen * computed) // ranks,
        "gradients": 0 if waits_on_host else trained * kept // ranks,
        "optimizer": 0 if waits_on_host else moments_bytes(cfg, trained, kept) // ranks,
        "activations": activation_bytes(
            sizes, learner.pack_tokens, computed, recomputes=learner.gradient_checkpointing
        ),
        "logits": logit_bytes(sizes, "cuda" if on_gpu else "cpu", learner.pack_tokens),
    }
    if is_sharded:
        # Everything outside of the blocks is whole while the model runs; of the blocks this one and the next.
        whole = sizes.parameters - sizes.layers * sizes.block_parameters + 2 * sizes.block_parameters
        found["whole layers"] = whole * computed + sizes.block_parameters * FLOAT32
    if cfg.loss.critic.kind is CriticKind.model:
        found["critic"] = (2 * sizes.parameters * kept + moments_bytes(cfg, sizes.parameters, kept)) // ranks
    if cfg.loss.kl_coef > 0 and not cfg.model.lora.rank:
        found["reference"] = sizes.parameters * computed
    return Part("learner", ranks, found, "waits in the host's memory: weights, gradients, moments" * waits_on_host)


def prm_part(cfg: Config, sizes: Sizes, *, on_gpu: bool) -> Part:
    """The run's own process reward model, trained as the policy is, on one process."""
    kept, computed = DTYPE_BYTES[cfg.learner.weights_dtype], DTYPE_BYTES[cfg.model.dtype]
    recomputes = cfg.learner.gradient_checkpointing
    found = {
        "weights": sizes.parameters * kept,
        "gradients": sizes.parameters * kept,
        "optimizer": moments_bytes(cfg, sizes.parameters, kept),
        "activations": activation_bytes(sizes, cfg.learner.pack_tokens, computed, recomputes=recomputes),
    }
    if cfg.prm.kind is PrmKind.implicit:
        found["reference"] = sizes.parameters * computed
        found["logits"] = logit_bytes(sizes, "cuda" if on_gpu else "cpu", cfg.learner.pack_tokens)
    return Part("prm", 1, found)


def engine_part(cfg: Config, sizes: Sizes, *, on_gpu: bool, gpu_bytes: int) -> Part:
    """One engine, on each of the GPUs that it spans: its share of the weights, and the cache of keys and values."""
    rollout, spans = cfg.rollout, cfg.rollout.tensor_parallel_size
    weights = sizes.parameters * DTYPE_BYTES[cfg.model.dtype] // spans
    of_token = cache_bytes(sizes, DTYPE_BYTES[cfg.model.dtype]) / spans
    if on_gpu:
        cache = max(0, int(gpu_bytes * rollout.gpu_memory_share) - weights)
    elif rollout.engine is EngineKind.vllm:
        cache = rollout.kv_cache_mib * 2**20
    else:  # transformers keeps that of the batch that runs, at most as many paths as run at once
        cache = int(of_token * rollout.max_context_tokens * rollout.max_running_requests)
    fits = int(cache / of_token / rollout.max_context_tokens)
    note = f"{of_token:,.0f} bytes a token: {fits:,} paths of {rollout.max_context_tokens:,} tokens fit"
    if on_gpu and not gpu_bytes:
        note = f"{of_token:,.0f} bytes a token; the cache takes what rollout.gpu_memory_share leaves beside the weights"
    return Part("engine", rollout.num_workers * spans, {"weights": weights, "cache": cache}, note)


def moments_bytes(cfg: Config, parameters: int, kept: int) -> int:
    """AdamW's two moments of each trained weight."""
    of_moment = 1 if cfg.learner.optimizer is OptimizerKind.adamw_8bit else kept
    return 2 * parameters * of_moment


def cache_bytes(sizes: Sizes, computed: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * computed


def activation_bytes(sizes: Sizes, tokens: int, computed: int, *, recomputes: bool) -> int:
    """What backward needs of one pack: every layer's, or with gradient checkpointing each layer's input and one layer's
    all."""
    of_layer = layer_bytes(sizes, computed)
    if recomputes:
        return tokens * (sizes.layers * sizes.hidden * computed + of_layer)
    return tokens * sizes.layers * of_layer


def layer_bytes(sizes: Sizes, computed: int) -> int:
    """What backward needs of one token in one layer.

    A normalisation keeps its input, in float32, and what comes out before and after its weight; attention keeps
    queries, keys, values and its output; a gated feed-forward layer its two branches, the gate's activation and their
    product.
    """
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    norms = 2 * sizes.hidden * (FLOAT32 + 2 * computed)
    if sizes.normalises_heads:
        norms += (queries + keys) * (FLOAT32 + computed)
    attention = (2 * queries + 2 * keys) * computed
    return norms + attention + 4 * sizes.intermediate * computed


def logit_bytes(sizes: Sizes, device: str, tokens: int) -> int:
    """Logits, probabilities and their gradient of one chunk of rows, and the output layer's gradient, in float32."""
    rows = min(tokens, max(1, HEAD_CHUNK_LOGITS[device] // sizes.vocabulary))
    return (3 * rows + sizes.hidden) * sizes.vocabulary * FLOAT32


def sizes_of(config: Any, cfg: Config) -> Sizes:
    """A model's numbers, counted on a model of this config without memory behind it.

    Args:
        config: a transformers config of a causal LM.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    blocks = _blocks(model)
    heads = text.num_attention_heads
    experts = getattr(text, "num_experts_per_tok", None) or 0
    width = experts * (getattr(text, "moe_intermediate_size", None) or 0) or text.intermediate_size
    return Sizes(
        parameters=_count(model),
        block_parameters=max(map(_count, blocks), default=0),
        adapter_parameters=adapter_parameters(model, cfg),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=width,
        vocabulary=text.vocab_size,
        normalises_heads=any(name.endswith("q_norm") for name, _ in model.named_modules()),
    )


def adapter_parameters(model: Any, cfg: Config) -> int:
    """Of LoRA: rank x (in + out) of every layer that gets an adapter."""
    from torch import nn

    lora, head = cfg.model.lora, model.get_output_embeddings()
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}
    wanted: Sequence[str] = lora.targets
    chosen = [
        part
        for name, part in linear.items()
        if "all-linear" in wanted or any(name == each or name.endswith(f".{each}") for each in wanted)
    ]
    return lora.rank * sum(part.in_features + part.out_features for part in chosen)


def _blocks(model: Any) -> list[Any]:
    names = set(model._no_split_modules or ())
    return [part for part in model.modules() if type(part).__name__ in names]


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def reward_model_kinds(cfg: Config) -> dict[str, ModelKind]:
    """Models under rewards.models that the run loads itself, and that some source asks."""
    asked = {source.model for source in cfg.rewards.sources.values()}
    return {
        name: model.kind
        for name, model in cfg.rewards.models.items()
        if name in asked and model.kind is not ModelKind.endpoint
    }
