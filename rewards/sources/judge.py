"""Judges: models that are asked what a step, a trajectory or the better of two is worth.

Each asks the `model` that the source names (rewards.sources.NAME.model), in the words of a Jinja file: the shipped one,
or one of yours (args.prompt). The reply is held against a JSON schema and asked for again where it does not fit; a
judge that gives none raises, which is a failed score and never a zero.

Judges read what the policy wrote, and the policy is paid by what they say, so it learns to talk to them. Its texts are
therefore put between marks that they cannot contain, control words are broken up and long texts lose their middle
(`rewards.templates`); that keeps a text in its place, but no judge from being convinced by it. Watch a few scores by
hand, and pay a judge beside something that can be checked.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import re
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from conf.errors import ConfigError, DataError
from rewards.models.base import RewardModel
from rewards.models.replies import ask
from rewards.templates import Template, shown, shown_steps
from rewards.tournament import (
    Game,
    Points,
    anchored,
    double_elimination,
    played_async,
    reward_of_places,
    round_robin,
    single_elimination,
    swiss,
)
from rollout.tree import Node
from rollout.types import StepFacts, StepKind, StopReason

MAX_CHARS = 8_000
TRIES = 3
BEST = 10
"""Points of a perfect trajectory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Principle:
    """One thing that a step is graded by."""

    name: str
    text: str
    weight: float = 1.0


TOOL_USE = (
    Principle(name="well_formed", text="The step is a call that the environment understands and can carry out."),
    Principle(name="needed", text="It asks for what the question needs next, given what is known by now."),
    Principle(name="grounded", text="What it states and passes on is from the question or from earlier replies."),
    Principle(name="new", text="It repeats no earlier call, and the reply brings something that was not known."),
    Principle(name="brief", text="It holds no words or calls that the step does not need."),
)
"""Principles for steps that call a tool."""


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    # OpenAI's strict form: everything is required and nothing else is allowed.
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _reply(**properties: Any) -> dict[str, Any]:
    """Schema of a reply: first why, then what."""
    return _object({"reasoning": {"type": "string", "description": "why, in one to three sentences"}, **properties})


POINTS = {"type": "number", "minimum": 0, "maximum": BEST}
SIDE = _object({"process": POINTS, "answer": POINTS})
"""Points of one side of a game."""


class Judge:
    """What all judges have: a model, a prompt, and a reply of a fixed form."""

    shipped: ClassVar[str]
    """Name of the shipped prompt."""
    variables: ClassVar[tuple[str, ...]]
    """What the prompt may use, beside the question and the like."""
    shows_reference: ClassVar[bool] = False
    """Whether the reference answer is shown unless told otherwise."""

    def __init_subclass__(cls) -> None:
        # Spelt out, so that a misspelt argument is refused before the run and not at the first score.
        own = {**inspect.signature(cls.__init__).parameters}
        common = {**inspect.signature(Judge.__init__).parameters}
        named = {name: each for name, each in (common | own).items() if name not in ("self", "options")}
        cls.__signature__ = inspect.Signature(list(named.values()))

    def __init__(
        self,
        *,
        prompt: str = "",
        about: str = "",
        reference: bool | None = None,
        max_chars: int = MAX_CHARS,
        tries: int = TRIES,
        seed: int = 0,
    ) -> None:
        """Read the prompt.

        Args:
            prompt: a Jinja file of yours; "" for the shipped one.
            about: what the judge should know of the task and its tools; part of the prompt.
            reference: show the judge the reference answer; None for what fits the judge.
            max_chars: letters of one text, such as all earlier steps, that the judge is shown.
            tries: replies to ask for until one fits its form.
            seed: of the judge's sampling.
        Raises: ConfigError for a prompt that cannot be used, or numbers that leave nothing to ask.
        """
        if max_chars < 1 or tries < 1:
            raise ConfigError(
                f"args.max_chars={max_chars} and args.tries={tries} must be at least 1, or there is nothing to ask."
            )
        self._template = Template(prompt, self.shipped, ("question", "reference", "about", *self.variables))
        self._about, self._max_chars, self._tries, self._seed = about, max_chars, tries, seed
        self._reference = self.shows_reference if reference is None else reference
        self.prompt_hash = self._template.hash

    async def _ask(
        self, model: RewardModel, schema: Mapping[str, Any], question: str, answer: str, **values: Any
    ) -> dict[str, Any]:
        """The reply to the prompt with these values. Raises: ModelError; TimeoutError."""
        messages = self._template.messages(
            schema,
            question=shown("question", question, self._max_chars),
            reference=shown("reference", answer, self._max_chars) if self._reference else "",
            about=self._about,
            **values,
        )
        return await ask(model, messages, schema, tries=self._tries, seed=self._seed)

    def _before(self, trajectory: Sequence[Node]) -> str:
        return shown_steps("earlier steps", trajectory[:-1], self._max_chars)

    def _step(self, trajectory: Sequence[Node], name: str = "step", **options: Any) -> str:
        return shown_steps(name, trajectory[-1:], self._max_chars, first=len(trajectory), **options)

    def _trajectory(self, trajectory: Sequence[Node], name: str = "trajectory") -> str:
        return shown_steps(name, trajectory, self._max_chars)


