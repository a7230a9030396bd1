"""Text games: generated alike everywhere, played, scored, forked, and grown into a tree."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from chatml import chatml_tokenizer, encode
from worlds import ChatEngine, wait_until

from conf.compose import compose
from conf.errors import ConfigError, DataError
from conf.schema import ExpanderKind, RolloutConfig, TaskConfig, TextWorldConfig
from rewards.sources.world import world_score, world_total, world_won
from rollout.data import PromptEncoder
from rollout.envs.textworld import TextWorld, TextWorldRows
from rollout.expand import build_expander
from rollout.grow import grow_tree
from rollout.tree import Tree
from rollout.types import Prompt, StopReason
from rollout.world import ThreadHost, WorldEnvironment
from rollout.world_process import ProcessHost

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("textworld") is None, reason="needs the package textworld: pip install -r requirements/envs.txt"
    ),
]
GROW = RolloutConfig(
    expander=ExpanderKind.beam_forks,
    num_leaves=4,
    max_forks=2,
    max_steps=8,
    max_turn_tokens=128,
    max_context_tokens=16_384,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TextWorldConfig:
    return TextWorldConfig(cache_dir=str(tmp_path_factory.mktemp("games")))


def prompt_of(row: dict[str, Any], config: TextWorldConfig) -> Prompt:
    cfg = compose(["experiment=textworld"])
    return PromptEncoder(cfg, chatml_tokenizer(), {}).prompt(row, "train/0", "train question 0")


def solved(row: dict[str, Any]) -> list[str]:
    return row["answer"].split("; ")


def environment(host: Any = None) -> WorldEnvironment:
    return WorldEnvironment(TaskConfig(), chatml_tokenizer(), host or ThreadHost(TextWorld()), TextWorld.fork)


def grow(env: WorldEnvironment, prompt: Prompt, engine: ChatEngine, seed: int = 0) -> Tree:
    return asyncio.run(grow_tree(prompt, engine, env, build_expander(GROW, seed), GROW, seed))


def commands(context_ids: list[int], rng: random.Random) -> str:
    """A player that tries any of the commands it was last offered."""
    seen = str(chatml_tokenizer().decode(context_ids))
    offered = seen.rpartition("Possible commands: ")[2].partition("<|im_end|>")[0]
    return rng.choice(offered.split("; "))


def test_a_walkthrough_wins_and_its_points_add_up_to_one(config: TextWorldConfig):
    row = TextWorldRows(config, seed=0, split="train").row(0)
    world, prompt = TextWorld(), Prompt(id="a", token_ids=(1,), question=row["question"], answer="", data=row)
    session, opening = world.reset(prompt)
    said = [world.act(session, command) for command in solved(row)]
    assert opening == row["question"]
    assert [each.done for each in said] == [False] * (len(said) - 1) + [True]
    assert sum(each.score or 0 for each in said) == 1.0
    assert (said[0].won, said[-1].won) == (False, True)


def test_what_is_seen_follows_the_state(config: TextWorldConfig):
    row = TextWorldRows(config, seed=0, split="train").row(0)
    world = TextWorld()
    session, opening = world.reset(Prompt(id="a", token_ids=(1,), question="", answer="", data=row))
    assert "You are in the " in opening
    assert "Possible commands: " in opening
    assert world.act(session, "Let me see.\n> LOOK").text.startswith("You are in the ")
    bad = world.act(session, "dance")
    assert (bad.refused, bad.text.splitlines()[0]) == (True, 'You cannot "dance" here.')


def test_commands_are_told_only_where_asked_for(config: TextWorldConfig):
    quiet = TextWorldConfig(cache_dir=config.cache_dir, show_commands=False)
    assert "Possible commands" not in TextWorldRows(quiet, 0, "train").row(0)["question"]


def test_train_and_held_out_games_differ_and_held_out_ones_are_the_same_for_every_seed(config: TextWorldConfig):
    train = {TextWorldRows(config, seed, "train").row(index)["question"] for seed in (0, 1) for index in range(2)}
    held_out = [TextWorldRows(config, seed, "eval").row(0) for seed in (0, 1)]
    assert len(train) == 4
    assert held_out[0] == held_out[1]
    assert held_out[0]["question"] not in train
    assert TextWorldRows(config, 0, "train").num_rows == config.num_games


@pytest.mark.slow
def test_another_process_makes_the_same_game(config: TextWorldConfig, tmp_path: Path):
    code = (
        "from conf.schema import TextWorldConfig; from rollout.envs.textworld import TextWorldRows; "
        f"print(TextWorldRows(TextWorldConfig(cache_dir={str(tmp_path)!r}), 0, 'train').row(0)['question'], end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == TextWorldRows(config, 0, "train").row(0)["question"], done.stderr


@pytest.mark.parametrize("index", [0, 1])
def test_a_game_played_anew_goes_on_as_the_game_itself(config: TextWorldConfig, index: int):
    row = TextWorldRows(config, seed=0, split="train").row(index)
    world, rng = TextWorld(), random.Random(index)
    prompt = Prompt(id="a", token_ids=(1,), question="", answer="", data=row)
    session, _ = world.reset(prompt)
    done: list[str] = []
    for _ in range(8):
        command = rng.choice(session.state["admissible_commands"])
        again, _ = world.reset(prompt)
        for each in done:
            world.act(again, each)
        observed = world.act(session, command)
        assert world.act(again, command) == observed
        done.append(command)
        if observed.done:
            break


@pytest.mark.parametrize("seed", [0, 1])
def test_a_tree_of_games_holds_what_the_engine_was_given_and_leaves_no_session(config: TextWorldConfig, seed: int):
    prompt = prompt_of(TextWorldRows(config, seed=0, split="train").row(0), config)
    env, engine = environment(), ChatEngine([], choose=commands)
    tree = grow(env, prompt, engine, seed)
    assert sorted(engine.contexts) == sorted(tree.path_ids(node.parent) for node in tree.nodes)
    assert len(tree.leaves()) == 4
    gc.collect()
    assert isinstance(env.host, ThreadHost)
    sessions = env.host.sessions
    asyncio.run(wait_until(lambda: not sessions.live))


def test_a_policy_that_knows_the_way_wins_every_trajectory_and_is_paid_for_its_quests(config: TextWorldConfig):
    row = TextWorldRows(config, seed=0, split="train").row(1)
    way = solved(row)

    def next_command(context_ids: list[int], rng: random.Random) -> str:
        said = str(chatml_tokenizer().decode(context_ids)).count("<|im_start|>assistant")
        return way[said - 1]

    tree = grow(environment(), prompt_of(row, config), ChatEngine([], choose=next_command))
    for leaf in tree.leaves():
        steps = [tree.nodes[each] for each in tree.path(leaf)]
        assert (world_won(steps), world_total(steps)) == (1.0, 1.0)
        assert [world_score(step) for step in steps].count(0.5) == config.num_quests
    assert {tree.nodes[leaf].stop for leaf in tree.leaves()} == {StopReason.answered}


@pytest.mark.slow
def test_a_game_in_a_process_grows_the_same_tree(config: TextWorldConfig):
    prompt = prompt_of(TextWorldRows(config, seed=0, split="train").row(0), config)
    host = ProcessHost("rollout.envs.textworld:TextWorld", {}, 1)
    try:
        apart = grow(environment(host), prompt, ChatEngine([], choose=commands), 3)
    finally:
        host.kill()
    assert apart == grow(environment(), prompt, ChatEngine([], choose=commands), 3)


def test_a_row_of_another_task_and_sizes_without_a_game_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match='has no column "game"'):
        TextWorld().reset(Prompt(id="a", token_ids=(1,), question="q", answer=""))
    monkeypatch.setattr("rollout.envs.textworld.MAX_TRIES", 0)
    with pytest.raises(ConfigError, match=r"made no game of task\.textworld\.num_rooms=3, num_objects=5"):
        TextWorldRows(TextWorldConfig(cache_dir=str(tmp_path)), 0, "train").row(0)
    assert list(tmp_path.iterdir()) == []


def test_the_prompt_ends_where_the_policy_begins(config: TextWorldConfig):
    row = TextWorldRows(config, seed=0, split="train").row(0)
    prompt = prompt_of(row, config)
    assert list(prompt.token_ids)[-len(encode(chatml_tokenizer(), "<|im_start|>assistant\n")) :] == encode(
        chatml_tokenizer(), "<|im_start|>assistant\n"
    )
