"""Every row of the table of faults in docs/rewards.md: no score is invented, others go on, nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

import judge_server
import psutil
import pytest
from judge_server import JudgeServer

from conf.errors import RewardFailed
from conf.schema import RewardModelConfig, RewardsConfig, SourceConfig
from rewards.arguments import Call
from rewards.drawn import parse_tree
from rewards.lane import Lane, ProcessDied, Request
from rewards.service import RewardService, check_failure_budget
from rewards.types import BROKEN, Score, ScoredTree, ScoreStatus
from rl.credit.forest import forest_of
from rollout.tree import Tree

FILE = """
import ctypes, os, re, sys, time

def raises(step): raise KeyError("verdict")
def nan(step): return float("nan")
def text(step): return "good"
def wrong_length(steps): return [1.0]
def sleeps(step): time.sleep(3600)
def spins(step): return re.match("(a+)+$", "a" * 60 + "b") is None
def allocates(step): return len(bytearray(10 * 2**30))
def exits(step): sys.exit(1)
def leaves(step): os._exit(3)
def crashes(step): ctypes.string_at(0)
def floods(step):
    for _ in range(400):
        print("x" * 100_000)
    return 1.0
def opens(step, trajectory): return {"f": float(len(trajectory)), "g": None}
def fine(step): return 1.0

async def awaits_for_ever(step):
    import asyncio
    await asyncio.sleep(3600)

async def blocks_the_loop(step): time.sleep(3600)
async def fine_async(step): return 1.0
"""
LATE = """
import asyncio
async def reward(step, question):
    await asyncio.sleep(60 * (question == "late"))
    return 1.0
"""
SLOW = """
import asyncio, time
def fine(step):
    time.sleep(0.5)
    return 1.0
async def fine_async(step):
    await asyncio.sleep(0.5)
    return 1.0
"""
TREE = "q -> a -> (b, c)"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    return path


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Processes, open files and sockets, and threads, before and after."""
    # What the standard library starts once for the whole program, with the first spawned process.
    resource_tracker.ensure_running()
    # The file of its shared memory stays open, and another one follows when that is used up: here is enough, set free.
    multiprocessing.get_context("spawn").RawArray("b", 2**16)
    me = psutil.Process()
    # The event loop's own and what the standard library starts once.
    asyncio.run(asyncio.to_thread(lambda: None))
    before = len(me.children(recursive=True)), me.num_fds(), threading.active_count()
    yield
    gc.collect()
    ended_by = time.monotonic() + 10
    while time.monotonic() < ended_by:
        after = len(me.children(recursive=True)), me.num_fds(), threading.active_count()
        if all(now <= then for now, then in zip(after, before, strict=True)):
            return
        time.sleep(0.05)
    raise AssertionError(f"(processes, open files, threads) went from {before} to {after}")


def scored(
    cfg: RewardsConfig, *trees: Tree, meanwhile: Callable[[RewardService], None] | None = None
) -> list[ScoredTree]:
    async def together(service: RewardService) -> list[ScoredTree]:
        calls = [asyncio.ensure_future(service.score(tree)) for tree in trees]
        if meanwhile is not None:
            while not service.num_processes:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(meanwhile, service)
        return await asyncio.gather(*calls)

    service = RewardService(cfg)
    try:
        return asyncio.run(together(service))
    finally:
        service.close()


def mine(file: Path, name: str, **changes: object) -> RewardsConfig:
    """The faulty source beside one of a user's and one of Grove's, which must go on."""
    sources = {
        "faulty": SourceConfig(fn=f"{file}:{name}", signal="faulty", **{"timeout_s": 1.0, **changes}),
        "fine": SourceConfig(fn=f"{file}:fine"),
        "answer": SourceConfig(fn="rewards.sources.outcome:exact_match"),
    }
    return RewardsConfig(sources=sources, memory_limit_mib=2048)


def assert_trains_nothing(found: ScoredTree, reason: str, status: ScoreStatus) -> None:
    scores = found.step_scores["faulty"]
    assert set(scores) == {0, 1, 2}
    assert {score.status for score in scores.values()} == {status}
    assert all(reason in score.reason for score in scores.values()), scores[0].reason
    # Neither the signal nor what credit reads of it has a number.
    assert all(score.status is status for score in found.step_signals["faulty"].values())
    forest = forest_of([found])
    assert forest.step_signals["faulty"].isnan().all()
    assert forest.step_failed["faulty"].all()
    # The others went on.
    assert {score.value for score in found.step_scores["fine"].values()} == {1.0}
    assert {row: score.value for row, score in found.leaf_scores["answer"].items()} == {1: 1.0, 2: 0.0}