class Principles(Judge):
    """How well a step keeps some principles, in [0, 1]: a principle process reward (PPR, arXiv 2509.25598).

    The weighted mean of points / most points over the principles. PPR's own model invents principles for each step and
    gives one sum of points; here they are fixed, so that scores of different steps mean the same.
    """

    shipped = "principles"
    variables = ("before", "step", "principles", "points")

    def __init__(
        self,
        *,
        principles: Sequence[Mapping[str, Any]] = (),
        points: int = 4,
        judge_last: bool = False,
        parts: bool = False,
        **options: Any,
    ) -> None:
        """Read the prompt and the principles.

        Args:
            principles: records of name, text and weight (1); none for `TOOL_USE`.
            points: most points of one principle.
            judge_last: judge steps that end a trajectory as well, which PPR leaves to the outcome.
            parts: return what each principle adds to the score, by name, so that each can be watched or weighed.
            options: those of `Judge`.
        """
        super().__init__(**options)
        self._principles = [_principle(each) for each in principles] or list(TOOL_USE)
        names = [each.name for each in self._principles]
        if len(set(names)) < len(names):
            raise ConfigError(f"args.principles: two have one name ({', '.join(names)}). Name each by itself.")
        self._weight = math.fsum(each.weight for each in self._principles)
        if points < 1 or not self._weight > 0:
            raise ConfigError(f"args.points={points} and the sum of weights {self._weight} must be above 0.")
        self._points, self._judge_last, self._parts = points, judge_last, parts
        grade = {"type": "integer", "minimum": 0, "maximum": points}
        self._schema = _reply(scores=_object(dict.fromkeys(names, grade)))

    async def __call__(
        self, step: Node, trajectory: Sequence[Node], question: str, answer: str, model: RewardModel
    ) -> float | dict[str, float] | None:
        """Score of a step; None for one that ends its trajectory."""
        if step.stop is not StopReason.continues and not self._judge_last:
            return None
        reply = await self._ask(
            model,
            self._schema,
            question,
            answer,
            before=self._before(trajectory),
            step=self._step(trajectory),
            principles=self._principles,
            points=self._points,
        )
        shares = {
            each.name: each.weight * reply["scores"][each.name] / (self._points * self._weight)
            for each in self._principles
        }
        return shares if self._parts else math.fsum(shares.values())


