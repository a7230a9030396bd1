from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from policy_trees import KeepsFloat64, PairedTree, drawn_forest, forests, grown, paired, tiny
from torch import Tensor
from transformers import PreTrainedModel

from conf.schema import Layout
from rl.policy.layouts.depth_first import depth_first_hidden
from rl.policy.layouts.hidden import tree_hidden
from rl.policy.layouts.trajectories import trajectory_hidden
from rl.policy.model import TreePolicy
from rl.policy.pack import PackedBatch, pack
from rl.policy.ranks import Ranks
from rl.policy.sharding import shard
from rollout.tree import ROOT


def packed(forest: list[PairedTree], pad_multiple: int = 1) -> PackedBatch:
    return pack([each.credit() for each in forest], pad_multiple)


def fork(num_actions: tuple[int, int, int] = (2, 2, 2)) -> PairedTree:
    """A prompt of 3 tokens, a step, and two steps behind it, without observations."""
    rng = random.Random(0)
    return paired(grown([ROOT, 0, 0], [(count, 0) for count in num_actions], rng), rng)


def gradients(model: PreTrainedModel, hidden_TD: Tensor, num_tokens: int) -> list[Tensor]:
    """Of a sum in which every entry of a real token has another weight."""
    model.zero_grad()
    draw = torch.Generator().manual_seed(0)
    weights_TD = torch.randn(hidden_TD.shape, generator=draw, dtype=torch.float64).to(hidden_TD.dtype)
    (hidden_TD * weights_TD)[:num_tokens].sum().backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def check_equal(model: PreTrainedModel, batch: PackedBatch, cut_tokens: int, relative: float) -> None:
    """States and gradients against those of the trajectories one by one."""
    expected_TD = trajectory_hidden(model.base_model, batch).hidden_TD
    expected = gradients(model, expected_TD, batch.num_tokens)
    hidden_TD = depth_first_hidden(model.base_model, batch, cut_tokens)
    found = gradients(model, hidden_TD, batch.num_tokens)
    assert (hidden_TD - expected_TD).norm() <= relative * expected_TD.norm()
    largest = max(grad.norm() for grad in expected)
    for grad, expected_grad in zip(found, expected, strict=True):
        assert (grad - expected_grad).norm() <= relative * max(expected_grad.norm(), 0.01 * largest)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "mixtral"])
def test_depth_first_trains_as_the_trajectories_do_in_float32(family: str):
    model = tiny(family)
    for seed, cut_tokens in enumerate((512, 3, 1)):
        check_equal(model, packed(drawn_forest(seed)), cut_tokens, 1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_depth_first_trains_as_the_trajectories_do_in_float64(family: str):
    model = tiny(family, torch.float64)
    forward = model.base_model.forward

    def forward_in_float64(**inputs: object) -> object:
        with KeepsFloat64():  # inside backward too, which knows nothing of a mode around it
            return forward(**inputs)

    model.base_model.forward = forward_in_float64

    @settings(max_examples=5, deadline=None)
    @given(forests(max_trees=2, max_steps=5), st.integers(1, 12))
    def check(forest: list[PairedTree], cut_tokens: int) -> None:
        check_equal(model, packed(forest), cut_tokens, 1e-10)

    check()


def test_a_window_of_one_token_lets_no_piece_see_another():
    check_equal(tiny("mistral", sliding_window=1), packed([fork()]), 2, 1e-5)


def calls(model: PreTrainedModel, batch: PackedBatch, cut_tokens: int) -> tuple[list[int], list[int]]:
    """First token of each call's piece, forward and then backward."""
    starts: list[int] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: starts.append(kwargs["tree_plan"].piece.start), with_kwargs=True
    )
    hidden_TD = depth_first_hidden(model.base_model, batch, cut_tokens)
    num_forward = len(starts)
    hidden_TD.sum().backward()
    hook.remove()
    return starts[:num_forward], starts[num_forward:]


def test_pieces_before_a_fork_are_computed_on_the_way_down_and_all_of_them_on_the_way_up():
    # Tokens 0 to 4 are the prompt and the first step, 5 and 6 one branch, 7 and 8 the other.
    assert calls(tiny("qwen3"), packed([fork()]), 512) == ([0, 5, 7], [0, 5, 7, 0])


