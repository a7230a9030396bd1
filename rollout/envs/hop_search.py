"""Hop search: a question names a person and a chain of relations, and each relation is served by exactly one tool.

    who is Anna Reed 's teacher 's friend ?
    <call> office teacher Anna Reed </call>  <result> error </result>
    <call> school teacher Anna Reed </call>  <result> Tom Hill </result>
    <call> family friend Tom Hill </call>    <result> Mia Cole </result>
    <answer> Mia Cole </answer>

Which tool serves which relation is fixed and never told. Every fact is a keyed hash, so worlds cost nothing, never end
and fit in a short string: that string is all a tool needs to answer, in any process.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from conf.errors import ConfigError, ToolError
from conf.schema import HopSearchConfig
from rollout.seeds import derive_seed
from rollout.teaching import Message, Wording


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words(
    "Anna Tom Mia Leo Eva Max Zoe Ian Ada Sam Amy Ben Kim Jon Lia Tim Ivy Dan Fay Rob Una Hal Nia Gus Ola Ray Pia Ned "
    "Meg Abe Liv Ed"
)
LAST_NAMES = _words(
    "Reed Hill Cole Park Moss Ford Lane Wood Bell Cruz Dean Frey Gold Hart Iqbal Jung King Lowe Mann Nash Orr Penn "
    "Quinn Rush Shaw Todd Unwin Vega Webb Xu Yates Zane"
)
RELATIONS = _words("boss teacher friend doctor landlord rival mentor sister lawyer neighbor partner cousin")
TOOLS = _words("office school family clinic court city")
PLAIN_WORDS = ("who", "is", "'s", "?", "error")
"""Words of questions and refusals beside the names, relations and tools."""
MARKERS = ("<call>", "</call>", "<result>", "</result>", "<answer>", "</answer>")
# A turn costs what its words cost: roles are told apart by the markers that calls, answers and results carry anyway.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not loop.first %} {% endif -%}"
    "{%- if message.role == 'tool' -%}<result> {{ message.content }} </result>"
    "{%- else -%}{{ message.content }}{%- endif -%}"
    "{%- endfor -%}"
)
WORDING = Wording(
    words=(*MARKERS, *PLAIN_WORDS, *TOOLS, *RELATIONS, *FIRST_NAMES, *LAST_NAMES),
    turn_ends=("</call>", "</answer>"),
    chat_template=CHAT_TEMPLATE,
)
HELD_OUT_SHARE = 4
"""One name in so many is kept for the held-out world."""
DEMONSTRATION_HOPS = 5
"""Demonstrations have chains of 1 to this many hops, whatever the run trains on: the demos' length is no hint."""


@dataclass(frozen=True, slots=True)
class World:
    """Who stands in which relation to whom; a value made of four facts, written as one word."""

    split: str
    number: int
    num_relations: int
    num_tools: int

    def __str__(self) -> str:
        """The form that travels in a row's `world` column, e.g. "train/17/12x4"."""
        return f"{self.split}/{self.number}/{self.num_relations}x{self.num_tools}"

    @property
    def people(self) -> tuple[str, ...]:
        """Names of everyone in this world; training worlds and the held-out world share none."""
        return _people(self.split)

    def tool_of(self, relation: str) -> str | None:
        """The one tool that serves a relation; None for a word that is no relation of this world."""
        return _tool_of_relation(self.num_relations, self.num_tools).get(relation)

    def follow(self, relation: str, person: str) -> str:
        """Who stands in the relation to the person."""
        return self.people[derive_seed(self, relation, person) % len(self.people)]


@cache
def parse_world(text: str) -> World:
    """The world that a `world` column names; the inverse of `str(world)`."""
    split, number, sizes = text.split("/")
    num_relations, num_tools = sizes.split("x")
    return World(split, int(number), int(num_relations), int(num_tools))


@cache
def _people(split: str) -> tuple[str, ...]:
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    return tuple(name for name in names if _is_held_out(name) == (split == "eval"))


def _is_held_out(name: str) -> bool:
    return derive_seed("held out", name) % HELD_OUT_SHARE == 0