class Ternary(Judge):
    """-1, 0 or +1 for the thought of a step, and for its query or its answer (SLATE, arXiv 2602.23440).

    Named parts, whose sum is in [-2, 2]: `thought`, then `query` or `answer`, each asked for by itself and without the
    reply to the step, so that the choice is judged and not its luck; and `early`, `early_bonus` (B - t) / B for an
    answer in step t of at most B, from t = 1. A turn that cannot be read has a query of -1, for it is none.
    """

    shipped = "ternary"
    variables = ("before", "step", "part")
    shows_reference = True
    schema = _reply(score={"type": "integer", "enum": [-1, 0, 1]})

    def __init__(
        self,
        *,
        judged: Sequence[str] = ("thought", "query", "answer"),
        early_bonus: float = 0.0,
        max_steps: int = 4,
        max_reply_chars: int = 300,
        **options: Any,
    ) -> None:
        """Read the prompt.

        Args:
            judged: parts to ask for: leave out `thought` where the policy shows none.
            early_bonus: most an early answer is paid; the authors' lambda is 0.1.
            max_steps: B.
            max_reply_chars: letters of each earlier reply that the judge is shown.
            options: those of `Judge`; the reference is shown where an answer is judged.
        """
        super().__init__(**options)
        strange = sorted(set(judged) - {"thought", "query", "answer"})
        if strange or not judged or max_steps < 1:
            raise ConfigError(
                f"args.judged={list(judged)} and args.max_steps={max_steps}: judged are thought, query and answer, and "
                f"an episode has 1 step or more."
            )
        self._judged, self._early_bonus, self._max_steps = tuple(judged), early_bonus, max_steps
        self._max_reply_chars = max_reply_chars

    async def __call__(
        self, step: Node, trajectory: Sequence[Node], question: str, answer: str, model: RewardModel
    ) -> dict[str, float] | None:
        """Parts of a step's score; None where none of them is judged."""
        kind = step.facts.kind
        act = "answer" if kind is StepKind.answer else "query"
        unreadable = kind is StepKind.malformed and "query" in self._judged
        asked = [part for part in ("thought", act) if part in self._judged and not (part == "query" and unreadable)]
        before = shown_steps("earlier steps", trajectory[:-1], self._max_chars, max_reply_chars=self._max_reply_chars)
        shown_step = self._step(trajectory, last_reply=False)
        replies = await _all(
            self._ask(
                model,
                self.schema,
                question,
                answer if part == "answer" else "",
                before=before,
                step=shown_step,
                part=part,
            )
            for part in asked
        )
        parts = {part: float(reply["score"]) for part, reply in zip(asked, replies, strict=True)}
        if unreadable:
            parts["query"] = -1.0
        if self._early_bonus and act == "answer":
            parts["early"] = self._early_bonus * max(self._max_steps - len(trajectory), 0) / self._max_steps
        return parts or None


class Verdict(Judge):
    """+1 for a step that is right, -1 for one that is wrong (TP-GRPO, arXiv 2507.23317).

    The authors cut a solution into thoughts, judge them from its end, and merge neighbours of one verdict; here the
    steps of the tree are judged, each with what came before it, for later steps differ from branch to branch.
    """

    shipped = "verdict"
    variables = ("before", "step")
    shows_reference = True
    schema = _reply(verdict={"type": "string", "enum": ["right", "wrong"]})

    async def __call__(
        self, step: Node, trajectory: Sequence[Node], question: str, answer: str, model: RewardModel
    ) -> float:
        """Verdict on a step."""
        reply = await self._ask(
            model,
            self.schema,
            question,
            answer,
            before=self._before(trajectory),
            step=self._step(trajectory),
        )
        return 1.0 if reply["verdict"] == "right" else -1.0


class Rubric(Judge):
    """How much of its problem's own rubric a trajectory meets, in [0, 1] (RRM, arXiv 2510.07774).

    The rubric is the data's column `rubric`, a text or a list of points. Without one there is nothing to say: pay such
    prompts by another source.
    """

    shipped = "rubric"
    variables = ("rubric", "trajectory")
    schema = _reply(score=POINTS)

    async def __call__(
        self,
        trajectory: Sequence[Node],
        question: str,
        answer: str,
        model: RewardModel,
        rubric: str | Sequence[Any] | None = None,
    ) -> float | None:
        """Share of the points of a trajectory; None without a rubric."""
        text = rubric if isinstance(rubric, str) else "\n".join(f"- {point}" for point in rubric or ())
        if not text.strip():
            return None
        reply = await self._ask(
            model,
            self.schema,
            question,
            answer,
            rubric=shown("rubric", text, self._max_chars),
            trajectory=self._trajectory(trajectory),
        )
        return reply["score"] / BEST


