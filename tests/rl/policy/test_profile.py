from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from rl.policy.profile import profiled


def test_a_trace_holds_the_operators_of_the_block(tmp_path: Path):
    file = tmp_path / "profile" / "learner_rank0_step_000002.json.gz"
    with profiled(file):
        torch.ones(8, 8) @ torch.ones(8, 8)
    with gzip.open(file, "rt") as trace:
        assert "aten::mm" in {event.get("name") for event in json.load(trace)["traceEvents"]}


def test_without_a_path_nothing_is_traced(tmp_path: Path):
    with profiled(None):
        torch.ones(2)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_trace_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "profile").touch()
    with profiled(tmp_path / "profile" / "trace.json.gz"):
        torch.ones(2)
    assert "could not be written" in caplog.text
