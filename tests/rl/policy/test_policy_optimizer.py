from __future__ import annotations

import sys

import pytest
import torch
from policy_trees import tiny
from rank_cases import policy
from torch import nn

from conf.errors import ConfigError
from conf.schema import LearnerConfig, OptimizerKind
from rl.policy.optimizer import build_optimizer


def names_by_group(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[float, float], set[str]]:
    """Names of the parameters by (rate, decay) of their group."""
    name_of = {parameter: name for name, parameter in module.named_parameters()}
    return {
        (group["lr"], group["weight_decay"]): {name_of[parameter] for parameter in group["params"]}
        for group in optimizer.param_groups
    }


def test_norms_and_biases_are_not_decayed_and_a_value_head_has_its_own_rate():
    module = policy(has_value_head=True)
    groups = names_by_group(module, build_optimizer(module, LearnerConfig(weight_decay=0.1), 1e-3, 1e-2))
    assert groups.keys() == {(1e-3, 0.1), (1e-3, 0.0), (1e-2, 0.1), (1e-2, 0.0)}
    assert groups[1e-2, 0.1] == {"value_head.weight"} and groups[1e-2, 0.0] == {"value_head.bias"}
    assert all("norm" in name for name in groups[1e-3, 0.0])
    assert sum(map(len, groups.values())) == len(list(module.parameters()))


def test_the_first_rate_is_the_modules_own():
    assert build_optimizer(policy(has_value_head=True), LearnerConfig(), 1e-3, 1e-2).param_groups[0]["lr"] == 1e-3


def test_frozen_weights_are_left_out():
    module = policy().requires_grad_(False)
    norm = module.get_parameter("model.model.norm.weight").requires_grad_(True)
    groups = build_optimizer(module, LearnerConfig(), 1e-3, 1e-3).param_groups
    assert [group["params"] for group in groups] == [[norm]]


def test_the_configured_betas_are_used():
    optimizer = build_optimizer(policy(), LearnerConfig(betas=[0.8, 0.99]), 1e-3, 1e-3)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.99)}


def test_8_bits_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"adamw_8bit needs the package torchao.*pip install torchao"):
        build_optimizer(policy(), LearnerConfig(optimizer=OptimizerKind.adamw_8bit), 1e-3, 1e-3)


def test_8_bits_step_almost_as_32_do_and_take_a_rate_that_changes():
    pytest.importorskip("torchao")
    found = []
    for kind in OptimizerKind:
        model = tiny("qwen3", hidden_size=64, intermediate_size=128)
        optimizer = build_optimizer(model, LearnerConfig(optimizer=kind, weight_decay=0.1), 1e-2, 1e-2)
        for step in range(3):
            torch.manual_seed(step)
            for weight in model.parameters():
                weight.grad = 1.0 + 0.1 * torch.randn_like(weight)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2 / 3] * 2
        found.append([weight.detach().clone() for weight in model.parameters()])
    start = tiny("qwen3", hidden_size=64, intermediate_size=128).parameters()
    for wide, narrow, first in zip(*found, start, strict=True):
        moved = (wide - first).abs().max()
        torch.testing.assert_close(narrow, wide, rtol=0, atol=0.05 * moved.item())
    large = max(model.parameters(), key=torch.numel)
    assert optimizer.state[large]["exp_avg"].codes.dtype == torch.uint8