class How2Score(Judge):
    """Are instructions free of critical failures, in form, and as long as the reference? (How2Everything, 2602.08808)

    Named parts, each in [0, 1]: `how2score`, 1 when the judge lists no critical failure; `format`, see
    `steps_in_order`; `length`, see `length_term`, in words where the authors count tokens. All three are 0 without an
    answer. Without `length` the score rises with the length of the answer.
    """

    shipped = "how2score"
    variables = ("steps",)
    shows_reference = True
    schema = _reply(
        critical_failures={"type": "array", "items": {"type": "string", "description": "numbers of steps: the failure"}}
    )

    async def __call__(
        self, facts: StepFacts, question: str, answer: str, model: RewardModel, num_steps: int | None = None
    ) -> dict[str, float]:
        """Parts of an answer's score; the data's column `num_steps` says how many steps were asked for."""
        if not answer.strip():
            raise DataError("the prompt has no reference answer; name its column in task.columns.answer")
        given = facts.answer or ""
        if not given.strip():
            return {"how2score": 0.0, "format": 0.0, "length": 0.0}
        reply = await self._ask(
            model,
            self.schema,
            question,
            answer,
            steps=shown("instructions", given, self._max_chars),
        )
        return {
            "how2score": float(not reply["critical_failures"]),
            "format": steps_in_order(given, num_steps),
            "length": length_term(len(given.split()) / len(answer.split())),
        }


STEP_NUMBER = re.compile(r"^\s*(?:step\s+)?(\d{1,4})\s*[.):]\s*\S", re.IGNORECASE | re.MULTILINE)


def steps_in_order(text: str, num_steps: int | None = None) -> float:
    """1 when the numbered lines of a text count from 1 without a gap, as many as asked for, else 0."""
    numbers = [int(number) for number in STEP_NUMBER.findall(text)]
    wanted = len(numbers) if num_steps is None else num_steps
    return float(bool(numbers) and numbers == list(range(1, wanted + 1)))


def length_term(ratio: float, tolerance: float = 0.2, steepness: float = 5.0) -> float:
    """1 near the reference's length, else exp(-steepness (|ratio - 1| - tolerance) / (1 - tolerance)); 0 for none."""
    if ratio <= 0:
        return 0.0
    away = abs(ratio - 1)
    return 1.0 if away <= tolerance + 1e-9 else math.exp(-steepness * (away - tolerance) / (1 - tolerance))


class Tournament(Judge):
    """Trajectories of one prompt play against each other before a judge: from 1 for the first place to 0 for the last
    (ArenaRL, arXiv 2601.06487).

    In each game the judge sees both in both orders and gives points to each, `process_weight` for the way and the rest
    for the answer; a side's points are the mean of the two orders. Where the orders disagree on who is better, the game
    is a draw. A game that could not be judged fails the prompt: a place would be made up.
    """

    shipped = "game"
    variables = ("first", "second")
    schema = _reply(first=SIDE, second=SIDE)

    def __init__(
        self,
        *,
        bracket: str = "single_elimination",
        anchor: int = 0,
        num_rounds: int = 0,
        process_weight: float = 0.6,
        **options: Any,
    ) -> None:
        """Read the prompt.

        Args:
            bracket: round_robin, anchored, single_elimination, double_elimination or swiss; n (n - 1) / 2, n - 1,
                2 (n - 1), about 3 (n - 1) and n / 2 a round games of two requests.
            anchor: number of the trajectory that all others play for the seeds, the last where there are fewer;
                ArenaRL decodes it greedily.
            num_rounds: of swiss; 0 for as many as a single elimination has.
            process_weight: of the points for the way; the rest is for the answer.
            options: those of `Judge`.
        """
        super().__init__(**options)
        if bracket not in BRACKETS:
            raise ConfigError(f'args.bracket="{bracket}" is none. Use {", ".join(BRACKETS)}.')
        if not 0 <= process_weight <= 1 or anchor < 0 or num_rounds < 0:
            raise ConfigError(
                f"args.process_weight={process_weight} must be from 0 to 1, args.anchor={anchor} and "
                f"args.num_rounds={num_rounds} at least 0."
            )
        self._bracket, self._anchor, self._num_rounds = bracket, anchor, num_rounds
        self._process_weight = process_weight

    async def __call__(
        self, trajectories: Sequence[Sequence[Node]], question: str, answer: str, model: RewardModel
    ) -> list[float | None]:
        """Place of each trajectory, as a score; None where there is no other."""
        num_players = len(trajectories)
        if num_players < 2:
            return [None] * num_players
        texts = [self._texts(trajectory) for trajectory in trajectories]

        async def play(games: Sequence[Game]) -> list[Points]:
            orders = [pair for one, two in games for pair in ((one, two), (two, one))]
            said = await _all(
                self._ask(model, self.schema, question, answer, first=texts[one][0], second=texts[two][1])
                for one, two in orders
            )
            points = [(self._points(reply["first"]), self._points(reply["second"])) for reply in said]
            return [_points_of(*points[place : place + 2]) for place in range(0, len(points), 2)]

        return list(reward_of_places(await played_async(self._games(num_players), play)))

    def _games(self, num_players: int) -> Any:
        anchor = min(self._anchor, num_players - 1)
        match self._bracket:
            case "round_robin":
                return round_robin(num_players)
            case "swiss":
                return swiss(num_players, self._num_rounds or math.ceil(math.log2(num_players)))
            case "anchored":
                return anchored(num_players, anchor)
            case "double_elimination":
                return double_elimination(num_players, anchor)
        return single_elimination(num_players, anchor)

    def _texts(self, trajectory: Sequence[Node]) -> tuple[str, str]:
        return self._trajectory(trajectory, "first attempt"), self._trajectory(trajectory, "second attempt")

    def _points(self, said: Mapping[str, float]) -> float:
        return self._process_weight * said["process"] + (1 - self._process_weight) * said["answer"]


