from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from other_models import other
from policy_trees import grown, paired, tiny
from rank_cases import run_ranks
from torch import Tensor

from conf.errors import ConfigError
from conf.schema import Layout
from rl.policy.layouts import choose
from rl.policy.layouts.choose import SelfCheck, choose_layout, compiler_failure, self_check, smallest_forest
from rl.policy.model import TreePolicy
from rl.policy.pack import PackedBatch, PathCredit, TokenCredit, TreeCredit, pack, unique_tokens
from rl.policy.ranks import Ranks
from rl.policy.sharding import shard
from rollout.tree import ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PACKED = [Layout.flex, Layout.segments, Layout.varlen, Layout.mask, Layout.depth_first]


def credit(parents: list[int], num_actions: int = 3, seed: int = 0) -> TreeCredit:
    rng = random.Random(seed)
    return paired(grown(parents, [(num_actions, 1)] * len(parents), rng), rng).credit()


FORKED = [ROOT, 0, 0, 1, 1]
CHAIN = [ROOT, 0]


def test_a_plain_model_on_a_cpu_is_packed_by_segments():
    assert choose_layout(tiny("qwen3"), Layout.auto, CPU, 1) == (Layout.segments, "the fastest on cpu")


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox"])
def test_learned_positions_and_dropout_of_unused_heads_are_no_obstacle(model_type: str):
    # gpt_neox and gpt2 configs hold classifier_dropout and summary_first_dropout of 0.1.
    assert choose_layout(other(model_type), Layout.auto, CPU, 1)[0] is Layout.segments


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_windows_and_caps_are_no_obstacle(family: str):
    assert choose_layout(tiny(family), Layout.auto, CPU, 1)[0] is Layout.segments


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("gpt2", {"attn_pdrop": 0.1}, "dropout ({'attn_pdrop': 0.1})"),
        ("qwen3_moe", {}, "load-balancing loss"),
        ("qwen3_next", {}, "layers of type ['linear_attention']"),
        ("mamba", {}, "layers of type ['linear_attention']"),
        ("rwkv", {}, "RwkvForCausalLM carries a state"),
        ("recurrent_gemma", {}, "RecurrentGemmaForCausalLM carries a state"),
        ("bloom", {}, "BloomForCausalLM does not let transformers replace its attention"),
        ("gptj", {}, "GPTJForCausalLM does not let"),
        ("gpt_oss", {}, "GptOssForCausalLM has attention sinks"),
    ],
)
def test_a_model_that_a_packed_tree_cannot_train_goes_by_trajectories(
    model_type: str, changes: dict[str, object], reason: str
):
    model = other(model_type, **changes)
    layout, why = choose_layout(model, Layout.auto, GPU, 1)
    assert layout is Layout.trajectories and reason in why
    assert choose_layout(model, Layout.trajectories, CPU, 4) == (Layout.trajectories, "as configured")
    for requested in PACKED:
        with pytest.raises(ConfigError) as raised:
            choose_layout(model, requested, CPU, 1)
        assert f"learner.layout={requested.value}" in str(raised.value) and reason in str(raised.value)
        assert "Use learner.layout=trajectories, or auto" in str(raised.value)


@pytest.mark.parametrize("requested", [Layout.segments, Layout.mask, Layout.depth_first, Layout.trajectories])
def test_a_layout_that_can_work_is_taken_as_configured(requested: Layout):
    assert choose_layout(tiny("qwen3"), requested, CPU, 1) == (requested, "as configured")


@pytest.mark.parametrize("requested", [Layout.flex, Layout.varlen])
def test_kernels_of_a_gpu_are_refused_on_a_cpu(requested: Layout):
    with pytest.raises(
        ConfigError, match=f"learner.layout={requested.value} needs a GPU and the learner's device is cpu"
    ):
        choose_layout(tiny("qwen3"), requested, CPU, 1)
    assert choose_layout(tiny("qwen3"), requested, GPU, 2)[0] is requested


def test_depth_first_is_refused_for_several_processes():
    with pytest.raises(ConfigError, match=r"learner\.num_processes=2 would dead-lock"):
        choose_layout(tiny("qwen3"), Layout.depth_first, CPU, 2)


