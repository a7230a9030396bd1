"""Which scored trajectories train. Pure: the trees come back as copies, and what was recorded is never changed."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from conf.errors import ConfigError
from conf.schema import Keep, SelectConfig
from rewards.types import BROKEN, ScoredTree
from rl.credit.assign import Credit
from rl.credit.forest import Forest
from rollout.seeds import derive_seed

CENTRE = 0.5
"""Of step scores in [0, 1]. A class of trajectories moves as one with it, so that no choice depends on it."""


class Reason(StrEnum):
    """Why a trajectory was left out."""

    band = "band"
    """Too few or too many of its prompt's trajectories are right."""
    unjudged = "unjudged"
    """Whether it is right, or what its steps are worth, is not known, and the choice depends on it."""
    outranked = "outranked"
    """Others of its prompt were kept."""
    silent = "silent"
    """No step of its prompt has an advantage."""


@dataclass(kw_only=True, slots=True)
class Selection:
    """The trees of a batch with what is left to train."""

    trees: list[ScoredTree]
    """As given, with kept=False at the ends of the trajectories left out: same order, same rows, same scores."""
    left_out: list[dict[int, Reason]] = field(default_factory=list)
    """Per tree: row of a leaf -> why its trajectory does not train."""

    def shares(self) -> dict[str, float]:
        """reason -> share of the trainable trajectories that it left out; {} where there are none."""
        counts = Counter(reason for table in self.left_out for reason in table.values())
        whole = counts.total() + sum(len(each.tree.trained_leaves()) for each in self.trees)
        return {reason.value: counts[reason] / whole for reason in Reason} if whole else {}

    def num_missing_prompts(self) -> int:
        """Prompts of which nothing is left to train."""
        return sum(not each.tree.trained_leaves() for each in self.trees)

    def without(self, reasons: Sequence[dict[int, Reason]]) -> Selection:
        """The selection with more trajectories left out, per tree by the row of their leaf."""
        return Selection(
            trees=[_pruned(tree, more) for tree, more in zip(self.trees, reasons, strict=True)],
            left_out=[had | more for had, more in zip(self.left_out, reasons, strict=True)],
        )


@dataclass(frozen=True, slots=True)
class Judged:
    """A trajectory as the choice among its prompt's sees it."""

    leaf: int
    """Row of the step that ended it."""
    is_right: bool
    rank: float
    """Within its class the lowest goes first."""


def selected(scored: Sequence[ScoredTree], cfg: SelectConfig, seed: int) -> Selection:
    """Choose the trajectories that train, before any of them is compared with others.

    A prompt passes the band by the share of right ones among its trajectories whose outcome is known; then `keep`
    chooses among those. A tree is one prompt's group.

    Args:
        scored: the step's trees, with the scores of every source.
        seed: of the run, for the choices that are drawn; the same prompt and seed give the same lot.
    Raises: ConfigError when cfg.step_source never scored a step of these trees.
    """
    _check_source(scored, cfg)
    whole = Selection(trees=list(scored), left_out=[{} for _ in scored])
    whole = whole.without([_outside_band(tree, cfg) for tree in whole.trees])
    return whole.without([_outranked(tree, cfg, seed) for tree in whole.trees])


def without_silent_prompts(selection: Selection, forest: Forest, credit: Credit) -> Selection:
    """The selection without the prompts in which no trained step has an advantage other than 0.

    Args:
        forest: of selection.trees.
        credit: of that forest; not whitened, for a mean that is taken off moves every 0.
    """
    is_loud_N = (credit.w_pos_N != 0) | (credit.w_neg_N != 0)
    loud = set(forest.prompt_N[is_loud_N].tolist())
    return selection.without(
        [
            {} if number in loud else dict.fromkeys(each.tree.trained_leaves(), Reason.silent)
            for number, each in enumerate(selection.trees)
        ]
    )


def outcome(scored: ScoredTree, leaf: int) -> float | None:
    """What the first trajectory source says of a trajectory; None where it was not scored."""
    score = next(iter(scored.leaf_scores.values()), {}).get(leaf)
    return score.value if score is not None and score.is_scored else None


def is_right(scored: ScoredTree, leaf: int) -> bool | None:
    """Whether the first trajectory source gives more than a half; None where it was not scored."""
    value = outcome(scored, leaf)
    return None if value is None else value > 0.5


def consistency(step_scores: Sequence[float], *, is_right: bool, centre: float = CENTRE) -> float:
    """How well the scores of steps agree with how their trajectory ended; PROF (arXiv 2509.03403).

    c = (2 r - 1) * mean_h 2 (p_h - centre), r = 1 for a right trajectory and 0 for a wrong one

    The centre is fixed, where the authors' code takes the mean of the batch: a constant moves all right trajectories
    alike, and all wrong ones, and they are ranked apart.

    Args:
        step_scores: p_h in [0, 1] of the steps that were scored.
    Returns: in [-1, 1]; 0 where no step was scored, as in the code.
    """
    if not step_scores:
        return 0.0
    return (1 if is_right else -1) * 2 * (statistics.fmean(step_scores) - centre)


