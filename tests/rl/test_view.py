import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from conf.errors import DataError
from conf.schema import Config
from rewards.drawn import parse_scored
from rewards.types import Score, ScoredTree
from rl.metrics import MetricsLog
from rl.plan import LIMITS, PARTS
from rl.record import Advantages, RecordedTree, write_records
from rl.run_folder import RunFolder, open_run_folder, settings
from rl.view import choose_tree, draw_tree_text, duration_text, running_mean, succeeded, tree_html, write_report
from rollout.types import StopReason


def write_trees(path: Path, scored: list[ScoredTree], advantages: list[Advantages]) -> None:
    found = zip(scored, advantages, strict=True)
    write_records(path, [RecordedTree(scored=tree, advantages=table) for tree, table in found])


def recorded(text: str, advantages: dict[int, float] | None = None, **scores: object) -> RecordedTree:
    tables = {row: {"outcome": total, "total": total} for row, total in (advantages or {}).items()}
    return RecordedTree(scored=parse_scored(text, **scores), advantages=tables)


def sample_tree() -> RecordedTree:
    tree = recorded(
        "q -> (a -> (a1, a2), b)",
        {0: 0.25, 1: 1.0, 2: -0.5, 3: 0.0},
        steps={"a": 0.0, "b": Score.failed("HTTP <500>")},
        outcomes={"a1": 1.0, "a2": 0.0, "b": Score.timed_out("10 s")},
        stops={"b": StopReason.call_budget},
        answer="a1",
    )
    tree.tree.nodes[0].action_text = "<call> walk school </call>"
    tree.tree.nodes[0].observation_text = "melun & co"
    return tree


def sample_run(path: Path, tree: RecordedTree | None = None) -> RunFolder:
    config = Config()
    config.run.name, config.credit.name, config.seed = "hop <search>", "portool", 3
    folder = open_run_folder(path, settings(config))
    log = MetricsLog(folder.metrics)
    log.append(0, {"eval/success_share": 0.25, "rollout/total_generated_tokens": 0})
    for step in (1, 2):
        log.append(
            step,
            {
                "rollout/success_share": 0.3,
                "rollout/total_generated_tokens": 1000 * step,
                "reward/judge_mean": 0.1 * step,
                "reward/judge_failed_share": 0.5,
                "reward/judge_timed_out_share": 0.0,
                "time/grow_seconds": 30.0,
                "time/update_seconds": 10.0,
                "time/step_seconds": 41.0,
            },
        )
    log.append(2, {"eval/success_share": 0.75})
    tree = tree or sample_tree()
    write_trees(folder.tree_file(2), [tree.scored], [tree.advantages])
    return folder


class Balance(HTMLParser):
    """Finds tags that are not closed and addresses that a browser would fetch."""

    VOID = frozenset({"meta", "img", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in {"src", "href"} and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(folder: RunFolder) -> str:
    return write_report(folder.path).read_text(encoding="utf-8")


def test_the_report_tells_the_run_from_its_folder_alone(tmp_path):
    page = page_of(sample_run(tmp_path))
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("</style>")[1]))
    assert "25.0% → 75.0%" in words
    assert "+50.0 points · 2 steps · 2,000 generated tokens · 1 min 22 s" in words
    assert "portool" in words
    assert "grow 1 min 0 s 75%" in words
    assert "update 20 s 25%" in words
    assert "judge 0.100 0.200" in words
    assert "One tree of step 2" in words


def test_the_report_has_what_was_foreseen_beside_what_a_tree_did_cost(tmp_path):
    folder = sample_run(tmp_path)
    parts = dict.fromkeys(PARTS, 8.0)
    folder.write_plan({"text": "growing", LIMITS: parts})
    folder.write_summary({"cost_per_tree": {"foreseen": parts | {"steps": 64.0}, "measured": parts | {"steps": 63.5}}})
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page_of(folder)))
    assert "Cost of a tree trajectories steps generated" in words
    assert "at the limits 8.0 8.0" in words and "foreseen 8.0 64.0" in words and "measured 8.0 63.5" in words


def test_the_report_is_whole_fetches_nothing_and_has_its_curve_inside(tmp_path):
    folder = sample_run(tmp_path)
    checked = Balance()
    checked.feed(page_of(folder))
    assert checked.open == []
    assert [address[:22] for address in checked.fetched] == ["data:image/png;base64,"]
    assert "http" not in page_of(folder).replace("HTTP", "")
    assert folder.curve.read_bytes().startswith(b"\x89PNG")