@pytest.mark.parametrize(
    ("head_dim", "failure", "softcap", "expected"),
    [
        (16, None, None, Layout.flex),
        (16, "no compiler", None, Layout.varlen),
        (16, "no compiler", 50.0, Layout.segments),
        (8, None, None, Layout.segments),
    ],
)
def test_a_gpu_gets_the_fastest_layout_it_can_run(
    head_dim: int,
    failure: str | None,
    softcap: float | None,
    expected: Layout,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(choose, "compiler_failure", lambda device: failure)
    model = tiny("gemma2", head_dim=head_dim, attn_logit_softcapping=softcap)
    layout, reason = choose_layout(model, Layout.auto, GPU, 1)
    assert layout is expected
    assert failure is None or failure in reason


@pytest.mark.parametrize("error", [RuntimeError("no triton\nsome trace"), FileNotFoundError("no triton")])
def test_a_compiler_that_raises_is_none(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def compile_nothing(function: object) -> object:
        def call(values: Tensor) -> Tensor:
            raise error

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    assert compiler_failure(CPU) == "no triton"


def policy(dtype: torch.dtype = torch.float32, family: str = "qwen3") -> TreePolicy:
    return TreePolicy(tiny(family, dtype), 1.0).train()


def batch() -> PackedBatch:
    return pack(smallest_forest([credit(FORKED)]))


def all_see_all_before(right: PackedBatch) -> PackedBatch:
    """The mask of a layout that takes the pack for one sequence."""
    return replace(right, end_T=torch.full_like(right.end_T, len(right.end_T)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [Layout.segments, Layout.mask, Layout.depth_first])
def test_a_right_layout_passes(layout: Layout, dtype: torch.dtype):
    found = self_check(policy(dtype), layout, batch())
    assert found.passed, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_mask_fails_in_every_precision(dtype: torch.dtype):
    found = self_check(policy(dtype), Layout.segments, all_see_all_before(batch()))
    assert not found.passed and found.gap_logprob > 0.01 and found.gap_gradient > 0.15
    assert "nats apart" in str(found)


def test_a_branch_that_three_tokens_of_the_next_one_see_is_found_in_bfloat16():
    right = batch()
    first_end = int(right.end_T.min())
    wrong_T = right.end_T.where(right.end_T != first_end, first_end + 3)
    assert not self_check(policy(torch.bfloat16), Layout.mask, replace(right, end_T=wrong_T)).passed


def test_a_layout_that_cannot_compute_the_model_fails_with_its_reason():
    found = self_check(policy(), Layout.varlen, batch())
    assert not found.passed and "flash attention" in str(found)


def test_states_that_are_not_numbers_fail():
    broken = policy()
    with torch.no_grad():
        broken.model.base_model.norm.weight.fill_(torch.nan)
    assert not self_check(broken, Layout.segments, batch()).passed


def test_the_check_leaves_no_trace():
    checked = policy()
    first, second, *rest = checked.parameters()
    first.grad = torch.ones_like(first)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    self_check(checked, Layout.segments, batch())
    assert torch.rand(3).equal(expected)
    assert first.grad.equal(torch.ones_like(first))
    assert all(weight.grad is None for weight in (second, *rest))
    assert not checked.model.base_model._forward_hooks


def test_a_value_head_is_no_part_of_the_check():
    with_head = TreePolicy(tiny("qwen3"), 1.0, has_value_head=True)
    assert self_check(with_head, Layout.segments, batch()).passed


def test_numbers_are_told_with_their_units():
    assert str(SelfCheck(0.25, 0.5, passed=False)) == "log-probabilities 0.25 nats apart, gradients 0.5 of their norm"


def test_the_smallest_tree_that_forks_is_checked():
    chain, small, large = credit(CHAIN, 1), credit(FORKED, 2), credit(FORKED, 5)
    untrained = replace(small, w_pos=[0.0] * 5, w_neg=[0.0] * 5, w0=[0.0] * 5)
    (found,) = smallest_forest([large, untrained, chain, small])
    assert found.tree is small.tree


def test_without_a_fork_a_made_up_one_is_checked_beside_the_smallest_chain():
    short, long = credit(CHAIN, 1), credit(CHAIN, 5)
    first, made_up = smallest_forest([long, short])
    assert first.tree is short.tree
    assert len(pack([made_up]).traj_ptr) - 1 == 4
    assert set(pack([made_up]).input_ids_T.tolist()) <= set(short.tree.prompt.token_ids)


def test_without_anything_small_the_made_up_tree_is_checked_alone():
    (made_up,) = smallest_forest([credit(FORKED, 100)], max_tokens=200)
    assert unique_tokens(made_up) < 100 and self_check(policy(), Layout.segments, pack([made_up])).passed


def test_trees_with_a_critic_can_be_checked_beside_the_made_up_one():
    chain = credit(CHAIN, 2)
    path = PathCredit(leaf=1, advantage=[1.0, 1.0], weight=[1.0, 1.0])
    numbers = [[0.0] * 2] * 2
    chain = replace(chain, paths=[path], tokens=TokenCredit(advantage=numbers, value=numbers, target=numbers))
    checked = pack(smallest_forest([chain]))
    assert checked.value_E is None and checked.paths is None
    assert self_check(policy(), Layout.segments, checked).passed


def test_the_same_trees_give_the_same_check():
    found = [self_check(policy(), Layout.segments, pack(smallest_forest([credit(CHAIN)]))) for _ in range(2)]
    assert found[0] == found[1]


def sharded_check(ranks: Ranks) -> list[list[float]]:
    """A right and a wrong layout: both gaps, and whether it passed."""
    checked = policy()
    shard(checked, ranks, torch.float32, offload=False)
    found = [self_check(checked, Layout.segments, each) for each in (batch(), all_see_all_before(batch()))]
    return [[each.gap_logprob, each.gap_gradient, float(each.passed)] for each in found]


@pytest.mark.slow
def test_processes_that_share_a_model_agree_on_the_check(tmp_path: Path):
    first, second = run_ranks([sharded_check], tmp_path)["sharded_check"]
    assert first == second
    alone = self_check(policy(), Layout.segments, all_see_all_before(batch()))
    assert [passed for _, _, passed in first] == [1.0, 0.0]
    assert first[1][1] == pytest.approx(alone.gap_gradient, rel=1e-4)
