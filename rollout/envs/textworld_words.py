"""TextWorld's games in few words of a closed vocabulary, for a policy that Grove makes itself.

    goal insert cup into chest goal eat apple in kitchen see chest closed pen table with apple cup exits south

A kitchen with a closed chest, a pen on the floor, and a table on which an apple and a cup lie; nothing is carried.
Every word is a token of the policy, so there are no more of them than tell one state from another.
"""

from __future__ import annotations

import copy
import random
from itertools import chain
from typing import Any

from conf.errors import ConfigError
from rollout.envs.textworld_text import DIRECTIONS, Facts
from rollout.seeds import derive_seed
from rollout.teaching import Wording

NAMES = {
    kind: tuple(names.split())
    for kind, names in {
        "r": "kitchen garden attic cellar hall library bedroom bathroom garage porch study shed",
        "c": "box chest drawer fridge cupboard basket suitcase safe trunk crate locker cabinet",
        "s": "table shelf desk bench bed counter stool stand rack couch",
        "o": "lamp book coin cup hat pen rope ball clock vase comb bell doll brush scarf mug",
        "f": "apple bread cheese cake pear egg soup carrot",
        "k": "tin-key brass-key iron-key gold-key silver-key copper-key",
        "d": "oak-door pine-door glass-door steel-door red-door blue-door",
    }.items()
}
"""Names by the package's types: rooms, containers, supporters, objects, food, keys, doors."""
VERBS = (
    "take",
    "drop",
    "put",
    "insert",
    "open",
    "close",
    "lock",
    "unlock",
    "eat",
    "go",
    "look",
    "inventory",
    "examine",
)
BETWEEN = ("from", "on", "into", "with", "in")
"""Between the two things of a command."""
STATES = ("closed", "locked")
"""Beside "open", which is a verb too."""
VIEW_WORDS = ("goal", "see", "exits", "have", "no", "point", "can", "won", "lost", ",")
TURN_END = "<end>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not loop.first %} {% endif -%}"
    "{{ message.content }}{%- if message.role == 'assistant' %} <end>{% endif -%}"
    "{%- endfor -%}"
)
WORDING = Wording(
    words=(TURN_END, *VERBS, *BETWEEN, *STATES, *VIEW_WORDS, *DIRECTIONS, *chain.from_iterable(NAMES.values())),
    turn_ends=(TURN_END,),
    chat_template=CHAT_TEMPLATE,
)


def rename(game: Any, key: str) -> Any:
    """The same game with names drawn from the vocabulary; the same for the same key.

    Raises: ConfigError for a game with more things of a kind than there are names.
    """
    rng = random.Random(derive_seed("textworld names", key))
    drawn = {kind: rng.sample(names, len(names)) for kind, names in NAMES.items()}
    renamed = copy.copy(game)
    renamed._infos = {}
    for entity in sorted(game.infos):
        info = copy.copy(game.infos[entity])
        renamed._infos[entity] = info
        if info.type in drawn:
            if not drawn[info.type]:
                raise ConfigError(
                    f"A game has more than {len(NAMES[info.type])} things of the kind of {NAMES[info.type][0]}, and "
                    "task.textworld.words=true has no more names. Use smaller task.textworld.num_rooms or num_objects."
                )
            info.name = drawn[info.type].pop()
    return renamed


class Words:
    """Says after every command all that is seen, so that the policy need remember the goal alone."""

    def opening(self, session: Any) -> str:
        """The last command of each quest, and the view."""
        goals = [f"goal {_goal(session, quest)}" for quest in session._game.quests]
        return " ".join([*goals, _view(session)])

    def answer(self, session: Any, command: str) -> str:
        """The view."""
        return _view(session)

    def refusal(self, session: Any, typed: str) -> str:
        """No, and the view."""
        return f"no {_view(session)}"

    def points(self, session: Any) -> str:
        """A quest is done."""
        return "point"

    def end(self, session: Any) -> str:
        """Won or lost."""
        return "won" if session.state["won"] else "lost"

    def offer(self, session: Any) -> str:
        """One after another."""
        return f"can {' , '.join(session.state['admissible_commands'])}"

    def joined(self, said: list[str]) -> str:
        """With blanks between."""
        return " ".join(said)


def _goal(session: Any, quest: Any) -> str:
    """The command that ends a quest, e.g. "drop apple in kitchen"."""
    action = [each for each in quest.win_events[0].actions if each.name != "trigger"][-1]
    (command,) = session._inform7.gen_commands_from_actions([action])
    if not command.startswith("drop "):
        return command
    room = next(fact.arguments[1].name for fact in action.preconditions if fact.name == "at")
    return f"{command} in {session._game.infos[room].name}"


def _view(session: Any) -> str:
    facts = Facts(session)
    # Things that hold nothing come first, so that what follows "with" is held.
    here = sorted(facts.inside("at", facts.room), key=lambda each: (bool(facts.held(each)), facts.name(each)))
    said = {
        "in": [facts.name(facts.room)],
        "see": [_thing(facts, each) for each in here],
        "exits": [f"{way} {facts.name(door)} {facts.status(door)}" if door else way for way, door in facts.exits()],
        "have": facts.names(facts.inside("in", "I")),
    }
    return " ".join(" ".join([what, *said[what]]) for what in said if said[what])


def _thing(facts: Facts, entity: str) -> str:
    held = facts.names(facts.held(entity))
    status = facts.status(entity)
    return " ".join([facts.name(entity), *([status] if status else []), *(["with", *held] if held else [])])
