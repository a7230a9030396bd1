"""The law the learner rests on: training a packed forest is training its trajectories one by one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from policy_trees import (
    FAMILIES,
    KeepsFloat64,
    PairedTree,
    drawn_forest,
    forests,
    grown,
    paired,
    plain_copy,
    tiny,
)
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers import PreTrainedModel

from conf.schema import Layout
from rl.policy.layouts.hidden import tree_hidden
from rl.policy.logprobs import edge_logprobs, output_head
from rl.policy.loss import log_ratio, ppo_clip
from rl.policy.pack import PackedBatch, TreeCredit, pack, plan_packs
from rollout.tree import ROOT

CLIP_LOW, CLIP_HIGH, ENTROPY_COEF, TEMPERATURE = 0.2, 0.28, 0.1, 0.8
CUDA = torch.device("cuda")
ON_CPU = (Layout.segments, Layout.mask)
"""Packed layouts that have a backward pass on a CPU."""

SHAPES: dict[str, tuple[list[int], list[tuple[int, int]]]] = {
    "a chain": ([ROOT, 0, 1], [(3, 2), (1, 1), (2, 0)]),
    "forks at the root alone": ([ROOT] * 4, [(5, 0), (1, 0), (3, 0), (2, 0)]),
    "a fork inside a turn": ([ROOT, 0, 0, 1, 1], [(2, 0), (2, 0), (1, 2), (1, 0), (4, 0)]),
    "one-token steps": ([ROOT, ROOT, 0, 0, 2, 2], [(1, 0)] * 6),
    "a comb with ragged leaves": ([ROOT, ROOT, 0, 0, 2, 2, 4, 4], [(2, 2), (5, 0), (1, 3), (4, 0)] * 2),
    "a deep tree": ([ROOT, *range(10), 5, 3], [(1, 1)] * 13),
}
"""Parent and (action tokens, observation tokens) of each step."""


def one_by_one(
    model: PreTrainedModel, forest: Sequence[PairedTree]
) -> tuple[dict[tuple[int, int, int], Tensor], Tensor]:
    """Log-probs by (tree, step, leaf) and the summed PPO loss, each trajectory a plain sequence of its own."""
    logprobs, loss = {}, torch.zeros((), dtype=model.dtype)
    for number, each in enumerate(forest):
        for leaf in sorted({leaf for _, leaf in each.pairs}):
            logp_TV = sequence_logprobs(model, each.tree.path_ids(leaf))
            start = len(each.tree.prompt.token_ids)
            for row in each.tree.path(leaf):
                node = each.tree.nodes[row]
                rows = slice(start - 1, start - 1 + len(node.action_ids))
                weight, advantage = each.pairs[row, leaf]
                logprob = logp_TV[rows].gather(1, torch.tensor(node.action_ids)[:, None])[:, 0]
                ratio = (logprob - torch.tensor(node.action_logprobs, dtype=model.dtype)).exp()
                clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
                surrogate = torch.minimum(ratio * advantage, clipped * advantage)
                entropy = -(logp_TV[rows].exp() * logp_TV[rows]).sum(-1)
                loss = loss - weight * (surrogate + ENTROPY_COEF * entropy).sum()
                logprobs[number, row, leaf] = logprob.detach()
                start += len(node.action_ids) + len(node.observation_ids)
    return logprobs, loss


def sequence_logprobs(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    return (model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)


def packed(model: PreTrainedModel, batch: PackedBatch, layout: Layout = Layout.segments) -> tuple[Tensor, Tensor]:
    """Log-probs of the edges and the same loss, of one pack."""
    hidden_TD = tree_hidden(model.base_model, batch, layout)
    logprob_E, entropy_E = edge_logprobs(
        hidden_TD, output_head(model), batch.edge_row_E, batch.edge_target_E, TEMPERATURE, chunk_rows=7
    )
    shift_E = log_ratio(logprob_E, batch.old_logprob_E.to(model.dtype))
    w_pos_E, w_neg_E, w0_E = (values.to(model.dtype) for values in (batch.w_pos_E, batch.w_neg_E, batch.w0_E))
    policy = ppo_clip(shift_E, w_pos_E, w_neg_E, CLIP_LOW, CLIP_HIGH).sum()
    return logprob_E.detach(), policy - ENTROPY_COEF * (w0_E * entropy_E).sum()


def packed_loss(model: PreTrainedModel, credits: Sequence[TreeCredit], pad_multiple: int = 1) -> Tensor:
    return packed(model, pack(credits, pad_multiple))[1]


def gradients(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    """One per parameter, zeros for an expert that no token went to."""
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


def check_gradients(found: list[Tensor], expected: list[Tensor], relative: float) -> None:
    """Per parameter, against its largest gradient; parameters that hardly move, against 1% of the largest of all."""
    largest = max(grad.abs().max().item() for grad in expected)
    for grad, expected_grad in zip(found, expected, strict=True):
        scale = max(expected_grad.abs().max().item(), 0.01 * largest)
        assert (grad - expected_grad).abs().max().item() <= relative * scale


def check_tree_equals_trajectories(
    model: PreTrainedModel,
    forest: Sequence[PairedTree],
    relative: float,
    layouts: Sequence[Layout] = ON_CPU,
    change: Callable[[PackedBatch], None] = lambda batch: None,
    plain: PreTrainedModel | None = None,
) -> None:
    """Log-probs, loss and gradients of each layout, against transformers' own attention on each path alone."""
    plain = plain or plain_copy(model)
    expected_logprobs, expected_loss = one_by_one(plain, forest)
    expected_grads = gradients(plain, expected_loss)
    credits = [each.credit() for each in forest]
    firsts = first_edges(credits)
    for layout in layouts:
        batch = pack(credits)
        change(batch)
        logprob_E, loss = packed(model, batch, layout)
        for (number, row, _), expected in expected_logprobs.items():
            first = firsts[number, row]
            torch.testing.assert_close(logprob_E[first : first + len(expected)], expected, rtol=relative, atol=relative)
        torch.testing.assert_close(loss, expected_loss, rtol=relative, atol=relative)
        check_gradients(gradients(model, loss), expected_grads, relative)


