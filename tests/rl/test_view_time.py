from __future__ import annotations

from rl.idle import PARTS
from rl.view_time import SHOWN_PARTS, duration_text, time_section

ROWS = {
    "time/grow_seconds": [3.0, 1.0],
    "time/update_seconds": [4.0],
    "time/learner_idle_share": [0.25, 0.75],
    "time/driver_idle_share": [1.0, 0.8],
}


def test_the_report_shows_stages_and_who_had_nothing_to_do():
    page = time_section(lambda name: ROWS.get(name, []))
    assert "grow <b>4 s</b> 50%" in page and "update <b>4 s</b> 50%" in page
    # the learner was idle for a half of the steps in the mean, so its bar is filled to a half
    assert '<div>learner</div><div class=bar><i style="width:50.00%' in page and "<span>50% idle</span>" in page
    assert "<span>90% idle</span>" in page and "reward service" not in page


def test_a_run_without_times_has_no_section_and_one_without_idle_shares_no_bars():
    assert time_section(lambda name: []) == ""
    assert "class=parts" not in time_section(lambda name: [1.0] if name == "time/grow_seconds" else [])


def test_every_part_has_a_name_for_people():
    assert set(SHOWN_PARTS) == set(PARTS)


def test_durations_as_people_say_them():
    assert [duration_text(seconds) for seconds in (5.4, 65, 7260)] == ["5 s", "1 min 5 s", "2 h 1 min"]
