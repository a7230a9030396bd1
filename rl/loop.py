"""The training loop: the algorithm, about one line for each arrow of the flow."""

from __future__ import annotations

import logging
from typing import Any

from conf.checks import require_runnable
from conf.schema import Config
from conf.settle import settled
from rl.interrupts import uninterrupted
from rl.run import Run, opened_run
from rl.unread import told_if_unread

logger = logging.getLogger(__name__)


def train(cfg: Config) -> dict[str, Any]:
    """Train a policy and leave a run folder behind.

    Returns: what summary.json holds: `success_before` and `success_after` on held-out prompts, tokens, seconds, ...
    Raises: GroveError for whatever the user or the world did; KeyboardInterrupt after a checkpoint.
    """
    with told_if_unread(cfg) as watched_cfg:
        cfg = settled(watched_cfg)
        require_runnable(cfg, warn=logger.debug)
        with opened_run(cfg) as run:
            return train_run(run)


def train_run(run: Run) -> dict[str, Any]:
    """Train with a run's parts until its steps or tokens are used up; returns its summary."""
    run.evaluate_if_due()
    while run.goes_on():
        scored = run.score(run.grow(run.next_prompts()))
        found = run.assign(scored)
        while prompts := run.refill(found):
            scored = run.score(run.grow(prompts))
            found = run.assign(scored)
        with uninterrupted():  # half an update is no state to save
            run.update(scored, found)
            run.finish_step(scored, found)
        run.evaluate_if_due()
        run.checkpoint_if_due()
    return run.finish()
