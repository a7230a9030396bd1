from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from policy_trees import PairedTree, forests
from torch import Tensor
from transformers import AttentionInterface

from conf.errors import ConfigError
from rl.policy import attention
from rl.policy.attention import ATTENTION_NAME, plan_attention, register_tree_attention, tree_attention
from rl.policy.mask import ancestor_mask
from rl.policy.pack import pack

MODULE = SimpleNamespace(num_key_value_groups=2, is_causal=True)


def random_heads(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads that share two key heads of size 3."""
    torch.manual_seed(num_tokens)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, heads, num_tokens, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )


def written_out(query: Tensor, key: Tensor, value: Tensor, end_T: Tensor) -> Tensor:
    """Softmax over the whole masked table; query heads 0 and 1 read key head 0."""
    key, value = key[:, [0, 0, 1, 1]], value[:, [0, 0, 1, 1]]
    scores = (query @ key.transpose(2, 3) * 0.5).masked_fill(~ancestor_mask(end_T), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def check_equal(end_T: Tensor) -> None:
    heads = random_heads(len(end_T))
    packed, _ = tree_attention(MODULE, *heads, None, tree_plan=plan_attention(end_T), scaling=0.5)
    expected = written_out(*heads, end_T)
    torch.testing.assert_close(packed, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((packed * weights).sum(), heads)
    for grad, expected_grad in zip(grads, torch.autograd.grad((expected * weights).sum(), heads), strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(forests())
def test_packed_attention_equals_the_masked_softmax_written_out(forest: list[PairedTree]):
    check_equal(pack([each.credit() for each in forest]).end_T)


def test_long_segments_keep_their_shape_and_need_no_mask_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "LONG_TOKENS", 4)
    # a prompt of 6 with two branches of 5 and one of 9
    end_T = torch.tensor([25] * 6 + [11] * 5 + [16] * 5 + [25] * 9)
    blocks = plan_attention(end_T).blocks
    assert [(block.num_segments, block.num_queries, block.num_keys) for block in blocks] == [
        (1, 6, 6),
        (2, 5, 11),
        (1, 9, 15),
    ]
    assert [tuple(block.mask_G1QK.shape) for block in blocks] == [(1, 1, 6, 6), (1, 1, 5, 11), (1, 1, 9, 15)]
    check_equal(end_T)


def test_short_segments_of_many_lengths_share_few_calls():
    branches = [torch.full((length,), 20 + sum(range(1, length + 1))) for length in range(1, 8)]
    end_T = torch.cat([torch.full((20,), 48), *branches])
    # 20 queries of the prompt, rounded to 24; seven branches of up to 8 queries and 32 keys
    blocks = plan_attention(end_T).blocks
    assert [(block.num_segments, block.num_queries, block.num_keys) for block in blocks] == [(1, 24, 32), (7, 8, 32)]
    check_equal(end_T)


def test_without_a_plan_it_is_plain_causal_attention():
    heads = random_heads(7)
    output, _ = tree_attention(MODULE, *heads, None, scaling=0.5)
    torch.testing.assert_close(output, written_out(*heads, torch.full((7,), 7)))


def test_a_sliding_window_is_refused():
    with pytest.raises(ConfigError, match="sliding window of 16 tokens"):
        tree_attention(
            MODULE, *random_heads(2), None, tree_plan=plan_attention(torch.tensor([2, 2])), sliding_window=16
        )


def test_registering_twice_changes_nothing():
    register_tree_attention()
    register_tree_attention()
    assert AttentionInterface()[ATTENTION_NAME] is tree_attention
