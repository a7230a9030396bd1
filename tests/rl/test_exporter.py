from __future__ import annotations

import re
import socket
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest
from ports import free_port
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from conf.schema import TrackerConfig
from rl.exporter import Exporter, exported_name, families
from rl.metrics import METRICS, declared

METRICS_OF_A_STEP = {
    "rollout/tool_ok_share": 0.75,
    "rollout/total_generated_tokens": 4096.0,
    "reward/judge_mean": 0.5,
    "reward/answer_mean": 0.25,
    "reward/judge_failed_share": 0.0,
    "eval/pass_at_4_share": 0.875,
    "time/grow_seconds": 1.5,
    "loss/kl": None,
}


def scraped(port: int) -> str:
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    with urllib.request.urlopen(asked, timeout=10) as reply:
        assert reply.headers["Content-Type"].startswith("application/openmetrics-text")
        return reply.read().decode()


def test_a_scrape_reads_every_metric_with_unit_labels_and_what_it_is_of():
    port = free_port()
    exporter = Exporter(TrackerConfig(metrics_port=port), {"run": "hop", "seed": "1"})
    try:
        exporter.log(METRICS_OF_A_STEP, step=7)
        exporter.log({"time/grow_seconds": 2.5}, step=8)
        text = scraped(port)
    finally:
        exporter.finish()
        exporter.finish()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in found.values()
        for sample in family.samples
    }
    assert values["grove_rollout_tool_ok_ratio",] == 0.75 and values["grove_time_grow_seconds",] == 2.5
    assert values["grove_run_generated_tokens_total",] == 4096 and values["grove_steps_total",] == 8
    assert values["grove_reward_mean", ("signal", "judge")] == 0.5
    assert values["grove_reward_mean", ("signal", "answer")] == 0.25
    assert values["grove_reward_failed_ratio", ("source", "judge")] == 0.0
    assert values["grove_eval_pass_at_ratio", ("k", "4")] == 0.875
    assert values["grove_run_info", ("run", "hop"), ("seed", "1")] == 1
    assert found["grove_rollout_tool_ok_ratio"].unit == "ratio"
    assert found["grove_rollout_tool_ok_ratio"].documentation == "tool calls that returned; of: tool calls"
    assert not any("kl" in name for name in found), "what has no value is absent, never 0"
    with pytest.raises(OSError, match="refused"):
        scraped(port)


def test_nobody_else_can_read_it_unless_asked():
    port = free_port()
    exporter = Exporter(TrackerConfig(metrics_port=port), {})
    try:
        assert exporter._server.server_address == ("127.0.0.1", port)
    finally:
        exporter.finish()


def test_a_taken_port_is_told_and_the_run_goes_on(caplog: pytest.LogCaptureFixture):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        exporter = Exporter(TrackerConfig(metrics_port=port), {})
        exporter.log({"time/grow_seconds": 2.5}, step=1)
        exporter.finish()
    assert f"tracker.metrics_port={port} cannot be opened on 127.0.0.1" in caplog.text


def test_a_file_for_node_exporter_is_replaced_each_step(tmp_path: Path):
    file = tmp_path / "textfile" / "grove.prom"
    exporter = Exporter(TrackerConfig(metrics_file=str(file)), {"run": "hop"})
    for step, seconds in ((1, 2.5), (2, 3.5)):
        exporter.log({"time/grow_seconds": seconds}, step)
        assert f"grove_time_grow_seconds {seconds}\n" in file.read_text()
    assert [path.name for path in file.parent.iterdir()] == ["grove.prom"]


def test_a_file_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    exporter = Exporter(TrackerConfig(metrics_file=str(tmp_path / "file" / "grove.prom")), {})
    for step in (1, 2):
        exporter.log({"time/grow_seconds": 1.0}, step)
    assert [record.getMessage().partition(" cannot")[0] for record in caplog.records] == [
        f"tracker.metrics_file={tmp_path}/file/grove.prom"
    ]


def test_every_declared_metric_has_a_lawful_name_of_its_own():
    metrics_of = defaultdict(list)
    for metric in METRICS:
        name, _, unit = exported_name(metric)
        assert re.fullmatch(r"grove_[a-z0-9]+(_[a-z0-9]+)*", name), name
        assert name.endswith(unit) and not name.endswith("_total")
        metrics_of[name].append(re.sub(r"<\w+>", "<>", metric.name))
    # a signal and a source of the same name share reward/<name>_mean
    assert {name: set(of) for name, of in metrics_of.items() if len(of) > 1} == {
        "grove_reward_mean": {"reward/<>_mean"}
    }


def test_labels_of_one_family_are_the_same():
    names = ["reward/a_mean", "reward/b.part_mean", "credit/fork_abs_mean"]
    assert all(declared(name) for name in names)
    assert [(family.name, len(family.samples)) for family in families(dict.fromkeys(names, 1.0))] == [
        ("grove_reward_mean", 2),
        ("grove_credit_abs_mean", 1),
    ]
