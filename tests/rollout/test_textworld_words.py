"""Text games in a closed vocabulary: what they say, how they are demonstrated, and what a path of them is made of."""

from __future__ import annotations

import asyncio
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from chatml import encode
from worlds import ChatEngine

from conf import check_machine
from conf.compose import compose
from conf.errors import ConfigError
from conf.schema import Config, ExpanderKind, RolloutConfig, TaskConfig, TextWorldConfig
from rl.tiny import tiny_tokenizer
from rollout.chat import build_environment
from rollout.data import PromptEncoder
from rollout.envs.textworld import TextWorldRows, load_game, make_game, play, start_game, way_to_win
from rollout.envs.textworld_teacher import LONGEST, TextWorldTeacher, demonstration
from rollout.envs.textworld_words import NAMES, WORDING, rename
from rollout.expand import build_expander
from rollout.grow import grow_tree
from rollout.teaching import TEACHERS, Message, teacher_of
from rollout.types import Prompt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("textworld") is None, reason="needs the package textworld: pip install -r requirements/envs.txt"
    ),
]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("games")
    return compose(["experiment=textworld_small", f"task.textworld.cache_dir={folder}", "task.textworld.num_games=24"])


@pytest.fixture(scope="module")
def demos(cfg: Config) -> list[list[Message]]:
    return list(teacher_of(cfg.task).demonstrations(72, right_share=0.5, seed=0))


def rows_of(cfg: Config, split: str, num: int) -> list[dict[str, Any]]:
    rows = TextWorldRows(cfg.task.textworld, seed=0, split=split)
    return [rows.row(index) for index in range(num)]


def game_of(row: dict[str, Any]) -> Any:
    return load_game(make_game(row["game"], Path(row["folder"])))


def prompt_of(cfg: Config, row: dict[str, Any]) -> Prompt:
    return PromptEncoder(cfg, tiny_tokenizer(WORDING), {}).prompt(row, "train/0", "train question 0")


def commands(messages: list[Message]) -> list[str]:
    return [text for role, text in messages if role == "assistant"]


def test_every_word_of_every_game_and_demonstration_is_a_token(cfg: Config, demos: list[list[Message]]):
    said = {text for messages in demos for _, text in messages}
    for split in ("train", "eval"):
        for row in rows_of(cfg, split, 12):
            session = start_game(game_of(row))
            said |= {row["question"], *session.state["admissible_commands"], play(session, "dance", row).text}
    words = {word for text in said for word in text.split()}
    assert words <= {*WORDING.words}
    assert {"goal", "take", "go", "north", "no", "point"} <= words
    tokenizer = tiny_tokenizer(WORDING)
    assert all(tokenizer.decode(tokenizer(text).input_ids) == text for text in said)


def test_every_demonstration_replays_in_its_game(cfg: Config, demos: list[list[Message]]):
    rows = rows_of(cfg, "train", 24)
    for number, messages in enumerate(demos):
        row = rows[number % 24]
        session = start_game(rename(game_of(row), f"{row['game']} {number}"))
        for (_, asked), (role, command) in zip(messages[2::2], messages[1::2], strict=False):
            assert role == "assistant"
            observed = play(session, command, row)
            assert (observed.text, observed.refused) == (asked, False)


def test_the_same_game_is_shown_under_other_names_each_time(demos: list[list[Message]]):
    assert len({messages[0][1] for messages in demos}) == 72  # of 24 games


@pytest.mark.parametrize(("share", "least", "most"), [(1.0, 1.0, 1.0), (0.5, 0.5, 0.75), (0.0, 0.0, 0.4)])
def test_as_many_commands_lead_on_as_the_share_says(cfg: Config, share: float, least: float, most: float):
    # A command by lot is the right one now and then: about one in eight are possible.
    right = total = won = 0
    for number, row in enumerate(rows_of(cfg, "train", 24)):
        game = game_of(row)
        messages = demonstration(game, row, share, random.Random(number))
        session = start_game(game)
        for command in commands(messages):
            right += command == way_to_win(session)[0]
            total += 1
            play(session, command, row)
        won += session.state["won"]
        assert len(commands(messages)) <= LONGEST * len(row["answer"].split("; "))
        assert share < 1.0 or commands(messages) == row["answer"].split("; ")
    assert least <= right / total <= most
    assert (won == 24) == (share == 1.0)


