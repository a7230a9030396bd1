"""What TextWorld's games say, in sentences: Grove's own words over the facts of a game's state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

DIRECTIONS = ("north", "east", "south", "west")


class Voice(Protocol):
    """How a game speaks."""

    def opening(self, session: Any) -> str:
        """What is to be done, and what is seen at the start."""
        ...

    def answer(self, session: Any, command: str) -> str:
        """What a command that was carried out did."""
        ...

    def refusal(self, session: Any, typed: str) -> str:
        """What is said to something that is no command here."""
        ...

    def points(self, session: Any) -> str:
        """Said when a quest was finished."""
        ...

    def end(self, session: Any) -> str:
        """Said when the game is over; the policy is not told."""
        ...

    def offer(self, session: Any) -> str:
        """The possible commands."""
        ...

    def joined(self, said: list[str]) -> str:
        """Several sayings as one text."""
        ...


class Sentences:
    """For a pretrained model: sentences, a line each."""

    def opening(self, session: Any) -> str:
        """The package's instructions, and the room."""
        return f"{session.state['objective'].strip()}\n\n{_look(session)}"

    def answer(self, session: Any, command: str) -> str:
        """What looking shows, or that it is done."""
        verb, _, rest = command.partition(" ")
        if verb in ("look", "go"):
            return _look(session)
        if verb == "inventory":
            return _carried(Facts(session))
        if verb == "examine":
            return _examined(Facts(session), rest)
        return f"You {command}."

    def refusal(self, session: Any, typed: str) -> str:
        """Repeats what was typed."""
        return f'You cannot "{typed}" here.'

    def points(self, session: Any) -> str:
        """How many there are so far."""
        return f"You have {session.state['score']} of {session.state['max_score']} points."

    def end(self, session: Any) -> str:
        """Won or lost."""
        return "You won." if session.state["won"] else "You lost."

    def offer(self, session: Any) -> str:
        """One after another."""
        return "Possible commands: " + "; ".join(session.state["admissible_commands"])

    def joined(self, said: list[str]) -> str:
        """A line each."""
        return "\n".join(said)


class Facts:
    """The facts of a game's state, by predicate, entities by name."""

    def __init__(self, session: Any) -> None:
        self._infos = session._game.infos
        self._rows: dict[str, list[tuple[str, ...]]] = {}
        for fact in session.state["_facts"]:
            self._rows.setdefault(fact.name, []).append(tuple(each.name for each in fact.arguments))
        self.room = next(place for who, place in self._rows["at"] if who == "P")

    def name(self, entity: str) -> str:
        """Of an entity, as players know it."""
        return self._infos[entity].name or entity

    def names(self, entities: Iterable[str]) -> list[str]:
        """Of several, in alphabetical order."""
        return sorted(self.name(each) for each in entities)

    def rows(self, predicate: str) -> list[tuple[str, ...]]:
        """Entities of each fact with this predicate."""
        return self._rows.get(predicate, [])

    def inside(self, predicate: str, place: str) -> list[str]:
        """What is `at`, `in` or `on` a place, but for the player."""
        return [what for what, where in self.rows(predicate) if where == place and what != "P"]

    def status(self, entity: str) -> str:
        """Whether it is locked, closed or open; "" for what cannot be."""
        return next((each for each in ("locked", "closed", "open") if (entity,) in self.rows(each)), "")

    def held(self, entity: str) -> list[str]:
        """What can be seen in or on it."""
        shows_inside = self.status(entity) in ("", "open")
        return [*self.inside("on", entity), *(self.inside("in", entity) if shows_inside else [])]

    def exits(self) -> list[tuple[str, str]]:
        """Direction of each way out of the room, and the door in it or ""."""
        doors = {to: door for here, door, to in self.rows("link") if here == self.room}
        return [
            (direction, doors.get(there, ""))
            for direction in DIRECTIONS
            for there, here in self.rows(f"{direction}_of")
            if here == self.room
        ]

    def described(self, entity: str) -> str:
        """Name, whether it is open, and what can be seen in or on it."""
        said = [self.status(entity)] if self.status(entity) else []
        held = self.inside("on", entity)
        if held:
            said.append("on it: " + ", ".join(self.names(held)))
        held = self.inside("in", entity) if self.status(entity) in ("", "open") else []
        if held:
            said.append("in it: " + ", ".join(self.names(held)))
        return self.name(entity) + (f" ({'; '.join(said)})" if said else "")


def _look(session: Any) -> str:
    facts = Facts(session)
    things = sorted(facts.described(each) for each in facts.inside("at", facts.room))
    exits = [
        direction + (f" (through the {facts.status(door)} {facts.name(door)})" if door else "")
        for direction, door in facts.exits()
    ]
    lines = [f"You are in the {facts.name(facts.room)}."]
    lines.append(f"You see: {', '.join(things)}." if things else "You see nothing of use.")
    lines.append(f"Exits: {', '.join(exits)}." if exits else "There is no exit.")
    return "\n".join([*lines, _carried(facts)])


def _carried(facts: Facts) -> str:
    carried = facts.names(facts.inside("in", "I"))
    return f"You carry: {', '.join(carried)}." if carried else "You carry nothing."


def _examined(facts: Facts, name: str) -> str:
    found = next((each for each, info in facts._infos.items() if info.name == name), None)
    if found is None:
        return f"You see nothing special about the {name}."
    text = (facts._infos[found].desc or "").partition("[")[0].strip()  # what is in brackets is code of Inform 7
    return f"{text} It is: {facts.described(found)}.".strip()
