from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_trees import PairedTree, forests, plain_copy, tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention
from transformers import AttentionInterface

from conf.errors import ConfigError
from rl.policy.layouts import flex
from rl.policy.layouts.attention import ATTENTION_NAME, AttentionPlan, register_tree_attention, tree_attention
from rl.policy.layouts.dense_mask import MaskPlan
from rl.policy.layouts.flex import FlexPlan, block_tables
from rl.policy.layouts.segments import SegmentPlan
from rl.policy.layouts.varlen import VarlenPlan, plan_sequences
from rl.policy.mask import ancestor_mask
from rl.policy.pack import pack

MODULE = SimpleNamespace(num_key_value_groups=2, is_causal=True)
WINDOWS = st.sampled_from([None, 1, 3, 8])
CAPS = st.sampled_from([None, 0.7])

# a prompt of 6 with two branches of 5 and one of 9
END_T = torch.tensor([25] * 6 + [11] * 5 + [16] * 5 + [25] * 9)


def random_heads(num_tokens: int, head_dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads that share two key heads."""
    torch.manual_seed(num_tokens)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, heads, num_tokens, head_dim, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )


def written_out(
    query: Tensor, key: Tensor, value: Tensor, end_T: Tensor, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Softmax over the whole masked table; query heads 0 and 1 read key head 0."""
    key, value = key[:, [0, 0, 1, 1]], value[:, [0, 0, 1, 1]]
    scores = query @ key.transpose(2, 3) * 0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~ancestor_mask(end_T, window), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def attended(plan: AttentionPlan | None, heads: tuple[Tensor, ...], **kwargs: Any) -> Tensor:
    """As a model's layer calls it."""
    return tree_attention(MODULE, *heads, None, tree_plan=plan, scaling=0.5, **kwargs)[0]


def check_equal(plan: AttentionPlan | None, end_T: Tensor, window: int | None, softcap: float | None) -> None:
    heads = random_heads(len(end_T))
    found = attended(plan, heads, sliding_window=window, softcap=softcap)
    expected = written_out(*heads, end_T, window, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((found * weights).sum(), heads)
    for grad, expected_grad in zip(grads, torch.autograd.grad((expected * weights).sum(), heads), strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start: Tensor,
    key_start: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch says `varlen_attn` does: sequences apart, causal from the last key backwards, `left` keys before a
    query's own."""
    assert enable_gqa and window_size[1] == 0
    outputs = []
    for first, stop, first_key, stop_key in zip(query_start, query_start[1:], key_start, key_start[1:], strict=False):
        assert stop - first <= most_queries and stop_key - first_key <= most_keys
        q, k, v = query[first:stop], key[first_key:stop_key], value[first_key:stop_key]
        distance = (torch.arange(len(q))[:, None] - len(q)) - (torch.arange(len(k)) - len(k))
        sees = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        scores = torch.einsum("qhd,khd->hqk", q, k[:, [0, 0, 1, 1]]) * scale
        outputs.append(
            torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v[:, [0, 0, 1, 1]])
        )
    return torch.cat(outputs)


@settings(max_examples=15, deadline=None)
@given(forests(), WINDOWS, CAPS)
def test_segments_equal_the_masked_softmax_written_out(
    forest: list[PairedTree], window: int | None, softcap: float | None
):
    end_T = pack([each.credit() for each in forest], pad_multiple=8).end_T
    check_equal(SegmentPlan(end_T), end_T, window, softcap)


@settings(max_examples=8, deadline=None)
@given(forests(), WINDOWS, CAPS)
def test_the_whole_mask_equals_the_masked_softmax_written_out(
    forest: list[PairedTree], window: int | None, softcap: float | None
):
    end_T = pack([each.credit() for each in forest], pad_multiple=8).end_T
    check_equal(MaskPlan(end_T), end_T, window, softcap)


@settings(max_examples=8, deadline=None)
@given(forests(), WINDOWS)
def test_sequences_of_ancestors_equal_the_masked_softmax_written_out(forest: list[PairedTree], window: int | None):
    end_T = pack([each.credit() for each in forest], pad_multiple=8).end_T
    check_equal(VarlenPlan(end_T, plain_varlen), end_T, window, None)


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_flex_equals_the_masked_softmax_written_out(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
):
    # torch's switch to run it operation by operation; it has no backward here either way.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    end_T = torch.tensor([384] * 100 + [220] * 120 + [384] * 163 + [384])
    heads = tuple(head.detach() for head in random_heads(384, head_dim=16))
    found = attended(FlexPlan(end_T), heads, sliding_window=window, softcap=softcap)
    # Softmax's own constants are float32 in torch's written-out form of it.
    torch.testing.assert_close(found, written_out(*heads, end_T, window, softcap), rtol=1e-6, atol=1e-6)


@settings(max_examples=5, deadline=None)
@given(forests(max_steps=14))
def test_flex_is_given_the_table_that_torch_finds_by_writing_the_mask_out(forest: list[PairedTree]):
    end_T = pack([each.credit() for each in forest], pad_multiple=128).end_T
    seen_TT = ancestor_mask(end_T)
    length = len(end_T)
    expected = flex_attention.create_block_mask(
        lambda batch, head, query, key: seen_TT[query, key], 1, 1, length, length, device="cpu"
    )
    rows = "kv_num_blocks kv_indices full_kv_num_blocks full_kv_indices"
    columns = "q_num_blocks q_indices full_q_num_blocks full_q_indices"
    for name, table in zip(f"{rows} {columns}".split(), block_tables(end_T), strict=True):
        assert torch.equal(table, getattr(expected, name)), name


@pytest.mark.slow
@torch.no_grad()
def test_flex_is_compiled_once_for_packs_of_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex._attend, backend=counter, fullgraph=True)
    for num_blocks in (3, 2, 5):
        plan = FlexPlan(torch.full((num_blocks * 128,), num_blocks * 128))
        heads = (torch.randn(1, heads, num_blocks * 128, 16) for heads in (4, 2, 2))
        arguments = *heads, plan.end_T, plan.depth_T, plan.tables(None)
        flex.mark_lengths(*arguments)
        compiled(*arguments, None, None, None)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_flex_on_a_cpu_does_not_train():
    plan = FlexPlan(torch.full((128,), 128))
    with pytest.raises(ConfigError, match=r"layout=flex cannot train on cpu.*Use learner\.layout=segments"):
        attended(plan, random_heads(128))


def test_varlen_says_what_flash_attention_cannot_do():
    plan = VarlenPlan(END_T)
    with pytest.raises(ConfigError, match=r"no cap of the attention scores, but the model caps them at 30\.0"):
        attended(plan, random_heads(25), softcap=30.0)
    with pytest.raises(ConfigError, match=r"given torch\.float64 on cpu"):
        attended(plan, random_heads(25))


def test_sequences_leave_out_keys_that_no_query_has_in_its_window():
    whole, narrow = plan_sequences(END_T), plan_sequences(END_T, window=3)
    # prompt 6, two branches of 6 + 5 keys, one of 6 + 9
    assert whole.key_start.tolist() == [0, 6, 17, 28, 43]
    # of the prompt each branch keeps the last two tokens
    assert narrow.key_start.tolist() == [0, 6, 13, 20, 31]
    assert narrow.key_index_K.tolist()[6:13] == [4, 5, 6, 7, 8, 9, 10]
    assert (whole.most_queries, whole.most_keys, narrow.most_keys) == (9, 15, 11)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 30])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_without_a_plan_it_is_the_causal_attention_of_the_model(window: int | None, softcap: float | None):
    check_equal(None, torch.full((7,), 7), window, softcap)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_plain_sequences_padded_on_the_right_are_as_transformers_computes_them(family: str):
    model = tiny(family)
    plain = plain_copy(model)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 0, 0, 0]])
    logits = model(input_ids=ids, use_cache=False).logits
    for row, length in ((0, 9), (1, 6)):
        alone = plain(input_ids=ids[row : row + 1, :length], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, :length], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", [None, SegmentPlan(torch.tensor([2, 2]))])
def test_scores_that_nothing_here_computes_are_refused(plan: AttentionPlan | None):
    with pytest.raises(ConfigError, match=r"attention uses \['s_aux'\]"):
        attended(plan, random_heads(2), s_aux=torch.zeros(4))


def test_dropout_in_a_pack_is_refused_and_none_is_not():
    plan = SegmentPlan(torch.tensor([2, 2]))
    attended(plan, random_heads(2), dropout=0.0, position_bias=None)
    with pytest.raises(ConfigError, match=r"attention uses \['dropout'\]"):
        attended(plan, random_heads(2), dropout=0.1)


def test_registering_twice_changes_nothing():
    register_tree_attention()
    register_tree_attention()
    assert AttentionInterface()[ATTENTION_NAME] is tree_attention