def first_edges(credits: Sequence[TreeCredit]) -> dict[tuple[int, int], int]:
    """(tree, row) -> its first edge: trees in order, rows depth first."""
    firsts, edge = {}, 0
    for number, credit in enumerate(credits):
        stack = credit.tree.children(ROOT)[::-1]
        while stack:
            row = stack.pop()
            stack += credit.tree.children(row)[::-1]
            if credit.is_trained(row):
                firsts[number, row] = edge
                edge += len(credit.tree.nodes[row].action_ids)
    return firsts


def shaped(name: str) -> list[PairedTree]:
    rng = random.Random(name)
    return [paired(grown(*SHAPES[name], rng), rng)]


@pytest.fixture
def float64_is_kept() -> Iterator[None]:
    with KeepsFloat64():
        yield


# Drawn, not searched: hypothesis would dig for forests whose gradients cancel until only float32's rounding is left.
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_forests_train_as_their_trajectories_do_in_float32(family: str):
    model = tiny(family, tied=family == "qwen3")
    for seed in range(2):
        check_tree_equals_trajectories(model, drawn_forest(seed), 1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_trees_of_every_shape_train_as_their_trajectories_do(family: str, name: str):
    check_tree_equals_trajectories(tiny(family), shaped(name), 1e-5)


@pytest.mark.usefixtures("float64_is_kept")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_forests_train_as_their_trajectories_do_in_float64(family: str):
    model = tiny(family, torch.float64)

    @settings(max_examples=3, deadline=None)
    @given(forests(max_trees=2, max_steps=5))
    def check(forest: list[PairedTree]) -> None:
        check_tree_equals_trajectories(model, forest, 1e-10)

    check()


@pytest.mark.slow
@pytest.mark.usefixtures("float64_is_kept")
@pytest.mark.parametrize("family", FAMILIES)
def test_many_packed_forests_train_as_their_trajectories_do_in_float64(family: str):
    model = tiny(family, torch.float64)

    @settings(max_examples=40, deadline=None)
    @given(forests(max_steps=14))
    def check(forest: list[PairedTree]) -> None:
        check_tree_equals_trajectories(model, forest, 1e-10)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_packed_forests_train_as_their_trajectories_do_in_float32(family: str):
    model = tiny(family)
    for seed in range(2, 30):
        check_tree_equals_trajectories(model, drawn_forest(seed), 1e-5)


def wrong_end(batch: PackedBatch) -> None:
    """The first token behind a branch sees the branch's last one."""
    closes_T = (batch.end_T < len(batch.end_T)) & (torch.arange(1, len(batch.end_T) + 1) == batch.end_T)
    batch.end_T = batch.end_T + closes_T.long()


def wrong_position(batch: PackedBatch) -> None:
    """Branches behind the first start one position late; a shift of whole paths would be invisible to the model."""
    jumps_T = batch.position_T.diff(prepend=torch.tensor([-1])) != 1
    batch.position_T = batch.position_T + (jumps_T & (batch.position_T > 0)).cumsum(0)


def wrong_row(batch: PackedBatch) -> None:
    """A branch's first token is predicted from the token before it in the pack, as shifted labels would have it."""
    batch.edge_row_E = batch.edge_token_E - 1


@pytest.mark.parametrize("change", [wrong_end, wrong_position, wrong_row])
@pytest.mark.parametrize("layout", ON_CPU)
def test_a_pack_with_one_thing_off_by_one_is_noticed(layout: Layout, change: Callable[[PackedBatch], None]):
    # Unchanged, the same model and tree pass above.
    with pytest.raises(AssertionError):
        check_tree_equals_trajectories(tiny("qwen3"), shaped("a comb with ragged leaves"), 1e-5, [layout], change)


@pytest.mark.parametrize("wrong", [3, 5])
@pytest.mark.parametrize("layout", ON_CPU)
def test_a_window_off_by_one_is_noticed(layout: Layout, wrong: int):
    model, forest = tiny("mistral"), shaped("a deep tree")
    plain = plain_copy(model)
    check_tree_equals_trajectories(model, forest, 1e-5, [layout], plain=plain)
    model.config.sliding_window = wrong
    with pytest.raises(AssertionError):
        check_tree_equals_trajectories(model, forest, 1e-5, [layout], plain=plain)


@pytest.mark.usefixtures("float64_is_kept")
def test_splits_and_packings_add_up_to_the_same_gradient():
    model = tiny("gemma2", torch.float64)

    @settings(max_examples=4, deadline=None)
    @given(forests(max_steps=6))
    def check(forest: list[PairedTree]) -> None:
        credits = [each.credit() for each in forest]
        expected = gradients(model, packed_loss(model, credits, pad_multiple=16))
        for budget in (1, 20):
            parts = [packed_loss(model, each) for each in plan_packs(credits, budget)]
            check_gradients(gradients(model, torch.stack(parts).sum()), expected, 1e-10)

    check()


def test_gradient_checkpointing_changes_nothing():
    model, stored = tiny("qwen3", torch.float64), tiny("qwen3", torch.float64)
    stored.train()
    stored.gradient_checkpointing_enable({"use_reentrant": False})
    for seed in range(3):
        credits = [each.credit() for each in drawn_forest(seed)]
        expected = gradients(model, packed_loss(model, credits))
        # torch.autograd.grad with checkpoints inside needs the non-reentrant kind, which the learner uses too.
        check_gradients(gradients(stored, packed_loss(stored, credits)), expected, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_flex_sees_what_segments_see(family: str, monkeypatch: pytest.MonkeyPatch):
    # torch's switch to run it operation by operation; it has no backward here either way.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    model = tiny(family)
    for seed in range(2):
        batch = pack([each.credit() for each in drawn_forest(seed)], pad_multiple=128)
        expected_TD = tree_hidden(model.base_model, batch, Layout.segments)
        found_TD = tree_hidden(model.base_model, batch, Layout.flex)
        torch.testing.assert_close(found_TD, expected_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_flex_on_a_gpu_trains_as_segments_do(family: str, is_checkpointed: bool):
    model = tiny(family, head_dim=16).cuda()
    if is_checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for seed in range(3):  # three lengths, one compiled kernel
        batch = pack([each.credit() for each in drawn_forest(seed)], pad_multiple=256 * (seed + 1)).to(CUDA)
        expected = gradients(model, packed(model, batch, Layout.segments)[1])
        check_gradients(gradients(model, packed(model, batch, Layout.flex)[1]), expected, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_varlen_on_a_gpu_trains_as_segments_do(family: str):
    model = tiny(family, torch.bfloat16).cuda()
    for seed in range(3):
        batch = pack([each.credit() for each in drawn_forest(seed)]).to(CUDA)
        expected_TD = tree_hidden(model.base_model, batch, Layout.segments)
        found_TD = tree_hidden(model.base_model, batch, Layout.varlen)
        torch.testing.assert_close(found_TD, expected_TD, rtol=0.05, atol=0.1)
        # A loss without clips, where bfloat16 would flip tokens at the border.
        expected = gradients(model, expected_TD.square().mean())
        check_gradients(gradients(model, found_TD.square().mean()), expected, 0.1)
