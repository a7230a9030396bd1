"""TextWorld (arXiv 1806.11532): text games generated from a seed and sizes, played by commands, scored by quests.

Games, commands, rules and points are those of the package `textworld`. The words of an observation are Grove's own: the
package writes its longer ones with an interpreter in C under the GPL, which this needs not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from tempfile import mkstemp
from typing import Any

from conf.errors import ConfigError, DataError
from conf.schema import TextWorldConfig
from rollout.envs.optional import import_optional
from rollout.seeds import derive_seed
from rollout.types import Prompt
from rollout.world import Fork, Observed

STAND_INS = {"jericho": ("UnsupportedGameWarning", "TruncatedInputActionWarning")}
"""The C interpreter, imported by the package and used for games in another format only."""
MAX_TRIES = 20
"""Seeds tried for one game: now and then the generator finds no quest in the rooms it drew."""
MAX_SEED = 65_535
DIRECTIONS = ("north", "east", "south", "west")


@cache
def _package() -> Any:
    package = import_optional("textworld", STAND_INS)
    import_optional("textworld.generator")
    import_optional("textworld.envs.tw")
    return package


def game_name(config: TextWorldConfig, split: str, seed: int, index: int) -> str:
    """What a row's `game` column holds: all that a game follows from, e.g. "train-0-17-r3o5q2l3"."""
    sizes = f"r{config.num_rooms}o{config.num_objects}q{config.num_quests}l{config.quest_length}"
    return f"{split}-{seed}-{index}-{sizes}"


def make_game(name: str, folder: Path) -> Path:
    """The file of a game, generated where it is not there yet; the same for the same name.

    Raises: ConfigError for sizes that give no game.
    """
    path = folder / f"{name}.json"
    if path.is_file():
        return path
    package = _package()
    sizes = name.rpartition("-")[2]
    rooms, objects, quests, length = (int(part) for part in sizes.translate(str.maketrans("roql", "    ")).split())
    tried = ""
    for attempt in range(MAX_TRIES):
        options = package.GameOptions()
        options.seeds = derive_seed("textworld", name, attempt) % MAX_SEED
        options.nb_rooms, options.nb_objects = rooms, objects
        options.nb_parallel_quests, options.quest_length = quests, length
        try:
            game = package.generator.make_game(options)
        except Exception as error:  # the generator raises whatever its search ran into
            tried = f"{type(error).__name__}: {error}"
            continue
        _save(game, path)
        return path
    raise ConfigError(
        f"TextWorld made no game of task.textworld.num_rooms={rooms}, num_objects={objects}, num_quests={quests}, "
        f"quest_length={length} in {MAX_TRIES} tries ({tried}). Use more rooms and objects, or shorter quests."
    )


