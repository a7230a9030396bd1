"""`grove check-reward`: each kind of bad reward is told apart, on the sample that ships."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import threading
import time
from collections import Counter
from pathlib import Path

import judge_server
import pytest
from judge_server import JudgeServer

from conf.compose import compose
from conf.errors import ConfigError, DataError
from conf.schema import SourceConfig
from rewards.drawn import parse_scored
from rl.check_reward import (
    MAX_TREES,
    MAX_TREES_OF_MODEL,
    SAMPLE,
    RewardCheck,
    Verdict,
    check_reward,
    model_of,
    recorded_trees_of,
    setting_of,
)
from rl.cli import main
from rl.record import RecordedTree, write_records

pytestmark = pytest.mark.slow  # every check starts three processes

REWARDS = """
import os, re, threading, time
from types import MappingProxyType

import numpy
from rewards.types import Score

def fine(step):
    return float(step.facts.tool_ok is True)

def constant(step):
    return 1.0

def large(step):
    return 100.0 * len(step.action_ids)

def silent(step):
    return None

def raises(step):
    return {}["verdict"]

def differs(step):
    return hash(step.action_text) % 1000 / 1000

def late(step):
    time.sleep(60)

def leaves(step):
    os._exit(3)

def fragile(step):
    return 1 / len(step.action_text) if len(step.action_text) < 1000 else None

def longer(trajectory):
    return sum(len(step.action_ids) for step in trajectory) / 100

def of_column(step, level, size=1.0):
    return level * size

class Counted:
    def __init__(self, start):
        self.start = start
        self.lock = threading.Lock()  # cannot be sent, and stays where it is

    def __call__(self, step):
        return self.start

def shorter(step, other):
    return float(len(step.action_ids) < len(other.action_ids)) + float(step.facts.tool_ok is True)

def fewer(trajectory, other_trajectory):
    return len(other_trajectory) - len(trajectory)

def many(steps):
    return [len(step.action_ids) / 10 for step in steps]

def all_of_them(trajectories):
    return [len(trajectory) / 10 for trajectory in trajectories]

def whole(tree, rows):
    return {row: row / 100 for row in rows}

def parted(step):
    return {"tokens": len(step.action_ids) / 10, "tool": step.facts.tool_ok, "polite": 1}

def parts_of_chance(step):
    return {"up": hash(step.action_text) % 100, "down": -(hash(step.action_text) % 100)}

def unsendable_parts(step):
    return Score(1.0, parts=MappingProxyType({"all": 1.0}))

def unsendable_kind(step):
    class Mine(Score):
        pass
    return Mine(1.0)

async def unsendable_awaited(step):
    return unsendable_parts(step)

def numpy_inside(step):
    return Score(numpy.float32(0.5))

def numpy_number(step):
    return numpy.float32(len(step.action_ids) / 10)

async def points(step, question, model):
    reply = await model.chat([{"role": "user", "content": f"{question} {step.action_text[:200]}"}])
    return int(reply.text) / 10

async def sends_what_cannot_be_sent(step, model):
    await model.chat([{"role": "user", "content": lambda: 1}])

async def from_here(step, tree, engine):
    return await engine.complete(0, 4)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mine") / "my_rewards.py"
    path.write_text(REWARDS)
    return path


def checked(file: Path, name: str, **arguments) -> RewardCheck:
    return check_reward(f"{file}:{name}", recorded_trees_of("")[:2], **arguments)


def verdicts(check: RewardCheck) -> dict[str, Verdict]:
    return {finding.what: finding.verdict for finding in check.findings}


def detail(check: RewardCheck, what: str) -> str:
    return next(finding.detail for finding in check.findings if finding.what == what)


def test_the_sample_holds_trees_that_fork_and_end_differently():
    found = recorded_trees_of("")
    assert SAMPLE.is_file()
    assert len(found) >= 4
    assert all(len(each.tree.trained_leaves()) > 1 for each in found)
    outcomes = {score.value for each in found for score in each.scored.leaf_signals["outcome"].values()}
    assert outcomes == {0.0, 1.0}


def test_a_good_reward_passes_and_its_setting_can_be_pasted(file: Path):
    check = checked(file, "fine")
    assert check.passed and set(verdicts(check).values()) <= {Verdict.ok, Verdict.warning}
    assert detail(check, "arguments").startswith("scores one step; ")
    assert [finding.what for finding in check.findings] == [
        *("arguments", "sent", "scores", "values", "determinism", "time", "empty steps", "steps of a megabyte"),
        *("length", "outcome"),
    ]
    (setting,) = shlex.split(check.setting)
    source = compose(["experiment=hop_search", setting]).rewards.sources["fine"]
    assert (source.fn, source.weight) == (f"{file}:fine", 0.2)


