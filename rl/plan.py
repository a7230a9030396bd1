"""What growing trees was foreseen to cost, before a run and with its own lengths, beside what it did cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from conf.schema import RolloutConfig
from rl.run_folder import RunFolder
from rollout.cost import Cost, Lengths, chains_cost, most_steps, predicted
from rollout.types import Prompt

Row = Mapping[str, Any]

LIMITS, CHAINS, FORESEEN, MEASURED = "at the limits", "independent chains", "foreseen", "measured"
PARTS = ("trajectories", "steps", "generated", "prefilled", "cached", "trained")
"""Of a tree: requests, tokens sampled, context tokens computed, context tokens found in the cache, tokens trained."""


def write_plan(rollout: RolloutConfig, prompts: Sequence[Prompt], folder: RunFolder) -> str:
    """Foresee what a tree costs, keep it in the run's folder and tell it in a line."""
    prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)
    cost, text = plan_of(rollout, prompt_tokens), plan_text(rollout, prompt_tokens)
    folder.write_plan({"text": text} | ({LIMITS: _parts(cost)} if cost else {}))
    return text


def plan_of(rollout: RolloutConfig, prompt_tokens: float) -> Cost | None:
    """What a tree costs when every trajectory goes to the depth limit with turns as long as they may be.

    Replies of the environment are not known yet and count nothing; None where the expander's shape hangs on a judge or
    on the text.

    Args:
        prompt_tokens: of a prompt, the mean.
    """
    lengths = Lengths(prompt_tokens=prompt_tokens, turn_tokens=rollout.max_turn_tokens, observation_tokens=0.0)
    return predicted(rollout, rollout.max_steps, lengths)


def plan_text(rollout: RolloutConfig, prompt_tokens: float) -> str:
    """The same in a line, for the beginning of a run."""
    cost, name = plan_of(rollout, prompt_tokens), rollout.expander.value
    if cost is None:
        most = most_steps(rollout)
        bound = f"at most {most:,} steps" if most else "as many steps as its text or its judge asks for"
        return f"growing with {name}: {bound} a prompt, of up to {rollout.max_turn_tokens:,} tokens"
    share = cost.generated_share
    return (
        f"growing with {name}, at the limits: a prompt has {cost.trajectories:,.0f} trajectories of {cost.steps:,.0f} "
        f"steps and {cost.generated:,.0f} generated tokens ({share:.2f} of independent chains), "
        f"{cost.prefilled:,.0f} prefilled, {cost.cached:,.0f} cached, {cost.trained:,.0f} trained"
    )


def cost_table(rollout: RolloutConfig, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """A tree of this run by its metrics so far: what was measured, what the formulas foresee for the lengths that its
    trajectories came to have, and what as many independent chains would have cost.

    Args:
        rows: of metrics.jsonl.
    Returns: one entry per line of the table, with `PARTS` on average over the run's trees; {} before any has grown, and
        without the formulas' line where there is none.
    """
    rows = [row for row in rows if row.get("rollout/trees")]
    if not rows:
        return {}
    trees = sum(row["rollout/trees"] for row in rows)
    found = Cost(
        trajectories=_per_tree(rows, "rollout/trajectories"),
        steps=_per_tree(rows, "rollout/requests"),
        generated=_per_tree(rows, "rollout/generated_tokens"),
        prefilled=_per_tree(rows, "rollout/uncached_tokens"),
        cached=_per_tree(rows, "rollout/cached_tokens"),
        trained=sum(row.get("learner/trained_tokens") or 0 for row in rows) / trees,
    )
    length, reply = _mean(rows, "rollout/steps_per_trajectory"), _mean(rows, "rollout/tokens_per_reply")
    lengths = Lengths(
        prompt_tokens=_mean(rows, "rollout/tokens_per_prompt"),
        turn_tokens=_mean(rows, "rollout/tokens_per_turn"),
        observation_tokens=0.0 if math.isnan(reply) else reply,
    )
    if not math.isfinite(length):
        return {MEASURED: _parts(found)}
    whole = max(round(length), 1)
    # Formulas know whole steps alone: the tokens of a trajectory stay what they were.
    lengths = replace(lengths, turn_tokens=lengths.turn_tokens * length / whole)
    table = {CHAINS: _parts(chains_cost(found.trajectories, whole, lengths))}
    foreseen = predicted(rollout, whole, lengths)
    if foreseen is not None:
        table[FORESEEN] = _parts(foreseen)
    return table | {MEASURED: _parts(found)}


def _parts(cost: Cost) -> dict[str, float]:
    values = asdict(cost)
    return {part: values[part] for part in PARTS}


def _per_tree(rows: Sequence[Row], name: str) -> float:
    return sum(row.get(name) or 0 for row in rows) / sum(row["rollout/trees"] for row in rows)


def _mean(rows: Sequence[Row], name: str) -> float:
    """Over the trees of all rows that have the metric."""
    known = [(row[name], row["rollout/trees"]) for row in rows if row.get(name) is not None]
    trees = sum(num for _, num in known)
    return sum(value * num for value, num in known) / trees if trees else math.nan
