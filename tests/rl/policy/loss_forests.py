"""Forests with a number for every sampled token, and the losses of their trajectories computed one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from policy_trees import PairedTree
from torch import Tensor

from conf.schema import Aggregation, Correction, KlEstimator, LossConfig, LossKind
from rl.policy.aggregate import aggregate
from rl.policy.model import EdgeOutputs
from rl.policy.objective import Objective, Totals, objective
from rl.policy.pack import PackedBatch, PathCredit, TokenCredit, TreeCredit, pack
from rollout.tree import Tree

HORIZON = 7


@dataclass
class Numbers:
    """float64 vectors with one entry for every sampled token of a forest; `first` says where a step's begin."""

    first: dict[tuple[int, int], int]
    """(id of the tree, row) -> place of the step's first token."""
    logprob: Tensor
    old: Tensor
    engine: Tensor
    reference: Tensor
    entropy: Tensor
    value: Tensor
    old_value: Tensor
    target: Tensor
    token_advantage: Tensor = field(default_factory=lambda: torch.zeros(0))

    def places(self, tree: Tree, row: int) -> list[int]:
        start = self.first[id(tree), row]
        return list(range(start, start + len(tree.nodes[row].action_ids)))


def numbers(trees: Sequence[Tree], seed: int = 0, spread: float = 0.3) -> Numbers:
    """Random ones; the engine's are those of the trees."""
    first, engine = {}, []
    for tree in trees:
        for row, node in enumerate(tree.nodes):
            first[id(tree), row] = len(engine)
            engine += node.action_logprobs
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(len(engine), generator=generator, dtype=torch.float64)

    sampled = torch.tensor(engine, dtype=torch.float64)
    old = sampled + noise(0.3)
    return Numbers(
        first=first,
        logprob=(old + noise(spread)).requires_grad_(),
        old=old,
        engine=sampled,
        reference=old + noise(0.5),
        entropy=noise(1.0).abs().requires_grad_(),
        value=noise(0.5).requires_grad_(),
        old_value=noise(0.5),
        target=noise(0.5),
        token_advantage=noise(0.5),
    )


def credits_of(
    forest: Sequence[PairedTree],
    aggregation: Aggregation = Aggregation.token_mean,
    horizon: int = HORIZON,
    critic: Numbers | None = None,
) -> list[TreeCredit]:
    """Every tree with its trajectories, weights aggregated; with `critic`, its numbers as token credit."""
    pairs = [(number, *pair) for number, tree in enumerate(forest) for pair in tree.pairs.items()]
    leaves = sorted({(number, leaf) for number, (_, leaf), _ in pairs})
    found = aggregate(
        aggregation,
        weight_P=torch.tensor([weight for *_, (weight, _) in pairs], dtype=torch.float64),
        tokens_P=torch.tensor([len(forest[number].tree.nodes[row].action_ids) for number, (row, _), _ in pairs]),
        pair_leaf_P=torch.tensor([leaves.index((number, leaf)) for number, (_, leaf), _ in pairs]),
        tree_L=torch.tensor([number for number, _ in leaves]),
        num_trees=len(forest),
        horizon_tokens=horizon,
    )
    factors = {
        (number, *pair): factor for (number, pair, _), factor in zip(pairs, found.factor_P.tolist(), strict=True)
    }
    credits = []
    for number, (paired, denominator) in enumerate(zip(forest, found.denominator_G.tolist(), strict=True)):
        tree, empty = paired.tree, [0.0] * len(paired.tree.nodes)
        paths = []
        for leaf in [leaf for of_tree, leaf in leaves if of_tree == number]:
            steps = [(row, *paired.pairs[row, leaf]) for row in tree.path(leaf)]
            weights = [weight * factors[number, row, leaf] for row, weight, _ in steps]
            paths.append(PathCredit(leaf=leaf, advantage=[advantage for *_, advantage in steps], weight=weights))
        tokens = None if critic is None else token_credit(tree, critic)
        blank = TreeCredit(tree=tree, w_pos=empty, w_neg=empty, w0=empty, denominator=denominator)
        credit = blank.only_paths(paths)
        credit.tokens = tokens
        credits.append(credit)
    return credits


def token_credit(tree: Tree, critic: Numbers) -> TokenCredit:
    def rows(values: Tensor) -> list[list[float]]:
        return [values[critic.places(tree, row)].tolist() for row in range(len(tree.nodes))]

    return TokenCredit(advantage=rows(critic.token_advantage), value=rows(critic.old_value), target=rows(critic.target))


def totals_of(credits: Sequence[TreeCredit]) -> Totals:
    return Totals(
        denominator=sum(credit.denominator for credit in credits),
        weight=sum(credit.total_weight() for credit in credits),
    )


