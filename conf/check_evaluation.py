"""Rules of the held-out evaluation."""

from __future__ import annotations

from collections.abc import Callable

from conf.keys import did_you_mean
from conf.problem import Problem
from conf.schema import Config


def rules() -> list[Callable[[Config], list[Problem]]]:
    """Every rule of this module."""
    return [ks_can_be_drawn, chosen_by_a_source, samples_can_differ]


def ks_can_be_drawn(cfg: Config) -> list[Problem]:
    """k samples are drawn of those that there are."""
    samples = cfg.run.eval_samples
    return [
        Problem(
            f"run.eval_k holds {k} and run.eval_samples={samples}: k trajectories are drawn from those of each prompt. "
            f"Give k from 1 to {samples}{f', or run.eval_samples={k}' if k > samples else ''}."
        )
        for k in cfg.run.eval_k
        if not 1 <= k <= samples
    ]


def chosen_by_a_source(cfg: Config) -> list[Problem]:
    """Best of k needs scores, and several trajectories to choose from."""
    name, sources = cfg.run.eval_score, cfg.rewards.sources
    if not name:
        return []
    if name not in sources:
        return [
            Problem(
                f'run.eval_score="{name}" is no source under rewards.sources, so that nothing could be chosen by it.'
                f"{did_you_mean(name, sources)} There are {', '.join(sources) or 'none'}."
            )
        ]
    if cfg.run.eval_samples == 1:
        return [
            Problem(
                f"run.eval_score={name} chooses among the trajectories of a prompt, and run.eval_samples=1 leaves no "
                "choice. Use e.g. run.eval_samples=8.",
                fatal=False,
            )
        ]
    return []


def samples_can_differ(cfg: Config) -> list[Problem]:
    """Greedy trajectories of a prompt are one and the same, as far as engine and world repeat themselves."""
    if cfg.run.eval_samples == 1 or cfg.run.eval_temperature > 0:
        return []
    return [
        Problem(
            f"run.eval_samples={cfg.run.eval_samples} with run.eval_temperature=0: greedy trajectories differ by "
            "chance of machine or world alone, and pass@k measures just that. Use one sample, or a temperature.",
            fatal=False,
        )
    ]