def _save(game: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = mkstemp(dir=path.parent, suffix=".json")  # another process may make the same game
    os.close(handle)
    try:
        game.save(name)
        Path(name).replace(path)
    finally:
        with suppress(FileNotFoundError):
            Path(name).unlink()


class TextWorldRows:
    """Rows of games. Held-out games do not depend on the seed, and none of them is a training game."""

    def __init__(self, config: TextWorldConfig, seed: int, split: str) -> None:
        """Args: split is "train" or "eval". Raises: ConfigError without the package."""
        assert split in ("train", "eval"), f"unknown split {split}"
        _package()
        self._config, self._split = config, split
        self._seed = seed if split == "train" else 0
        self.num_rows: int | None = config.num_games if split == "train" else None

    def row(self, index: int) -> dict[str, Any]:
        """Columns question (what the game opens with), answer (a walkthrough), game, folder and show_commands."""
        config = self._config
        name = game_name(config, self._split, self._seed, index)
        row = {"game": name, "folder": config.cache_dir, "show_commands": config.show_commands}
        path = make_game(name, Path(config.cache_dir))
        session = _start(path)
        walkthrough = "; ".join(_load(path).metadata.get("walkthrough", []))
        return {"question": _opening(session, row), "answer": walkthrough, **row}


class TextWorld:
    """Plays the game that a row names; a command is the last line of a turn."""

    fork = Fork.replay  # a command takes 0.6 ms, and the package's own copy of a state 46 ms

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the package keeps caches of its own

    def reset(self, prompt: Prompt) -> tuple[Any, str]:
        """A game at its start.

        Raises: DataError for a row without its columns.
        """
        with self._lock:
            missing = [name for name in ("game", "folder", "show_commands") if name not in prompt.data]
            if missing:
                raise DataError(
                    f'prompt "{prompt.id}" has no column "{missing[0]}": the world TextWorld plays the games that '
                    "task.generator=textworld makes."
                )
            session = _start(make_game(prompt.data["game"], Path(prompt.data["folder"])))
            session.grove_row = dict(prompt.data)
            return session, _opening(session, prompt.data)

    def act(self, session: Any, action: str) -> Observed:
        """Play one command; each quest's point is a share of all of them."""
        lines = [line.strip() for line in action.splitlines() if line.strip()]
        command = " ".join(lines[-1].strip("`\"'*>. ").lower().split()) if lines else ""
        with self._lock:
            return self._played(session, command)

    def _played(self, session: Any, typed: str) -> Observed:
        by_lower = {each.lower(): each for each in session.state["admissible_commands"]}
        command = by_lower.get(typed)
        if command is None:
            text = f'You cannot "{typed}" here.' + _commands(session, session.grove_row)
            return Observed(text=text, score=0.0, won=False, refused=True)
        before = session.state.get("score") or 0
        state, score, done = session.step(command)
        gained, most = score - before, max(1, state["max_score"])
        said = [_feedback(session, command)]
        if gained:
            said.append(f"You have {score} of {most} points.")
        if done:
            said.append("You won." if state["won"] else "You lost.")
        text = "\n".join(said) + ("" if done else _commands(session, session.grove_row))
        return Observed(text=text, done=bool(done), score=gained / most, won=bool(state["won"]))


@lru_cache(maxsize=256)
def _load(path: Path) -> Any:
    return _package().Game.load(str(path))


def _start(path: Path) -> Any:
    """A session: the package's own environment, with a game that is read once for all."""
    package = _package()
    environment = package.envs.tw.TextWorldEnv(package.EnvInfos(admissible_commands=True))
    environment._gamefile, environment._game = str(path), _load(path)
    environment._inform7 = package.generator.inform7.Inform7Game(environment._game)
    environment.reset()
    return environment


def _opening(session: Any, row: Mapping[str, Any]) -> str:
    return f"{session.state['objective'].strip()}\n\n{_look(session)}{_commands(session, row)}"


def _commands(session: Any, row: Mapping[str, Any]) -> str:
    if not row["show_commands"]:
        return ""
    return "\nPossible commands: " + "; ".join(session.state["admissible_commands"])


def _feedback(session: Any, command: str) -> str:
    verb, _, rest = command.partition(" ")
    if verb in ("look", "go"):
        return _look(session)
    if verb == "inventory":
        return _carried(_Facts(session))
    if verb == "examine":
        return _examined(_Facts(session), rest)
    return f"You {command}."


class _Facts:
    """The facts of a game's state, by predicate, entities by name."""

    def __init__(self, session: Any) -> None:
        self._infos = session._game.infos
        self._rows: dict[str, list[tuple[str, ...]]] = {}
        for fact in session.state["_facts"]:
            self._rows.setdefault(fact.name, []).append(tuple(each.name for each in fact.arguments))
        self.room = next(place for who, place in self._rows["at"] if who == "P")

    def name(self, entity: str) -> str:
        return self._infos[entity].name or entity

    def names(self, entities: Iterable[str]) -> list[str]:
        return sorted(self.name(each) for each in entities)

    def rows(self, predicate: str) -> list[tuple[str, ...]]:
        return self._rows.get(predicate, [])

    def inside(self, predicate: str, place: str) -> list[str]:
        return [what for what, where in self.rows(predicate) if where == place and what != "P"]

    def status(self, entity: str) -> str:
        return next((each for each in ("locked", "closed", "open") if (entity,) in self.rows(each)), "")

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
    facts = _Facts(session)
    things = sorted(facts.described(each) for each in facts.inside("at", facts.room))
    exits = []
    for direction in DIRECTIONS:
        for there in (there for there, here in facts.rows(f"{direction}_of") if here == facts.room):
            door = next((door for here, door, to in facts.rows("link") if (here, to) == (facts.room, there)), "")
            exits.append(direction + (f" (through the {facts.status(door)} {facts.name(door)})" if door else ""))
    lines = [f"You are in the {facts.name(facts.room)}."]
    lines.append(f"You see: {', '.join(things)}." if things else "You see nothing of use.")
    lines.append(f"Exits: {', '.join(exits)}." if exits else "There is no exit.")
    return "\n".join([*lines, _carried(facts)])


def _carried(facts: _Facts) -> str:
    carried = facts.names(facts.inside("in", "I"))
    return f"You carry: {', '.join(carried)}." if carried else "You carry nothing."


def _examined(facts: _Facts, name: str) -> str:
    found = next((each for each, info in facts._infos.items() if info.name == name), None)
    if found is None:
        return f"You see nothing special about the {name}."
    text = (facts._infos[found].desc or "").partition("[")[0].strip()  # what is in brackets is code of Inform 7
    return f"{text} It is: {facts.described(found)}.".strip()
