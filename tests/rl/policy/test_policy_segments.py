from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_trees import PairedTree, forests
from torch import Tensor

from rl.policy.layouts import segments
from rl.policy.layouts.segments import Chunk, SegmentPlan, plan_calls, plan_chunks
from rl.policy.mask import ancestor_mask
from rl.policy.pack import pack

# a prompt of 6 with two branches of 5 and one of 9
END_T = torch.tensor([25] * 6 + [11] * 5 + [16] * 5 + [25] * 9)


@pytest.fixture
def calls_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(segments.CALL_PAIRS, "cpu", 0)
    monkeypatch.setattr(segments, "KEY_PAIRS", 0)


def outline(chunks: list[Chunk]) -> list[tuple[int, int, list[tuple[int, int]], bool]]:
    return [(chunk.start, chunk.stop, chunk.key_ranges, chunk.mask_QK is None) for chunk in chunks]


@pytest.mark.usefixtures("calls_are_free")
def test_where_calls_cost_nothing_every_segment_is_one_over_its_ancestors_and_itself():
    assert outline(plan_chunks(END_T)) == [
        (0, 6, [(0, 6)], True),
        (6, 11, [(0, 6), (6, 11)], False),
        (11, 16, [(0, 6), (11, 16)], False),
        (16, 25, [(0, 6), (16, 25)], False),
    ]


def test_where_a_call_costs_more_than_pairs_small_segments_share_one():
    # 25 * 25 pairs are less than three more calls of 4096
    (chunk,) = plan_chunks(END_T)
    assert outline([chunk]) == [(0, 25, [(0, 25)], False)]
    assert chunk.mask_QK is not None and torch.equal(chunk.mask_QK, ancestor_mask(END_T))


def test_siblings_share_the_keys_of_their_path_and_the_prompt_stays_causal():
    # 1000 tokens of prompt, then 20 answers of 10: joined, the answers bring the prompt's keys in once
    ends = [1200] * 1000 + [1000 + 10 * (answer + 1) for answer in range(20) for _ in range(10)]
    assert outline(plan_chunks(torch.tensor(ends))) == [
        (0, 1000, [(0, 1000)], True),
        (1000, 1200, [(0, 1000), (1000, 1200)], False),
    ]


@pytest.mark.usefixtures("calls_are_free")
def test_a_long_segment_behind_others_is_cut_and_a_window_leaves_out_what_nobody_sees(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(segments, "PIECE_TOKENS", 4)
    # a prompt of 4, a branch of 1, a branch of 8; token 9 is the ninth of its path and sees tokens from the sixth on
    end_T = torch.tensor([13] * 4 + [5] + [13] * 8)
    assert outline(plan_chunks(end_T)) == [
        (0, 4, [(0, 4)], True),
        (4, 5, [(0, 4), (4, 5)], False),
        (5, 9, [(0, 4), (5, 9)], False),
        (9, 13, [(0, 4), (5, 9), (9, 13)], False),
    ]
    assert outline(plan_chunks(end_T, window=4)) == [
        (0, 4, [(0, 4)], True),
        (4, 5, [(1, 4), (4, 5)], False),
        (5, 9, [(1, 4), (5, 9)], False),
        (9, 13, [(6, 9), (9, 13)], False),
    ]


def test_a_window_as_long_as_the_pack_changes_no_chunk():
    whole, windowed = plan_chunks(END_T), plan_chunks(END_T, window=25)
    assert outline(whole) == outline(windowed)
    for chunk, other in zip(whole, windowed, strict=True):
        assert chunk.mask_QK is not None and other.mask_QK is not None and torch.equal(chunk.mask_QK, other.mask_QK)


@settings(max_examples=20, deadline=None)
@given(
    forests(max_steps=14),
    st.sampled_from([None, 1, 3, 8]),
    st.sampled_from([0, 30, 2**12]),
    st.sampled_from([2, 256]),
)
def test_the_chunks_masks_are_the_whole_mask(
    forest: list[PairedTree], window: int | None, call_pairs: int, piece_tokens: int
):
    end_T = pack([each.credit() for each in forest], pad_multiple=4).end_T
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(segments.CALL_PAIRS, "cpu", call_pairs)
        patch.setattr(segments, "KEY_PAIRS", 0)
        patch.setattr(segments, "PIECE_TOKENS", piece_tokens)
        chunks = plan_chunks(end_T, window)
    assert [chunk.start for chunk in chunks] + [len(end_T)] == [0] + [chunk.stop for chunk in chunks]
    seen_TT = torch.zeros(len(end_T), len(end_T), dtype=torch.bool)
    for chunk in chunks:
        key_K = torch.cat([torch.arange(*part) for part in chunk.key_ranges])
        length = chunk.stop - chunk.start
        seen_TT[chunk.start : chunk.stop, key_K] = (
            torch.ones(length, length, dtype=torch.bool).tril() if chunk.mask_QK is None else chunk.mask_QK
        )
    assert torch.equal(seen_TT, ancestor_mask(end_T, window))


@pytest.mark.usefixtures("calls_are_free")
def test_neighbours_of_one_shape_and_mask_share_a_call():
    def sizes(end_T: Tensor) -> list[int]:
        return [len(call.chunks) for call in SegmentPlan(end_T).calls(None)]

    assert sizes(END_T) == [1, 2, 1]  # the prompt, the two branches of 5, the branch of 9
    assert sizes(torch.tensor([4] * 4 + [8] * 4 + [12] * 4)) == [3]  # three chains alike
    assert sizes(torch.tensor([6, 6, 4, 4, 6, 6])) == [1, 2]


def test_chunks_under_different_masks_stay_apart():
    everything = torch.ones(2, 2, dtype=torch.bool)
    first, alike, other = (
        Chunk(start, start + 2, [(start, start + 2)], mask)
        for start, mask in ((0, everything), (2, everything.clone()), (4, everything.tril()))
    )
    assert [call.chunks for call in plan_calls([first, alike, other])] == [[first, alike], [other]]


def test_a_plan_is_made_once_for_each_window():
    plan = SegmentPlan(END_T)
    assert plan.calls(4) is plan.calls(4)
    assert plan.calls(None) is not plan.calls(4)


def test_gradients_of_a_shared_token_add_up_in_float32():
    # 200 branches of one token behind one token: in bfloat16, 1 + 1/256 + 1/256 + ... would never leave 1
    end_T = torch.tensor([201, *range(2, 202)])
    query, key, value = (torch.zeros(1, 1, 201, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    attend(SegmentPlan(end_T), query, key, value).sum().backward()
    # the first token is all of its own attention and half of each branch's
    assert value.grad is not None
    assert value.grad[0, 0, 0, 0] == 1 + 200 / 2


def attend(plan: SegmentPlan, *heads: Tensor) -> Tensor:
    return plan.attend(*heads, scaling=None, window=None, softcap=None, layer=0)
