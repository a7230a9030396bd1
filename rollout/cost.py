"""What growing trees costs, in steps and tokens, against independent chains: foreseen from a config, measured on trees.

Steps are counted by depth. A step of depth d reads the prompt and d - 1 steps with their observations; what is shared
is read once where prefixes are cached. Formulas hold for trajectories of equal length; real ones end when they like.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from conf.schema import ExpanderKind, RolloutConfig, Survivors
from rollout.tree import ROOT, Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How many steps a tree has, and where. Numbers are expected ones, so they need not be whole."""

    steps_D: tuple[float, ...]
    """Steps sampled at each depth, from 1."""
    continued_D: tuple[float, ...]
    """Of them, those that another step follows: their observations are read. An environment acts on them."""
    leaves: float
    """Trajectories, those with an outcome."""
    trained_D: tuple[float, ...]
    """Steps that are trained, at most."""

    @property
    def steps(self) -> float:
        """Steps sampled in all."""
        return sum(self.steps_D)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """What one trajectory is like."""

    prompt_tokens: float
    turn_tokens: float
    """Sampled in one step."""
    observation_tokens: float
    """Of one reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Tokens of a tree, or of many."""

    steps: float = 0.0
    """Sampling requests."""
    generated: float = 0.0
    prefilled: float = 0.0
    """Context tokens that were computed."""
    cached: float = 0.0
    """Context tokens that were not."""
    trained: float = 0.0
    """Sampled tokens on trained paths, each once."""
    trajectories: float = 0.0
    chains_generated: float = 0.0
    """Tokens that as many independent trajectories would have sampled."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(Cost)})

    @property
    def computed(self) -> float:
        """Tokens that went through the model: of a request, what was not cached and all it sampled but the last."""
        return self.prefilled + self.generated - self.steps

    @property
    def generated_share(self) -> float:
        """Sampled tokens, in those that independent chains need for as many trajectories; below 1 the tree saves."""
        return self.generated / self.chains_generated if self.chains_generated else math.nan


def chains_shape(num: float, length: int) -> Shape:
    """`num` independent trajectories of `length` steps: num x length."""
    steps_D = (float(num),) * length
    return Shape(steps_D=steps_D, continued_D=(*steps_D[:-1], 0.0), leaves=num, trained_D=steps_D)


def random_expand_shape(trees: int, nodes: int, rounds: int, keep: int, length: int) -> Shape:
    """Tree-GRPO: M T + M L N E[T - depth], with places uniform over the prompt and the steps that have a successor.

    A branch has a step at depth d when its place is above d, so with chance d / T.
    """
    branches = trees * rounds * nodes
    steps_D = tuple(trees + branches * depth / length for depth in range(1, length + 1))
    leaves = trees * (1 + rounds * nodes)
    return Shape(
        steps_D=steps_D,
        continued_D=(*steps_D[:-1], 0.0),
        leaves=min(leaves, trees * keep) if keep else leaves,
        trained_D=steps_D,
    )


def beam_shape(num: int, forks: int, first: int, length: int) -> Shape:
    """`first` steps, then `num` of each depth's candidates go on with `forks` each: first + num forks (T - 1)."""
    kept = min(num, first)
    steps_D = (float(first), *[float(kept * forks)] * (length - 1))
    return Shape(
        steps_D=steps_D,
        continued_D=(*[float(kept)] * (length - 1), 0.0),
        leaves=kept,
        trained_D=(float(kept),) * length,
    )


def comb_shape(candidates: int, length: int) -> Shape:
    """SLATE: k T steps, all trained, on one path; T - 1 of them are acted on and followed."""
    steps_D = (float(candidates),) * length
    return Shape(steps_D=steps_D, continued_D=(*[1.0] * (length - 1), 0.0), leaves=1, trained_D=steps_D)


def entropy_expand_tokens(trees: int, tokens: int, rounds: int, forks: int, length: float, rest: float = 0.5) -> float:
    """TreeRL: M chains and M N L T branches that sample `rest` of a trajectory of `length` tokens each; evenly spread
    places leave half."""
    return trees * length + trees * tokens * rounds * forks * rest * length


def entropy_expand_leaves(trees: int, tokens: int, rounds: int, forks: int) -> int:
    """M (1 + N T L)."""
    return trees * (1 + tokens * forks * rounds)


