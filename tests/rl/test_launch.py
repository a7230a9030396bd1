"""What a launch does before it starts anything."""

from __future__ import annotations

import logging

import pytest
from test_placement import config, machines

from conf.errors import ConfigError
from conf.schema import Config
from rl import launch
from rl.launch import _planned
from rl.placement import Node, Role


def joined(*, resume: bool, timeout_s: float) -> Config:
    """Two workers of a core each, on a cluster that runs already."""
    cfg = config(2)
    cfg.cluster.address, cfg.run.resume, cfg.cluster.nodes_timeout_s = "10.0.0.1:6379", resume, timeout_s
    return cfg


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[Node]]:
    """The nodes that are there each time somebody looks; the last ones stay."""
    looks: list[list[Node]] = []
    monkeypatch.setattr(launch, "ray_nodes", lambda: looks.pop(0) if len(looks) > 1 else looks[0])
    monkeypatch.setattr(launch, "LOOK_EVERY_S", 0.01)
    return looks


def test_a_run_that_goes_on_waits_for_the_node_that_it_lost(seen: list[list[Node]], caplog: pytest.LogCaptureFixture):
    seen += [machines((1, 0)), machines((1, 0)), machines((1, 0), (1, 0))]
    found = _planned(joined(resume=True, timeout_s=20.0))
    assert [each.node for each in found.of(Role.worker)] == ["a", "b"]
    assert "waiting up to 20 s (cluster.nodes_timeout_s) for room: cluster.placement=auto is impossible" in caplog.text


def test_a_run_that_goes_on_and_has_room_waits_for_nobody(seen: list[list[Node]], caplog: pytest.LogCaptureFixture):
    seen += [machines((2, 0))]
    with caplog.at_level(logging.INFO):
        _planned(joined(resume=True, timeout_s=20.0))
    assert caplog.text == ""


def test_a_node_that_never_comes_is_told_with_what_has_no_room(seen: list[list[Node]]):
    seen += [machines((1, 0))]
    with pytest.raises(ConfigError, match=r"no node has room left for rollout worker 1"):
        _planned(joined(resume=True, timeout_s=0.2))


@pytest.mark.parametrize(("resume", "timeout_s"), [(False, 20.0), (True, 0.0)])
def test_a_new_run_and_one_that_shall_not_wait_are_refused_at_once(
    seen: list[list[Node]], resume: bool, timeout_s: float
):
    seen += [machines((1, 0)), machines((2, 0))]
    with pytest.raises(ConfigError, match="impossible here"):
        _planned(joined(resume=resume, timeout_s=timeout_s))