@cache
def _tool_of_relation(num_relations: int, num_tools: int) -> Mapping[str, str]:
    # Dealt round robin over a shuffled deck: every tool serves the same number of relations, in no order to guess.
    deck = RELATIONS[:num_relations]
    random.Random(derive_seed("tool of relation", num_relations, num_tools)).shuffle(deck)
    return {relation: TOOLS[place % num_tools] for place, relation in enumerate(deck)}


def _ask(tool: str, relation: str, person: str, world: str, tool_delay_s: float) -> str:
    time.sleep(tool_delay_s)
    here = parse_world(world)
    if here.tool_of(relation) != tool:
        raise ToolError(f'the {tool} does not know about "{relation}"')
    if person not in _people_set(here.split):
        raise ToolError(f'nobody is called "{person}"')
    return here.follow(relation, person)


@cache
def _people_set(split: str) -> frozenset[str]:
    return frozenset(_people(split))


def office(relation: str, person: str, *, world: str, tool_delay_s: float = 0.0) -> str:
    """Ask the office who stands in a relation to a person.

    Args:
        relation: One relation, such as boss or friend.
        person: First and last name of the person asked about.
    """
    return _ask("office", relation, person, world, tool_delay_s)


def school(relation: str, person: str, *, world: str, tool_delay_s: float = 0.0) -> str:
    """Ask the school who stands in a relation to a person.

    Args:
        relation: One relation, such as boss or friend.
        person: First and last name of the person asked about.
    """
    return _ask("school", relation, person, world, tool_delay_s)


def family(relation: str, person: str, *, world: str, tool_delay_s: float = 0.0) -> str:
    """Ask the family who stands in a relation to a person.

    Args:
        relation: One relation, such as boss or friend.
        person: First and last name of the person asked about.
    """
    return _ask("family", relation, person, world, tool_delay_s)


def clinic(relation: str, person: str, *, world: str, tool_delay_s: float = 0.0) -> str:
    """Ask the clinic who stands in a relation to a person.

    Args:
        relation: One relation, such as boss or friend.
        person: First and last name of the person asked about.
    """
    return _ask("clinic", relation, person, world, tool_delay_s)


def court(relation: str, person: str, *, world: str, tool_delay_s: float = 0.0) -> str:
    """Ask the court who stands in a relation to a person.

    Args:
        relation: One relation, such as boss or friend.
        person: First and last name of the person asked about.
    """
    return _ask("court", relation, person, world, tool_delay_s)


def city(relation: str, person: str, *, world: str, tool_delay_s: float = 0.0) -> str:
    """Ask the city who stands in a relation to a person.

    Args:
        relation: One relation, such as boss or friend.
        person: First and last name of the person asked about.
    """
    return _ask("city", relation, person, world, tool_delay_s)


def check_hop_search(config: HopSearchConfig) -> None:
    """Raises: ConfigError when no question could be made from these sizes."""
    if not 1 <= config.num_tools <= len(TOOLS):
        raise ConfigError(
            f"task.hop_search.num_tools={config.num_tools} but there are {len(TOOLS)} tools ({', '.join(TOOLS)}): "
            f"give a number from 1 to {len(TOOLS)}."
        )
    if not config.num_tools <= config.num_relations <= len(RELATIONS):
        raise ConfigError(
            f"task.hop_search.num_relations={config.num_relations}: every tool needs a relation to serve and there are "
            f"{len(RELATIONS)} relations; give a number from {config.num_tools} to {len(RELATIONS)}."
        )
    if not config.hops or not all(1 <= hops <= config.num_relations for hops in config.hops):
        raise ConfigError(
            f"task.hop_search.hops={config.hops}: a chain uses each relation at most once, so lengths go from 1 to "
            f"num_relations={config.num_relations}; give at least one."
        )
    if config.num_worlds < 1 or config.spare_calls < 0:
        raise ConfigError(
            f"task.hop_search: num_worlds={config.num_worlds} must be at least 1 and "
            f"spare_calls={config.spare_calls} at least 0, or no question can be asked or answered."
        )


