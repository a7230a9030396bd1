"""The sides of the learner's benchmark compute one gradient, and what is measured of them is what they took."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import learner, learner_gpu, tables
from benchmarks.apart import Apart, Step
from benchmarks.forests import CHAINS, COMB, GRPO, TOOL, Forest, Shape, Trajectory, random_forest
from benchmarks.policies import TINY, random_policy
from benchmarks.sides import filled, gradient_gap, grouped, packed, padded, varlen
from conf.schema import Layout
from rl.policy.model import TreePolicy

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [TOOL, GRPO, COMB, CHAINS], ids=lambda shape: shape.name)
def test_all_sides_compute_the_same_gradient(shape: Shape):
    policy, forest = random_policy(TINY, CPU), random_forest(shape.resized(120), TINY.vocabulary)
    sides = [packed(Layout.segments), varlen, padded]
    assert gradient_gap(policy, forest, sides, max_tokens=100) < 1e-5  # 100: each side needs several passes


def test_a_side_that_leaves_out_a_trajectory_is_found():
    def forgetful(policy: TreePolicy, forest: Forest, max_tokens: int) -> None:
        padded(policy, Forest(forest.credits, forest.trajectories[1:]), max_tokens)

    policy, forest = random_policy(TINY, CPU), random_forest(GRPO.resized(60), TINY.vocabulary)
    assert gradient_gap(policy, forest, [forgetful, padded], max_tokens=100) > 0.1


def test_padded_rows_count_with_their_padding():
    trajectories = [of_length(length) for length in (5, 2, 3, 4)]
    groups = grouped(trajectories, max_tokens=9)
    # 2 and 3 take two rows of 3, a third row of 4 would make 12; 4 and 5 would take two rows of 5.
    assert [[len(each.token_ids_T) for each in group] for group in groups] == [[2, 3], [4], [5]]


def test_rows_without_padding_are_filled_by_their_tokens():
    trajectories = [of_length(length) for length in (5, 2, 3, 4)]
    groups = filled(trajectories, max_tokens=9)
    assert [[len(each.token_ids_T) for each in group] for group in groups] == [[2, 3, 4], [5]]


def of_length(length: int) -> Trajectory:
    nothing = torch.zeros(0)
    return Trajectory(torch.zeros(length, dtype=torch.int64), nothing.long(), nothing, nothing, nothing)


def test_the_gpu_benchmark_runs_on_a_cpu_at_tiny_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(tables, "OUT", tmp_path)
    monkeypatch.setattr(learner_gpu, "REPEATS", 1)
    learner_gpu.main(["--quick"])
    assert "tool" in capsys.readouterr().out
    assert (tmp_path / "quick_learner_gpu.json").exists()


@pytest.mark.slow
def test_the_benchmark_runs_at_tiny_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tables, "OUT", tmp_path)
    learner.main(["--quick", "--threads", "1"])
    names = {"quick_learner.json", "quick_learner_memory.json", "quick_learner_head.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.slow
def test_the_peak_is_that_of_the_step_alone():
    with Apart(partial(filling_step, mib=64), num_threads=1, preload=["torch"]) as apart:
        first, second = apart.step(), apart.step()
    assert 60 < first.peak_mib < 80
    assert 60 < second.peak_mib < 80


def filling_step(mib: int) -> Step:
    torch.ones(2**20 * 200 // 4)  # 200 MiB before the step, given back: not the step's

    def step() -> None:
        torch.ones(2**20 * mib // 4)

    return step