def segment_edges(branches: Sequence[int]) -> list[int]:
    """Steps at each depth of a segment tree: the products of the branches so far."""
    return [math.prod(branches[: depth + 1]) for depth in range(len(branches))]


def segment_tokens(branches: Sequence[int], tokens: int, length: float) -> float:
    """SPO-tree: each step above the last depth samples `tokens`, the last ones what is left of `length`.

    6 x 6 x 6: 6 M + 36 M + 216 rest, where 216 chains sample 216 (2 M + rest).
    """
    *inner, leaves = segment_edges(branches)
    rest = max(length - tokens * len(inner), 0)
    return sum(inner) * tokens + leaves * rest


def completions_steps(chains: int, num: int, length: int, *, of_prompt: bool = False) -> float:
    """VinePPO and others that value each step by `num` fresh rollouts: n K sum of (T - t) over steps t = 1..T - 1, and
    K T more for the prompt's own value. The chains themselves are not counted."""
    return chains * num * length * (length - 1) / 2 + (num * length if of_prompt else 0)


def omega_rollouts(num: int, length: int) -> int:
    """OmegaPRM: rollouts to find the first error of one solution by halving, k ceil(log2 T), instead of k (T - 1)."""
    return num * math.ceil(math.log2(length)) if length > 1 else 0


def shape_of(cfg: RolloutConfig, length: int) -> Shape | None:
    """The tree of a config whose trajectories have `length` steps; None for expanders that branch inside turns, and for
    searches, whose shape follows their judge (see `most_steps`)."""
    length = min(length, cfg.max_steps)
    match cfg.expander:
        case ExpanderKind.chains:
            return chains_shape(cfg.num_leaves, length)
        case ExpanderKind.beam_forks:
            if cfg.survivors is Survivors.scored:
                return beam_shape(cfg.num_leaves, cfg.max_forks, cfg.num_leaves, length)
            return chains_shape(cfg.num_leaves, length)
        case ExpanderKind.beam:
            return beam_shape(cfg.num_leaves, cfg.max_forks, cfg.num_leaves * cfg.max_forks, length)
        case ExpanderKind.random_expand:
            return random_expand_shape(cfg.num_trees, cfg.expand_nodes, cfg.expand_rounds, cfg.keep_leaves, length)
        case ExpanderKind.comb:
            return comb_shape(cfg.num_candidates, length)
        case _:
            return None


def most_steps(cfg: RolloutConfig) -> int | None:
    """Steps that a search may sample at most; None where nothing but its judge bounds it."""
    bounds = [cfg.max_nodes] if cfg.max_nodes else []
    if cfg.max_tree_tokens:
        bounds.append(cfg.max_tree_tokens)
    if cfg.expander is ExpanderKind.mcts:
        bounds.append(cfg.search_simulations * cfg.max_forks)
    return min(bounds) if bounds else None


def predicted(cfg: RolloutConfig, length: int, lengths: Lengths) -> Cost | None:
    """What a tree of this config costs with a cache that never forgets; None as for `shape_of`, but for the expanders
    that branch inside the turn of a one-turn task."""
    shape = shape_of(cfg, length)
    if shape is not None:
        return cost_of(shape, lengths)
    if cfg.expander is ExpanderKind.entropy_expand and length == 1:
        numbers = (cfg.num_trees, cfg.expand_nodes, cfg.expand_rounds, cfg.token_forks)
        generated, leaves = entropy_expand_tokens(*numbers, lengths.turn_tokens), entropy_expand_leaves(*numbers)
        steps, before = leaves, (leaves - cfg.num_trees) * lengths.turn_tokens / 2
    elif cfg.expander is ExpanderKind.segments and length == 1 and not cfg.segment_leaves:
        edges = segment_edges(cfg.segment_branches)
        generated = segment_tokens(cfg.segment_branches, cfg.segment_tokens, lengths.turn_tokens)
        steps, before = sum(edges), sum(num * depth * cfg.segment_tokens for depth, num in enumerate(edges))
        leaves = edges[-1]
    else:
        return None
    return Cost(
        steps=steps,
        generated=generated,
        prefilled=lengths.prompt_tokens,
        cached=(steps - 1) * lengths.prompt_tokens + before,
        trained=generated,
        trajectories=leaves,
        chains_generated=leaves * lengths.turn_tokens,
    )


