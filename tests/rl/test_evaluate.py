from __future__ import annotations

from pathlib import Path

import pytest

from conf.errors import CheckpointError, ConfigError, RewardFailed
from conf.schema import Config, ExpanderKind
from rewards.drawn import parse_scored
from rewards.types import Score
from rl.evaluate import evaluate_run, evaluation_of, evaluation_rollout, successes_of


def test_success_is_the_share_of_scored_trajectories():
    trees = [parse_scored("q -> a", outcomes={"a": value}) for value in (1.0, 1.0, 0.0, 1.0)]
    found = evaluation_of(trees)
    assert found.success_share == 0.75 and found.num_prompts == 4
    assert found.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_a_trajectory_whose_score_failed_is_not_a_failure():
    good, lost = parse_scored("q -> a", outcomes={"a": 1.0}), parse_scored("q -> a", outcomes={"a": 0.0})
    name = next(iter(lost.leaf_scores))
    lost.leaf_scores[name] = {row: Score.failed("no answer") for row in lost.leaf_scores[name]}
    assert successes_of(lost) == []
    assert evaluation_of([good, lost]).success_share == 1.0


def test_an_evaluation_without_one_score_is_an_error_and_not_zero():
    lost = parse_scored("q -> a", outcomes={"a": 0.0})
    lost.leaf_scores = {"answer": {0: Score.timed_out("late")}}
    with pytest.raises(RewardFailed, match="success is unknown, not 0"):
        evaluation_of([lost])


def test_held_out_prompts_get_one_trajectory_at_their_own_temperature():
    cfg = Config()
    cfg.run.eval_temperature = 0.0
    rollout = evaluation_rollout(cfg)
    assert (rollout.expander, rollout.num_leaves, rollout.temperature) == (ExpanderKind.chains, 1, 0.0)
    assert cfg.rollout.expander is not ExpanderKind.chains


def test_a_folder_that_is_neither_run_nor_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"neither a run folder .* nor a model folder"):
        evaluate_run(str(tmp_path), [], None)


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path):
    from conf.compose import compose, to_yaml

    (tmp_path / "config.yaml").write_text(to_yaml(compose(["experiment=hop_search"])))
    with pytest.raises(CheckpointError, match="holds no intact checkpoint"):
        evaluate_run(str(tmp_path), [], None)
