"""Which layout a run uses, and the proof that it computes what plain trajectories do."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from subprocess import SubprocessError

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from conf.errors import ConfigError
from conf.schema import Layout
from rl.policy.layouts.backend import text_config
from rl.policy.layouts.flex import LEAST_HEAD_DIM
from rl.policy.lora import base_causal_lm
from rl.policy.model import TreePolicy
from rl.policy.pack import PackedBatch, TreeCredit, pack, unique_tokens
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason

EXACT_LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Layers whose attention a plan computes: all of a path, or its last tokens."""

LARGEST_GAP_NATS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
LARGEST_GRADIENT_GAP = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}
"""By the type that is computed in. Rounding alone did 0.003 nats and 0.02 in 28 layers of bfloat16, 1e-7 and 1e-6 in
those of float32; a mask that took a pack for one sequence did 0.05 nats and 0.25, and more with fewer layers."""


def choose_layout(
    model: PreTrainedModel | PeftModel, requested: Layout, device: torch.device, num_processes: int
) -> tuple[Layout, str]:
    """The layout to train by, never `auto`, and why, for the log.

    Args:
        model: a causal LM or its backbone.
        num_processes: that share the model.
    Raises: ConfigError when the requested layout cannot work, or cannot train this model exactly.
    """
    obstacle = _obstacle(base_causal_lm(model))
    if requested is Layout.auto:
        return (Layout.trajectories, obstacle) if obstacle else _fastest(model, device)
    if requested is Layout.trajectories:
        return requested, "as configured"
    if obstacle:
        raise ConfigError(
            f"learner.layout={requested.value} trains steps that trajectories share once, which is inexact for this "
            f"model: {obstacle}. Use learner.layout=trajectories, or auto."
        )
    if requested in (Layout.flex, Layout.varlen) and device.type != "cuda":
        raise ConfigError(
            f"learner.layout={requested.value} needs a GPU and the learner's device is {device.type}, where its kernel "
            "cannot train. Use learner.layout=segments, or auto."
        )
    if requested is Layout.depth_first and num_processes > 1:
        raise ConfigError(
            f"learner.layout=depth_first with learner.num_processes={num_processes} would dead-lock: it calls the "
            "model once for each piece of a tree, and processes that share a model must all make the same calls. Use "
            "learner.num_processes=1, or learner.layout=auto with learner.gradient_checkpointing=true."
        )
    return requested, "as configured"


def _obstacle(model: PreTrainedModel) -> str | None:
    """What a packed tree would get wrong in this model; None when nothing is known."""
    config, backbone = text_config(model), model.base_model
    dropouts = {name: value for name, value in config.to_dict().items() if _is_dropout(name) and value}
    if dropouts:
        return f"it has dropout ({dropouts}), and a shared step would have one random mask in all trajectories"
    if getattr(config, "output_router_logits", False):
        return "it asks for a load-balancing loss (output_router_logits), which counts a token in every trajectory"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - EXACT_LAYER_TYPES)
    if others:
        return f"it has layers of type {others}, which take a pack for one sequence"
    if model._is_stateful:
        return f"{type(model).__name__} carries a state from token to token, across the branches of a pack"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} does not let transformers replace its attention"
    if "position_ids" not in signature(backbone.forward).parameters:
        return f"{type(model).__name__} takes no positions, and counts through the branches of a pack"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return f"{type(model).__name__} has attention sinks, which are not computed for packs"
    return None


def _is_dropout(key: str) -> bool:
    """True for a setting of dropout in what a causal LM runs; configs keep those of other heads beside it."""
    return "drop" in key and not key.startswith(("classif", "summary"))


def _fastest(model: PreTrainedModel | PeftModel, device: torch.device) -> tuple[Layout, str]:
    if device.type != "cuda":
        return Layout.segments, f"the fastest on {device.type}"
    config = text_config(base_causal_lm(model))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim < LEAST_HEAD_DIM:
        return Layout.segments, f"heads of {head_dim} are too small for the kernels of a GPU"
    failure = compiler_failure(device)
    if failure is None:
        return Layout.flex, "the fastest on a GPU"
    if getattr(config, "attn_logit_softcapping", None):
        return Layout.segments, f"nothing can be compiled here ({failure}), and varlen knows no cap of the scores"
    return Layout.varlen, f"nothing can be compiled here ({failure})"


