"""reasoning-gym (arXiv 2505.24760): about a hundred makers of questions, each with the package's own scorer."""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from conf.errors import ConfigError, DataError
from conf.schema import ReasoningGymConfig
from rollout.envs.optional import import_optional
from rollout.seeds import derive_seed
from rollout.types import Prompt
from rollout.world import Fork, Observed

STAND_INS: dict[str, tuple[str, ...]] = {"pycosat": ()}
"""Needs a compiler; zebra_puzzles alone uses it."""
HELD_OUT_SEEDS = 10_000_000
"""Question i is the first of the dataset with seed s + i: seeds below this number are never trained on."""
NUM_SEEDS = 2_000_000_000
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
OWN_PARAMETERS = ("seed", "size")
AGAIN = "That is not right. Try again."


@lru_cache(maxsize=256)
def _dataset(name: str, args: str, seed: int) -> Any:
    """Raises: ConfigError for a name or parameters that the package does not know."""
    package = import_optional("reasoning_gym", STAND_INS)
    known = import_optional("reasoning_gym.factory").DATASETS
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else f" There are {', '.join(sorted(known))}."
        raise ConfigError(f'task.reasoning_gym.dataset="{name}" is no dataset of reasoning-gym.{hint}')
    given = json.loads(args)
    own = [each for each in OWN_PARAMETERS if each in given]
    if own:
        raise ConfigError(
            f"task.reasoning_gym.args gives {own[0]}={given[own[0]]}, which follows from the run: questions are drawn "
            "without end from cfg.seed, and held-out ones from seeds of their own. Leave it out."
        )
    try:
        return package.create_dataset(name, seed=seed, **given)
    except Exception as error:  # datasets check their parameters by assert, and an unknown one is a TypeError
        raise ConfigError(
            f"task.reasoning_gym.args={given}: the dataset {name} refuses its parameters "
            f"({type(error).__name__}: {error}). Correct them."
        ) from error


def _entry(name: str, args: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """The question of a seed, and the dataset that scores it.

    Raises: ConfigError when the dataset cannot make questions here.
    """
    dataset = _dataset(name, args, seed)
    try:
        return dataset, dataset[0]
    except Exception as error:
        raise ConfigError(
            f"task.reasoning_gym.dataset={name} could not make the question of seed {seed} ({type(error).__name__}: "
            f"{error}). Use other parameters; zebra_puzzles needs `pip install pycosat`, which needs a compiler."
        ) from error


class ReasoningGymRows:
    """Questions of one dataset without end. Held-out ones do not depend on the seed."""

    num_rows: int | None = None

    def __init__(self, config: ReasoningGymConfig, seed: int, split: str) -> None:
        """Args: split is "train" or "eval". Raises: ConfigError without the package, or for an unknown dataset."""
        assert split in ("train", "eval"), f"unknown split {split}"
        self._config, self._args = config, json.dumps(dict(config.args), sort_keys=True)
        drawn = HELD_OUT_SEEDS + derive_seed("reasoning_gym", seed) % NUM_SEEDS
        self._seed = drawn if split == "train" else 0
        _entry(config.dataset, self._args, self._seed)

    def row(self, index: int) -> dict[str, Any]:
        """Columns question, answer ("" where there are many), dataset, args, dataset_seed and num_tries."""
        _, entry = _entry(self._config.dataset, self._args, self._seed + index)
        return {
            "question": entry["question"],
            "answer": entry["answer"] if isinstance(entry["answer"], str) else "",
            "dataset": self._config.dataset,
            "args": self._args,
            "dataset_seed": self._seed + index,
            "num_tries": self._config.num_tries,
        }


class ReasoningGym:
    """Scores answers to the question that a row names, and lets the policy try again."""

    fork = Fork.copy

    def reset(self, prompt: Prompt) -> tuple[dict[str, Any], str]:
        """The question again.

        Raises: DataError for a row without its columns.
        """
        data = prompt.data
        missing = [name for name in ("dataset", "args", "dataset_seed") if name not in data]
        if missing:
            raise DataError(
                f'prompt "{prompt.id}" has no column "{missing[0]}": the world ReasoningGym scores the questions that '
                "task.generator=reasoning_gym makes."
            )
        dataset, entry = _entry(data["dataset"], data["args"], data["dataset_seed"])
        session = {"dataset": dataset, "entry": entry, "left": data.get("num_tries", 1), "best": 0.0}
        return session, entry["question"]

    def copy(self, session: dict[str, Any]) -> dict[str, Any]:
        """The same question with the same tries left."""
        return dict(session)

    def act(self, session: dict[str, Any], action: str) -> Observed:
        """Score an answer: what stands in the last <answer> ... </answer>, else all of it.

        The step's score is what it adds to the best answer so far, so an episode's steps add up to its best.
        """
        found = ANSWER.findall(action)
        answer = (found[-1] if found else action).strip()
        try:
            score = float(session["dataset"].score_answer(answer, session["entry"]))
        except Exception:  # some scorers parse an answer without care: what cannot be read is wrong
            score = 0.0
        score = min(1.0, max(0.0, score))
        gained = max(0.0, score - session["best"])
        session["best"] += gained
        session["left"] -= 1
        won = score == 1.0
        done = won or session["left"] <= 0
        return Observed(text="" if done else AGAIN, done=done, score=gained, won=won, answer=answer)
