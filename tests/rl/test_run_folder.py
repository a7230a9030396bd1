import json
import logging
import sys
import warnings

import pytest
import yaml

from conf.errors import ConfigError
from conf.schema import Config, SourceConfig
from rl.run_folder import RunFolder, installed_versions, open_run_folder, route_logs, settings


def test_a_new_folder_holds_the_settings_and_the_versions(tmp_path):
    folder = open_run_folder(tmp_path / "runs" / "one", settings(Config(seed=7)))
    written = yaml.safe_load(folder.config.read_text())
    assert written["seed"] == 7
    assert written["rollout"]["expander"] == "beam_forks"
    assert json.loads(folder.versions.read_text()) == installed_versions()
    assert {path.name for path in folder.path.iterdir() if path.is_dir()} == {"trees", "checkpoints", "logs"}


def test_a_folder_with_a_run_is_refused_unless_it_is_resumed(tmp_path):
    folder = open_run_folder(tmp_path / "one", {})
    open_run_folder(tmp_path / "one", {})  # the first died before its first step: nothing there to mix with
    folder.metrics.write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"already holds a run.*run.resume=true"):
        open_run_folder(tmp_path / "one", {})
    assert open_run_folder(tmp_path / "one", {"seed": 1}, resume=True) == folder
    assert folder.metrics.read_text() == '{"step": 1}\n'


def test_resuming_a_run_that_is_not_there_starts_it(tmp_path):
    assert open_run_folder(tmp_path / "one", {}, resume=True).config.exists()


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written.*run.dir"):
        open_run_folder(tmp_path / "file" / "run", {})


def test_no_secret_reaches_the_disk_by_its_name_or_by_its_value(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret-value")
    config = Config()
    config.rewards.sources["judge"] = SourceConfig(
        args={"api_key": "typed by hand", "url": "sk-very-secret-value", "max_tokens": 5, "model": "small"}
    )
    folder = open_run_folder(tmp_path / "one", settings(config))
    written = yaml.safe_load(folder.config.read_text())["rewards"]["sources"]["judge"]["args"]
    assert written == {"api_key": "<hidden>", "url": "<hidden>", "max_tokens": 5, "model": "small"}


def test_settings_keep_every_ordinary_value():
    written = settings(Config())
    assert written["rollout"]["max_turn_tokens"] == Config().rollout.max_turn_tokens
    assert "<hidden>" not in json.dumps(written)


def test_tree_files_sort_by_step_and_those_of_a_lost_future_go(tmp_path):
    folder = open_run_folder(tmp_path, {})
    for step in (9, 10, 100):
        folder.tree_file(step).touch()
    assert [file.name for file in folder.tree_files()] == [
        "step_000009.jsonl.gz",
        "step_000010.jsonl.gz",
        "step_000100.jsonl.gz",
    ]
    folder.drop_records_after(10)
    assert folder.tree_files() == [folder.tree_file(9), folder.tree_file(10)]


def test_a_summary_is_replaced_whole(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_summary() == {}
    folder.write_summary({"success_after": 0.5, "note": "long" * 100})
    folder.write_summary({"success_after": 0.75})
    assert folder.read_summary() == {"success_after": 0.75}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.fixture
def driver_log(tmp_path):
    """Logs routed into a folder; a function that reads what arrived there."""
    put_back = route_logs(tmp_path / "logs")
    yield lambda: (tmp_path / "logs" / "driver.log").read_text()
    put_back()


def test_libraries_write_to_the_file_and_not_to_the_terminal(driver_log, capsys):
    logging.getLogger("vllm.engine").info("loading weights")
    logging.getLogger("ray").error("a worker died")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old argument", DeprecationWarning, stacklevel=1)
    assert "INFO vllm.engine: loading weights" in driver_log()
    assert "ERROR ray: a worker died" in driver_log()
    assert "old argument" in driver_log()
    assert capsys.readouterr().err == ""


def test_our_own_warnings_go_to_both_and_our_chatter_to_the_file(driver_log, capsys):
    logging.getLogger("rl.checkpoint").warning("step_000020 is damaged")
    logging.getLogger("rl.checkpoint").info("saved")
    assert capsys.readouterr().err == "warning: step_000020 is damaged\n"
    assert "damaged" in driver_log()
    assert "saved" in driver_log()


def test_a_handler_that_a_library_put_in_place_later_is_removed_by_a_second_call(tmp_path, capsys):
    put_back = route_logs(tmp_path)
    logging.getLogger("ray").addHandler(logging.StreamHandler(sys.stderr))
    again = route_logs(tmp_path)
    logging.getLogger("ray").warning("once")
    again()
    put_back()
    assert (tmp_path / "driver.log").read_text().count("once") == 1
    assert capsys.readouterr().err == ""


def test_logging_is_put_back_as_it_was(tmp_path):
    def seen():
        return [
            (logger.handlers[:], logger.propagate, logger.level) for logger in map(logging.getLogger, ("", "ray", "rl"))
        ]

    before = seen()
    put_back = route_logs(tmp_path)
    assert seen() != before
    put_back()
    assert seen() == before
