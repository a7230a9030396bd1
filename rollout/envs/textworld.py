"""TextWorld (arXiv 1806.11532): text games generated from a seed and sizes, played by commands, scored by quests.

Games, commands, rules and points are those of the package `textworld`. The words of an observation are Grove's own
(`textworld_text.py`, `textworld_words.py`): the package writes its longer ones with an interpreter in C under the GPL,
which this needs not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from tempfile import mkstemp
from typing import Any

from conf.errors import ConfigError, DataError
from conf.schema import TextWorldConfig
from rollout.envs.optional import import_optional
from rollout.envs.textworld_text import Sentences, Voice
from rollout.envs.textworld_words import Words, rename
from rollout.seeds import derive_seed
from rollout.types import Prompt
from rollout.world import Fork, Observed

STAND_INS = {"jericho": ("UnsupportedGameWarning", "TruncatedInputActionWarning")}
"""The C interpreter, imported by the package and used for games in another format only."""
MAX_TRIES = 20
"""Seeds tried for one game: now and then the generator finds no quest in the rooms it drew."""
MAX_SEED = 65_535
VOICES: dict[bool, Voice] = {False: Sentences(), True: Words()}
"""By whether a game's names are those of a closed vocabulary."""


@cache
def _package() -> Any:
    package = import_optional("textworld", STAND_INS)
    import_optional("textworld.generator")
    import_optional("textworld.envs.tw")
    return package


def game_name(config: TextWorldConfig, split: str, seed: int, index: int) -> str:
    """What a row's `game` column holds: all that a game follows from, e.g. "train-0-17-r3o5q2l3", "...w" for words."""
    sizes = f"r{config.num_rooms}o{config.num_objects}q{config.num_quests}l{config.quest_length}"
    return f"{split}-{seed}-{index}-{sizes}{'w' if config.words else ''}"


def make_game(name: str, folder: Path) -> Path:
    """The file of a game, generated where it is not there yet; the same for the same name.

    Raises: ConfigError for sizes that give no game.
    """
    path = folder / f"{name}.json"
    if path.is_file():
        return path
    package = _package()
    sizes = name.rpartition("-")[2]
    rooms, objects, quests, length = (int(part) for part in sizes.translate(str.maketrans("roqlw", "     ")).split())
    tried = ""
    for attempt in range(MAX_TRIES):
        options = package.GameOptions()
        options.kb = package.generator.data.KnowledgeBase.default()  # else its rules are read anew, which is most of it
        options.seeds = derive_seed("textworld", name, attempt) % MAX_SEED
        options.nb_rooms, options.nb_objects = rooms, objects
        options.nb_parallel_quests, options.quest_length = quests, length
        try:
            game = package.generator.make_game(options)
        except Exception as error:  # the generator raises whatever its search ran into
            tried = f"{type(error).__name__}: {error}"
            continue
        _save(rename(game, name) if sizes.endswith("w") else game, path)
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

    def stub(self, index: int) -> dict[str, Any]:
        """The columns of a row that name its game."""
        name = game_name(self._config, self._split, self._seed, index)
        return {"game": name, "folder": self._config.cache_dir, "show_commands": self._config.show_commands}

    def row(self, index: int) -> dict[str, Any]:
        """Columns question (what the game opens with), answer (a walkthrough), game, folder and show_commands."""
        row = self.stub(index)
        session = start_game(load_game(make_game(row["game"], Path(row["folder"]))))
        return {"question": opening(session, row), "answer": "; ".join(way_to_win(session)), **row}


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
            session = start_game(load_game(make_game(prompt.data["game"], Path(prompt.data["folder"]))))
            session.grove_row = dict(prompt.data)
            return session, opening(session, prompt.data)

    def act(self, session: Any, action: str) -> Observed:
        """Play one command; each quest's point is a share of all of them."""
        with self._lock:
            return play(session, action, session.grove_row)


@lru_cache(maxsize=1024)
def load_game(path: Path) -> Any:
    """A game, read once for all."""
    return _package().Game.load(str(path))


def start_game(game: Any) -> Any:
    """A session: the package's own environment, at the start of a game that is in memory already."""
    package = _package()
    environment = package.envs.tw.TextWorldEnv(package.EnvInfos(admissible_commands=True))
    environment._game = game
    environment._inform7 = package.generator.inform7.Inform7Game(game)
    environment.reset()
    return environment


def opening(session: Any, row: Mapping[str, Any]) -> str:
    """What the game a row names begins with."""
    voice = voice_of(row)
    return voice.joined([voice.opening(session), *_offer(voice, session, row)])


def voice_of(row: Mapping[str, Any]) -> Voice:
    """How the game that a row names speaks."""
    return VOICES[row["game"].endswith("w")]


def typed_in(action: str) -> str:
    """The command that a turn types: its last line."""
    lines = [line.strip() for line in action.splitlines() if line.strip()]
    return " ".join(lines[-1].strip("`\"'*>. ").lower().split()) if lines else ""


def command_in(session: Any, action: str) -> str | None:
    """The possible command that a turn types; None when that is none."""
    by_lower = {each.lower(): each for each in session.state["admissible_commands"]}
    return by_lower.get(typed_in(action))


def play(session: Any, action: str, row: Mapping[str, Any]) -> Observed:
    """One turn, and what the game says of it.

    Each quest's point is a share of all of them. Progress is 1 where fewer commands are needed to win than before, -1
    where more are or the game is lost, else 0: the package knows where everything is.
    """
    voice, command = voice_of(row), command_in(session, action)
    if command is None:
        said = [voice.refusal(session, typed_in(action)), *_offer(voice, session, row)]
        return Observed(text=voice.joined(said), score=0.0, won=False, progress=0.0, refused=True)
    before, needed = session.state.get("score") or 0, len(way_to_win(session))
    state, score, done = session.step(command)
    gained = score - before
    said = [voice.answer(session, command)]
    if gained:
        said.append(voice.points(session))
    said += [voice.end(session)] if done else _offer(voice, session, row)
    return Observed(
        text=voice.joined(said),
        done=bool(done),
        score=gained / max(1, state["max_score"]),
        won=bool(state["won"]),
        progress=-1.0 if state["lost"] else _sign(needed - len(way_to_win(session))),
    )


def _sign(number: int) -> float:
    return float((number > 0) - (number < 0))


def way_to_win(session: Any) -> list[str]:
    """The commands with which the package's own player goes on from here; none when the game is over."""
    return session._inform7.gen_commands_from_actions(session._current_winning_policy or ())


def _offer(voice: Voice, session: Any, row: Mapping[str, Any]) -> list[str]:
    return [voice.offer(session)] if row["show_commands"] else []
