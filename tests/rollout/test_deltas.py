"""Differences of bytes: there and back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rollout.deltas import applied, difference


def raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def test_three_of_sixteen_words_of_two_bytes_are_eighteen_bytes():
    old = torch.arange(16, dtype=torch.bfloat16)
    new = old.clone()
    new[[1, 5, 11]] = -1
    delta = difference(raw(old), raw(new), 2)
    # 3 positions of 4 bytes and 3 values of 2: 18, above half of 32, so all of it is better sent
    assert delta is None
    longer, changed = torch.cat([old] * 2), torch.cat([new, old])
    delta = difference(raw(longer), raw(changed), 2)
    assert delta is not None and len(delta) == 18
    assert torch.equal(applied(raw(longer), delta, 2).view(torch.bfloat16), changed)


def test_nothing_changed_is_nothing_to_send():
    same = raw(torch.randn(8))
    delta = difference(same, same.clone(), 4)
    assert delta is not None and len(delta) == 0 and torch.equal(applied(same, delta, 4), same)


def test_a_number_that_is_none_and_a_negative_zero_are_changes_too():
    old = torch.zeros(64, dtype=torch.float32)
    new = old.clone()
    new[3], new[40] = float("nan"), -0.0
    delta = difference(raw(old), raw(new), 4)
    assert delta is not None and torch.equal(applied(raw(old), delta, 4), raw(new))


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 200), st.data())
def test_the_old_and_the_difference_make_the_new_to_the_bit(dtype: torch.dtype, size: int, data: st.DataObject):
    torch.manual_seed(data.draw(st.integers(0, 9)))
    old = torch.randn(size).to(dtype)
    new = old.clone()
    for place in data.draw(st.lists(st.integers(0, size - 1), max_size=size // 8)):
        new[place] = data.draw(st.floats(-4, 4))
    before = old.clone()
    delta = difference(raw(old), raw(new), dtype.itemsize)
    if delta is not None:
        assert torch.equal(applied(raw(old), delta, dtype.itemsize), raw(new))
        assert len(delta) <= size * dtype.itemsize / 2
    assert torch.equal(old, before), "the last version is still whole"
