from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_models import other
from policy_trees import PairedTree, drawn_forest, forests, grown, paired, plain_copy, tiny
from rank_cases import run_ranks
from torch import Tensor
from transformers import PreTrainedModel

from conf.errors import ConfigError
from conf.schema import Layout
from rl.policy.layouts.hidden import tree_hidden
from rl.policy.layouts.trajectories import router_aux_loss, trajectory_hidden
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


def one_by_one(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Each trajectory alone, in turn; what an earlier one wrote stays."""
    hidden_TD = torch.zeros(len(batch.input_ids_T), model.config.hidden_size)
    is_known_T = torch.zeros(len(batch.input_ids_T), dtype=torch.bool)
    for start, stop in zip(batch.traj_ptr[:-1], batch.traj_ptr[1:], strict=True):
        index = batch.traj_index_P[start:stop]
        hidden = model.base_model(input_ids=batch.input_ids_T[index][None], use_cache=False).last_hidden_state[0]
        new = ~is_known_T[index]
        hidden_TD = hidden_TD.index_copy(0, index[new], hidden[new])
        is_known_T[index] = True
    return hidden_TD


def gradients(model: PreTrainedModel, hidden_TD: Tensor) -> Tensor:
    """Of a sum in which every entry has another weight."""
    model.zero_grad()
    weights = torch.linspace(-1.0, 1.0, hidden_TD.numel(), dtype=hidden_TD.dtype).view_as(hidden_TD)
    (hidden_TD * weights).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def check_equal(model: PreTrainedModel, reference: PreTrainedModel, forest: list[PairedTree], max_tokens: int) -> None:
    batch = packed(forest)
    hidden_TD, expected_TD = (
        trajectory_hidden(model.base_model, batch, max_tokens).hidden_TD,
        one_by_one(reference, batch),
    )
    torch.testing.assert_close(hidden_TD, expected_TD, rtol=1e-4, atol=1e-5)
    found, expected = gradients(model, hidden_TD), gradients(reference, expected_TD)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_fork_of_two_is_two_rows_of_all_their_tokens():
    model, batch = tiny("qwen3"), packed([fork((2, 1, 4))])
    seen: list[Tensor] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    trajectory_hidden(model.base_model, batch)
    ids = batch.input_ids_T.tolist()  # 3 + 2 shared, 1, and 4 tokens; the longer path is first, the other is padded
    assert [each.tolist() for each in seen] == [[ids[:5] + ids[6:], [*ids[:6], 0, 0, 0]]]


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gemma3"])
def test_every_token_has_the_state_and_gradient_of_its_trajectory_alone(family: str):
    model = tiny(family)
    for seed in range(2):
        check_equal(model, plain_copy(model), drawn_forest(seed), max_tokens=40)


def test_the_size_of_groups_changes_nothing():
    model = tiny("llama")
    reference = plain_copy(model)

    @settings(max_examples=5, deadline=None)
    @given(forests(max_steps=6), st.sampled_from([1, 17, 60, 10_000]))
    def check(forest: list[PairedTree], max_tokens: int) -> None:
        check_equal(model, reference, forest, max_tokens)

    check()


@pytest.mark.parametrize(
    "model_type", ["mamba", "qwen3_next", "rwkv", "recurrent_gemma", "bloom", "mpt", "gptj", "opt"]
)
def test_padding_on_the_right_reaches_no_recurrence_and_no_position(model_type: str):
    model = other(model_type)
    check_equal(model, model, [fork((2, 1, 5))], max_tokens=100)


def test_a_model_that_was_made_for_packs_gets_its_own_masks_back():
    model = other("bloom")
    batch, expected_TD = packed([fork()]), one_by_one(model, packed([fork()]))
    model.config._attn_implementation = "grove_tree"  # bloom then makes no mask, and its tokens see those after them
    torch.testing.assert_close(trajectory_hidden(model.base_model, batch).hidden_TD, expected_TD)


def test_packed_layouts_and_trajectories_can_take_turns():
    model, batch = tiny("gemma2"), packed(drawn_forest(1))
    packed_TD = tree_hidden(model.base_model, batch, Layout.segments)
    torch.testing.assert_close(trajectory_hidden(model.base_model, batch).hidden_TD, packed_TD, rtol=1e-4, atol=1e-5)
    assert tree_hidden(model.base_model, batch, Layout.segments).equal(packed_TD)


def test_padding_of_the_pack_has_states_of_zero():
    batch = packed([fork()], pad_multiple=16)
    hidden_TD = trajectory_hidden(tiny("qwen3").base_model, batch).hidden_TD
    assert batch.num_tokens == 9 and len(hidden_TD) == 16
    assert hidden_TD[:9].any(dim=1).all() and not hidden_TD[9:].any()


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_gradient_checkpointing_changes_nothing(family: str):
    model, stored, batch = tiny(family), tiny(family).train(), packed(drawn_forest(2))
    stored.gradient_checkpointing_enable({"use_reentrant": False})
    expected = gradients(model, trajectory_hidden(model.base_model, batch, 40).hidden_TD)
    assert gradients(stored, trajectory_hidden(stored.base_model, batch, 40).hidden_TD).equal(expected)


def test_a_model_with_dropout_can_be_trained():
    model, batch = other("opt", dropout=0.5).train(), packed([fork()])
    first, second = (trajectory_hidden(model.base_model, batch).hidden_TD for _ in range(2))
    assert not first.equal(second)
    assert gradients(model, first).isfinite().all()


def test_router_loss_is_that_of_transformers_over_the_real_tokens():
    model, batch = other("qwen3_moe"), packed([fork((2, 1, 5))])
    ids = batch.input_ids_T.tolist()
    longer, shorter = ids[:5] + ids[6:], ids[:6]
    output = model(
        input_ids=torch.tensor([longer, shorter + [7] * 4]),
        attention_mask=torch.tensor([[1] * 10, [1] * 6 + [0] * 4]),
        use_cache=False,
    )
    for max_tokens in (10, 100):  # each alone, and both together
        router_loss = trajectory_hidden(model.base_model, batch, max_tokens).router_loss
        assert router_loss is not None
        torch.testing.assert_close(router_loss, output.aux_loss)


def test_router_loss_of_two_tokens_by_hand():
    model = other("qwen3_moe", num_experts_per_tok=1)
    # Expert 0 twice, with probabilities 0.9 and 0.6: 2 experts * (share 1 * mean 0.75 + share 0 * mean 0.25) = 1.5.
    logits = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log()
    assert router_aux_loss([[logits[:1]], [logits[1:]]], model.base_model).item() == pytest.approx(1.5)


def test_router_loss_moves_the_routers_with_checkpointing_too():
    model, batch = other("qwen3_moe").train(), packed([fork()])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    router_loss = trajectory_hidden(model.base_model, batch).router_loss
    assert router_loss is not None
    router_loss.backward()
    assert model.base_model.layers[0].mlp.gate.weight.grad.any()


def test_a_model_that_asks_for_no_router_loss_has_none():
    model = other("qwen3_moe", output_router_logits=False)
    assert trajectory_hidden(model.base_model, packed([fork()])).router_loss is None


def test_a_router_loss_without_routers_is_refused():
    with pytest.raises(ConfigError, match="output_router_logits=true but the model returns no router logits"):
        trajectory_hidden(other("llama", output_router_logits=True).base_model, packed([fork()]))


def uneven_groups(ranks: Ranks) -> list[Tensor]:
    """Two and six trajectories that go one by one: the first rank keeps step through four calls."""
    policy = TreePolicy(tiny("qwen3"), 1.0)
    shard(policy, ranks, torch.float32, offload=False)
    rng = random.Random(0)
    parents = [ROOT] * (2 if ranks.rank == 0 else 6)
    batch = packed([paired(grown(parents, [(3, 0)] * len(parents), rng), rng)])
    policy.forward = lambda batch, layout: trajectory_hidden(policy.model.base_model, batch, max_tokens=1).hidden_TD
    hidden_TD = policy(batch, Layout.trajectories)
    hidden_TD.square().sum().backward()
    return [hidden_TD.detach(), policy.model.base_model.norm.weight.grad.full_tensor()]


@pytest.mark.slow
def test_processes_with_different_numbers_of_groups_keep_step(tmp_path: Path):
    found = run_ranks([uneven_groups], tmp_path)["uneven_groups"]
    assert [len(hidden_TD) for hidden_TD, _ in found] == [3 + 2 * 3, 3 + 6 * 3]
    assert found[0][1].equal(found[1][1])