def test_what_a_model_wrote_is_text_and_never_markup(tmp_path):
    tree = sample_tree()
    tree.tree.nodes[1].action_text = "<script>alert(1)</script> \ud800"
    page = page_of(sample_run(tmp_path, tree))
    assert "&lt;script&gt;alert(1)&lt;/script&gt; ?" in page
    assert "<script" not in page
    assert "hop &lt;search&gt;" in page


def test_a_failed_score_looks_different_from_a_zero():
    page = tree_html(sample_tree())
    assert "<span class='score ' title=''>step 0</span>" in page
    assert "<span class='score failed' title='HTTP &lt;500&gt;'>step ✕ failed</span>" in page
    assert "<span class='score failed' title='10 s'>outcome ✕ timed out</span>" in page


def test_the_sign_of_an_advantage_is_its_colour_and_its_size_the_strength():
    page = tree_html(sample_tree())
    assert re.findall(r"class='card (\w+)' style='--size:([\d.]+)'", page) == [
        ("up", "0.25"),
        ("up", "1.00"),
        ("down", "0.50"),
        ("flat", "0.00"),
    ]
    assert "✓ answered" in page
    assert "✗ answered" in page
    assert "call budget" in page


def test_every_step_of_a_deep_chain_is_drawn_once():
    chain = recorded("q -> " + " -> ".join(f"s{depth}" for depth in range(400)))
    page = tree_html(chain)
    assert page.count("class=said") == 400
    assert page.count("untrained") == 400


def test_a_report_of_a_run_that_died_at_once_still_opens(tmp_path):
    folder = open_run_folder(tmp_path, {})
    MetricsLog(folder.metrics)
    page = page_of(folder)
    assert "no held-out evaluation" in page
    assert "One tree" not in page


def test_a_damaged_record_gives_way_to_the_one_before(tmp_path):
    folder = sample_run(tmp_path)
    folder.tree_file(30).write_bytes(b"not gzip")
    assert "One tree of step 2" in page_of(folder)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no run.*run.dir"):
        write_report(tmp_path)


def test_the_tree_with_mixed_outcomes_is_chosen_before_one_with_more_varied_advantages():
    same = recorded("q -> (a, b)", {0: 1.0, 1: 2.0}, outcomes={"a": 1.0, "b": 1.0})
    mixed = recorded("q -> (a, b)", {0: 0.5, 1: 0.5}, outcomes={"a": 1.0, "b": 0.0})
    varied = recorded("q -> (a, b)", {0: 0.5, 1: -0.5}, outcomes={"a": 1.0, "b": 0.0})
    assert choose_tree([same, mixed]) is mixed
    assert choose_tree([same, mixed, varied]) is varied
    assert choose_tree([]) is None


def test_success_of_a_trajectory_that_nobody_scored_is_unknown():
    tree = sample_tree()
    assert [succeeded(tree, leaf) for leaf in tree.tree.leaves()] == [True, False, None]


def test_the_terminal_shows_the_same_tree_without_colours_too():
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(draw_tree_text(sample_tree()))
    assert isinstance(console.file, io.StringIO)
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == [
        "q   reference: a1",
        "├── +0.250 <call> walk school </call>  → melun & co  step 0",
        "│   ├── +1.000 a1  outcome 1  [answered]",
        "│   └── -0.500 a2  outcome 0  [answered]",
        "└── +0.000 b  step ✕ failed  outcome ✕ timed out  [call_budget]",
    ]


def test_a_running_mean_looks_back_only():
    assert running_mean([1.0, 2.0, 3.0, 4.0], window=2) == [1.0, 1.5, 2.5, 3.5]
    assert running_mean([]) == []


@pytest.mark.parametrize("seconds, text", [(7.4, "7 s"), (119.6, "2 min 0 s"), (3725, "1 h 2 min")])
def test_a_duration_is_told_as_people_tell_it(seconds, text):
    assert duration_text(seconds) == text


def test_a_card_tells_what_became_of_a_raw_value_and_why_a_trajectory_was_left_out():
    tree = sample_tree()
    tree.raw, tree.compared, tree.left_out = {1: {"outcome": 1.0}}, {1: {"outcome": 0.5}}, {3: "outranked"}
    page = tree_html(tree)
    assert "outcome +1.000 (raw 1, compared +0.500), total +1.000" in page
    assert "call budget, left out: outranked" in page