FAULTS = [
    ("raises", "KeyError: 'verdict' (my_rewards.py:4)", ScoreStatus.failed),
    ("nan", "it returned nan", ScoreStatus.failed),
    ("text", "it returned a str", ScoreStatus.failed),
    ("wrong_length", "it returned 1 scores for 3 steps", ScoreStatus.failed),
    ("sleeps", "no answer within timeout_s=1; its process was killed", ScoreStatus.timed_out),
    ("spins", "no answer within timeout_s=1; its process was killed", ScoreStatus.timed_out),
    ("allocates", "MemoryError", ScoreStatus.failed),
    ("exits", "SystemExit: 1 (my_rewards.py:11)", ScoreStatus.failed),
    ("leaves", "its process died with exit code 3", ScoreStatus.failed),
    ("crashes", "its process died with exit code -11", ScoreStatus.failed),
    ("awaits_for_ever", "no answer within timeout_s=1", ScoreStatus.timed_out),
    ("blocks_the_loop", "no answer within timeout_s=1; its process was killed", ScoreStatus.timed_out),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reason", "status"), FAULTS, ids=[name for name, _, _ in FAULTS])
def test_a_faulty_function_costs_its_own_scores_alone(file, name, reason, status):
    cfg = mine(file, name)
    (found,) = scored(cfg, parse_tree(TREE, answer="b"))
    assert_trains_nothing(found, reason, status)
    with pytest.raises(
        RewardFailed, match=r"rewards\.sources\.faulty failed 3 of 3 .* or raise rewards\.max_failed_share"
    ):
        check_failure_budget([found], cfg)
    check_failure_budget([found], replace(cfg, max_failed_share=1.0))


@pytest.mark.slow
def test_a_flood_of_output_is_dropped_and_the_score_counts(file, capfd):
    (found,) = scored(mine(file, "floods", timeout_s=20.0), parse_tree(TREE, answer="b"))
    assert {score.value for score in found.step_scores["faulty"].values()} == {1.0}
    shown = capfd.readouterr().err
    assert 0 < len(shown) <= 300_000  # of 120,000,000


@pytest.mark.slow
def test_one_late_tree_of_an_async_source_costs_no_other(file):
    slow = file.with_name("slow.py")
    slow.write_text(LATE)
    cfg = RewardsConfig(sources={"faulty": SourceConfig(fn=f"{slow}:reward", timeout_s=1.0)})
    late, fine = scored(cfg, parse_tree("late -> a"), parse_tree("q -> a"))
    assert late.step_scores["faulty"][0].status is ScoreStatus.timed_out
    assert fine.step_scores["faulty"][0] == Score(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fine", "fine_async"])
def test_a_worker_that_is_killed_is_replaced_and_its_trees_are_asked_again(file, name):
    slow = file.with_name("slow.py")
    slow.write_text(SLOW)
    cfg = RewardsConfig(sources={"faulty": SourceConfig(fn=f"{slow}:{name}")}, num_processes=1)

    def kill(service: RewardService) -> None:
        time.sleep(0.7)  # while it scores
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # one that has ended already
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    (found,) = scored(cfg, parse_tree("q -> a -> b"), meanwhile=kill)
    assert found.step_scores["faulty"] == {0: Score(1.0), 1: Score(1.0)}


@pytest.mark.slow
def test_who_hears_that_a_process_died_and_asks_again_at_once_gets_another(file):
    source = SourceConfig(fn=f"{file}:fine")
    request = Request("fine", source, parse_tree("q -> a"), (Call((0,)),))
    lane, again = Lane(RewardsConfig()), []
    first = lane.submit(request, {}, None)
    # told in the thread that tells, before that thread ends
    first.ready.add_done_callback(lambda _: again.append(lane.submit(request, {}, None)))
    assert lane._child is not None
    lane._child._process.kill()
    try:
        with pytest.raises(ProcessDied):
            first.answers.result(timeout=60)
        (second,) = again
        reply = second.answers.result(timeout=60)
        assert not isinstance(reply, str), reply
    finally:
        lane.close()


def judged(server: JudgeServer, **changes: object) -> RewardsConfig:
    model = RewardModelConfig(
        path=judge_server.MODEL,
        url=server.url,
        **{"timeout_s": 0.3, "max_retries": 1, "breaker_failures": 99, **changes},
    )
    sources = {
        "faulty": SourceConfig(fn="rewards.sources.judge:Verdict", model="judge", signal="faulty"),
        "fine": SourceConfig(fn="rewards.sources.format:format_ok"),
        "answer": SourceConfig(fn="rewards.sources.outcome:exact_match"),
    }
    return RewardsConfig(sources=sources, models={"judge": model})


ENDPOINT_FAULTS = [
    ("500", judge_server.status(500), "500", ScoreStatus.failed),
    ("429", judge_server.status(429), "429", ScoreStatus.failed),
    ("garbage", judge_server.GARBAGE, "", ScoreStatus.failed),
    ("half a JSON", judge_server.HALF_A_JSON, "", ScoreStatus.failed),
    ("never", judge_server.NEVER_ANSWERS, "no reply within 0.3 s", ScoreStatus.timed_out),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault", "reason", "status"), ENDPOINT_FAULTS, ids=[row[0] for row in ENDPOINT_FAULTS]
)
def test_a_faulty_endpoint_costs_its_own_scores_alone(name, fault, reason, status):
    with JudgeServer(always=fault) as server:
        (found,) = scored(judged(server), parse_tree(TREE, answer="b"))
    assert_trains_nothing(found, reason, status)
    assert found.costs["faulty"].requests == 3


def test_a_reply_of_no_form_is_asked_for_again_and_then_fails():
    with JudgeServer("I rather like it.") as server:
        (found,) = scored(judged(server), parse_tree(TREE, answer="b"))
        assert server.num_requests == 9  # three tries for each of three steps
    assert_trains_nothing(found, "", ScoreStatus.failed)


class Unmarked:
    """A process reward model whose marker the tokenizer lost: as many rows as markers, which is none."""

    identity = "unmarked"

    async def score_steps(self, texts):
        return [[] for _ in texts]


def test_scores_that_a_lost_marker_left_out_are_failed_and_not_shifted():
    model = RewardModelConfig(path="prm")
    cfg = RewardsConfig(
        sources={
            "faulty": SourceConfig(fn="rewards.sources.prm:StepScores", model="prm", signal="faulty"),
            "fine": SourceConfig(fn="rewards.sources.format:format_ok"),
            "answer": SourceConfig(fn="rewards.sources.outcome:exact_match"),
        },
        models={"prm": model},
    )
    service = RewardService(cfg, models={"prm": Unmarked()})  # type: ignore[dict-item]
    found = asyncio.run(service.score(parse_tree(TREE, answer="b")))
    service.close()
    assert_trains_nothing(found, "0 scores for 2 steps", ScoreStatus.failed)


def test_a_broken_score_is_asked_for_again_and_a_real_one_is_kept(tmp_path):
    with JudgeServer({"reasoning": "", "verdict": "right"}, faults=[judge_server.status(400)] * 3) as server:
        service = RewardService(judged(server), cache_path=tmp_path / "cache.sqlite")
        tree = parse_tree(TREE, answer="b")
        first, second, third = (asyncio.run(service.score(tree)) for _ in range(3))
        service.close()
        assert all(score.status in BROKEN for score in first.step_scores["faulty"].values())
        assert all(score.is_scored for score in second.step_scores["faulty"].values())
        assert third.step_scores["faulty"] == second.step_scores["faulty"]
        assert server.num_requests == 6
        assert third.costs["faulty"].cached_calls == third.costs["faulty"].calls == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status"),
    [("time.sleep(3600)", ScoreStatus.timed_out), ("os._exit(3)", ScoreStatus.failed)],
    ids=["hangs", "kills its process"],
)
def test_one_step_that_hangs_or_kills_costs_its_own_score_and_not_its_trees(file, body, status):
    picky = file.with_name("picky.py")
    picky.write_text(f"import os, time\ndef reward(step):\n    if step.action_text == 'b': {body}\n    return 1.0")
    cfg = RewardsConfig(sources={"faulty": SourceConfig(fn=f"{picky}:reward", timeout_s=1.0)})
    (found,) = scored(cfg, parse_tree("q -> a -> (b, c, d)"))
    assert {row: score.status for row, score in found.step_scores["faulty"].items()} == {
        **dict.fromkeys((0, 2, 3), ScoreStatus.scored),
        1: status,
    }
