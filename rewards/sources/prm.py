"""Sources that ask a process reward model. Each names its model: rewards.sources.NAME.model=NAME_UNDER_MODELS."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from conf.errors import ConfigError
from rewards.models.base import MarkedText, Message, ModelError, RewardModel
from rewards.models.families import NO, YES, YES_NO_PROMPT, token_score, yes_no_messages, yes_no_template
from rewards.types import Score
from rollout.seeds import derive_seed
from rollout.tree import Node, Tree

SMALLEST = 1e-6
"""Probabilities are held this far from 0 and 1 before a logarithm is taken: a float32 softmax says nothing closer."""


class StepScores:
    """What a process reward model says of every step.

    Every trajectory is put to the model once, with all its steps, and not once per step: engines read such inputs from
    the start. A step that trajectories share has the score of the first of them that the model could read.
    """

    def __init__(self, logit: bool = False) -> None:
        """Args: `logit`: give log(p / (1 - p)) instead of p, which spreads what a sure model says."""
        self._logit = logit

    async def __call__(
        self, tree: Tree, rows: Sequence[int], steps: Sequence[Node], question: str, model: RewardModel
    ) -> list[float | Score]:
        """Score of each of `rows`, in their order."""
        assert len(rows) == len(steps), "rows are those of the steps"
        paths = [tree.path(leaf) for leaf in tree.trained_leaves()]
        asked = (_scored(model, question, [tree.nodes[row] for row in path]) for path in paths)
        found: dict[int, float | Score] = {}
        for path, scores in zip(paths, await asyncio.gather(*asked), strict=True):
            for row, score in zip(path, scores, strict=True):
                if row not in found or isinstance(found[row], Score):
                    found[row] = score
        return [self._scaled(found[row]) for row in rows]

    def _scaled(self, score: float | Score) -> float | Score:
        return _logit(score) if self._logit and not isinstance(score, Score) else score


class Aggregate:
    """One score for a trajectory, made of what a process reward model says of its steps.

    `min` and `product` punish long trajectories, `mean` pays for padding, `last` makes an outcome model of it.
    """

    def __init__(self, how: str = "min") -> None:
        """Args: `how`: min, mean, product, last or sum."""
        if how not in AGGREGATES:
            raise ConfigError(f'how="{how}" is no way to aggregate. Use one of {", ".join(AGGREGATES)}.')
        self._how = how

    async def __call__(self, trajectory: Sequence[Node], question: str, model: RewardModel) -> float | None:
        """The aggregate of the trajectory's scores."""
        text = MarkedText(question=question, steps=tuple(map(step_text, trajectory)))
        (scores,) = await model.score_steps([text])
        return aggregate(scores, self._how)


class Generative:
    """Asks a chat model in words whether each step is right: P(yes) / (P(yes) + P(no)) as its next token.

    With `reason` it writes a check first and is asked for the verdict then; `num_chains` such checks, each with a seed
    of its own, are averaged (GenPRM; ThinkPRM, arXiv 2504.16828).
    """

    def __init__(
        self,
        reason: bool = False,
        num_chains: int = 1,
        temperature: float = 0.6,
        prompt: str = "",
        yes: str = YES,
        no: str = NO,
    ) -> None:
        """Read the prompt.

        Args:
            temperature: of the written checks.
            prompt: file with a jinja template of question, steps, yes, no and reason; "" for the shipped one.
            yes, no: the two verdicts; each is one token of the model.
        """
        if num_chains < 1 or (num_chains > 1 and not reason):
            raise ConfigError(
                f"num_chains={num_chains} with reason={reason}: chains differ in the check that is written first, so "
                "without one they are all the same. Use reason=true, or num_chains=1."
            )
        template = Path(prompt).expanduser() if prompt else YES_NO_PROMPT
        if not template.is_file():
            raise ConfigError(f'prompt="{prompt}" is no file. Give the path of a jinja template.')
        text = template.read_text(encoding="utf-8")
        self.prompt_hash = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        self._template = yes_no_template(text)
        self._reason, self._num_chains, self._temperature = reason, num_chains, temperature
        self._yes, self._no = yes, no

    async def __call__(
        self, tree: Tree, rows: Sequence[int], steps: Sequence[Node], question: str, model: RewardModel
    ) -> list[float | Score]:
        """Score of each of `rows`, in their order."""
        assert len(rows) == len(steps), "rows are those of the steps"
        paths = [[step_text(tree.nodes[each]) for each in tree.path(row)] for row in rows]
        return await asyncio.gather(*(self._judged(question, path, model) for path in paths))

    async def _judged(self, question: str, path: list[str], model: RewardModel) -> float | Score:
        try:
            chains = [self._chain(question, path, model, number) for number in range(self._num_chains)]
            return sum(await asyncio.gather(*chains)) / self._num_chains
        except (ModelError, TimeoutError) as error:
            return _unscored(error)

    async def _chain(self, question: str, path: list[str], model: RewardModel, number: int) -> float:
        asked = yes_no_messages(self._template, question, path, yes=self._yes, no=self._no, reason=self._reason)
        if self._reason:
            asked += await self._checked(asked, len(path), model, number)
        found = await model.choose(asked, [self._yes, self._no])
        return token_score(found[self._yes], found[self._no])

    async def _checked(self, asked: list[Message], number: int, model: RewardModel, chain: int) -> list[Message]:
        """The check that the model wrote, and the question after it."""
        # The same for every step of a run: what differs between steps is what they are asked about.
        seed = derive_seed("prm", chain)
        reply = await model.chat(asked, temperature=self._temperature, seed=seed)
        # A verdict after an open thought would not be its conclusion.
        check = reply.text.rpartition("</think>")[2].strip() or reply.text.strip()
        verdict = f"So is step {number} correct? Answer with one word: {self._yes} or {self._no}."
        return [{"role": "assistant", "content": check}, {"role": "user", "content": verdict}]


def aggregate(scores: Sequence[float], how: str) -> float | None:
    """One number for the scores of all steps.

    Args:
        scores: in [0, 1], in the order of the steps.
        how: a name of `AGGREGATES`.
    Returns: None where there are no steps: nothing was judged, which is not 0.
    """
    return AGGREGATES[how](scores) if scores else None


def step_text(step: Node) -> str:
    """What the policy said in a step, then what the environment replied."""
    return "\n".join(text for text in (step.action_text, step.observation_text) if text)


def _product(scores: Sequence[float]) -> float:
    # A sum of logarithms does not underflow half way.
    return math.exp(math.fsum(map(math.log, scores))) if min(scores) > 0 else 0.0


AGGREGATES = {
    "min": min,
    "mean": lambda scores: math.fsum(scores) / len(scores),
    "product": _product,
    "last": lambda scores: scores[-1],
    "sum": math.fsum,
}


async def _scored(model: RewardModel, question: str, path: Sequence[Node]) -> Sequence[float | Score]:
    """Scores of one trajectory's steps; one that the model cannot read leaves the others their scores."""
    try:
        (scores,) = await model.score_steps([MarkedText(question=question, steps=tuple(map(step_text, path)))])
    except (ModelError, TimeoutError) as error:
        return [_unscored(error)] * len(path)
    if len(scores) != len(path):
        return [Score.failed(f"the model gave {len(scores)} scores for {len(path)} steps")] * len(path)
    return scores


def _unscored(error: Exception) -> Score:
    reason = str(error) or type(error).__name__
    return Score.timed_out(reason) if isinstance(error, TimeoutError) else Score.failed(reason)


def _logit(probability: float) -> float:
    held = min(max(probability, SMALLEST), 1 - SMALLEST)
    return math.log(held / (1 - held))
