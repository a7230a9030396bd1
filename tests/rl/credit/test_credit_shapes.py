import pytest
import torch

from conf.errors import ShapeError, UnscoredNode
from rl.credit.shapes import check_shapes, require_scored


def test_arrays_that_agree_on_every_letter_pass():
    check_shapes(reward_N=torch.zeros(5), score_NK=torch.zeros(5, 2), weight_K=torch.zeros(2))


def test_two_arrays_that_disagree_on_a_letter_are_named_with_both_sizes():
    with pytest.raises(ShapeError) as error:
        check_shapes(reward_N=torch.zeros(5), parent_N=torch.zeros(4))
    assert str(error.value) == "reward_N has N=5 nodes but parent_N has N=4; pass arrays of the same tree."


def test_a_letter_of_a_batch_asks_for_arrays_of_the_same_batch():
    with pytest.raises(ShapeError, match=r"logp_T has T=3 tokens but old_T has T=2; pass arrays of the same batch"):
        check_shapes(logp_T=torch.zeros(3), old_T=torch.zeros(2))


def test_a_matrix_under_a_vector_name_is_refused():
    with pytest.raises(ShapeError, match=r"reward_N has shape \[5, 1\].*Pass a tensor of shape \[N\]"):
        check_shapes(reward_N=torch.zeros(5, 1))


def test_first_row_that_was_never_scored_is_named():
    with pytest.raises(UnscoredNode, match=r"the value of row 1 is nan"):
        require_scored(torch.tensor([0.0, torch.nan, torch.inf]))


def test_rows_that_nobody_uses_need_no_score():
    require_scored(torch.tensor([0.0, torch.nan]), torch.tensor([True, False]))


def test_infinite_value_is_as_bad_as_none():
    with pytest.raises(UnscoredNode, match="row 0 is inf"):
        require_scored(torch.tensor([torch.inf]), torch.tensor([True]))
