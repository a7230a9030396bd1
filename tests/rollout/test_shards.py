"""Weights in pieces, and whole again."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published import arrived, brought, piece, published, rows_of

from conf.errors import DamagedWeights
from rollout.shards import Arriving, Published, check_piece, whole_tensors, without_copy

WEIGHT = torch.arange(10.0).reshape(5, 2)


@given(st.integers(0, 6), st.integers(1, 4), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_rows_of_any_number_of_processes_make_the_whole_tensor_to_the_bit(num: int, size: int, dtype: torch.dtype):
    weight = torch.randn(num, 3).to(dtype)
    stops = [min(rank * -(-num // size), num) for rank in range(size)] + [num]
    parts = [piece(rows_of("w", weight, start, stop)) for start, stop in itertools.pairwise(stops)]
    if num:
        (whole,) = whole_tensors([(each.rows, without_copy(each.payload)) for each in reversed(parts)]).values()
        assert whole.dtype == dtype and torch.equal(whole, weight)


def test_a_tensor_that_comes_in_one_part_is_not_copied():
    rows, array = rows_of("w", WEIGHT)
    assert whole_tensors([([rows], without_copy([array]))])["w"].data_ptr() == WEIGHT.data_ptr()


def test_a_number_is_a_tensor_too():
    assert arrived(published({"scale": torch.tensor(0.5), "w": WEIGHT}))["scale"] == 0.5


def test_groups_come_one_after_the_other_with_the_next_under_way():
    sent, asked = published(dict.fromkeys("abcd", WEIGHT)), []

    async def fetch(payload: list[np.ndarray]) -> list[np.ndarray]:
        asked.append(len(asked))
        return payload

    async def first() -> set[str]:
        async for tensors in Arriving(sent, fetch).tensors():
            await asyncio.sleep(0)
            return set(tensors)
        return set()

    assert asyncio.run(first()) == {"a", "b"} and asked == [0, 1]


def test_a_flipped_bit_is_refused():
    sent = piece(rows_of("w", WEIGHT))
    spoilt = sent.payload[0].copy()
    spoilt[7] ^= 1
    with pytest.raises(DamagedWeights, match="weights of w and 0 other tensors arrived with checksum"):
        check_piece(sent, [spoilt])


def test_an_engine_sees_nothing_of_a_damaged_group():
    sent = published(dict.fromkeys("abcd", WEIGHT))
    second = replace(sent.groups[1][0], checksum="of something else")
    seen: list[str] = []

    async def take() -> None:
        async for tensors in Arriving(Published(1, (sent.groups[0], (second,))), brought).tensors():
            seen.extend(tensors)

    with pytest.raises(DamagedWeights):
        asyncio.run(take())
    assert seen == ["a", "b"]


@pytest.mark.parametrize(("parts", "got"), [([(0, 2), (3, 5)], "0 to 2, 3 to 5"), ([(0, 3), (2, 5)], "0 to 3, 2 to 5")])
def test_missing_rows_and_rows_that_come_twice_are_refused(parts: list[tuple[int, int]], got: str):
    pieces = [piece(rows_of("w", WEIGHT, start, stop)) for start, stop in parts]
    with pytest.raises(DamagedWeights, match=f"weights of w: rows {got} arrived of the 5"):
        whole_tensors([(each.rows, without_copy(each.payload)) for each in pieces])