class HopSearchRows:
    """Endless rows of one split; row i depends on the settings, the seed and i alone.

    Held-out rows do not depend on the seed, so that runs with different seeds answer the same questions.
    """

    def __init__(self, config: HopSearchConfig, seed: int, split: str) -> None:
        """Args: split is "train" or "eval". Raises: ConfigError for sizes that make no question."""
        assert split in ("train", "eval"), f"unknown split {split}"
        check_hop_search(config)
        self.config = config
        self.seed = seed if split == "train" else 0
        self.split = split
        self.num_rows: int | None = None

    def row(self, index: int) -> dict[str, Any]:
        """Columns question, answer, world, relations, people (start, every hop, answer) and max_calls."""
        rng = random.Random(derive_seed("hop_search", self.split, self.seed, index))
        number = rng.randrange(self.config.num_worlds) if self.split == "train" else 0
        world = World(self.split, number, self.config.num_relations, self.config.num_tools)
        row = question_row(world, rng.choice(self.config.hops), self.config.spare_calls, rng)
        return row | ({"tool_delay_s": self.config.tool_delay_s} if self.config.tool_delay_s else {})


def question_row(world: World, num_hops: int, spare_calls: int, rng: random.Random) -> dict[str, Any]:
    """One question about `world` with a chain of `num_hops` different relations."""
    relations = rng.sample(RELATIONS[: world.num_relations], num_hops)
    people = [rng.choice(world.people)]
    for relation in relations:
        people.append(world.follow(relation, people[-1]))
    chain = " ".join(f"'s {relation}" for relation in relations)
    return {
        "question": f"who is {people[0]} {chain} ?",
        "answer": people[-1],
        "world": str(world),
        "relations": relations,
        "people": people,
        "max_calls": num_hops + spare_calls,
    }


class HopSearchTeacher:
    """Implements `rollout.teaching.Teacher`: chains of 1 to 5 hops, walked by trial and error."""

    wording = WORDING

    def __init__(self, config: HopSearchConfig) -> None:
        self._config = config

    def settings(self) -> list[int]:
        """Sizes of the worlds; which chains a run asks for shows in no demonstration."""
        return [self._config.num_tools, self._config.num_relations, self._config.num_worlds]

    def demonstrations(self, num: int, right_share: float, seed: int) -> Iterator[list[Message]]:
        """As `rollout.teaching.Teacher`; a decision is the tool tried first at a hop."""
        longest = min(DEMONSTRATION_HOPS, self._config.num_relations)
        chains = HopSearchConfig(
            hops=list(range(1, longest + 1)),
            num_tools=self._config.num_tools,
            num_relations=self._config.num_relations,
            num_worlds=self._config.num_worlds,
        )
        rows = HopSearchRows(chains, derive_seed("demonstrations", seed), "train")
        rng = random.Random(derive_seed("demonstration noise", seed))
        for row in map(rows.row, range(num)):
            yield [("user", row["question"]), *demonstration(row, right_share, rng)]


def demonstration(row: Mapping[str, Any], first_try_share: float, rng: random.Random) -> list[Message]:
    """One way to answer `row` by trial and error, as (role, text) messages after the question.

    Args:
        row: a row of `HopSearchRows`.
        first_try_share: chance that the first tool tried at a hop is the right one; otherwise the order is random.
    """
    world = parse_world(row["world"])
    messages: list[Message] = []
    for relation, person, found in zip(row["relations"], row["people"][:-1], row["people"][1:], strict=True):
        for tool in _tools_tried(world, relation, first_try_share, rng):
            messages.append(("assistant", f"<call> {tool} {relation} {person} </call>"))
            messages.append(("tool", found if tool == world.tool_of(relation) else "error"))
    messages.append(("assistant", f"<answer> {row['answer']} </answer>"))
    return messages


def _tools_tried(world: World, relation: str, first_try_share: float, rng: random.Random) -> Sequence[str]:
    right = world.tool_of(relation)
    assert right is not None, "a row only names relations of its own world"
    order = list(TOOLS[: world.num_tools])
    rng.shuffle(order)
    if rng.random() < first_try_share:
        return [right]
    return order[: order.index(right) + 1]
