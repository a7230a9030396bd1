"""Two learner processes on Ray, as the driver sees them: one learner."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from policy_trees import VOCABULARY, grown, paired, tiny
from published import arrived, of_ranks

from conf.errors import WorkerLost
from conf.schema import Config, LearnerConfig
from rewards.drawn import parse_tree
from rl.policy import actor
from rl.policy.actor import Calls, LearnerGroup
from rl.policy.learner import Learner
from rl.policy.pack import TreeCredit
from rl.policy.ranks import Ranks
from rl.policy.trained import NonFiniteGradient
from rollout.tree import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHAPE = [ROOT, 0, 0, 1, 1, ROOT]


def config(num_processes: int) -> Config:
    learner = LearnerConfig(num_threads=1, warmup_steps=0, pack_tokens=50, num_processes=num_processes)
    return Config(learner=learner)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3 folder with a word tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("policy")
    tiny("qwen3").save_pretrained(folder)
    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def group(checkpoint: str, logs: Path) -> Iterator[LearnerGroup]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    started = LearnerGroup(config(2), checkpoint, logs)
    answer(started, started.ready())
    yield started
    started.close()
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(checkpoint: str) -> Learner:
    """One process, in step with the group."""
    return Learner(config(1), checkpoint, Ranks.alone(torch.device("cpu")))


def answer(group: LearnerGroup, calls: Calls, what: str = "the test") -> Any:
    return group.answer(calls, limit_s=200.0, what=what)


def trees() -> list[TreeCredit]:
    rng = random.Random(3)
    made = [grown(SHAPE, [(rng.randint(1, 4), 2) for _ in SHAPE], rng, name=f"test/{n}") for n in range(5)]
    return [paired(tree, rng).credit() for tree in made]


async def in_shared_memory(ref: Any) -> Any:
    return ray.get(ref)


def test_two_processes_learn_what_one_learns_and_publish_it_together(group: LearnerGroup, alone: Learner):
    found, wanted = answer(group, group.update(trees(), 0)), alone.update(trees(), 0)
    # each rank has packs of its own, so a tree that two of them share costs its prefix twice
    assert found.pop("learner/packed_tokens") >= wanted.pop("learner/packed_tokens")
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    group_weights = arrived(group.publish(1, limit_s=200.0), in_shared_memory)
    weights = arrived(of_ranks([alone.pieces()]))
    assert group_weights.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(group_weights[name], weight, rtol=0, atol=1e-5)


def test_samples_are_scored_once_though_all_ranks_compute(group: LearnerGroup, alone: Learner):
    samples = [([1, 2], [3, 4, 5]), ([6], [7])]
    for found, wanted in zip(answer(group, group.score(samples)), alone.score(samples), strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


def test_one_process_loads_the_checkpoint_of_two(group: LearnerGroup, checkpoint: str, tmp_path: Path):
    answer(group, group.begin_save(str(tmp_path)))
    answer(group, group.update(trees(), 1))  # training goes on, and what is written is of before it
    while not all(written.done for written in group.answers(group.saved(), limit_s=60, what="the files")):
        time.sleep(0.01)
    after = answer(group, group.score([([1, 2], [3, 4, 5])]))[0]
    answer(group, group.load(str(tmp_path)))
    assert answer(group, group.score([([1, 2], [3, 4, 5])]))[0] != after
    loaded = Learner(config(1), checkpoint, Ranks.alone(torch.device("cpu")))
    loaded.load(tmp_path)
    wanted = answer(group, group.score([([1, 2], [3, 4, 5])]))[0]
    assert loaded.score([([1, 2], [3, 4, 5])])[0] == pytest.approx(wanted, abs=1e-5)


def test_each_rank_writes_its_own_log(group: LearnerGroup, logs: Path):
    assert {path.name for path in logs.iterdir()} == {"learner.log", "learner_rank1.log"}


def test_an_error_that_all_ranks_raise_leaves_them_alive(group: LearnerGroup):
    broken = TreeCredit(tree=parse_tree("q -> a", logprob=-1.0), w_pos=[float("nan")], w_neg=[0.0], w0=[1.0])
    with pytest.raises(NonFiniteGradient, match="the gradient norm is nan"):
        answer(group, group.update([broken], 1))
    assert len(answer(group, group.score([([1], [2])]))) == 1


def test_a_rank_that_dies_is_named_and_takes_the_others_with_it(
    group: LearnerGroup, logs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(actor, "SETTLE_S", 5.0)
    os.kill(group.pids()[1], signal.SIGKILL)
    with pytest.raises(WorkerLost, match=rf"update 7, 1 of 2 .* rank 1 \({logs}/learner_rank1\.log\)\. The others"):
        answer(group, group.update(trees(), 7), what="update 7")
    with pytest.raises(WorkerLost, match=r"2 of 2 learner processes died: rank 0 .* and rank 1"):
        answer(group, group.score([([1], [2])]))
