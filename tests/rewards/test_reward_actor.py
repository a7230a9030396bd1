"""The actor forwards to the service, user processes included."""

from __future__ import annotations

import pytest

from conf.schema import RewardsConfig, SourceConfig
from rewards.drawn import parse_tree
from rewards.types import Score


@pytest.mark.ray
def test_actor_scores_with_a_function_of_the_users_file(tmp_path):
    ray = pytest.importorskip("ray")
    from rewards.actor import RewardActor

    (tmp_path / "mine.py").write_text("def reward(step): return len(step.action_text)")
    cfg = RewardsConfig(
        sources={
            "mine": SourceConfig(fn=f"{tmp_path}/mine.py:reward"),
            "answer": SourceConfig(fn="rewards.sources.outcome:exact_match"),
        }
    )
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        actor = RewardActor.remote(cfg)
        assert ray.get(actor.ping.remote(), timeout=60)
        scored = ray.get(actor.score.remote(parse_tree("q -> abc", answer="abc")), timeout=60)
        assert scored.step_signals == {"step": {0: Score(3.0)}}
        assert scored.leaf_signals == {"outcome": {0: Score(1.0)}}
        ray.get(actor.close.remote(), timeout=60)
    finally:
        ray.shutdown()
