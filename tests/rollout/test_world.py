"""Worlds behind the chat: what the policy sees, how siblings fork, and what happens when a world hangs or dies."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chatml import chatml_tokenizer, encode
from worlds import ChatEngine, Counter, wait_until

from conf.errors import ConfigError, DataError
from conf.schema import Config, ExpanderKind, OnMalformed, RolloutConfig, TaskConfig, WorldConfig
from rollout.chat import build_environment
from rollout.environment import Turn
from rollout.expand import build_expander
from rollout.grow import complete_path, grow_tree
from rollout.tree import Tree
from rollout.types import Prompt, StepKind, StopReason
from rollout.world import Fork, ThreadHost, WorldEnvironment, load_world
from rollout.world_process import ProcessHost

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[1] / "worlds.py"
TREE = RolloutConfig(
    expander=ExpanderKind.random_expand,
    num_trees=2,
    expand_nodes=3,
    expand_rounds=2,
    keep_leaves=0,
    max_steps=4,
    max_turn_tokens=32,
    max_context_tokens=2048,
)


def question(text: str = "count", **data: Any) -> Prompt:
    token_ids = encode(chatml_tokenizer(), f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
    return Prompt(id="train/0", token_ids=tuple(token_ids), question=text, answer="", data=data)


def env_of(world: Any, *, max_sessions: int = 64, timeout_s: float = 5.0, **settings: Any) -> WorldEnvironment:
    task = TaskConfig(world=WorldConfig(max_sessions=max_sessions), tool_timeout_s=timeout_s, **settings)
    return WorldEnvironment(task, chatml_tokenizer(), ThreadHost(world), world.fork)


@contextmanager
def processes(fork: str, num: int = 1, timeout_s: float = 5.0) -> Iterator[WorldEnvironment]:
    args = {"fork": fork}
    host = ProcessHost(f"{HERE}:Counter", args, num, memory_mib=512)
    task = TaskConfig(tool_timeout_s=timeout_s)
    try:
        yield WorldEnvironment(task, chatml_tokenizer(), host, Fork(fork))
    finally:
        host.kill()


async def act(env: WorldEnvironment, state: Any, text: str) -> Turn:
    return await env.act(state, encode(env.tokenizer, text + "<|im_end|>"), stopped=True)


def play(env: WorldEnvironment, *texts: str) -> list[Turn]:
    async def run() -> list[Turn]:
        state, turns = env.reset(question()), []
        for text in texts:
            turns.append(await act(env, state, text))
            state = turns[-1].state
        return turns

    return asyncio.run(run())


def live(env: WorldEnvironment) -> int:
    assert isinstance(env.host, ThreadHost)
    return len(env.host.sessions.live)


# --- what the policy sees ---------------------------------------------------------------------------------------------


def test_a_game_grown_turn_by_turn_is_the_conversation_the_template_renders():
    env, tokenizer = env_of(Counter()), chatml_tokenizer()
    turns = play(env, "add 2", "<think>more</think>\nadd 3", "end")
    said = ["add 2", "<think>more</think>\nadd 3"]
    messages = [{"role": "user", "content": "count"}]
    for text, total in zip(said, ["2", "5"], strict=True):
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"total {total}"}]
    seen = list(question().token_ids)
    for text, turn in zip(said, turns, strict=False):
        seen += encode(tokenizer, text + "<|im_end|>") + turn.observation_ids
    assert seen == encode(
        tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )
    assert [turn.stop for turn in turns] == [StopReason.continues, StopReason.continues, StopReason.answered]


def test_what_a_world_says_of_an_action_is_in_the_facts():
    first, bad, last = (turn.facts for turn in play(env_of(Counter()), "add 2", "sing", "end"))
    assert (first.kind, first.arguments, first.result) == (StepKind.call, {"action": "add 2"}, "total 2")
    assert (first.score, first.won, first.tool_ok) == (2.0, False, True)
    assert (bad.tool_ok, bad.result, bad.score) == (False, 'I do not know how to "sing"', None)
    assert (last.kind, last.answer, last.won, last.score) == (StepKind.answer, "end", True, 0.0)


def test_a_turn_that_was_cut_or_says_nothing_never_reaches_the_world():
    env = env_of(Counter())
    turn = asyncio.run(env.act(env.reset(question()), encode(env.tokenizer, "add 2"), stopped=False))
    assert (turn.stop, turn.facts.kind) == (StopReason.turn_tokens, StepKind.malformed)
    (silent,) = play(env, "<think>hm</think> ")
    assert (silent.stop, silent.facts.kind) == (StopReason.continues, StepKind.malformed)
    assert "error: the turn says nothing" in silent.observation_text
    (ended,) = play(env_of(Counter(), on_malformed=OnMalformed.end), "")
    assert (ended.stop, live(env)) == (StopReason.malformed, 0)


# --- forks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fork", ["stateless", "copy", "replay"])
@pytest.mark.parametrize("where", ["threads", "processes"])
def test_siblings_act_from_the_same_state_whichever_acts_first(fork: str, where: str):
    async def run(env: WorldEnvironment) -> list[tuple[str | None, float | None]]:
        first = await act(env, env.reset(question()), "add 1")
        second = await act(env, first.state, "add 1")
        turns = [await act(env, place, text) for place in (second.state, first.state) for text in ("add 5", "add 7")]
        turns += await asyncio.gather(*(act(env, first.state, f"add {number}") for number in range(10)))
        return [(turn.facts.result, turn.facts.score) for turn in turns]

    if fork == "stateless":  # tells each action alone
        wanted = [5, 7, 5, 7, *range(10)]
    else:
        wanted = [2 + 5, 2 + 7, 1 + 5, 1 + 7, *range(1, 11)]
    if where == "threads":
        got = asyncio.run(run(env_of(Counter(fork=fork))))
    else:
        with processes(fork, num=2) as env:
            got = asyncio.run(run(env))
    assert [text for text, _ in got] == [f"total {total}" for total in wanted]
    assert [score for _, score in got] == [5, 7, 5, 7, *range(10)]


def test_a_copy_world_copies_and_a_replay_world_acts_again():
    async def fork_twice(env: WorldEnvironment) -> None:
        first = await act(env, env.reset(question()), "add 1")
        for _ in range(2):
            await act(env, first.state, "add 1")

    copied, replayed = Counter(fork="copy"), Counter(fork="replay")
    for world in (copied, replayed):
        asyncio.run(fork_twice(env_of(world)))
    assert (copied.num_resets, copied.num_acts) == (1, 3)
    assert (replayed.num_resets, replayed.num_acts) == (2, 4)  # the second sibling acts the first step again


def test_a_replay_that_diverges_is_an_error_and_not_data():
    async def run() -> None:
        env = env_of(Counter(fork="replay"))
        first = await act(env, env.reset(question()), "draw")  # a number that no seed decides
        await act(env, first.state, "add 1")
        await act(env, first.state, "add 2")

    with pytest.raises(DataError, match=r'acting step 1 of prompt "train/0" again, .*draw.* gave .* where it gave'):
        asyncio.run(run())


def test_a_world_that_opens_otherwise_than_the_row_asks_is_an_error():
    with pytest.raises(DataError, match="asks 'count', but its world opens with 'sing'"):
        play(env_of(Counter(opening="sing")), "add 1")
    assert play(env_of(Counter(opening="count")), "add 1")[0].facts.result == "total 1"


@pytest.mark.parametrize("fork", ["stateless", "copy", "replay"])
def test_sessions_are_bounded_and_those_closed_come_back(fork: str):
    world = Counter(fork=fork)
    env = env_of(world, max_sessions=2)

    async def run() -> list[str | None]:
        places = [(await act(env, env.reset(question()), f"add {number}")).state for number in range(6)]
        await wait_until(lambda: live(env) <= 2)
        turns = [await act(env, place, "add 10") for place in places]
        return [turn.facts.result for turn in turns]

    base = 0 if fork == "stateless" else 1
    assert asyncio.run(run()) == [f"total {base * number + 10}" for number in range(6)]


# --- trees ------------------------------------------------------------------------------------------------------------


def grow(env: WorldEnvironment, engine: ChatEngine, seed: int = 0, cfg: RolloutConfig = TREE) -> Tree:
    return asyncio.run(grow_tree(question(), engine, env, build_expander(cfg, seed), cfg, seed))


@pytest.mark.parametrize("fork", ["stateless", "copy", "replay"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_concatenating_a_path_gives_what_the_engine_was_given_and_no_session_is_left(fork: str, seed: int):
    world, engine = Counter(fork=fork), ChatEngine(["add 1", "add 2", "add 3", "end", "sing"])
    env = env_of(world)
    tree = grow(env, engine, seed)
    assert sorted(engine.contexts) == sorted(tree.path_ids(node.parent) for node in tree.nodes)
    gc.collect()
    asyncio.run(wait_until(lambda: not live(env)))
    asyncio.run(wait_until(lambda: world.num_closes == world.num_resets + world.num_copies))


def test_every_way_to_fork_grows_the_same_tree():
    texts = ["add 1", "add 2", "sing", "end"]
    trees = [grow(env_of(Counter(fork=fork)), ChatEngine(texts), 5) for fork in ("copy", "replay")]
    assert trees[0] == trees[1]
    with processes("replay", num=2) as env:
        assert grow(env, ChatEngine(texts), 5) == trees[0]


def test_a_value_behind_a_path_is_measured_in_the_same_world():
    env, engine = env_of(Counter(fork="replay")), ChatEngine(["add 1"])
    tree = grow(env, engine)
    steps = [tree.nodes[row] for row in tree.path(next(iter(tree.leaves())))][:2]
    values = asyncio.run(complete_path(question(), steps, 2, engine, env, TREE, seed=1))
    assert {node.facts.result for node in values.nodes if node.stop is StopReason.max_steps} == {"total 4"}


# --- crashes and hangs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "why"), [("raise", "OSError: the sky fell"), ("none", "TypeError: act() returned")])
def test_a_world_that_raises_ends_the_trajectory_and_trains_nothing(text: str, why: str):
    env = env_of(Counter())
    _, crashed = play(env, "add 1", text)
    assert crashed.stop is StopReason.tool_crashed
    assert why in crashed.facts.error
    gc.collect()


def test_a_world_that_hangs_in_a_thread_is_given_up_and_others_go_on():
    env = env_of(Counter(), timeout_s=0.3)
    begun = time.monotonic()
    (hung,) = play(env, "hang 1")
    assert time.monotonic() - begun < 1.0
    assert (hung.stop, hung.facts.error) == (StopReason.tool_crashed, "the world did not answer within 0.3 s")
    assert play(env, "add 1")[0].facts.result == "total 1"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hang 60", "did not answer within 1 s"),
        ("die", "ended its process (status 3)"),
        ("raise", "OSError: the sky"),
        ("hoard 600", "MemoryError"),
    ],
)
def test_a_world_that_hangs_or_dies_in_a_process_is_replaced_and_its_other_sessions_come_back(text: str, why: str):
    async def run(env: WorldEnvironment) -> tuple[Turn, Turn]:
        first = await act(env, env.reset(question()), "add 1")
        other = await act(env, env.reset(question()), "add 2")
        crashed = await act(env, first.state, text)
        return crashed, await act(env, other.state, "add 3")

    with processes("copy", timeout_s=1.0) as env:
        crashed, later = asyncio.run(run(env))
        assert (crashed.stop, later.facts.result) == (StopReason.tool_crashed, "total 5")
        assert why in crashed.facts.error
        assert isinstance(env.host, ProcessHost)
        assert env.host.processes[0].num_starts == (2 if text in ("hang 60", "die") else 1)


def num_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_process_and_no_file_outlives_its_host():
    before = num_files()
    with processes("copy", num=2) as env:
        play(env, "add 1", "add 2")
        play(env, "add 1", "die")
        pids = [process.pid for process in env.host.processes if process.pid]  # type: ignore[attr-defined]
        assert pids
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    del env
    gc.collect()
    assert num_files() <= before + 2  # the event loop's own may be about to close


def test_a_process_that_hangs_ends_with_the_one_who_started_it():
    code = (
        "import asyncio, os; from rollout.world_process import ProcessHost; from rollout.types import Prompt\n"
        f"host = ProcessHost({str(HERE) + ':Counter'!r}, {{}}, 1)\n"
        "prompt = Prompt(id='a', token_ids=(1,), question='q', answer='')\n"
        "async def run():\n"
        "    await host.start(0, prompt, 60)\n"
        "    print(host.processes[0].pid, flush=True)\n"
        "    asyncio.get_running_loop().call_later(0.5, os._exit, 0)\n"
        "    await host.act(0, 'hang 600', 600)\n"
        "asyncio.run(run())"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    pid = int(done.stdout)
    asyncio.run(wait_until(lambda: not is_running(pid), timeout_s=10.0))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_does_not_see_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_API_KEY", "hush")
    monkeypatch.setenv("MY_CITY", "Rome")
    with processes("copy") as env:
        assert [turn.facts.result for turn in play(env, "env MY_API_KEY", "env MY_CITY")] == ["hidden", "Rome"]


def test_a_step_that_is_cancelled_leaves_no_session():
    env = env_of(Counter())

    async def run() -> None:
        task = asyncio.create_task(act(env, env.reset(question()), "hang 0.2"))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del task
        gc.collect()
        await wait_until(lambda: not live(env))

    asyncio.run(run())


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_config_names_the_world():
    cfg = Config(task=TaskConfig(world=WorldConfig(fn=f"{HERE}:Counter", args={"fork": "replay"})))
    env = build_environment(cfg, chatml_tokenizer())
    assert isinstance(env, WorldEnvironment)
    assert env.fork is Fork.replay
    assert play(env, "add 4")[0].facts.result == "total 4"


@pytest.mark.parametrize(
    ("fn", "args", "why"),
    [
        (f"{HERE}:Counter", {"speed": 1}, "could not be made with the arguments {'speed': 1}: TypeError"),
        (f"{HERE}:ChatEngine", {"texts": []}, "is no world: it has no method reset"),
        (f"{HERE}:Nothing", {}, 'defines no "Nothing"'),
    ],
)
def test_what_is_no_world_is_refused(fn: str, args: dict[str, Any], why: str):
    with pytest.raises(ConfigError, match=why.replace("(", r"\(").replace("{", r"\{")):
        load_world(fn, args)
