"""What each term made of each step: its raw value, that value compared, and its part of the advantage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conf.schema import Compare, Config, Degenerate, GaeConfig, Normalizer, Scope
from rewards.types import ScoredTree
from rl.credit.assign import Credit, assign
from rl.credit.forest import Forest
from rl.credited import Credited
from rl.record import TOTAL, Advantages, RecordedTree, TermValues


@dataclass(frozen=True, slots=True)
class Shares:
    """Each term's value of each step, in the mean over the step's trajectories.

    term -> float32 [N]; NaN where the step is not trained or the term has nothing to say of it. The critic's part is
    compared with the critic alone and is in neither.
    """

    raw: dict[str, Tensor]
    """Before it is compared."""
    compared: dict[str, Tensor]
    """Against its scope, before the term's weight and before the sum is whitened."""


def recorded_trees(scored: Sequence[ScoredTree], found: Credited, shares: Shares) -> list[RecordedTree]:
    """Trees as they are recorded: whole, with what selection left out of them and what credit made of the rest.

    Args:
        scored: the step's trees before selection, in the order of found.selection.trees.
        shares: of `found`.
    """
    tables = zip(
        scored,
        advantage_tables(found.forest, found.credit, len(scored)),
        _tables(found.forest, shares.raw, len(scored)),
        _tables(found.forest, shares.compared, len(scored)),
        found.selection.left_out,
        strict=True,
    )
    return [
        RecordedTree(
            scored=tree,
            advantages=advantages,
            raw=raw_values,
            compared=compared_values,
            left_out={row: reason.value for row, reason in left_out.items()},
        )
        for tree, advantages, raw_values, compared_values, left_out in tables
    ]


def advantage_tables(forest: Forest, credit: Credit, num_trees: int) -> list[Advantages]:
    """For each tree: trained row -> each term's mean contribution over the trajectories through it, and their total."""
    contributions = {name: _mean_N(forest, part_P, credit.weight_P) for name, part_P in credit.parts.items()}
    total_N = torch.where(credit.w0_N > 0, credit.advantage_N, torch.nan)
    return _tables(forest, {**contributions, TOTAL: total_N}, num_trees)


def shares_of(found: Credited, cfg: Config) -> Shares:
    """What each term makes of each step: what `assign` gives it by itself, with weight 1.

    Args:
        found: given by `cfg`.
    """
    shares = Shares({}, {})
    for name, term in cfg.credit.terms.items():
        whole = replace(term, weight=1.0)
        alone = replace(
            whole,
            compare=Compare.returns,
            scope=Scope.prompt,
            normalizer=Normalizer.none,
            token_weighted=False,
            singleton=Degenerate.raw,
            zero_variance=Degenerate.raw,
        )
        for values, view in ((shares.raw, alone), (shares.compared, whole)):
            only = replace(cfg.credit, terms={name: view}, whiten=False, gae=GaeConfig())
            credit = assign(found.forest, only, cfg.rollout.max_steps, found.history)
            speaks_P = (credit.weight_P > 0) * found.credit.weight_P
            values[name] = _mean_N(found.forest, credit.parts[name], speaks_P)
    return shares


def _mean_N(forest: Forest, value_P: Tensor, weight_P: Tensor) -> Tensor:
    """Weighted mean [N] over each step's pairs; NaN where nothing counts."""
    zeros_N = value_P.new_zeros(len(forest.parent_N))
    total_N = zeros_N.index_add(0, forest.pair_node_P, weight_P * value_P)
    return total_N / zeros_N.index_add(0, forest.pair_node_P, weight_P)


def _tables(forest: Forest, values: dict[str, Tensor], num_trees: int) -> list[TermValues]:
    """For each tree: row -> {name: value}, NaN left out."""
    tables: list[TermValues] = [{} for _ in range(num_trees)]
    places = list(zip(forest.prompt_N.tolist(), forest.row_N.tolist(), strict=True))
    for name, value_N in values.items():
        for (number, row), value, missing in zip(places, value_N.tolist(), value_N.isnan().tolist(), strict=True):
            if not missing:
                tables[number].setdefault(row, {})[name] = value
    return tables