def num_dropped(num_right: int, num_wrong: int, num_kept: int, *, in_proportion: bool = False) -> tuple[int, int]:
    """How many right and wrong trajectories of a prompt go, so that `num_kept` stay; PROF (arXiv 2509.03403).

    With R to go and n+ right, n- wrong: R+ = round((n+ - n- + R) / 2), within [0, R], and R- = R - R+, which leaves as
    many right as wrong where that can be. Halves round to the even number, as in the authors' code.
    In proportion: R+ = round(R n+ / (n+ + n-)); our reading of the paper's variant.
    """
    num_gone = max(0, num_right + num_wrong - num_kept)
    if in_proportion:
        right = round(num_gone * num_right / max(1, num_right + num_wrong))
    else:
        right = min(num_gone, max(0, round((num_right - num_wrong + num_gone) / 2)))
    return right, num_gone - right


def kept_of(judged: Sequence[Judged], num_kept: int, *, in_proportion: bool = False) -> set[int]:
    """Leaves of the trajectories that stay: of right and of wrong ones the lowest ranks go, equal ones in order."""
    right = [each for each in judged if each.is_right]
    wrong = [each for each in judged if not each.is_right]
    gone = num_dropped(len(right), len(wrong), num_kept, in_proportion=in_proportion)
    return {
        each.leaf
        for group, count in zip((right, wrong), gone, strict=True)
        for each in sorted(group, key=lambda each: each.rank)[count:]
    }


def _outside_band(scored: ScoredTree, cfg: SelectConfig) -> dict[int, Reason]:
    low, high = cfg.min_success_share, cfg.max_success_share
    if cfg.ends_pass and (low, high) == (0, 1):
        return {}
    leaves = scored.tree.trained_leaves()
    known = [right for leaf in leaves if (right := is_right(scored, leaf)) is not None]
    if not known:
        return dict.fromkeys(leaves, Reason.unjudged)
    share = sum(known) / len(known)
    passes = low <= share <= high if cfg.ends_pass else low < share < high
    return {} if passes else dict.fromkeys(leaves, Reason.band)


def _outranked(scored: ScoredTree, cfg: SelectConfig, seed: int) -> dict[int, Reason]:
    if cfg.keep is Keep.all:
        return {}
    leaves = scored.tree.trained_leaves()
    draw = random.Random(derive_seed(seed, "select", scored.tree.prompt.id))
    lots = [draw.random() for _ in leaves]
    judged = [_judged(scored, leaf, lot, cfg) for leaf, lot in zip(leaves, lots, strict=True)]
    known = [each for each in judged if each is not None]
    kept = kept_of(known, cfg.num_kept, in_proportion=cfg.keep is Keep.prof_ratio)
    reasons = dict.fromkeys(leaves, Reason.unjudged) | {each.leaf: Reason.outranked for each in known}
    return {leaf: reason for leaf, reason in reasons.items() if leaf not in kept}


def _judged(scored: ScoredTree, leaf: int, lot: float, cfg: SelectConfig) -> Judged | None:
    """None where the outcome is not known, or a step score that the choice needs."""
    right = is_right(scored, leaf)
    if right is None:
        return None
    if cfg.keep is Keep.balanced or (cfg.keep is Keep.prof_correct and not right):
        return Judged(leaf, right, lot)
    path = scored.tree.path(leaf)
    table = scored.step_scores.get(cfg.step_source, {})
    said = [score for row in path if (score := table.get(row)) is not None]
    if any(score.status in BROKEN for score in said):
        return None
    agreement = consistency([score.value for score in said if score.is_scored], is_right=right)
    # Outside the sign, as in the authors' code: the paper's formula would raise a wrong answer given in one step.
    is_odd = not cfg.min_steps <= len(path) <= cfg.max_steps
    return Judged(leaf, right, agreement - cfg.step_count_penalty * is_odd)


def _pruned(scored: ScoredTree, leaves: dict[int, Reason]) -> ScoredTree:
    """The tree without the trajectories that end at `leaves`; shared steps stay with those that are left."""
    if not leaves:
        return scored
    nodes = [replace(node, kept=False) if row in leaves else node for row, node in enumerate(scored.tree.nodes)]
    return replace(scored, tree=replace(scored.tree, nodes=nodes))


def _check_source(scored: Sequence[ScoredTree], cfg: SelectConfig) -> None:
    if cfg.keep in (Keep.all, Keep.balanced):
        return
    known = {name for tree in scored for name in tree.step_scores}
    if cfg.step_source in known or not any(each.tree.trained_leaves() for each in scored):
        return
    raise ConfigError(
        f'select.step_source="{cfg.step_source}" scored no step of these trees, so nothing says which trajectories '
        f"agree with their steps. Scored by: {', '.join(sorted(known)) or 'no source of steps'}. Name one of these."
    )
