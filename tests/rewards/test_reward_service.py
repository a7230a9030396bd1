"""The service: shared steps once, users' functions in processes that can be killed, and the failure budget."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from conf.errors import ConfigError, RewardFailed
from conf.schema import RewardsConfig, SourceConfig
from rewards.drawn import parse_scored, parse_tree
from rewards.service import RewardService, check_failure_budget, score_counts
from rewards.types import Score, ScoredTree, ScoreStatus
from rollout.child import secret_names
from rollout.types import StopReason

FORKED = "q -> a -> (a1, a2)"
PLUGIN = '''
import asyncio, ctypes, os, re, subprocess, sys, threading, time

def fine(step):
    return 1.0

def counted(step, tree, log):
    """Writes a line for every call."""
    with open(log, "a") as file:
        file.write(step.action_text + "\\n")
    return 1.0

def endless(step):
    while True:
        pass

def stubborn(step):
    """One C call that never gives Python a turn."""
    return bool(re.match(r"(a+)+$", "a" * 64 + "b"))

def leaves(step, code):
    os._exit(code)

def crashes(step):
    ctypes.string_at(0)

def exits(step):
    sys.exit(1)

def interrupts(step):
    raise KeyboardInterrupt

def leaves_if(step, leave):
    return os._exit(3) if leave else 1.0

def dies_later(step):
    threading.Timer(0.2, os._exit, [1]).start()
    return 1.0

def starts_a_process(step, note):
    child = subprocess.Popen(["sleep", "60"])
    with open(note, "w") as file:
        file.write(str(child.pid))
    child.wait()

async def asleep(step):
    await asyncio.sleep(3600)

def sees(step, name):
    return float(name in os.environ)

class Slow:
    """Set-up that takes longer than one tree may."""
    def __init__(self):
        time.sleep(1.5)
    async def __call__(self, step):
        return 2.0

class Client:
    """Holds on to the first event loop it sees, as HTTP clients do."""
    def __init__(self):
        self.loop = None
    async def __call__(self, step):
        self.loop = self.loop or asyncio.get_running_loop()
        return float(self.loop is asyncio.get_running_loop())
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("user") / "user_rewards.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture
def serve(plugin: Path):
    """Makes services of a user's functions and closes them."""
    services = []

    def _serve(**sources: str | SourceConfig) -> RewardService:
        named = {name: each if isinstance(each, SourceConfig) else mine(plugin, each) for name, each in sources.items()}
        services.append(RewardService(RewardsConfig(sources=named, pass_env=["JUDGE_API_KEY"], num_processes=1)))
        return services[-1]

    yield _serve
    for service in services:
        service.close()


def mine(plugin: Path, name: str, **cfg) -> SourceConfig:
    return SourceConfig(fn=f"{plugin}:{name}", **{"timeout_s": 1.0, **cfg})


def score(service: RewardService, *trees) -> list[ScoredTree]:
    async def together() -> list[ScoredTree]:
        return await asyncio.gather(*map(service.score, trees))

    return asyncio.run(together())


def test_step_shared_by_two_trajectories_is_scored_once(serve, plugin, tmp_path):
    log = tmp_path / "calls"
    service = serve(counted=mine(plugin, "counted", args={"log": str(log)}))
    tree = parse_tree("q -> (a -> (a1, a2), b -> b1)", stops={"b1": StopReason.deadline})
    (scored,) = score(service, tree)
    assert log.read_text().split() == ["a", "a1", "a2"]  # a once for its two leaves; b leads to nothing that trains
    assert scored.step_scores["counted"] == {row: Score(1.0) for row in (0, 1, 2)}
    assert scored.step_signals["step"] == scored.step_scores["counted"]
    assert scored.leaf_scores == {}


def test_shipped_sources_need_no_process(serve):
    service = serve(
        answer=SourceConfig(fn="rewards.sources.outcome:exact_match"),
        format=SourceConfig(target="rewards.sources.format.format_ok", weight=0.5),
    )
    (scored,) = score(service, parse_tree(FORKED, answer="A1"))
    assert scored.leaf_signals == {"outcome": {1: Score(1.0), 2: Score(0.0)}}
    assert scored.step_signals == {"step": {row: Score(0.5) for row in (0, 1, 2)}}
    assert service.num_processes == 0
    assert set(scored.costs) == {"answer", "format"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["endless", "stubborn", "asleep"])