def test_long_pieces_are_cut():
    assert calls(tiny("qwen3"), packed([fork()]), 4) == ([0, 4, 5, 7], [0, 4, 5, 7, 4, 0])


def test_forward_keeps_nothing_for_backward():
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        hidden_TD = depth_first_hidden(tiny("qwen3").base_model, packed([fork()]))
    assert hidden_TD.requires_grad and not kept


def test_gradients_add_up_over_packs_and_with_those_of_other_layouts():
    model, first, second = tiny("qwen3"), packed(drawn_forest(0)), packed(drawn_forest(1))
    weight = model.base_model.norm.weight
    for batch in (first, second):
        trajectory_hidden(model.base_model, batch).hidden_TD.square().sum().backward()
    expected = weight.grad.clone()
    model.zero_grad()
    depth_first_hidden(model.base_model, first).square().sum().backward()
    trajectory_hidden(model.base_model, second).hidden_TD.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected)


def test_a_model_whose_layers_are_checkpointed_as_well():
    model, stored, batch = tiny("qwen3"), tiny("qwen3").train(), packed(drawn_forest(2))
    stored.gradient_checkpointing_enable({"use_reentrant": False})
    found, expected = (
        gradients(each, depth_first_hidden(each.base_model, batch, 3), batch.num_tokens) for each in (stored, model)
    )
    assert all(grad.equal(expected_grad) for grad, expected_grad in zip(found, expected, strict=True))


@pytest.mark.parametrize("adapted", ["q_proj", "v_proj", "layers.1.mlp.down_proj"])
def test_adapters_of_a_frozen_model_are_trained(adapted: str):
    config = LoraConfig(r=2, target_modules=rf".*{adapted}", init_lora_weights=False)
    model = get_peft_model(tiny("qwen3"), config).get_base_model()
    assert isinstance(model, PreTrainedModel)
    check_equal(model, packed(drawn_forest(3)), 3, 1e-5)


def test_without_anything_to_train_there_is_no_graph():
    frozen, batch = tiny("qwen3").requires_grad_(False), packed([fork()])
    assert not depth_first_hidden(frozen.base_model, batch).requires_grad
    with torch.no_grad():
        assert not depth_first_hidden(tiny("qwen3").base_model, batch).requires_grad


def test_padding_is_not_computed():
    batch = packed([fork()], pad_multiple=16)
    assert calls(tiny("qwen3"), batch, 512)[0] == [0, 5, 7]
    assert not depth_first_hidden(tiny("qwen3").base_model, batch)[9:].any()


def test_policy_through_the_layout_has_the_gradient_of_packed_attention_head_included():
    policy, batch = TreePolicy(tiny("qwen3"), 1.0), packed(drawn_forest(4))
    found = []
    for layout in (Layout.depth_first, Layout.segments):
        policy.zero_grad()
        policy(batch, layout).logprob_E.sum().backward()
        found.append(torch.cat([weight.grad.flatten() for weight in policy.parameters()]))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[1].norm()


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_one_process_may_compute_in_another_type_than_that_of_its_weights(dtype: torch.dtype, relative: float):
    batch, found = packed(drawn_forest(5)), []
    for layout in (Layout.depth_first, Layout.segments):
        policy = TreePolicy(tiny("qwen3"), 1.0)
        shard(policy, Ranks.alone(torch.device("cpu")), dtype, offload=False)
        for _ in range(2):  # what the first pass leaves behind must not disturb the second
            policy.zero_grad()
            policy(batch, layout).logprob_E.sum().backward()
        grads = [weight.grad.full_tensor() for weight in policy.parameters()]
        assert {grad.dtype for grad in grads} == {torch.float32}
        found.append(torch.cat([grad.flatten() for grad in grads]))
    assert (found[0] - found[1]).norm() <= relative * found[1].norm()


def test_the_tree_attention_is_asked_for_anew():
    model, batch = tiny("qwen3"), packed([fork()])
    expected_TD = tree_hidden(model.base_model, batch, Layout.segments)
    trajectory_hidden(model.base_model, batch)
    torch.testing.assert_close(depth_first_hidden(model.base_model, batch), expected_TD)
