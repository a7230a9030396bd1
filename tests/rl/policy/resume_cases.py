"""Ten steps of a learner, straight and in two halves, on any number of ranks."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import rank_cases
from policy_trees import VOCABULARY, grown, paired, tiny
from torch import Tensor

from conf.schema import Config, LearnerConfig
from rl.policy.learner import Learner
from rl.policy.pack import TreeCredit
from rl.policy.ranks import Ranks
from rollout.tree import ROOT

STEPS, HALF = 10, 5
SHAPE = [ROOT, 0, 0, 1, 1, ROOT]
START, MIDDLE = "start", "middle"
"""Folders of the first weights and of the checkpoint after HALF steps."""

Run = tuple[list[dict[str, float]], dict[str, Tensor]]
"""Metrics of each step, and the weights after the last."""


def write_start(folder: Path) -> None:
    """The first weights and a tokenizer; without dropout, whose masks are drawn for each rank."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny("qwen3").save_pretrained(folder / START)
    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    tokenizer.save_pretrained(folder / START)


def learner(folder: Path, ranks: Ranks) -> Learner:
    """As it is before the first step."""
    settings = LearnerConfig(
        num_processes=ranks.size,
        num_threads=1,
        warmup_steps=7,
        learning_rate=1e-3,
        mini_batches=2,
        weight_decay=0.1,
        pack_tokens=60,
    )
    return Learner(Config(learner=settings), str(folder / START), ranks)


def trees(step: int) -> list[TreeCredit]:
    rng = random.Random(step)
    made = [grown(SHAPE, [(rng.randint(1, 4), 2) for _ in SHAPE], rng, name=f"{step}/{n}") for n in range(5)]
    return [paired(tree, rng).credit() for tree in made]


def straight(folder: Path, ranks: Ranks) -> Run:
    """All steps; the checkpoint of the middle is written while the steps behind it go on."""
    trained, metrics = learner(folder, ranks), []
    for step in range(STEPS):
        if step == HALF:
            trained.begin_save(folder / f"{MIDDLE}{ranks.size}")
        metrics.append(trained.update(trees(step), step))
    while not trained.saved().done:
        time.sleep(0.002)
    assert trained.saved().error == ""
    return metrics, trained.policy.weights()


def second_half(folder: Path, ranks: Ranks, saved_by: int) -> Run:
    """The steps behind the checkpoint that `saved_by` ranks wrote, by a learner that knows nothing else."""
    trained = learner(folder, ranks)
    trained.load(folder / f"{MIDDLE}{saved_by}")
    metrics = [trained.update(trees(step), step) for step in range(HALF, STEPS)]
    return metrics, trained.policy.weights()


def straight_here(ranks: Ranks) -> Any:
    return list(straight(rank_cases.shared, ranks))


def second_half_here(ranks: Ranks) -> Any:
    return list(second_half(rank_cases.shared, ranks, saved_by=ranks.size))


def taken_from_one(ranks: Ranks) -> Any:
    return list(second_half(rank_cases.shared, ranks, saved_by=1))
