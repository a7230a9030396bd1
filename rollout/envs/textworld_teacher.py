"""Demonstrations of TextWorld's games: the package's own way to win, mixed with commands drawn by lot."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from conf.schema import TextWorldConfig
from rollout.envs.textworld import TextWorldRows, load_game, make_game, opening, play, start_game, way_to_win
from rollout.envs.textworld_words import WORDING, rename
from rollout.seeds import derive_seed
from rollout.teaching import Message

LONGEST = 2
"""A demonstration ends after so many times the commands that winning takes."""


class TextWorldTeacher:
    """Implements `rollout.teaching.Teacher`: plays the training games, under other names each time."""

    wording = WORDING

    def __init__(self, config: TextWorldConfig) -> None:
        """Raises: ConfigError for games in sentences, whose words are too many."""
        if not config.words:
            raise ConfigError(
                "task.textworld.words=false: games in sentences have more words than a tiny policy can be taught. Use "
                "task.textworld.words=true, or give model.path a pretrained model."
            )
        self._config = config

    def settings(self) -> list[Any]:
        """The words, how many games there are, and their sizes."""
        config = self._config
        sizes = [config.num_rooms, config.num_objects, config.num_quests, config.quest_length]
        return ["textworld", *WORDING.words, config.num_games, *sizes, config.show_commands]

    def demonstrations(self, num: int, right_share: float, seed: int) -> Iterator[list[Message]]:
        """As `rollout.teaching.Teacher`; a decision is a command."""
        rng = random.Random(derive_seed("demonstration noise", seed))
        rows = TextWorldRows(self._config, seed, "train")
        for number in range(num):
            row = rows.stub(number % self._config.num_games)
            game = load_game(make_game(row["game"], Path(row["folder"])))
            yield demonstration(rename(game, f"{row['game']} {number}"), row, right_share, rng)


def demonstration(game: Any, row: dict[str, Any], right_share: float, rng: random.Random) -> list[Message]:
    """A game played to its end, or for so long that it leads nowhere.

    Args:
        row: columns game and show_commands.
        right_share: chance that a command is the next one of the shortest way to win; else it is any possible one.
    """
    session = start_game(game)
    messages: list[Message] = []
    said, is_over = opening(session, row), False
    for _ in range(LONGEST * len(way_to_win(session))):
        if is_over:
            break
        possible = session.state["admissible_commands"]
        command = way_to_win(session)[0] if rng.random() < right_share else rng.choice(possible)
        messages += [("user", said), ("assistant", command)]
        observed = play(session, command, row)
        said, is_over = observed.text, observed.done
    return messages