@pytest.mark.parametrize(
    ("name", "what", "verdict", "message"),
    [
        ("constant", "values", Verdict.warning, "always 1: nothing is told apart"),
        ("large", "values", Verdict.warning, "choose its weight with care"),
        ("large", "length", Verdict.warning, "the policy may learn to be long"),
        ("silent", "scores", Verdict.failure, "nothing to say of any"),
        ("raises", "scores", Verdict.failure, "KeyError: 'verdict' (my_rewards.py:"),
        ("leaves", "scores", Verdict.failure, "died with exit code 3"),
        # A Score is made of plain values on its way out of the process, whatever is in it.
        ("unsendable_parts", "scores", Verdict.ok, "scored"),
        ("unsendable_kind", "scores", Verdict.ok, "scored"),
        ("unsendable_awaited", "scores", Verdict.ok, "scored"),
        ("numpy_inside", "values", Verdict.warning, "always 0.5"),
        ("parts_of_chance", "determinism", Verdict.warning, "differ when another process is asked"),
        ("parted", "parts", Verdict.warning, "3 named: tokens from "),
        ("differs", "determinism", Verdict.warning, "differ when another process is asked"),
        ("fragile", "empty steps", Verdict.warning, "ZeroDivisionError"),
        ("longer", "length", Verdict.warning, "correlation +1.00"),
    ],
)
def test_what_a_run_would_stumble_over_is_told(file: Path, name: str, what: str, verdict: Verdict, message: str):
    check = checked(file, name, timeout_s=2.0)
    assert verdicts(check)[what] is verdict
    assert message in detail(check, what)
    assert check.passed == (verdict is not Verdict.failure)


def test_a_reward_that_is_late_is_killed_at_its_deadline(file: Path):
    started = time.monotonic()
    check = check_reward(f"{file}:late", recorded_trees_of(""), timeout_s=0.2)
    assert not check.passed
    assert "timed out; first error: no answer within timeout_s=0.2" in detail(check, "scores")
    assert detail(check, "scores").endswith("the other 3 trees were not tried")
    assert list(verdicts(check)) == ["arguments", "sent", "scores"]
    assert time.monotonic() - started < 30  # two processes; the first was asked once and the other may tell why


@pytest.mark.parametrize(
    ("name", "level", "about"),
    [
        ("longer", "", "scores one whole trajectory; "),
        ("shorter", "", "compares two steps tried at the same fork, in both orders; "),
        ("shorter", "pair", "compares two steps tried at the same fork, in both orders; "),
        ("fewer", "", "compares two trajectories of a prompt, in both orders; "),
        ("many", "", "scores all steps of a tree at once; 1 call a tree"),
        ("all_of_them", "", "scores all trajectories of a tree at once; 1 call a tree"),
        ("whole", "tree", "scores a whole tree, for each of its trajectories; 1 call a tree"),
    ],
)
def test_what_a_call_is_about_is_said_and_its_scores_are_correlated(file: Path, name: str, level: str, about: str):
    check = checked(file, name, level=level)
    assert check.passed and detail(check, "arguments").startswith(about)
    assert verdicts(check)["sent"] is verdicts(check)["scores"] is Verdict.ok
    assert {"length", "outcome"} <= verdicts(check).keys()
    (setting,) = shlex.split(check.setting)
    assert compose(["experiment=hop_search", setting]).rewards.sources[name].level == level


def test_a_pair_takes_both_orders_of_every_two_at_a_fork(file: Path):
    # Forks of 3 and of 2: 3 * 2 + 2 * 1 calls. The second step of a fork wins by its one token less, or loses.
    tree = RecordedTree(scored=parse_scored("q -> (a -> (d, e), b, c)", outcomes=dict.fromkeys("bcde", 1.0)))
    assert "; 8 calls a tree" in detail(check_reward(f"{file}:shorter", [tree]), "arguments")


def test_parts_are_shown_with_their_ranges(file: Path):
    said = detail(checked(file, "parted"), "parts")
    assert re.match(r"3 named: tokens from 0\.\d to \d\.?\d*, tool from 0 to 1, polite always 1; a part that is", said)


