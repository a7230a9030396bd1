"""Settings that follow from others where the user has left them open."""

from __future__ import annotations

from dataclasses import replace

from conf.schema import Config, Correction, OldLogprobs


def settled(cfg: Config) -> Config:
    """The configuration as a run uses it and writes it down.

    With rollout.max_staleness above 0, and old log-probabilities and correction left as they are, the ratio is taken
    against the learner's own log-probabilities and the engines' staleness is corrected by truncated importance weights.
    """
    loss = cfg.loss
    is_open = loss.old_logprobs is OldLogprobs.engine and loss.correction is Correction.none
    if cfg.rollout.max_staleness and loss.corrects_stale and is_open:
        loss = replace(loss, old_logprobs=OldLogprobs.recompute, correction=Correction.token_truncate)
    return replace(cfg, loss=loss)