def compiler_failure(device: torch.device) -> str | None:
    """Why torch cannot compile for a device, by trying; None when it can."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except (RuntimeError, OSError, SubprocessError) as error:
        return str(error).partition("\n")[0]
    return None


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """How far a layout is from plain trajectories on one batch."""

    gap_logprob: float
    """Mean absolute difference of the log-probabilities, in nats."""
    gap_gradient: float
    """Norm of the difference of the gradients, relative to the norm of the gradient."""
    passed: bool
    """Both are what rounding explains."""
    failure: str = ""
    """Why the layout could not compute this model at all."""

    def __str__(self) -> str:
        gaps = f"log-probabilities {self.gap_logprob:.2g} nats apart, gradients {self.gap_gradient:.2g} of their norm"
        return self.failure or gaps


def self_check(policy: TreePolicy, layout: Layout, batch: PackedBatch) -> SelfCheck:
    """Compare log-probabilities and gradients of a layout with those of plain trajectories.

    The gradient is that of the sum of all log-probabilities with signs drawn at random, so that no parts of it are
    alike and could stand in for each other. Gradients and random numbers are left as they were. Costs both passes, and
    the room of one more gradient. Where processes share the model, all call it with the same batch.

    Args:
        batch: a small one; see `smallest_forest`. It needs a path longer than a model's window to tell of windows.
    """
    signs = torch.Generator().manual_seed(0)
    sign_E = torch.randint(0, 2, batch.edge_row_E.shape, generator=signs).to(batch.edge_row_E.device) * 2 - 1
    weights = list(policy.parameters())
    kept = [weight.grad for weight in weights]
    devices = [batch.input_ids_T.device] if batch.input_ids_T.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            found = _measured(policy, layout, batch, sign_E)
            expected = _measured(policy, Layout.trajectories, batch, sign_E)
    except ConfigError as error:
        return SelfCheck(math.inf, math.inf, passed=False, failure=str(error))
    finally:
        for weight, grad in zip(weights, kept, strict=True):
            weight.grad = grad
    return _compared(found, expected)


@dataclass(frozen=True, slots=True)
class _Measured:
    logprob_E: Tensor
    grads: list[Tensor | None]
    dtype: torch.dtype
    """That the model computed in."""


def _measured(policy: TreePolicy, layout: Layout, batch: PackedBatch, sign_E: Tensor) -> _Measured:
    for weight in policy.parameters():
        weight.grad = None
    dtypes = []
    # A sharded model may compute in another type than that of its weights.
    hook = base_causal_lm(policy.model).base_model.register_forward_hook(
        lambda module, args, output: dtypes.append(output.last_hidden_state.dtype)
    )
    try:
        logprob_E = policy(batch, layout).logprob_E
        (logprob_E * sign_E).sum().backward()
    finally:
        hook.remove()
    return _Measured(logprob_E.detach(), [weight.grad for weight in policy.parameters()], dtypes[0])


def _compared(found: _Measured, expected: _Measured) -> SelfCheck:
    sums = torch.zeros(2, dtype=torch.float64, device=expected.logprob_E.device)
    for grad, expected_grad in zip(found.grads, expected.grads, strict=True):
        ours, theirs = _own_part(grad), _own_part(expected_grad)
        sums[0] += (ours - theirs).double().square().sum()
        sums[1] += theirs.double().square().sum()
    if dist.is_initialized():
        dist.all_reduce(sums)  # each process holds its shard of the gradients
    gap_gradient = (sums[0] / sums[1]).sqrt().item()
    gap_logprob = (found.logprob_E - expected.logprob_E).abs().mean().item()
    # NaN is in no limit.
    passed = gap_logprob <= LARGEST_GAP_NATS[expected.dtype] and gap_gradient <= LARGEST_GRADIENT_GAP[expected.dtype]
    return SelfCheck(gap_logprob, gap_gradient, passed)


def _own_part(grad: Tensor | None) -> Tensor:
    """This process's part of a gradient; 0 for a weight that got none."""
    if grad is None:
        return torch.zeros(())
    return grad.to_local() if isinstance(grad, DTensor) else grad


def smallest_forest(trees: Sequence[TreeCredit], max_tokens: int = 2048) -> list[TreeCredit]:
    """Something small to check a layout on: the smallest tree that forks.

    Where none of at most `max_tokens` does, the smallest of all if it fits, and a made-up tree of its prompt's tokens.

    Args:
        trees: at least one of them trains something.
    """
    # Without their trajectories and critic, so that they can be packed beside the made-up one.
    plain = [replace(credit, paths=[], tokens=None) for credit in trees if unique_tokens(credit)]
    plain.sort(key=unique_tokens)
    fitting = [credit for credit in plain if unique_tokens(credit) <= max_tokens]
    for credit in fitting:
        if len(pack([credit]).traj_ptr) > 2:  # more than one trajectory
            return [credit]
    return [*fitting[:1], _made_up(plain[0].tree.prompt.token_ids)]


def _made_up(token_ids: Sequence[int]) -> TreeCredit:
    """A tree with forks at its root and below it; every step is trained."""
    parents = [ROOT, 0, 0, 1, 1, ROOT]
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return draw.choices(token_ids, k=count)

    tree = Tree(prompt=Prompt(id="made up", token_ids=tuple(tokens(6)), question="", answer=""))
    for row, parent in enumerate(parents):
        ended = row not in parents
        tree.add(
            Node(
                parent=parent,
                action_ids=tokens(4 + row),
                action_logprobs=[0.0] * (4 + row),
                observation_ids=[] if ended else tokens(3),
                facts=StepFacts(kind=StepKind.answer if ended else StepKind.call),
                stop=StopReason.answered if ended else StopReason.continues,
                version=0,
            )
        )
    nothing = [0.0] * len(parents)
    return TreeCredit(tree=tree, w_pos=nothing, w_neg=nothing, w0=[1.0] * len(parents))