def test_a_conversation_grown_turn_by_turn_is_the_one_the_template_renders(cfg: Config):
    tokenizer, row = tiny_tokenizer(WORDING), rows_of(cfg, "train", 1)[0]
    env, prompt = build_environment(cfg, tokenizer), prompt_of(cfg, row)
    messages = demonstration(game_of(row), row, 0.5, random.Random(1))
    messages = [*messages[:-1], ("assistant", "dance")]  # what is no command here is refused in the same words

    async def grown() -> list[int]:
        seen, state = list(prompt.token_ids), env.reset(prompt)
        for command in commands(messages):
            action_ids = encode(tokenizer, f"{command} <end>")
            turn = await env.act(state, action_ids, stopped=True)
            seen, state = seen + action_ids + turn.observation_ids, turn.state
        return seen

    chat = [{"role": role, "content": text} for role, text in messages]
    whole = encode(tokenizer, tokenizer.apply_chat_template(chat, tokenize=False))
    assert asyncio.run(grown())[: len(whole)] == whole
    assert "<unk>" in tokenizer.decode(whole)  # "dance", which the policy cannot even write


def test_a_tree_holds_what_the_engine_was_given(cfg: Config):
    tokenizer, row = tiny_tokenizer(WORDING), rows_of(cfg, "train", 2)[1]
    prompt, way = prompt_of(cfg, row), row["answer"].split("; ")
    settings = RolloutConfig(expander=ExpanderKind.beam_forks, num_leaves=4, max_forks=2, max_steps=6)
    engine = ChatEngine([*way, "look", "inventory"], tokenizer=tokenizer, end=" <end>")
    env = build_environment(cfg, tokenizer)
    tree = asyncio.run(grow_tree(prompt, engine, env, build_expander(settings, 0), settings, 0))
    assert sorted(engine.contexts) == sorted(tree.path_ids(node.parent) for node in tree.nodes)
    assert len(tree.leaves()) == 4


@pytest.mark.parametrize("command", ["drop", "insert"])
def test_a_goal_is_the_last_command_of_its_quest_and_where_to_drop(cfg: Config, command: str):
    for row in rows_of(cfg, "train", 24):
        goals = row["question"].partition(" in ")[0]
        if command not in goals:
            continue
        if command == "drop":
            assert row["question"].split(f"goal {command} ")[1].split()[1:2] == ["in"]
        else:
            assert row["answer"].count(command) >= 1
        return
    raise AssertionError(f"no game asks to {command}")


def test_names_follow_from_the_key_and_run_out(cfg: Config, monkeypatch: pytest.MonkeyPatch):
    game = game_of(rows_of(cfg, "train", 1)[0])

    def names(key: str) -> list[str]:
        return [info.name for info in rename(game, key).infos.values() if info.name]

    assert names("a") == names("a") != names("b")
    assert len(set(names("a"))) == len(names("a"))
    monkeypatch.setitem(NAMES, "r", ("kitchen",))
    with pytest.raises(ConfigError, match="more than 1 things of the kind of kitchen"):
        rename(game, "a")


def test_games_in_words_are_others_than_games_in_sentences_and_can_be_offered_commands(cfg: Config):
    settings = TextWorldConfig(cache_dir=cfg.task.textworld.cache_dir, words=True)  # show_commands is the default
    row = TextWorldRows(settings, 0, "eval").row(0)
    offered = row["question"].partition(" can ")[2].split(" , ")
    assert offered == start_game(game_of(row)).state["admissible_commands"]
    assert row["game"] == "eval-0-0-r3o5q2l3w"


def test_only_games_in_words_are_taught():
    assert set(check_machine.TEACHES) == set(TEACHERS)
    with pytest.raises(ConfigError, match=r"task\.textworld\.words=false"):
        TextWorldTeacher(TextWorldConfig())
    with pytest.raises(ConfigError, match='generator="verifiers" makes no demonstrations'):
        teacher_of(TaskConfig(generator="verifiers"))


def test_progress_is_whether_fewer_commands_are_needed(cfg: Config):
    row = next(each for each in rows_of(cfg, "train", 24) if each["answer"].startswith("go "))
    way = row["answer"].split("; ")
    back = {"go north": "go south", "go south": "go north", "go east": "go west", "go west": "go east"}[way[0]]

    def judged(typed: list[str]) -> list[float | None]:
        session = start_game(game_of(row))
        return [play(session, command, row).progress for command in typed]

    assert judged(way) == [1.0] * len(way)
    assert judged(["look", "dance", way[0], back, "inventory"]) == [0.0, 0.0, 1.0, -1.0, 0.0]
