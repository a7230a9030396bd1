"""Scores grown trees: every source at once, every unique step once, and a stop when a source has been lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, RewardFailed
from conf.schema import Level, ModelKind, RewardModelConfig, RewardsConfig
from rewards.arguments import ENGINE, MODEL, Call
from rewards.base import Answers, Source, build_sources
from rewards.blend import blend
from rewards.cache import ScoreCache
from rewards.engine import Completer, TreeEngine
from rewards.judging import SourceJudge
from rewards.models.base import MarkedText, Message, Reply, RewardModel
from rewards.sandbox import Sandbox
from rewards.types import BROKEN, Cost, Origin, Score, ScoredTree, ScoreStatus
from rollout.tree import ROOT, Tree

MAX_EXAMPLE_CHARS = 200


class RewardService:
    """Scores trees with the configured sources. Shipped ones run here, a user's own in processes that can be killed."""

    def __init__(
        self,
        cfg: RewardsConfig,
        columns: Collection[str] | None = None,
        *,
        models: Mapping[str, RewardModel] | None = None,
        completer: Completer | None = None,
        cache_path: Path | None = None,
    ):
        """Load every source; processes start with the first tree that needs one.

        Args:
            cfg: sources, models, processes, failure budget.
            columns: columns that every prompt has, where known, so that a misspelt argument is refused here.
            models: of rewards.models, those that somebody else has started; endpoints are reached from here.
            completer: goes on from a step, for sources that ask for `engine`.
            cache_path: SQLite file of cached scores; None keeps them in memory. rewards.cache_path goes before it.
        Raises: ConfigError that lists the problems of all sources together.
        """
        self._cfg = cfg
        # What the run's own process reward model says is blended in by who asks it.
        self._blended = replace(cfg, sources={name: each for name, each in cfg.sources.items() if not each.prm})
        self._sources = build_sources(cfg, columns)
        self._of_name = {source.name: source for source in self._sources}
        self._models = _models(cfg, self._sources, models or {})
        self._completer = completer
        self._sandbox = Sandbox(cfg)
        self._cache: ScoreCache | None = None
        self._cache_path = Path(cfg.cache_path) if cfg.cache_path else cache_path
        self._asking: dict[str, asyncio.Future[list[Score]]] = {}
        self._origins: dict[tuple[str, str], Origin] = {}

    async def score(self, tree: Tree, only: Collection[str] | None = None) -> ScoredTree:
        """Ask every source about the steps and trajectories that may train, and blend what they say into signals.

        Args:
            only: names of the sources to ask; nothing is blended then.
        Returns: the scored tree; a source that broke has failed or timed-out scores there, nothing is raised.
        """
        sources = [source for source in self._sources if only is None or source.name in only]
        scored = ScoredTree(tree=tree, costs={source.name: Cost() for source in sources})
        said = await asyncio.gather(*(self._said(each, tree, scored.costs[each.name]) for each in sources))
        for source, scores in zip(sources, said, strict=True):
            of_level = scored.step_scores if source.level is Level.step else scored.leaf_scores
            of_level[source.name] = scores
            scored.origins[source.name] = self._origin(source)
        return scored if only is not None else blend(scored, self._blended)

    async def judge(self, source: str, tree: Tree, rows: list[int]) -> list[float | None]:
        """What a source of steps says of steps of a tree that still grows; None where it gave no number."""
        return await SourceJudge(self._grade, source).score(tree, rows)

    def use_completer(self, completer: Completer) -> None:
        """From now on, go on from steps with this one."""
        self._completer = completer

    @property
    def num_processes(self) -> int:
        """Reward processes that are up; none before the first tree that needs one."""
        return self._sandbox.num_running

    def close(self) -> None:
        """Stop the reward processes and close the cache."""
        self._sandbox.close()
        if self._cache is not None:
            self._cache.close()

    async def _said(self, source: Source, tree: Tree, cost: Cost) -> dict[int, Score]:
        calls = source.calls(tree)
        ask = self._cached_answers if source.uses_cache else self._answers
        answers = await ask(source, tree, calls, cost) if calls else []
        cost.calls = len(calls)
        return source.folded(tree, calls, answers)

    async def _cached_answers(self, source: Source, tree: Tree, calls: Sequence[Call], cost: Cost) -> Answers:
        """As `_answers`; of calls with equal content only the first is asked, whichever tree it is in."""
        if self._cache is None:
            self._cache = ScoreCache(self._cache_path)
        names = source.digests(tree, calls, self._origin(source).version)
        call_of = dict(zip(reversed(names), reversed(calls), strict=True))
        known = self._cache.found(call_of)
        awaited = {name: self._asking[name] for name in call_of if name not in known and name in self._asking}
        asked = [name for name in call_of if name not in known and name not in awaited]
        cost.cached_calls = len(calls) - len(asked)
        if asked:
            loop = asyncio.get_running_loop()
            self._asking |= {name: loop.create_future() for name in asked}
            try:
                answers = await self._answers(source, tree, [call_of[name] for name in asked], cost)
                found = dict(zip(asked, answers, strict=True))
            except BaseException:
                for name in asked:
                    self._asking.pop(name).cancel()
                raise
            self._cache.keep(found)
            for name, scores in found.items():
                self._asking.pop(name).set_result(scores)
            known |= found
        for name, future in awaited.items():
            known[name] = await future
        return [known[name] for name in names]

    async def _answers(self, source: Source, tree: Tree, calls: Sequence[Call], cost: Cost) -> Answers:
        services: dict[str, Any] = {}
        if MODEL in source.services:
            model = source.cfg.model
            services[MODEL] = _Metered(self._models[model], cost, self._cfg.models[model])
        if ENGINE in source.services:
            services[ENGINE] = TreeEngine(tree, self._completer, partial(self._grade, asker=cost), cost)
        if source.runs_here:
            started = time.monotonic()
            answers = await source.answers(tree, calls, services)
            cost.seconds = time.monotonic() - started
        else:
            answers, cost.seconds = await self._sandbox.answers(source, tree, calls, services)
        return answers

    async def _grade(self, name: str, tree: Tree, asker: Cost | None = None) -> dict[int, Score]:
        """What a source says of a tree; what its model costs is noted for `asker`."""
        if name not in self._of_name:
            raise KeyError(f'no source "{name}" under rewards.sources; there are {", ".join(self._of_name)}')
        cost = Cost()
        said = await self._said(self._of_name[name], tree, cost)
        if asker is not None:
            asker.add_requests(cost)
        return said

    def _origin(self, source: Source) -> Origin:
        model = source.cfg.model
        identity = self._models[model].identity if model else ""
        if (source.name, identity) not in self._origins:  # it reads files
            self._origins[source.name, identity] = source.origin(self._cfg.models.get(model), identity)
        return self._origins[source.name, identity]