def test_arguments_that_cannot_be_sent_are_told_before_anything_is_started(file: Path):
    check = checked(file, "Counted", args={"start": lambda: 1})
    assert not check.passed and list(verdicts(check)) == ["arguments", "sent"]
    assert "its arguments cannot be sent to the process it runs in: " in detail(check, "sent")
    check = checked(file, "of_column", columns={"level": threading.Lock()})
    assert "its columns cannot be sent to the process it runs in: TypeError: cannot pickle" in detail(check, "sent")


def test_what_can_be_sent_passes(file: Path):
    assert verdicts(checked(file, "Counted", args={"start": 3}))["sent"] is Verdict.ok
    assert verdicts(checked(file, "numpy_number"))["sent"] is Verdict.ok  # a plain number is made of it
    shipped = check_reward("rewards.sources.format:tool_success", recorded_trees_of("")[:1])
    assert detail(shipped, "sent").startswith("is asked in the run's own process")


def test_only_so_many_trees_are_tried(file: Path):
    tree = RecordedTree(scored=parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": 0.0}))
    check = check_reward(f"{file}:constant", [tree] * 40)
    assert detail(check, "trees") == f"the first {MAX_TREES} of 40 that are recorded"
    assert detail(check, "scores") == f"{2 * MAX_TREES} scored"


def test_an_engine_is_part_of_a_run(file: Path):
    check = checked(file, "from_here")
    assert check.passed and not check.was_tried
    assert list(verdicts(check)) == ["arguments", "engine"]
    assert "it can be tried in a run alone" in detail(check, "engine")
    (setting,) = shlex.split(check.setting)
    assert compose(["experiment=hop_search", setting]).rewards.sources["from_here"].weight == 0.0


# Rewards that ask a model


def a_model(server: JudgeServer, **settings: object):
    return model_of(json.dumps({"url": server.url, "path": "judge", "timeout_s": 5, "max_retries": 0} | settings))


def length_of(messages: judge_server.Messages) -> str:
    return str(len(messages[-1]["content"]) % 11)


def second_question() -> str:
    return recorded_trees_of("")[1].tree.prompt.question


def test_a_model_is_asked_and_its_cost_is_shown(file: Path):
    with JudgeServer(length_of) as server:
        model = a_model(server, usd_per_million_prompt_tokens=1000.0)
        check = checked(file, "points", model=model)
    assert check.passed, check.findings
    assert "; asks a model (judge)" in detail(check, "arguments")
    said = re.match(
        r"([\d.]+) requests a score, each of (\d+) prompt and 1 reply tokens; ([\d.]+) d", detail(check, "cost")
    )
    assert said is not None, detail(check, "cost")
    requests, tokens, dollars = map(float, said.groups())
    assert dollars == pytest.approx(requests * tokens / 1000, rel=0.1)  # a tenth of a cent a token
    assert "milliseconds a score" in detail(check, "time")
    assert verdicts(check)["a step of 100 kB"] is Verdict.ok
    cfg = compose(["experiment=hop_search", *shlex.split(check.setting)])
    assert cfg.rewards.models["judge"] == model
    assert cfg.rewards.sources["points"].model == "judge"


def test_the_cache_does_not_hide_that_a_model_changes_its_mind(file: Path):
    with JudgeServer(length_of) as server:
        check = checked(file, "points", model=a_model(server))
        assert verdicts(check)["determinism"] is Verdict.ok
        times = Counter(prompt for prompt in server.prompts() if prompt.startswith(second_question()))
        assert times and all(number % 2 == 0 for number in times.values())  # as often again, past the cache
    count = itertools.count()
    with JudgeServer(lambda messages: str(next(count) % 10)) as server:
        check = checked(file, "points", model=a_model(server))
        assert verdicts(check)["determinism"] is Verdict.warning
        assert "differ when another process is asked" in detail(check, "determinism")


def test_requests_that_had_to_be_repeated_are_told(file: Path):
    with JudgeServer(length_of, faults=[judge_server.status(503)]) as server:
        check = checked(file, "points", model=a_model(server, max_retries=2))
    assert verdicts(check)["cost"] is Verdict.warning
    assert "1 requests had to be repeated" in detail(check, "cost")


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        ("points", "scores", "does not exist"),
        ("sends_what_cannot_be_sent", "scores", "pickle"),
    ],
)
def test_what_a_model_cannot_be_asked_is_told(file: Path, name: str, what: str, message: str):
    with JudgeServer("7", model="another" if name == "points" else "judge") as server:
        check = checked(file, name, model=a_model(server), timeout_s=3.0)
    assert verdicts(check)[what] is Verdict.failure
    assert message in detail(check, what)