def test_source_that_hangs_is_killed_and_timed_out_while_the_others_score(serve, plugin, name):
    service = serve(
        hung=mine(plugin, name, timeout_s=0.5), fine="fine", answer=SourceConfig(fn="rewards.sources.format:format_ok")
    )
    scored, again = score(service, parse_tree(FORKED), parse_tree(FORKED))
    for each in (scored, again):
        assert {one.status for one in each.step_scores["hung"].values()} == {ScoreStatus.timed_out}
        killed = "" if name == "asleep" else "; its process was killed"  # what is awaited can be cancelled
        assert each.step_scores["hung"][0].reason == f"no answer within timeout_s=0.5{killed}"
        assert each.step_scores["fine"] == dict.fromkeys((0, 1, 2), Score(1.0))
        assert each.step_signals["step"][0].status is ScoreStatus.timed_out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("leaves", {"code": 0}, "its process died with exit code 0"),
        ("leaves", {"code": 3}, "its process died with exit code 3"),
        ("crashes", {}, "its process died with exit code -11"),
        ("exits", {}, "SystemExit: 1 (user_rewards.py:28)"),
        ("interrupts", {}, "KeyboardInterrupt: "),
    ],
)
def test_crash_fails_its_own_scores_and_the_pool_survives(serve, plugin, name, args, reason):
    service = serve(broken=mine(plugin, name, args=args), fine="fine")
    for scored in score(service, parse_tree(FORKED), parse_tree(FORKED)):
        assert [one.reason for one in scored.step_scores["broken"].values()] == [reason] * 3
        assert {one.status for one in scored.step_scores["broken"].values()} == {ScoreStatus.failed}
        assert scored.step_scores["fine"] == dict.fromkeys((0, 1, 2), Score(1.0))


@pytest.mark.slow
def test_slow_set_up_does_not_count_as_scoring(serve):
    (scored,) = score(serve(slow="Slow"), parse_tree("q -> a"))
    assert scored.step_scores["slow"] == {0: Score(2.0)}
    assert scored.costs["slow"].seconds < 1.0


def test_client_of_an_async_class_stays_usable_from_tree_to_tree(serve):
    service = serve(client="Client")
    for _ in range(2):
        (scored,) = score(service, parse_tree("q -> a"))
        assert scored.step_scores["client"] == {0: Score(1.0)}


def test_secrets_are_not_inherited_unless_passed(serve, plugin, monkeypatch):
    names = {"WANDB_API_KEY": 0.0, "JUDGE_API_KEY": 1.0, "PLAIN_SETTING": 1.0}
    for name in names:
        monkeypatch.setenv(name, "value")
    service = serve(**{name: mine(plugin, "sees", args={"name": name}) for name in names})
    (scored,) = score(service, parse_tree("q -> a"))
    assert {name: scored.step_scores[name][0].value for name in names} == names
    assert os.environ["WANDB_API_KEY"] == "value"


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "AWS_PROFILE", "APIKEY", "db_password", "PGPASSWORD", "A_SECRET"],
)
def test_names_that_look_like_secrets(name):
    assert secret_names([name], passed=[]) == [name]
    assert secret_names([name], passed=[name]) == []


@pytest.mark.parametrize("name", ["PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD", "OMP_NUM_THREADS", "MONKEY"])
def test_names_that_do_not_look_like_secrets(name):
    assert secret_names([name], passed=[]) == []


def test_columns_that_cannot_travel_fail_their_tree_only(serve):
    service = serve(fine="fine")
    scored, fine = score(service, parse_tree("q -> a", data={"open": lambda: 0}), parse_tree("q -> a"))
    assert scored.step_scores["fine"][0].status is ScoreStatus.failed
    assert "pickle" in scored.step_scores["fine"][0].reason
    assert fine.step_scores["fine"] == {0: Score(1.0)}


def test_tree_without_a_trained_leaf_is_scored_as_empty(serve):
    service = serve(fine="fine", answer=SourceConfig(fn="rewards.sources.outcome:exact_match"))
    (scored,) = score(service, parse_tree("q -> a", stops={"a": StopReason.deadline}))
    assert scored.step_scores == {"fine": {}}
    assert scored.leaf_signals == {"outcome": {}}


def test_closing_ends_what_is_still_awaited(serve, plugin):
    async def close_early() -> tuple[ScoredTree, bool]:
        service = serve(hung=mine(plugin, "endless", timeout_s=60.0))
        running = asyncio.create_task(service.score(parse_tree("q -> a")))
        while service.num_processes == 0:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(service.score(parse_tree("q -> a")))
        await asyncio.sleep(0.3)
        service.close()
        await asyncio.wait([running, waiting], timeout=10)
        return running.result(), waiting.cancelled()

    scored, was_cancelled = asyncio.run(close_early())
    assert scored.step_scores["hung"][0].reason == "its process was stopped"
    assert was_cancelled


