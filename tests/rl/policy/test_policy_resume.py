"""A run that stopped half-way comes to the same bits as one that did not, and to the same loss on other ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_cases
import resume_cases
import torch
from resume_cases import HALF, STEPS, Run

from rl.policy.ranks import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ALONE = Ranks.alone(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resume")
    resume_cases.write_start(made)
    return made


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Run:
    return resume_cases.straight(folder, ALONE)


@pytest.fixture(scope="module")
def two_ranks(folder: Path, one_rank: Run) -> dict[str, Run]:
    """What rank 0 of two found; `one_rank` has left its checkpoint by then."""
    cases = [resume_cases.straight_here, resume_cases.second_half_here, resume_cases.taken_from_one]
    found = rank_cases.run_ranks(cases, folder)
    assert not any(isinstance(of_rank, str) for runs in found.values() for of_rank in runs), found
    return {name: tuple(of_rank[0]) for name, of_rank in found.items()}


def assert_same_bits(resumed: Run, whole: Run) -> None:
    assert len(whole[0]) == STEPS and resumed[0] == whole[0][HALF:]
    assert resumed[1].keys() == whole[1].keys()
    assert all(torch.equal(weight, whole[1][name]) for name, weight in resumed[1].items())


def assert_equal_losses(resumed: Run, whole: Run) -> None:
    for found, wanted in zip(resumed[0], whole[0][HALF:], strict=True):
        assert found["loss/total"] == pytest.approx(wanted["loss/total"], abs=1e-6, rel=0)
        assert found["learner/grad_norm"] == pytest.approx(wanted["learner/grad_norm"], rel=1e-4)


def test_ten_steps_are_five_a_resume_and_five_on_one_rank(folder: Path, one_rank: Run):
    assert_same_bits(resume_cases.second_half(folder, ALONE, saved_by=1), one_rank)


def test_ten_steps_are_five_a_resume_and_five_on_two_ranks(two_ranks: dict[str, Run]):
    assert_same_bits(two_ranks["second_half_here"], two_ranks["straight_here"])


def test_one_rank_goes_on_where_two_stopped_with_equal_loss(folder: Path, two_ranks: dict[str, Run]):
    assert_equal_losses(resume_cases.second_half(folder, ALONE, saved_by=2), two_ranks["straight_here"])


def test_two_ranks_go_on_where_one_stopped_with_equal_loss(one_rank: Run, two_ranks: dict[str, Run]):
    assert_equal_losses(two_ranks["taken_from_one"], one_rank)
