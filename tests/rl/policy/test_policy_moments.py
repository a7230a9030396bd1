"""Weights and moments that go to files and come back; what two ranks do with them is in test_policy_sharding."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_cases
import torch
from rank_cases import MOMENTS, WEIGHTS, policy, stepped, store, take

from conf.errors import CheckpointError
from conf.schema import LearnerConfig
from rl.policy.model import TreePolicy
from rl.policy.moments import load_moments, load_weights, moment_tensors, weight_tensors
from rl.policy.optimizer import build_optimizer
from rl.policy.rank_files import Shards, begin_shards, save_shards
from rl.policy.ranks import Ranks

ALONE = Ranks.alone(torch.device("cpu"))


def optimizer_of(module: TreePolicy) -> torch.optim.Optimizer:
    return build_optimizer(module, LearnerConfig(), 1e-2, 1e-2)


def test_weights_and_moments_of_a_module_in_one_piece_round_trip(tmp_path: Path):
    module = policy()
    optimizer = optimizer_of(module)
    assert moment_tensors(module, optimizer) == {}, "nothing before the first step"
    stepped(module, optimizer, ALONE, 2)
    assert moment_tensors(module, optimizer)["model.model.norm.weight/step"] == 2
    store(module, optimizer, tmp_path, ALONE)
    stepped(module, optimizer, ALONE, 1)
    again = policy()
    resumed = optimizer_of(again)
    take(again, resumed, tmp_path, ALONE)
    stepped(again, resumed, ALONE, 1)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_what_is_written_is_what_there_was_when_the_copy_was_made(tmp_path: Path):
    weight = torch.arange(1e6)
    writing = begin_shards(tmp_path, {"weight": weight}, ALONE)
    weight.zero_()  # training goes on
    writing.result()
    assert torch.equal(Shards(tmp_path).whole(["weight"])["weight"], torch.arange(1e6))


def test_moments_of_a_run_that_never_stepped_leave_none(tmp_path: Path):
    module = policy()
    optimizer = optimizer_of(module)
    store(module, optimizer, tmp_path, ALONE)
    stepped(module, optimizer, ALONE, 1)
    before = {name: each.clone() for name, each in weight_tensors(module).items()}
    load_moments(module, optimizer, Shards(tmp_path), MOMENTS, ALONE)
    assert not optimizer.state and all(weight.grad is None for weight in module.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in weight_tensors(module).items())
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]


def test_adapters_are_loaded_without_the_frozen_model(tmp_path: Path):
    module = rank_cases.adapted_policy()
    adapters, frozen = weight_tensors(module), weight_tensors(module, trained=False)
    assert adapters and frozen and adapters.keys().isdisjoint(frozen)
    save_shards(tmp_path, {WEIGHTS + name: torch.ones_like(each) for name, each in adapters.items()}, ALONE)
    load_weights(module, Shards(tmp_path), WEIGHTS, ALONE)
    assert all((module.get_parameter(name) == 1).all() for name in adapters)


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Shards:
    save_shards(folder, tensors, ALONE)
    return Shards(folder)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    module, other = policy(), policy(tied=False)
    kept = {
        each: stored(tmp_path / name, {WEIGHTS + path: weight for path, weight in weight_tensors(each).items()})
        for name, each in (("tied", module), ("untied", other))
    }
    with pytest.raises(CheckpointError, match=r"1 weights it does not have, 0 it trains.*model\.lm_head\.weight"):
        load_weights(module, kept[other], WEIGHTS, ALONE)
    with pytest.raises(CheckpointError, match="0 weights it does not have, 1 it trains"):
        load_weights(other, kept[module], WEIGHTS, ALONE)
    wrong = {**weight_tensors(module), "model.model.norm.weight": torch.ones(3)}
    wrong_sizes = stored(tmp_path / "sizes", {WEIGHTS + path: weight for path, weight in wrong.items()})
    with pytest.raises(CheckpointError, match=r"1 of another shape \(first: model\.model\.norm\.weight\)"):
        load_weights(module, wrong_sizes, WEIGHTS, ALONE)


def test_moments_of_another_model_or_optimiser_are_refused(tmp_path: Path):
    module = policy()
    optimizer = optimizer_of(module)
    with pytest.raises(CheckpointError, match=r"moments of 1 parameters that this model does not have \(first: x\)"):
        load_moments(module, optimizer, stored(tmp_path / "x", {"moments/x/step": torch.ones(())}), MOMENTS, ALONE)
    other = stored(tmp_path / "other", {"moments/model.model.norm.weight/momentum": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"keeps \['momentum'\] of each parameter and this one \['exp_avg'"):
        load_moments(module, optimizer, other, MOMENTS, ALONE)


def test_a_folder_without_training_state_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no training state"):
        Shards(tmp_path)