def chains_cost(num: float, length: int, lengths: Lengths) -> Cost:
    """What as many independent chains cost, each computing its prompt and its observations once: nothing is shared."""
    cost, prompts = cost_of(chains_shape(num, length), lengths), (num - 1) * lengths.prompt_tokens
    return replace(cost, prefilled=cost.prefilled + prompts, cached=cost.cached - prompts)


def cost_of(shape: Shape, lengths: Lengths) -> Cost:
    """Tokens of a tree of this shape: the prompt is computed once, and each observation that is followed once."""
    step = lengths.turn_tokens + lengths.observation_tokens
    context = sum(num * (lengths.prompt_tokens + depth * step) for depth, num in enumerate(shape.steps_D))
    prefilled = lengths.prompt_tokens + sum(shape.continued_D) * lengths.observation_tokens
    return Cost(
        steps=shape.steps,
        generated=shape.steps * lengths.turn_tokens,
        prefilled=prefilled,
        cached=context - prefilled,
        trained=sum(shape.trained_D) * lengths.turn_tokens,
        trajectories=shape.leaves,
        chains_generated=shape.leaves * len(shape.steps_D) * lengths.turn_tokens,
    )


def lengths_of(trees: Iterable[Tree]) -> tuple[float, Lengths]:
    """What the trajectories of grown trees were like, on average, each by itself: turns of one, and its tokens.

    Returns: nan where there is no trajectory.
    """
    trees = list(trees)
    ends = [(tree, leaf) for tree in trees for leaf in tree.outcome_leaves()]
    sampled = sum(len(tree.nodes[row].action_ids) for tree, leaf in ends for row in tree.path(leaf))
    turns = sum(tree.num_turns(leaf) for tree, leaf in ends)
    replies = [len(node.observation_ids) for tree in trees for node in tree.nodes if node.observation_ids]
    return _mean(turns, len(ends)), Lengths(
        prompt_tokens=_mean(sum(len(tree.prompt.token_ids) for tree in trees), len(trees)),
        turn_tokens=_mean(sampled, turns),
        observation_tokens=sum(replies) / len(replies) if replies else 0.0,
    )


def _mean(total: float, num: int) -> float:
    return total / num if num else math.nan


def unique_tokens(tree: Tree) -> int:
    """Tokens of a tree that something was sampled behind: an engine that forgets nothing computes each of them once.

    The last token of a trajectory is sampled and never read, and neither is a reply that ends one.
    """
    followed = {node.parent for node in tree.nodes}
    return len(tree.prompt.token_ids) + sum(
        len(node.action_ids) + len(node.observation_ids) if row in followed else max(len(node.action_ids) - 1, 0)
        for row, node in enumerate(tree.nodes)
    )


def measured(trees: Iterable[Tree]) -> Cost:
    """What grown trees did cost. Their trained trajectories, sampled independently, are `chains_generated`."""
    return sum((_measured(tree) for tree in trees), start=Cost())


def _measured(tree: Tree) -> Cost:
    after = {ROOT: len(tree.prompt.token_ids)}
    sampled = {ROOT: 0}
    for row, node in enumerate(tree.nodes):
        after[row] = after[node.parent] + len(node.action_ids) + len(node.observation_ids)
        sampled[row] = sampled[node.parent] + len(node.action_ids)
    context = [after[node.parent] for node in tree.nodes]
    cached = [node.num_cached_tokens for node in tree.nodes]
    # The rest of a step that was cut in two was no request. `rollout.tree.split` calls all before it cached, which no
    # engine does: it computes the last token of a context in any case.
    is_request = [known < size for size, known in zip(context, cached, strict=True)]
    ends = tree.outcome_leaves()
    return Cost(
        steps=sum(is_request),
        generated=tree.num_generated_tokens(),
        prefilled=sum(size - known for size, known, asked in zip(context, cached, is_request, strict=True) if asked),
        cached=sum(known for known, asked in zip(cached, is_request, strict=True) if asked),
        trained=sum(
            len(tree.nodes[row].action_ids)
            for row in {row for leaf in tree.trained_leaves() for row in tree.path(leaf)}
        ),
        trajectories=len(ends),
        chains_generated=sum(sampled[leaf] for leaf in ends),
    )
