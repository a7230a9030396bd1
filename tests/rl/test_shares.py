import gzip
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from conf.compose import compose
from conf.keys import group_choices
from conf.schema import Config, CreditConfig, Keep, Level, Normalizer, Scope, SelectConfig, SignalUse, TermConfig
from rewards.drawn import parse_scored
from rewards.types import Score, ScoredTree
from rl.credit.measured import Measured
from rl.credited import credited
from rl.record import TOTAL, RecordedTree, read_trees, write_records
from rl.shares import recorded_trees, shares_of


def config(*, whiten: bool = False, **select: Any) -> Config:
    fork = TermConfig(
        level=Level.step,
        signals={"step": SignalUse(scale=0.5)},
        scope=Scope.siblings,
        normalizer=Normalizer.center,
        weight=2.0,
    )
    trajectory = TermConfig(signals={"outcome": SignalUse()}, normalizer=Normalizer.center)
    credit = CreditConfig(terms={"trajectory": trajectory, "fork": fork}, whiten=whiten)
    return Config(credit=credit, select=SelectConfig(**select))


def sample() -> ScoredTree:
    return parse_scored(
        "q -> (a -> (a1, a2), b)",
        steps={"a": 1.0, "a1": 1.0, "a2": 0.0, "b": Score.failed("503")},
        outcomes={"a1": 1.0, "a2": 0.0, "b": 0.0},
    )


def recorded(tree: ScoredTree, cfg: Config) -> RecordedTree:
    found = credited([tree], cfg)
    return recorded_trees([tree], found, shares_of(found, cfg))[0]


def test_a_record_holds_what_each_term_made_of_each_step():
    found = recorded(sample(), config())
    a, a1, a2, b = range(4)
    assert found.raw[a] == {"trajectory": 0.5, "fork": 0.5}  # half of the trajectories through a are right; 0.5 * 1
    assert found.raw[a1] == {"trajectory": 1.0, "fork": 0.5}
    assert found.compared[a1] == approx({"trajectory": 2 / 3, "fork": 0.25})
    assert found.advantages[a1] == approx({"trajectory": 2 / 3, "fork": 0.5, TOTAL: 7 / 6})
    assert found.advantages[a2] == approx({"trajectory": -1 / 3, "fork": -0.5, TOTAL: -5 / 6})
    # of b the fork says nothing, which is not 0
    assert (found.raw[b], found.compared[b]) == ({"trajectory": 0.0}, approx({"trajectory": -1 / 3}))


@pytest.mark.parametrize("credit", group_choices()["credit"])
def test_every_recipe_has_shares_that_add_up_to_what_it_gives(credit: str):
    def measure(trees: list[Any]) -> list[Measured]:
        nodes = [tree.nodes for tree in trees]
        return [Measured(kl=[0.5] * len(each), value=[[0.25] for _ in each]) for each in nodes]

    tree, cfg = sample(), compose([f"credit={credit}"])
    for signal in ("judge", "prm", "match", "implicit", "value", "contribution"):
        tree.step_signals[signal] = tree.step_signals["step"]
    tree.leaf_signals |= dict.fromkeys(("arena", "length"), tree.leaf_signals["outcome"])
    found = credited([tree], cfg, measure)
    shares = shares_of(found, cfg)
    assert shares.raw.keys() == shares.compared.keys() == cfg.credit.terms.keys()
    if cfg.credit.terms and not cfg.credit.whiten:
        given = recorded_trees([tree], found, shares)[0]
        for row, values in given.compared.items():
            total = sum(cfg.credit.terms[name].weight * value for name, value in values.items())
            assert given.advantages[row][TOTAL] == approx(total, abs=1e-6)


def test_a_recorded_share_is_read_as_it_was_written(tmp_path):
    written = [recorded(sample(), config(keep=Keep.balanced, num_kept=1))]
    write_records(tmp_path / "t.jsonl.gz", written)
    assert read_trees(tmp_path / "t.jsonl.gz") == written
    assert set(written[0].left_out.values()) == {"outranked"}


def test_a_record_without_shares_is_still_read(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    write_records(path, [recorded(sample(), config())])
    line = json.loads(gzip.decompress(path.read_bytes()))
    for part in ("raw", "compared", "left_out"):
        del line[part]
    path.write_bytes(gzip.compress(json.dumps(line).encode()))
    [found] = read_trees(path)
    assert (found.raw, found.compared, found.left_out) == ({}, {}, {}) and found.total(0) is not None


def test_a_trajectory_left_out_is_recorded_whole_and_has_no_advantage():
    tree = parse_scored("q -> (a, b)", outcomes={"a": 1.0, "b": 1.0})
    cfg = Config(credit=CreditConfig(terms={"t": TermConfig(signals={"outcome": SignalUse()})}))
    cfg.select = SelectConfig(keep=Keep.balanced, num_kept=1)
    found = recorded(tree, cfg)
    [out] = found.left_out
    assert found.scored is tree and found.tree.nodes[out].kept
    assert found.total(out) is None and found.total(1 - out) == 0.0


@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(st.floats(-2, 2) | st.none(), min_size=4, max_size=4),
    outcomes=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
)
def test_shares_add_up_to_the_advantage_whitened_or_not(steps: list[float | None], outcomes: list[float]):
    tree = parse_scored(
        "q -> (a -> (a1, a2), b)",
        steps=dict(zip(("a", "a1", "a2", "b"), steps, strict=True)),
        outcomes=dict(zip(("a1", "a2", "b"), outcomes, strict=True)),
    )
    for whiten in (False, True):
        found = recorded(tree, config(whiten=whiten))
        for terms in found.advantages.values():
            assert sum(value for name, value in terms.items() if name != TOTAL) == approx(terms[TOTAL], abs=1e-4)
        if not whiten:
            for row, compared in found.compared.items():
                weighted = {name: {"trajectory": 1.0, "fork": 2.0}[name] * value for name, value in compared.items()}
                assert weighted == approx({name: found.advantages[row][name] for name in compared}, abs=1e-5)