class _Metered:
    """A model that notes what it costs the source that asks it."""

    def __init__(self, model: RewardModel, cost: Cost, cfg: RewardModelConfig) -> None:
        self._model, self._cost, self._cfg = model, cost, cfg

    @property
    def identity(self) -> str:
        return self._model.identity

    async def chat(self, messages: Sequence[Message], **settings: Any) -> Reply:
        self._cost.requests += 1
        reply = await self._model.chat(messages, **settings)
        self._cost.tries += reply.num_tries
        self._cost.prompt_tokens += reply.prompt_tokens
        self._cost.reply_tokens += reply.reply_tokens
        self._cost.usd += (
            reply.prompt_tokens * self._cfg.usd_per_million_prompt_tokens
            + reply.reply_tokens * self._cfg.usd_per_million_reply_tokens
        ) / 1e6
        return reply

    async def choose(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        self._cost.requests += 1
        self._cost.tries += 1
        return await self._model.choose(messages, choices)

    async def score_steps(self, texts: Sequence[MarkedText]) -> list[list[float]]:
        self._cost.requests += 1
        self._cost.tries += 1
        return await self._model.score_steps(texts)


def _models(
    cfg: RewardsConfig, sources: Sequence[Source], started: Mapping[str, RewardModel]
) -> dict[str, RewardModel]:
    """What sources ask, by name."""
    models: dict[str, RewardModel] = dict(started)
    for source in sources:
        name = source.cfg.model
        if not name or name in models:
            continue
        if name not in cfg.models:
            raise ConfigError(
                f'{source.key}.model="{name}" is not under rewards.models, which has '
                f"{', '.join(cfg.models) or 'none'}. Describe it there, e.g. rewards.models.{name}="
                f"{{url: http://127.0.0.1:8000/v1, path: the-model}}."
            )
        if cfg.models[name].kind is not ModelKind.endpoint:
            raise ConfigError(
                f"rewards.models.{name}.kind={cfg.models[name].kind.value} is started by a run, and this is none. To "
                f"try {source.key} by itself, serve the model (`vllm serve`) and name it as an endpoint."
            )
        from rewards.models.endpoint import EndpointModel  # loads openai

        models[name] = EndpointModel(cfg.models[name])
    return models


def score_counts(scored: Sequence[ScoredTree]) -> dict[str, dict[ScoreStatus, int]]:
    """How often each source said what, over a batch: source -> status -> number of scores, every status present."""
    counted: dict[str, Counter[ScoreStatus]] = {}
    for tree in scored:
        for source, scores in {**tree.step_scores, **tree.leaf_scores}.items():
            counted.setdefault(source, Counter()).update(score.status for score in scores.values())
    return {source: {status: counts[status] for status in ScoreStatus} for source, counts in counted.items()}


def check_failure_budget(scored: Sequence[ScoredTree], cfg: RewardsConfig) -> None:
    """Stop a run that has lost a source.

    share = (failed + timed out) / (scored + failed + timed out), per source over the batch. Scores that are not
    applicable count on neither side: a source that is rarely asked for an opinion may still not break.

    Raises: RewardFailed naming the first source above cfg.max_failed_share, its share and first error, and a way out.
    """
    for source, counts in score_counts(scored).items():
        broken = sum(counts[status] for status in BROKEN)
        asked = broken + counts[ScoreStatus.scored]
        if broken and broken / asked > cfg.max_failed_share:
            raise RewardFailed(_budget_message(source, broken, asked, scored, cfg))


def _budget_message(source: str, broken: int, asked: int, scored: Sequence[ScoredTree], cfg: RewardsConfig) -> str:
    tree, row, score = next(_broken_scores(source, scored))
    text = tree.prompt.question if row == ROOT else tree.nodes[row].action_text
    shown = text if len(text) <= MAX_EXAMPLE_CHARS else f"{text[:MAX_EXAMPLE_CHARS]}..."
    if score.status is ScoreStatus.timed_out:
        remedy = f"Make it faster or raise rewards.sources.{source}.timeout_s"
    else:
        remedy = "Mend it"
    return (
        f"rewards.sources.{source} failed {broken} of {asked} scores in this batch ({broken / asked:.1%}), more than "
        f"rewards.max_failed_share={cfg.max_failed_share:g} allows: the policy would learn only from the steps that it "
        f'happens to answer. First error: {score.reason}; at prompt "{tree.prompt.id}", step "{shown}". '
        f"{remedy}, return None where it has nothing to say, or raise rewards.max_failed_share."
    )


def _broken_scores(source: str, scored: Sequence[ScoredTree]) -> Iterator[tuple[Tree, int, Score]]:
    for each in scored:
        scores = {**each.step_scores, **each.leaf_scores}.get(source, {})
        for row, score in scores.items():
            if score.status in BROKEN:
                yield each.tree, row, score
