"""Every metric a run writes, declared once, and the log that keeps them: one JSON object per step in metrics.jsonl."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from conf.errors import DataError

STAGES = ("grow", "score", "prm", "credit", "update", "publish", "eval", "checkpoint", "step")
"""Parts of a training step that are timed; `step` is the whole of it."""


class Better(Enum):
    """Which way a metric should move."""

    higher = "higher"
    lower = "lower"
    neutral = "neutral"


@dataclass(frozen=True, slots=True)
class Metric:
    """One declared metric."""

    name: str
    """`stage/thing_unit`; a part in angle brackets, as in reward/<source>_mean, stands for any name."""
    what: str
    denominator: str
    """What the number is divided by or counted over; a reader of a share must never have to guess."""
    better: Better = Better.neutral

    def matches(self, name: str) -> bool:
        """True when `name` is this metric or one of its family."""
        return self.name == name if "<" not in self.name else self._pattern().fullmatch(name) is not None

    def parts(self, name: str) -> dict[str, str]:
        """What the parts in angle brackets stand for in `name`: {"k": "4"} in eval/pass_at_4_share."""
        found = self._pattern().fullmatch(name)
        assert found is not None, f"{name} is none of {self.name}"
        return found.groupdict()

    def _pattern(self) -> re.Pattern[str]:
        pieces = re.split(r"<(\w+)>", self.name)  # literal, part, literal ...
        return re.compile(
            "".join(f"(?P<{piece}>[^/]+)" if at % 2 else re.escape(piece) for at, piece in enumerate(pieces))
        )


METRICS: tuple[Metric, ...] = (
    Metric(
        "eval/success_share",
        "success on held-out prompts, pass@1",
        "held-out prompts, each the share of its scored samples that succeeded",
        Better.higher,
    ),
    Metric("eval/success_low_share", "lower end of its 95% interval, over prompts", "as eval/success_share"),
    Metric("eval/success_high_share", "upper end of its 95% interval, over prompts", "as eval/success_share"),
    Metric("eval/pass_at_<k>_share", "one of k samples succeeds, pass@k", "held-out prompts", Better.higher),
    Metric("eval/pass_all_<k>_share", "all of k samples succeed, pass^k", "held-out prompts", Better.higher),
    Metric("eval/majority_share", "the most frequent answer is right", "held-out prompts", Better.higher),
    Metric("eval/best_of_<k>_share", "the best by run.eval_score of k succeeds", "held-out prompts", Better.higher),
    Metric(
        "eval/weighted_vote_share",
        "the answer with the largest sum of run.eval_score is right",
        "held-out prompts",
        Better.higher,
    ),
    Metric("eval/unknown_share", "success could not be told: world or score failed", "held-out samples", Better.lower),
    Metric("eval/tokens_per_sample", "tokens the policy sampled", "held-out samples"),
    Metric(
        "rollout/success_share",
        "success in training",
        "trained trajectories whose outcome is known",
        Better.higher,
    ),
    Metric("rollout/generated_tokens", "tokens the policy sampled, pruned steps included", "this step"),
    Metric("rollout/total_generated_tokens", "tokens the policy sampled in training", "the run so far"),
    Metric("rollout/uncached_tokens", "context tokens that the engines computed", "this step", Better.lower),
    Metric("rollout/cached_tokens", "context tokens found in the prefix cache", "this step", Better.higher),
    Metric(
        "rollout/generated_share_of_chains",
        "sampled tokens, pruned steps included; below 1 the trees save",
        "tokens that as many independent trajectories would have sampled",
        Better.lower,
    ),
    Metric("rollout/trees", "trees that were grown", "this step"),
    Metric("rollout/requests", "times that an engine was asked to sample", "this step", Better.lower),
    Metric("rollout/tokens_per_prompt", "tokens of a prompt", "trees"),
    Metric("rollout/tokens_per_turn", "tokens sampled in a turn", "turns of trajectories with an outcome"),
    Metric("rollout/tokens_per_reply", "tokens of what the environment replied", "replies"),
    Metric("rollout/trajectories", "trajectories that may be scored and trained", "this step"),
    Metric("rollout/steps_per_trajectory", "steps from the prompt to the end", "trained trajectories"),
    Metric(
        "rollout/cached_token_share",
        "context tokens the engine found in its prefix cache",
        "context tokens of all sampled steps",
        Better.higher,
    ),
    Metric("rollout/tool_ok_share", "tool calls that returned", "tool calls", Better.higher),
    Metric("rollout/stop_<reason>_share", "trajectories that ended for this reason", "kept trajectories"),
    Metric("rollout/tokens_per_second", "sampling speed", "seconds of growing", Better.higher),
    Metric("rollout/staleness_mean", "versions that the weights which sampled are behind", "sampled tokens"),
    Metric("rollout/staleness_max", "the oldest step's versions behind", "this step"),
    Metric("rollout/stale_share", "tokens sampled by older weights", "sampled tokens"),
    Metric("reward/<signal>_mean", "mean of a signal, after weights", "scored steps or trajectories", Better.higher),
    Metric("reward/<source>_mean", "mean of a source, before weights", "scored steps or trajectories", Better.higher),
    Metric("reward/<source>_failed_share", "scores that failed", "scores asked of the source", Better.lower),
    Metric("reward/<source>_timed_out_share", "scores that came too late", "scores asked of the source", Better.lower),
    Metric("reward/<source>_not_applicable_share", "scores with nothing to say", "scores asked of the source"),
    Metric("reward/<source>_seconds", "time that scoring took, waiting for models included", "trees", Better.lower),
    Metric("reward/<source>_cached_share", "calls answered from the cache or by an equal call", "calls of the source"),
    Metric("reward/<source>_requests", "requests to the model that the source asks", "this step", Better.lower),
    Metric("reward/<source>_retries", "requests that were repeated", "this step", Better.lower),
    Metric("reward/<source>_tokens", "tokens of its model's prompts and replies", "this step", Better.lower),
    Metric("reward/<source>_usd", "price of its model's tokens", "this step", Better.lower),
    Metric("reward/<source>_generated_tokens", "tokens sampled to measure values, going on from steps", "this step"),
    Metric("credit/<term>_abs_mean", "mean size of a term's contribution to the advantage", "trained steps"),
    Metric("credit/zero_advantage_share", "steps that teach nothing", "trained steps", Better.lower),
    Metric("select/<reason>_share", "trajectories left out for this reason", "trajectories that could be trained"),
    Metric("select/missing_prompts", "prompts that the batch lacks, refilled or not", "this step", Better.lower),
    Metric("select/refills", "times that more prompts were drawn because nothing was left of some", "this step"),
    Metric(
        "health/<signal>_agreement_share",
        "mean step score and outcome put two trajectories in the same order; 0.5 is chance",
        "pairs of a prompt's trajectories with different outcomes",
        Better.higher,
    ),
    Metric(
        "health/<signal>_calibration_error",
        "distance of a step source's mean score from the success share, in ten bins; for scores in [0, 1] alone",
        "trajectories with an outcome",
        Better.lower,
    ),
    Metric("health/<signal>_invalid_share", "no value, for whatever reason", "steps or trajectories that may train"),
    Metric("health/<term>_silent_share", "groups in which the term tells nothing apart", "groups of two or more"),
    Metric("health/outcome_steps_correlation", "outcome against steps, within prompts", "trained trajectories"),
    Metric("health/outcome_tokens_correlation", "outcome against tokens, within prompts", "trained trajectories"),
    Metric("health/effective_steps", "(sum w)^2 / sum w^2 of the steps' whole advantages", "this step", Better.higher),
    Metric("health/no_credit_share", "steps that teach nothing", "steps that may train", Better.lower),
    Metric("prm/loss", "what the run's process reward model minimises", "trajectories with an outcome", Better.lower),
    Metric("prm/grad_norm", "norm of its gradient before clipping", "optimiser steps"),
    Metric(
        "prm/order_accuracy",
        "its scores put two trajectories in the order of their outcomes; 0.5 is chance",
        "pairs of a prompt's trajectories, weighted by the difference of their outcomes",
        Better.higher,
    ),
    Metric("prm/sign_accuracy", "score above 0 exactly where the outcome is above 0.5", "trajectories", Better.higher),
    Metric(
        "prm/calibration_error",
        "distance of its chance of success from the success share, in ten bins",
        "trajectories with an outcome",
        Better.lower,
    ),
    Metric("prm/error", "distance of the expected outcome from the outcome", "trajectories", Better.lower),
    Metric("prm/drift", "how far one update moved the scores of the same steps", "steps of up to 8 trees"),
    Metric("loss/total", "the loss that is minimised", "as loss.aggregation says"),
    Metric("loss/policy", "policy part of the loss", "as loss.aggregation says"),
    Metric("loss/kl", "KL part of the loss, before its weight", "as loss.aggregation says"),
    Metric("loss/entropy_nats", "entropy of the policy", "weighted trained tokens"),
    Metric("loss/clip_share", "tokens whose ratio was clipped", "weighted trained tokens"),
    Metric("loss/clip_low_share", "tokens whose ratio was clipped from below", "weighted trained tokens"),
    Metric(
        "loss/clip_share_depth_<step>",
        "tokens of the steps of this depth whose ratio was clipped; 16 stands for 16 and deeper",
        "weighted trained tokens of these steps",
    ),
    Metric("loss/approx_kl_nats", "estimated KL from the sampling policy to the learner", "weighted trained tokens"),
    Metric("loss/ratio_max", "largest probability ratio of learner to sampler", "trained tokens"),
    Metric(
        "loss/correction_cut_share",
        "tokens whose importance weight was out of bounds, by themselves or by their trajectory",
        "weighted trained tokens",
        Better.lower,
    ),
    Metric(
        "loss/logprob_gap_nats",
        "mean gap of learner and engine on sampled tokens, before the first update of the step",
        "weighted trained tokens",
        Better.lower,
    ),
    Metric(
        "loss/mismatch_kl_nats",
        "estimated KL from the engine to the learner, before the first update of the step",
        "weighted trained tokens",
        Better.lower,
    ),
    Metric(
        "loss/mismatch_ratio_max",
        "largest probability ratio of learner to engine, before the first update of the step",
        "trained tokens",
        Better.lower,
    ),
    Metric(
        "loss/mismatch_effective_share",
        "effective sample size of the engine's tokens as samples of the learner",
        "weighted trained tokens",
        Better.higher,
    ),
    Metric("loss/value", "loss of the critic, before its weight", "weighted trained tokens", Better.lower),
    Metric("loss/value_clip_share", "tokens whose value was clipped", "weighted trained tokens"),
    Metric(
        "loss/value_explained_share",
        "variance of the returns that the critic explains, before its update",
        "variance of the returns",
        Better.higher,
    ),
    Metric("learner/grad_norm", "norm of the gradient before clipping", "optimiser updates of this step"),
    Metric(
        "learner/critic_grad_norm", "norm of the critic's gradient before clipping", "optimiser updates of this step"
    ),
    Metric("learner/learning_rate", "learning rate of the last update", "none"),
    Metric("learner/trained_tokens", "unique sampled tokens that were trained", "this step"),
    Metric("learner/packed_tokens", "tokens computed in the tree layout", "this step", Better.lower),
    Metric("learner/path_tokens", "tokens that separate trajectories would have computed", "this step"),
    Metric("weights/sync_seconds", "time to bring new weights to the engines", "this step", Better.lower),
    Metric("weights/bytes", "size of a version of the weights as engines take it", "all learner processes"),
    Metric("weights/brought_bytes", "of them, what each engine was sent", "all learner processes"),
    Metric("weights/lay_out_seconds", "time to copy and checksum the weights", "slowest learner process", Better.lower),
    Metric("weights/fetch_seconds", "waiting for weights and checking them", "slowest engine", Better.lower),
    Metric("weights/load_seconds", "making tensors whole and loading them", "slowest engine", Better.lower),
    Metric("weights/canary_seconds", "sampling and scoring the canary", "this step", Better.lower),
    Metric("weights/canary_gap_nats", "largest mean gap of an engine and the learner", "canary tokens", Better.lower),
    Metric("weights/version", "version of the weights the engines hold", "none"),
    Metric(
        "time/<part>_idle_share",
        "time in which a part (rollout, engine, reward, prm, learner, driver) had nothing to do",
        "seconds of the step, in the mean over the part's processes",
        Better.lower,
    ),
    *(Metric(f"time/{stage}_seconds", f"time of the stage {stage}", "this step", Better.lower) for stage in STAGES),
)


def declared(name: str) -> Metric | None:
    """The declaration of a metric, exact names before families; None when it was never declared."""
    return next((metric for metric in METRICS if metric.matches(name)), None)


def _refusal(name: str) -> str:
    near = difflib.get_close_matches(name, [metric.name for metric in METRICS], n=1)
    hint = f"; nearest: {near[0]}" if near else ""
    return f"metric {name!r} is not declared in rl/metrics.py, so no reader would know its denominator{hint}"


class MetricsLog:
    """The append-only metrics.jsonl of a run, on disk after every line, with steps that never go back.

    A step may be written in several goes, its training first and its evaluation later: readers see one row per step.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        """Open the log.

        Args:
            path: the file; made when absent.
            resume_step: last step of the checkpoint that a resumed run starts from: later rows are cut, because those
                steps will be trained again. None keeps every whole row.
        """
        self.path = path
        rows = read_metrics(path) if path.exists() else []
        self.rows = [row for row in rows if resume_step is None or row["step"] <= resume_step]
        _rewrite(path, self.rows)  # a killed run may leave half a line, and nothing may be appended to that

    def append(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Write metrics of a step and return the step's row so far.

        A number that is not finite is written as null: JSON has no NaN, and a gap in a curve is honest where 0 is not.
        """
        for name in metrics:
            assert declared(name), _refusal(name)
        last = self.rows[-1]["step"] if self.rows else step
        assert step >= last, f"step {step} comes after step {last} was written"
        row = {"step": step, **{name: _json_number(value) for name, value in metrics.items()}}
        _append(self.path, json.dumps(row) + "\n")
        self.rows = _merged([*self.rows[-1:], row], onto=self.rows[:-1])
        return self.rows[-1]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, one per step, oldest first; a last line that a killed run left half written is dropped.

    Raises: DataError naming the line when an earlier line is damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise DataError(
                f"{path} line {number} is not JSON ({error}): the file was edited or the disk damaged it, and a curve "
                f"drawn from the rest would have a hidden gap. Remove that line to go on without its step."
            ) from error
    return _merged(rows, onto=[])


def _merged(rows: Iterable[dict[str, Any]], onto: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`onto` and `rows`, with neighbours of the same step made one; the later value of a metric counts."""
    merged = list(onto)
    for row in rows:
        if merged and merged[-1]["step"] == row["step"]:
            merged[-1] = merged[-1] | row
        else:
            merged.append(row)
    return merged


def _append(path: Path, line: str) -> None:
    """Add a line or nothing: a disk without room takes a part of it, and nothing may be appended to that."""
    size_bytes = path.stat().st_size
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError:
        os.truncate(path, size_bytes)
        raise


def _rewrite(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file in one move, so that a kill in between leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    beside.replace(path)


def _json_number(value: float) -> float | int | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