@pytest.mark.slow
def test_what_a_killed_function_started_is_killed_too(serve, plugin, tmp_path):
    note = tmp_path / "pid"
    service = serve(parent=mine(plugin, "starts_a_process", args={"note": str(note)}, timeout_s=0.5))
    (scored,) = score(service, parse_tree("q -> a"))
    assert scored.step_scores["parent"][0].status is ScoreStatus.timed_out
    status = Path(f"/proc/{note.read_text()}/stat")
    ended_by = time.monotonic() + 10  # the kernel may take a moment on a busy machine
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < ended_by:
        time.sleep(0.01)
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_process_that_dies_between_two_trees_is_replaced(serve, plugin):
    service = serve(dying=mine(plugin, "dies_later"))
    for _ in range(2):
        (scored,) = score(service, parse_tree("q -> a"))
        assert scored.step_scores["dying"] == {0: Score(1.0)}
        while service.num_processes:
            time.sleep(0.01)


@pytest.mark.slow
def test_many_crashes_cost_no_other_tree_its_scores(serve, plugin):
    service = serve(half=mine(plugin, "leaves_if"))
    trees = [parse_tree("q -> a", data={"leave": place % 2}) for place in range(8)]
    statuses = [scored.step_scores["half"][0].status for scored in score(service, *trees)]
    assert statuses == [ScoreStatus.scored, ScoreStatus.failed] * 4


def test_misspelt_argument_stops_the_service_where_columns_are_known(plugin):
    cfg = RewardsConfig(sources={"mine": mine(plugin, "sees")})
    with pytest.raises(ConfigError, match='nothing can fill the argument "name"'):
        RewardService(cfg, columns=["question"])


def batch(failed: int, of: int, broken: Score) -> list[ScoredTree]:
    values = {"a": None, **{f"s{each}": broken if each < failed else 1.0 for each in range(of)}}
    return [parse_scored(f"q -> a -> ({', '.join(list(values)[1:])})", steps=values, prompt_id="train/17")]


def test_run_that_lost_its_judge_stops_with_the_error_an_example_and_a_way_out():
    cfg = RewardsConfig(sources={"step": SourceConfig(fn="a.py:f")}, max_failed_share=0.05)
    with pytest.raises(RewardFailed) as stopped:
        check_failure_budget(batch(2, 10, Score.failed("ValueError: no verdict")), cfg)
    assert str(stopped.value) == (
        "rewards.sources.step failed 2 of 10 scores in this batch (20.0%), more than rewards.max_failed_share=0.05 "
        "allows: the policy would learn only from the steps that it happens to answer. First error: ValueError: no "
        'verdict; at prompt "train/17", step "s0". Mend it, return None where it has nothing to say, or raise '
        "rewards.max_failed_share."
    )


def test_run_whose_judge_is_slow_is_told_to_wait_longer():
    cfg = RewardsConfig(sources={"step": SourceConfig(fn="a.py:f")})
    with pytest.raises(RewardFailed, match=r"Make it faster or raise rewards\.sources\.step\.timeout_s"):
        check_failure_budget(batch(10, 10, Score.timed_out("late")), cfg)


def test_failures_within_the_budget_stop_nothing():
    cfg = RewardsConfig(sources={"step": SourceConfig(fn="a.py:f")}, max_failed_share=0.2)
    check_failure_budget(batch(2, 10, Score.failed("down")), cfg)  # 2 / 10 is not above 0.2
    check_failure_budget([], cfg)


def test_steps_a_source_has_nothing_to_say_of_do_not_hide_its_failures():
    tree = parse_scored("q -> a -> (b, c)", steps={"a": None, "b": None, "c": Score.failed("down")})
    with pytest.raises(RewardFailed, match=r"failed 1 of 1 scores"):
        check_failure_budget([tree], RewardsConfig())


def test_scores_are_counted_by_source_and_status():
    counts = score_counts(batch(2, 10, Score.failed("down")) + batch(0, 3, Score.failed("down")))
    assert counts == {
        "step": {
            ScoreStatus.scored: 8 + 3,
            ScoreStatus.failed: 2,
            ScoreStatus.timed_out: 0,
            ScoreStatus.not_applicable: 2,
        }
    }