def packed(credits: Sequence[TreeCredit], table: Numbers, cfg: LossConfig) -> tuple[PackedBatch, EdgeOutputs]:
    """A pack, and what a model that says `table` puts out for it."""
    batch = pack(credits)
    trees = [credit.tree for credit in credits]
    place_E = [place for number, row in batch.trained_steps for place in table.places(trees[number], row)]
    batch.old_logprob_E = table.old[place_E]
    batch.reference_logprob_E = table.reference[place_E] if cfg.kl_coef else None
    outputs = EdgeOutputs(table.logprob[place_E], table.entropy[place_E], table.value[place_E])
    return batch, outputs


def objective_of(
    packs: Sequence[Sequence[TreeCredit]], table: Numbers, cfg: LossConfig, totals: Totals, **arguments: object
) -> Objective:
    """All packs of one mini-batch added up."""
    loss, parts, maxima = torch.zeros((), dtype=torch.float64), {}, {}
    for credits in packs:
        batch, outputs = packed(credits, table, cfg)
        found = objective(outputs, batch, cfg, totals, **arguments)
        loss = loss + found.loss
        parts = {name: parts.get(name, 0.0) + part for name, part in found.parts.items()}
        maxima = {name: max(maxima.get(name, -math.inf), value) for name, value in found.maxima.items()}
    return Objective(loss, parts, maxima)


def gradients(loss: Tensor, table: Numbers) -> list[Tensor]:
    leaves = [table.logprob, table.entropy, table.value]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def slow_objective(forest: Sequence[PairedTree], table: Numbers, cfg: LossConfig) -> Tensor:
    """The loss as the papers have it: trajectory by trajectory, without sums over trajectories or folded weights."""
    tokens, trajectories, weights = [], [], []
    for paired in forest:
        for leaf in sorted({leaf for _, leaf in paired.pairs}):
            steps = [(row, *paired.pairs[row, leaf]) for row in paired.tree.path(leaf)]
            expanded = [(p, w, a) for row, w, a in steps for p in table.places(paired.tree, row)]
            place, weight, advantage = zip(*expanded, strict=True)
            loss = slow_tokens(list(place), torch.tensor(advantage, dtype=torch.float64), table, cfg)
            weight = torch.tensor(weight, dtype=torch.float64)
            tokens.append((weight * loss).sum())
            trajectories.append((weight * loss).sum() / weight.sum())
            weights.append(weight.sum())
    num = len(tokens)
    return {
        Aggregation.token_mean: lambda: sum(tokens) / sum(weights),
        Aggregation.seq_mean_token_mean: lambda: sum(trajectories) / num,
        Aggregation.seq_mean_token_sum: lambda: sum(tokens) / num,
        Aggregation.seq_mean_token_sum_norm: lambda: sum(tokens) / num / HORIZON,
    }[cfg.aggregation]()


def slow_tokens(place: list[int], advantage: Tensor, table: Numbers, cfg: LossConfig) -> Tensor:
    """Loss of every token of one trajectory."""
    logprob, old = table.logprob[place], table.old[place]
    loss = slow_policy(logprob, old, advantage, cfg) * slow_weight(old - table.engine[place], cfg)
    if cfg.kl_coef:
        difference = logprob - table.reference[place]
        assert cfg.kl_estimator is KlEstimator.k3
        loss = loss + cfg.kl_coef * (torch.exp(-difference) + difference - 1)
    return loss - cfg.entropy_coef * table.entropy[place]


def slow_policy(logprob: Tensor, old: Tensor, advantage: Tensor, cfg: LossConfig) -> Tensor:
    ratio = torch.exp(logprob - old)

    def clip(value: Tensor) -> Tensor:
        return value.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)

    if cfg.kind is LossKind.reinforce:
        return -advantage * logprob
    if cfg.kind is LossKind.cispo:
        return -clip(ratio).detach() * advantage * logprob
    if cfg.kind is LossKind.gspo:
        sequence = torch.exp((logprob - old).mean()).detach()
        ratio = sequence * torch.exp(logprob) / torch.exp(logprob).detach()
    surrogate = torch.minimum(ratio * advantage, clip(ratio) * advantage)
    if cfg.dual_clip and cfg.kind is not LossKind.gspo:
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, cfg.dual_clip * advantage), surrogate)
    return -surrogate


def slow_weight(delta: Tensor, cfg: LossConfig) -> Tensor:
    if cfg.correction is Correction.none:
        return torch.ones_like(delta)
    level, what = cfg.correction.value.split("_")
    ratio = torch.exp(delta if level == "token" else delta.sum().expand_as(delta))
    within = (ratio >= cfg.correction_min) & (ratio <= cfg.correction_max)
    bounded = ratio.clamp(cfg.correction_min, cfg.correction_max)
    return torch.where(within, ratio, bounded if what == "truncate" else 0.0)
