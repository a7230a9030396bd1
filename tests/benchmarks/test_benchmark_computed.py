"""What an engine computes for trees: the account of requests is the engine's own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks import computed
from conf.compose import compose
from rewards.drawn import parse_tree
from rl.tiny import write_tiny_model
from rollout.types import StopReason


def test_an_environment_of_a_given_size_replies_alike_to_the_same_turn():
    replies = computed.Replies((1,), longest=200, num_words=50)
    first, again, other = (
        asyncio.run(replies.act(0, turn, stopped=True)).observation_ids for turn in ([4, 1], [4, 1], [5, 1])
    )
    assert first == again != other and 50 <= len(first) <= 200
    assert asyncio.run(computed.Replies((1,), 0, 50).act(0, [4, 1], stopped=True)).stop is StopReason.answered


def test_prompts_are_all_different_and_about_as_long_as_asked():
    prompts = computed.made_prompts(computed.CASES[1], 8, num_words=50)
    assert len({prompt.token_ids for prompt in prompts}) == 8
    assert all(300 <= len(prompt.token_ids) <= 500 for prompt in prompts)


def test_an_account_that_differs_from_the_engines_own_is_an_error():
    tree = parse_tree("q -> (a, b)")  # contexts of 1 token each, 1 token sampled behind each
    counts = {"context": 2, "cached": 0, "generated": 2}
    assert computed.figures([tree], counts)["computed"] == 2 / 2  # the prompt twice, and no step but its only token
    with pytest.raises(RuntimeError, match=r"the requests tell of .*'cached': 0.*, the engine of .*'cached': 1"):
        computed.figures([tree], counts | {"cached": 1})


@pytest.mark.vllm
def test_an_engine_and_its_requests_tell_the_same(tmp_path: Path):
    model = write_tiny_model(tmp_path / "tiny", compose(computed.CASES[1].overrides))
    found = computed.measured_apart(1, "forking beams", str(model), num_prompts=1)
    assert 0.5 < found["efficiency"] <= 1.0 and 0.0 < found["cached_share"] < 1.0
