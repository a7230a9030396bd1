import io

import pytest
from rich.console import Console

from conf.schema import Config
from rl.progress import Progress, reward_parts, sparkline, stage_shares, step_line


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80)


def terminal_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=90, color_system=None)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


TRAINED = {
    "rollout/success_share": 0.5,
    "rollout/total_generated_tokens": 26_000.0,
    "reward/outcome_mean": 0.5,
    "reward/judge_mean": 0.75,
    "reward/judge_failed_share": 0.01,
    "reward/judge_timed_out_share": 0.02,
    "rollout/tokens_per_second": 5321.4,
    "time/step_seconds": 4.06,
}


def test_without_a_terminal_every_update_is_one_plain_line():
    console = plain_console()
    with Progress(Config(), console) as progress:
        progress.update(0, {"eval/success_share": 0.371})
        progress.update(1, TRAINED)
    assert printed(console).splitlines() == [
        "step 0/60  held-out 37.1%",
        "step 1/60  training 50.0%  outcome 0.500  judge 0.750 (3.0% lost)  5,321 tokens/s  4.1 s",
    ]


def test_a_note_is_printed_as_it_is_written():
    console = plain_console()
    with Progress(Config(), console) as progress:
        progress.note("report: runs/[bold]x/report.html")
    assert printed(console) == "report: runs/[bold]x/report.html\n"


def test_a_warm_start_prints_ten_lines_and_not_hundreds():
    console = plain_console()
    with Progress(Config(), console) as progress:
        for step in range(1, 601):
            progress.warm_start(step, 600, 0.5)
    assert len(printed(console).splitlines()) == 10
    assert printed(console).endswith("warm start 600/600, loss 0.500\n")


def test_the_panel_shows_the_whole_run_at_a_glance():
    console = terminal_console()
    config = Config()
    config.run.max_generated_tokens = 100_000
    with Progress(config, console) as progress:
        progress.update(0, {"eval/success_share": 0.25})
        progress.update(1, TRAINED)
        progress.update(1, {"eval/success_share": 0.5})
        with progress.stage("grow"):
            progress.note("a note above the panel")
    for part in (
        "1/60",
        "26,000/100,000",
        "50.0%   from 25.0%",
        "judge 0.750 (3.0% lost)",
        "5,321 tokens/s",
        "grow 100%",
        "a note above the panel",
    ):
        assert part in printed(console)


def test_the_panel_opens_before_there_is_anything_to_show():
    console = terminal_console()
    with Progress(Config(), console):
        pass
    assert "0/60" in printed(console)


def test_a_running_stage_is_shown_with_its_detail_and_gone_when_it_ends_even_badly():
    console = terminal_console()
    progress = Progress(Config(), console)
    with pytest.raises(ZeroDivisionError), progress.stage("step"), progress.stage("model"):
        progress.warm_start(30, 600, 0.125)
        assert "model 0 s   warm start 30/600, loss 0.125" in str(progress._now())
        raise ZeroDivisionError
    assert str(progress._now()) == "-"


def test_sparkline_is_drawn_on_the_scale_of_a_share():
    assert sparkline([0.0, 0.5, 1.0, 1.2]) == "▁▅██"
    assert sparkline([0.50, 0.51]) == "▅▅"  # noise does not look like progress


def test_stage_shares_are_sorted_and_leave_out_what_is_nothing():
    assert stage_shares({"update": 1.0, "grow": 3.0, "credit": 0.001}) == "grow 75%   update 25%"
    assert stage_shares({}) == ""
    assert stage_shares({"grow": 0.0}) == ""


def test_reward_parts_name_what_was_lost_and_keep_quiet_when_nothing_was():
    assert reward_parts({"reward/a_mean": 0.5, "reward/a_failed_share": 0.0, "loss/total": 1.0}) == ["a 0.500"]


def test_a_step_line_of_no_metrics_is_the_step():
    assert step_line(3, 60, {}) == "step 3/60"
