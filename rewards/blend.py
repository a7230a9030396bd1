"""From what the sources said to the signals that credit reads. Pure: a recorded run can be blended with new weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from conf.errors import ConfigError
from conf.schema import Level, PartConfig, RewardsConfig, SourceConfig
from rewards.base import default_signal
from rewards.types import BROKEN, Score, ScoredTree

_PLAIN = PartConfig()

Weighted = tuple[str, float, Score]
"""A source's name, its weight, and what it said of one row."""


def blend(scored: ScoredTree, cfg: RewardsConfig) -> ScoredTree:
    """The same scores with the signals that `cfg` makes of them.

    signal[row] = sum of weight * value over the sources that feed it. A source of weight 0 is recorded and feeds none.
    Of a source that returned named parts, each part is weighted, and may feed a signal, by itself.
    A failed or timed-out source makes the signal unknown at that row; one with nothing to say adds nothing; where none
    has anything to say the signal is not applicable.

    Args:
        scored: a tree with step_scores and leaf_scores.
        cfg: sources with their weights and signals.
    Returns: a copy with step_signals and leaf_signals; the scores are shared with `scored`.
    Raises: ConfigError when `cfg` weighs a source that never scored this tree.
    """
    _check_scored(scored, cfg)
    return replace(
        scored,
        step_signals=_signals(scored.step_scores, cfg.sources, default_signal(Level.step)),
        leaf_signals=_signals(scored.leaf_scores, cfg.sources, default_signal(Level.trajectory)),
    )


def blended(said: Iterable[Weighted]) -> Score:
    """One row's signal from what its sources said; every weight counts, so leave out sources of weight 0."""
    said = list(said)
    for status in BROKEN:
        for source, _, score in said:
            if score.status is status:
                return Score(math.nan, status, f"{source}: {score.reason}")
    parts = [weight * score.value for _, weight, score in said if score.is_scored]
    if not parts:
        return Score.not_applicable("no source has anything to say here")
    total = math.fsum(parts)
    if not math.isfinite(total):
        return Score.failed(f"the weighted sum of {', '.join(source for source, _, _ in said)} overflows")
    return Score(total)


def _signals(
    scores: Mapping[str, Mapping[int, Score]], sources: Mapping[str, SourceConfig], default: str
) -> dict[str, dict[int, Score]]:
    said: dict[str, dict[int, list[Weighted]]] = {}
    for name, source in sources.items():
        if name not in scores or source.weight == 0:
            continue
        home = source.signal or default
        said.setdefault(home, {})
        for row, score in scores[name].items():
            for signal, weighted in _weighted(name, source, score, home):
                said.setdefault(signal, {}).setdefault(row, []).append(weighted)
    return {signal: {row: blended(said[signal][row]) for row in sorted(said[signal])} for signal in said}


def _weighted(name: str, source: SourceConfig, score: Score, home: str) -> Iterator[tuple[str, Weighted]]:
    """What a source adds to which signal at one row."""
    if score.is_scored and score.parts:
        for part, value in score.parts.items():
            its = source.parts.get(part, _PLAIN)
            if its.weight:
                yield its.signal or home, (f"{name}.{part}", source.weight * its.weight, Score(value))
        return
    # A score without parts speaks for all of them: where it is unknown, so is every signal that a part would feed.
    signals = dict.fromkeys([home, *(its.signal or home for its in source.parts.values() if its.weight)])
    for signal in signals if not score.is_scored else [home]:
        yield signal, (name, source.weight, score)


def _check_scored(scored: ScoredTree, cfg: RewardsConfig) -> None:
    known = {*scored.step_scores, *scored.leaf_scores}
    missing = [name for name, source in cfg.sources.items() if source.weight != 0 and name not in known]
    if missing:
        raise ConfigError(
            f"rewards.sources.{missing[0]} has weight {cfg.sources[missing[0]].weight:g} but never scored prompt "
            f'"{scored.tree.prompt.id}", which was scored by: {", ".join(sorted(known)) or "none"}. Its signal would '
            f"silently lack it. Set its weight to 0, or score the trees again."
        )