BRACKETS = ("round_robin", "anchored", "single_elimination", "double_elimination", "swiss")


class Pairwise(Judge):
    """Which of two trajectories of a prompt is better: +1 the first, -1 the second, 0 neither."""

    shipped = "pairwise"
    variables = ("things", "before", "first", "second")
    schema = _reply(better={"type": "string", "enum": ["first", "second", "tie"]})

    async def __call__(
        self,
        trajectory: Sequence[Node],
        other_trajectory: Sequence[Node],
        question: str,
        answer: str,
        model: RewardModel,
    ) -> float:
        """How much better `trajectory` is."""
        return await self._better(
            model,
            question,
            answer,
            things="attempts",
            before="",
            first=self._trajectory(trajectory, "first attempt"),
            second=self._trajectory(other_trajectory, "second attempt"),
        )

    async def _better(self, model: RewardModel, question: str, answer: str, **values: Any) -> float:
        reply = await self._ask(model, self.schema, question, answer, **values)
        return {"first": 1.0, "second": -1.0, "tie": 0.0}[reply["better"]]


class PairwiseSteps(Pairwise):
    """Which of two steps that were tried at one fork is better: +1 the first, -1 the second, 0 neither."""

    async def __call__(  # type: ignore[override]
        self,
        step: Node,
        other: Node,
        trajectory: Sequence[Node],
        question: str,
        answer: str,
        model: RewardModel,
    ) -> float:
        """How much better `step` is."""
        return await self._better(
            model,
            question,
            answer,
            things="steps that were tried at the same point",
            before=self._before(trajectory),
            first=self._step([*trajectory[:-1], step], "first step"),
            second=self._step([*trajectory[:-1], other], "second step"),
        )


def _points_of(in_order: Points, swapped: Points) -> Points:
    """Points of a game's two sides, from what was said of one and two, and of two and one."""
    one, two = (in_order[0] + swapped[1]) / 2, (in_order[1] + swapped[0]) / 2
    if (in_order[0] - in_order[1]) * (swapped[1] - swapped[0]) < 0:
        return (one + two) / 2, (one + two) / 2
    return one, two


def _principle(record: Mapping[str, Any]) -> Principle:
    known = [each.name for each in fields(Principle)]
    if not isinstance(record, Mapping) or set(record) - set(known) or not {"name", "text"} <= set(record):
        raise ConfigError(f"args.principles: {record!r} is no principle. Give {{name: ..., text: ..., weight: 1}}.")
    principle = Principle(**record)
    if not principle.weight >= 0:
        raise ConfigError(f"args.principles: {principle.name} has weight={principle.weight}. Give 0 or more.")
    return principle


async def _all(asked: Any) -> list[Any]:
    """What all of them say; nothing is under way any more when one of them raises."""
    tasks: list[Coroutine[Any, Any, Any]] = list(asked)
    replies = await asyncio.gather(*tasks, return_exceptions=True)
    for reply in replies:
        if isinstance(reply, BaseException):
            raise reply
    return replies
