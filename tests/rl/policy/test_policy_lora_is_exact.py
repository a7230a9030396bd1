"""Adapters and a value head learn from a packed forest what they would learn from its trajectories one by one."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from policy_trees import PairedTree, grown, paired, tiny
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from conf.schema import Layout, LoraConfig
from rl.policy.lora import base_causal_lm, with_lora
from rl.policy.model import TreePolicy
from rl.policy.pack import pack
from rollout.tree import ROOT

TEMPERATURE, RETURN, VALUE_COEF = 0.8, 0.3, 0.5
TARGETS = {
    "all-linear": ["all-linear"],
    "attention": ["q_proj", "v_proj"],
    "output layer too": ["all-linear", "lm_head"],
}


def adapted_policy(targets: list[str], dtype: torch.dtype, *, has_value_head: bool) -> TreePolicy:
    """A policy in the midst of training: neither B nor the value head is zero any more."""
    model = with_lora(tiny("qwen3", dtype, tied=False), LoraConfig(rank=3, alpha=6.0, targets=targets), seed=1)
    policy = TreePolicy(model, TEMPERATURE, has_value_head=has_value_head)
    torch.manual_seed(2)
    for name, weight in policy.named_parameters():
        if "lora_B" in name or "value_head" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return policy


def one_by_one(policy: TreePolicy, forest: Sequence[PairedTree]) -> Tensor:
    """The loss, each trajectory a plain sequence of its own behind transformers' own attention."""
    model = base_causal_lm(policy.model)
    loss = torch.zeros((), dtype=model.dtype)
    for each in forest:
        for leaf in sorted({leaf for _, leaf in each.pairs}):
            ids_1T = torch.tensor([each.tree.path_ids(leaf)])
            hidden_TD = model.base_model(input_ids=ids_1T).last_hidden_state[0]
            logp_TV = (model.lm_head(hidden_TD) / TEMPERATURE).log_softmax(-1)
            start = len(each.tree.prompt.token_ids)
            for row in each.tree.path(leaf):
                node = each.tree.nodes[row]
                rows = slice(start - 1, start - 1 + len(node.action_ids))
                weight, advantage = each.pairs[row, leaf]
                logprob = logp_TV[rows].gather(1, torch.tensor(node.action_ids)[:, None])
                loss = loss - weight * advantage * logprob.sum()
                if policy.value_head is not None:
                    error = policy.value_head(hidden_TD[rows])[:, 0] - RETURN
                    loss = loss + VALUE_COEF * weight * error.square().sum()
                start += len(node.action_ids) + len(node.observation_ids)
    return loss


def packed(policy: TreePolicy, forest: Sequence[PairedTree]) -> Tensor:
    """The same loss of one pack."""
    batch = pack([each.credit() for each in forest])
    output = policy(batch, Layout.segments)
    loss = -((batch.w_pos_E + batch.w_neg_E) * output.logprob_E).sum()
    if output.value_E is not None:
        loss = loss + VALUE_COEF * (batch.w0_E * (output.value_E - RETURN).square()).sum()
    return loss


def gradients(policy: TreePolicy, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def check_pack_equals_trajectories(policy: TreePolicy, forest: list[PairedTree], relative: float) -> None:
    plain = copy.deepcopy(policy)
    base_causal_lm(plain.model).set_attn_implementation("sdpa")
    check_gradients(gradients(policy, packed(policy, forest)), gradients(plain, one_by_one(plain, forest)), relative)


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """Per weight, against its largest gradient; weights that hardly move, against 1% of the largest of all."""
    largest = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        assert "lora_" in name or "value_head" in name
        scale = max(grad.abs().max().item(), 0.01 * largest)
        assert (found[name] - grad).abs().max().item() <= relative * scale, name


def drawn_forest(seed: int) -> list[PairedTree]:
    rng = random.Random(seed)
    shapes = [[rng.randint(ROOT, row - 1) for row in range(rng.randint(1, 7))] for _ in range(2)]
    sizes = [[(rng.randint(1, 4), rng.randint(0, 3)) for _ in parents] for parents in shapes]
    return [paired(grown(*shape, rng), rng) for shape in zip(shapes, sizes, strict=True)]


@pytest.fixture
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' norms round to float32 inside, where a sum of rounded gradients is not the rounded sum."""

    def forward(self: Qwen3RMSNorm, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize("has_value_head", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_learn_from_a_pack_as_from_its_trajectories_in_float64(targets: str, has_value_head: bool):
    policy = adapted_policy(TARGETS[targets], torch.float64, has_value_head=has_value_head)
    for seed in range(4):
        check_pack_equals_trajectories(policy, drawn_forest(seed), 1e-10)


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_learn_from_a_pack_as_from_its_trajectories_in_float32(targets: str):
    policy = adapted_policy(TARGETS[targets], torch.float32, has_value_head=True)
    for seed in range(4):
        check_pack_equals_trajectories(policy, drawn_forest(seed), 1e-5)


@pytest.mark.usefixtures("norms_in_float64")
def test_gradient_checkpointing_reaches_the_adapters_below_frozen_embeddings():
    policy = adapted_policy(["all-linear"], torch.float64, has_value_head=True).train()
    forest = drawn_forest(0)
    expected = gradients(policy, packed(policy, forest))
    base_causal_lm(policy.model).gradient_checkpointing_enable({"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in base_causal_lm(policy.model).base_model.layers)
    check_gradients(gradients(policy, packed(policy, forest)), expected, 1e-12)


def test_a_step_on_the_adapters_leaves_the_frozen_weights_alone_and_lowers_the_loss():
    policy = adapted_policy(["all-linear"], torch.float32, has_value_head=True)
    frozen = {name: weight.clone() for name, weight in policy.named_parameters() if not weight.requires_grad}
    forest = drawn_forest(1)
    loss = packed(policy, forest)
    loss.backward()
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight -= 1e-4 * weight.grad
    assert packed(policy, forest) < loss
    assert all(torch.equal(weight, frozen[name]) for name, weight in policy.named_parameters() if name in frozen)
