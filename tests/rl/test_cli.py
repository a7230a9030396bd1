"""The command line: what it prints, what it returns, and what it does not load."""

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from conf.compose import from_yaml
from conf.errors import ConfigError, RewardFailed, WorkerLost
from conf.schema import Config
from rl.cli import main

ONE_WORKER = "rollout.num_workers=1"  # so that the smallest machine will do
TRAIN = ["train", ONE_WORKER, "run.max_restarts=0"]  # in this process


class Calls:
    """Stands in for the modules that do the work, and remembers what they were asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.error: BaseException | None = None

    def train(self, cfg: Config) -> dict[str, Any]:
        return self._done(cfg)

    def evaluate_run(self, path: str, overrides: list[str], out: str, config_dir: str) -> dict[str, Any]:
        return self._done(path, overrides, out, config_dir)

    def evaluation_json(self, done: dict[str, Any]) -> dict[str, Any]:
        return done

    def write_report(self, run_dir: Path) -> Path:
        self._done(run_dir)
        return run_dir / "report.html"

    def _done(self, *asked: Any) -> dict[str, Any]:
        self.seen.append(asked)
        if self.error is not None:
            raise self.error
        return {"success_after": 0.91015625, "steps": 80}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """The work faked, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    fake = Calls()
    work = {"rl.loop": ["train"], "rl.evaluate": ["evaluate_run", "evaluation_json"], "rl.view": ["write_report"]}
    for module, names in work.items():
        stand_in = types.ModuleType(module)
        for name in names:
            setattr(stand_in, name, getattr(fake, name))
        monkeypatch.setitem(sys.modules, module, stand_in)
    return fake


def test_train_hands_over_the_composed_config_and_prints_the_summary(calls: Calls, capsys: pytest.CaptureFixture[str]):
    assert main([*TRAIN, "experiment=hop_search", "seed=3"]) == 0
    [(cfg,)] = calls.seen
    assert (cfg.run.name, cfg.seed) == ("hop_search", 3)
    assert capsys.readouterr().out == "success_after  0.9102\nsteps          80\n"


def test_settings_may_follow_an_option(calls: Calls, tmp_path: Path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/own.yaml").write_text("# @package _global_\nrun: {name: own}\n")
    assert main([*TRAIN, "--config-dir", "mine", "experiment=own", "seed=3"]) == 0
    [(cfg,)] = calls.seen
    assert (cfg.run.name, cfg.seed) == ("own", 3)


def test_a_reward_may_live_in_a_package_of_the_working_folder(calls: Calls):
    Path("my_package_of_rewards").mkdir()
    Path("my_package_of_rewards/__init__.py").write_text("def brief(step): return 1.0\n")
    assert main([*TRAIN, "rewards.sources.mine.fn=my_package_of_rewards:brief"]) == 0


def test_bad_config_is_told_without_a_traceback_and_nothing_starts(calls: Calls, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "rollout.num_leafs=4"]) == 2
    told = capsys.readouterr()
    assert told.err == (
        'error: rollout.num_leafs (override "rollout.num_leafs=4") is no setting: it would change nothing. '
        "Did you mean rollout.num_leaves?\n"
    )
    assert told.out == "" and calls.seen == []


def test_rules_are_checked_before_anything_starts(calls: Calls, capsys: pytest.CaptureFixture[str]):
    assert main([*TRAIN, "rollout.top_p=0.9", "learner.mini_batches=99"]) == 2
    assert capsys.readouterr().err.startswith("error: 2 settings cannot be used:\n  1. ")
    assert calls.seen == []