def test_fewer_trees_are_tried_where_each_request_may_cost(file: Path):
    tree = RecordedTree(scored=parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": 0.0}))
    with JudgeServer(length_of) as server:
        check = check_reward(f"{file}:points", [tree] * 40, model=a_model(server))
        assert server.num_requests < 20  # equal trees: all but the first are answered from the cache
    assert detail(check, "trees") == f"the first {MAX_TREES_OF_MODEL} of 40 that are recorded"
    assert "14 of 16 calls were equal to another and not asked again" in detail(check, "cost")


def test_a_model_that_is_missing_or_never_asked_is_refused_with_the_way_to_try_it(file: Path):
    with pytest.raises(ConfigError, match=r"no model is named.*To try it here, add --model '\{url: "):
        checked(file, "points")
    with pytest.raises(ConfigError, match=r"is never asked.*leave --model away"):
        checked(file, "fine", model=model_of("{url: http://127.0.0.1:1/v1, path: judge}"))
    with pytest.raises(ConfigError, match=r"Did you mean rewards\.models\.judge\.url"):
        model_of("{urll: http://127.0.0.1:1/v1, path: judge}")
    with pytest.raises(ConfigError, match="is started by a run, and this is none"):
        checked(file, "points", model=model_of("{kind: vllm, path: judge}"))


def test_arguments_and_columns_are_filled(file: Path):
    check = checked(file, "of_column", columns={"level": 2}, args={"size": 0.5})
    assert check.passed and "always 1" in detail(check, "values")
    (setting,) = shlex.split(check.setting)
    assert compose(["experiment=hop_search", setting]).rewards.sources["of_column"].args == {"size": 0.5}
    assert checked(file, "Counted", args={"start": 3}).passed


def test_what_nothing_can_fill_is_refused_with_the_way_to_try_it(file: Path):
    with pytest.raises(ConfigError, match=r'nothing can fill the argument "level".*--column NAME=VALUE'):
        checked(file, "of_column")


def test_trees_come_from_a_run_or_a_file(tmp_path: Path):
    tree = RecordedTree(scored=parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": 0.0}))
    write_records(tmp_path / "run" / "trees" / "step_000001.jsonl.gz", [tree])
    assert recorded_trees_of(str(tmp_path / "run")) == [tree]
    assert recorded_trees_of(str(tmp_path / "run" / "trees" / "step_000001.jsonl.gz")) == [tree]
    with pytest.raises(ConfigError, match="neither the folder of a run nor a recorded file"):
        recorded_trees_of(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no recorded trees"):
        recorded_trees_of(str(tmp_path / "empty"))


def test_the_command_shows_a_table_and_ends_with_what_to_type(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(file.parent)
    assert main(["check-reward", "my_rewards.py:fine"]) == 0
    shown = capsys.readouterr().out
    assert "fit for a run" in shown
    assert shown.splitlines()[-1].startswith(
        "grove train experiment=hop_search 'rewards.sources.fine={fn: my_rewards.py"
    )
    assert main(["check-reward", "my_rewards.py:raises"]) == 1
    assert "not fit for a run" in capsys.readouterr().out
    assert main(["check-reward", "my_rewards.py:of_column", "--column", "level"]) == 2
    assert main(["check-reward", "my_rewards.py:whole", "--level", "tree"]) == 0
    assert "level: tree" in capsys.readouterr().out
    assert main(["check-reward", "my_rewards.py:from_here"]) == 0
    assert "to be tried in a run" in capsys.readouterr().out
    with JudgeServer(length_of) as server:
        assert main(["check-reward", "my_rewards.py:points", "--model", f"{{url: {server.url}, path: judge}}"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"grove train experiment=hop_search 'rewards.models.judge={{path: judge, url: {server.url}}}' "
        f"'rewards.sources.points={{fn: my_rewards.py:points, model: judge, weight: 0.2}}'"
    )


TEXTS = [
    "plain",
    "two words",
    "a: b",
    "it's",
    'say "no"',
    "back\\slash",
    "end\\",
    'both\\"',
    "{x}, [y]",
    "",
    "true",
    "12",
    "1e3",
]


@pytest.mark.parametrize("text", TEXTS)
def test_arguments_are_typed_so_that_a_run_gets_the_same(text: str):
    args = {"text": text, "list": [1, 0.5, None, True, text], "map": {"inner": text}}
    (setting,) = shlex.split(setting_of("mine", SourceConfig(fn="my rewards.py:fine", args=args, timeout_s=3.0)))
    source = compose(["experiment=hop_search", setting]).rewards.sources["mine"]
    assert (source.fn, source.args, source.timeout_s) == ("my rewards.py:fine", args, 3.0)