def test_warnings_are_printed_and_the_run_goes_on(calls: Calls, capsys: pytest.CaptureFixture[str]):
    assert main([*TRAIN, "credit=grpo"]) == 0
    assert capsys.readouterr().err.startswith('warning: rewards.sources.progress feeds "step", which no term')


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RewardFailed("the judge is gone"), 1),
        (ConfigError("no"), 2),
        (WorkerLost("gone"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(calls: Calls, error: BaseException, code: int, capsys: pytest.CaptureFixture[str]):
    calls.error = error
    assert main(TRAIN) == code
    assert (str(error) or "run.resume=true continues") in capsys.readouterr().err


def test_a_training_process_says_what_starting_it_again_would_not_mend(calls: Calls):
    for error, code in (
        (RewardFailed("the judge is gone"), 70),
        (AssertionError("ours"), 70),
        (WorkerLost("gone"), 75),
    ):
        calls.error = error
        assert main(["__train", ONE_WORKER]) == code


def test_a_reader_who_has_seen_enough_does_not_make_a_run_start_again(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls.error = BrokenPipeError()
    with (tmp_path / "out").open("w") as out:  # what a run does to its output must not be done to pytest's
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["__train", ONE_WORKER]) == 70


def test_a_bug_keeps_its_traceback(calls: Calls):
    calls.error = AssertionError("ours")
    with pytest.raises(AssertionError, match="ours"):
        main(TRAIN)


def test_errors_are_red_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["config", "foo=1"]) == 2
    assert capsys.readouterr().err.startswith("\033[31merror: foo")
    monkeypatch.setenv("NO_COLOR", "1")
    main(["config", "foo=1"])
    assert capsys.readouterr().err.startswith("error: foo")


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], []),
        (["--prompts", "64", "rollout.num_workers=2"], ["rollout.num_workers=2", "run.eval_prompts=64"]),
        (["--samples", "8", "--k", "1,8"], ["run.eval_samples=8", "run.eval_k=[1,8]"]),
        (["--score", "prm", "--temperature", "0.6"], ["run.eval_score=prm", "run.eval_temperature=0.6"]),
        (["--greedy"], ["run.eval_samples=1", "run.eval_k=[]", "run.eval_temperature=0"]),
    ],
)
def test_options_of_eval_are_settings(
    calls: Calls, words: list[str], settings: list[str], capsys: pytest.CaptureFixture[str]
):
    Path("runs/x").mkdir(parents=True)
    assert main(["eval", "runs/x", "--json", "--out", "here.jsonl", *words]) == 0
    assert calls.seen == [("runs/x", settings, "here.jsonl", "")]
    assert json.loads(capsys.readouterr().out)["steps"] == 80


def test_report_prints_where_it_is(calls: Calls, capsys: pytest.CaptureFixture[str]):
    Path("runs/x").mkdir(parents=True)
    assert main(["report", "runs/x"]) == 0
    assert capsys.readouterr().out == "runs/x/report.html\n"


@pytest.mark.parametrize("command", ["eval", "report"])
def test_missing_folder_is_a_bad_setting(calls: Calls, command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "runs/nothing"]) == 2
    assert 'folder "runs/nothing"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["report", "runs/x", "seed=1"], ["train", "--sede"], ["eval", "x", "--prompts", "0"], ["dance"]]
)
def test_words_that_mean_nothing_are_refused(calls: Calls, words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


# config


def test_printed_config_is_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["config", "experiment=hop_search", "seed=5"]) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    cfg = from_yaml(tmp_path / "config.yaml")
    assert (cfg.run.dir, cfg.seed) == ("runs/hop_search-seed5", 5)


def test_check_runs_the_rules(capsys: pytest.CaptureFixture[str]):
    assert main(["config", ONE_WORKER, "rollout.top_p=0.9", "--check"]) == 2
    assert "rollout.top_p=0.9" in capsys.readouterr().err
    assert main(["config", ONE_WORKER, "rollout.top_p=0.9"]) == 0


def test_keys_show_type_default_and_meaning(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "--keys", "num_leaves"]) == 0
    assert capsys.readouterr().out == (
        "rollout.num_leaves: int = 8\n    Trajectories of one prompt: n of chains, beam_forks and beam; as many end "
        "best_first's search.\n"
    )


def test_keys_begin_with_the_groups(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("rollout=best_first|chains|") for line in lines[:12])
    assert any(line.startswith("rollout.expander: chains|random_expand|beam_forks|") for line in lines)


def test_keys_of_an_unknown_word(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "--keys", "zzz"]) == 2
    assert "no setting contains zzz" in capsys.readouterr().err


# The process


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "grove train experiment=hop_search " in capsys.readouterr().out
    assert main([]) == 0
    assert "examples:" in capsys.readouterr().out


def grove(*words: str, after: str = "") -> subprocess.CompletedProcess[str]:
    command = f'"{sys.executable}" -m rl.cli {" ".join(words)} {after}'
    root = Path(__file__).parents[2]
    return subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=False)


def test_module_runs_as_the_command():
    assert "usage: grove" in grove("--help").stdout


def test_a_reader_that_has_seen_enough_is_no_error():
    assert grove("config", "--keys", after="| head -n 1").stderr == ""


def test_a_bad_config_loads_neither_torch_nor_ray():
    code = (
        "import sys; from rl.cli import main; code = main(['train', 'rollout.top_p=0.5']);"
        "print(code, {'torch', 'ray', 'vllm', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 set()\n"
