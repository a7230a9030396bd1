"""Trees laid out depth first, so that every token of a forest is computed once.

A pack is one long row of tokens. `end_T` alone says who sees whom (`rl.policy.mask`), a token's position is its depth
in its own path, and an edge is one trained prediction: the row it is read from and the token it predicts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from conf.errors import ConfigError, DataError, ShapeError
from rollout.tree import ROOT, Tree

PAD_ID = 0
"""Token of the padding; any id would do, since nothing sees it and nothing is predicted from it."""


@dataclass(kw_only=True, slots=True)
class PathCredit:
    """How one trajectory trains; what the sums of `TreeCredit` are made of."""

    leaf: int
    """Row of the step that ended it."""
    advantage: list[float]
    """Per step of `tree.path(leaf)`."""
    weight: list[float]
    """Per step of `tree.path(leaf)`; 0 where it trains nothing."""


@dataclass(kw_only=True, slots=True)
class TokenCredit:
    """What a critic makes of the action tokens; per row of the tree and action token, [] for rows without credit."""

    advantage: list[list[float]]
    """Added at the token to the advantage of every trajectory through it."""
    value: list[list[float]]
    """What the critic said of the state before the token, before this step's updates."""
    target: list[list[float]]
    """The return that the critic should have said."""


@dataclass(kw_only=True, slots=True)
class TreeCredit:
    """A tree and how its steps train: sums over the trajectories through each step, 0 where a step trains nothing."""

    tree: Tree
    w_pos: list[float]
    """Per row: sum of weight * max(advantage, 0)."""
    w_neg: list[float]
    """Per row: sum of weight * min(advantage, 0), so never positive."""
    w0: list[float]
    """Per row: sum of weight; the step's share of the token mean, of the KL and of the entropy terms."""
    paths: list[PathCredit] = field(default_factory=list)
    """The trajectories one by one, for losses that need them; may be left out where the sums are enough."""
    tokens: TokenCredit | None = None
    """Only with a critic; needs `paths`."""
    denominator: float = math.nan
    """This tree's part of what the losses of a mini-batch are divided by; by default `total_weight()`, a token mean."""

    def __post_init__(self) -> None:
        num_nodes = len(self.tree.nodes)
        for name in ("w_pos", "w_neg", "w0"):
            length = len(getattr(self, name))
            if length != num_nodes:
                raise ShapeError(
                    f"{name} has {length} weights but the tree of {self.tree.prompt.id!r} has {num_nodes} steps: "
                    "weights would land on other steps. Pass one weight per row of tree.nodes, 0 for untrained steps."
                )
        assert self.tokens is None or self.paths, "advantages of tokens add to those of the trajectories"
        if math.isnan(self.denominator):
            self.denominator = self.total_weight()

    def is_trained(self, row: int) -> bool:
        """True when the step has any weight."""
        return bool(self.w_pos[row] or self.w_neg[row] or self.w0[row])

    def total_weight(self) -> float:
        """Sum of w0 over trained tokens: this tree's part of the denominator of a mean over tokens."""
        return sum(weight * len(node.action_ids) for weight, node in zip(self.w0, self.tree.nodes, strict=True))

    def only_rows(self, rows: set[int]) -> TreeCredit:
        """The same tree with the weights of all other rows set to zero."""
        assert not self.paths, "trajectories are kept whole: use `only_paths`"

        def kept(weights: list[float]) -> list[float]:
            return [weight if row in rows else 0.0 for row, weight in enumerate(weights)]

        return replace(self, w_pos=kept(self.w_pos), w_neg=kept(self.w_neg), w0=kept(self.w0))

    def only_paths(self, paths: list[PathCredit]) -> TreeCredit:
        """The same tree trained by some of its trajectories alone."""
        sums = [[0.0] * len(self.tree.nodes) for _ in range(3)]
        for path in paths:
            steps = zip(self.tree.path(path.leaf), path.advantage, path.weight, strict=True)
            for row, advantage, weight in steps:
                for total, part in zip(sums, (max(advantage, 0.0), min(advantage, 0.0), 1.0), strict=True):
                    total[row] += weight * part
        return replace(self, w_pos=sums[0], w_neg=sums[1], w0=sums[2], paths=paths)


@dataclass(kw_only=True, slots=True)
class PathTokens:
    """Trained tokens trajectory by trajectory: M entries, a token in k trajectories k times; K trajectories."""

    edge_M: Tensor
    """int64 [M], the edge."""
    path_M: Tensor
    """int64 [M], the trajectory, from 0 to K - 1; entries of one trajectory are neighbours, in order."""
    advantage_M: Tensor
    """float64 [M], of this trajectory at this token."""
    weight_M: Tensor
    """float64 [M]."""
    num_paths: int
    """K; a trajectory that a pack holds is whole."""

    def to(self, device: torch.device) -> PathTokens:
        """The same on a device."""
        return _moved(self, device)


@dataclass(kw_only=True, slots=True)
class PackedBatch:
    """A forest as tensors; T tokens, E edges (trained tokens, each once), P tokens of all trajectories one by one."""

    input_ids_T: Tensor
    """int64 [T]."""
    position_T: Tensor
    """int64 [T], tokens before this one on its own path."""
    end_T: Tensor
    """int64 [T], one past the last token of the subtree below: token q sees token k exactly if k <= q < end_T[k]."""
    edge_row_E: Tensor
    """int64 [E], index of the token that each trained token is predicted from."""
    edge_token_E: Tensor
    """int64 [E], index of the trained token itself."""
    edge_target_E: Tensor
    """int64 [E], id of the trained token."""
    depth_E: Tensor
    """int64 [E], number of the token's step on its path, 1 for a first step."""
    engine_logprob_E: Tensor
    """float64 [E], log-probability that the engine gave the token when it sampled it, in nats."""
    old_logprob_E: Tensor
    """float64 [E], what the ratio is taken against: the engine's, unless the learner computed its own."""
    reference_logprob_E: Tensor | None = None
    """float64 [E], of the frozen reference; None without one."""
    w_pos_E: Tensor
    """float64 [E], see `TreeCredit`."""
    w_neg_E: Tensor
    """float64 [E]."""
    w0_E: Tensor
    """float64 [E]."""
    value_E: Tensor | None = None
    """float64 [E], see `TokenCredit`; None without a critic."""
    target_E: Tensor | None = None
    """float64 [E]."""
    paths: PathTokens | None = None
    """None unless the trees came with their trajectories."""
    traj_index_P: Tensor
    """int64 [P], index in the pack of every token of every trajectory, trajectories one after the other."""
    traj_ptr: list[int]
    """Where each trajectory starts in traj_index_P; one more entry than trajectories."""
    trained_steps: list[tuple[int, int]]
    """(number of the tree, row) of each trained step, in the order of the edges."""
    num_tokens: int
    """T without padding."""
    plan: Any = None
    """What the attention of this pack needs; made by the layout at first use."""

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device."""
        return _moved(self, device)


Batch = TypeVar("Batch", PackedBatch, PathTokens)


def _moved(batch: Batch, device: torch.device) -> Batch:
    values = {spec.name: getattr(batch, spec.name) for spec in fields(batch)}
    moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor | PathTokens)}
    return replace(batch, **moved)


def pack(trees: Sequence[TreeCredit], pad_multiple: int = 1) -> PackedBatch:
    """Lay trees out depth first: the prompt, then each step's action and observation, and behind it its children.

    Steps with no weight on any path below them are left out, and so are observations that nothing trained follows.

    Args:
        trees: any number of trees; those that train nothing take no room.
        pad_multiple: T is padded to a multiple of this by tokens that see only themselves.
    Raises: DataError for a prompt without tokens.
    """
    layout = _Layout()
    for credit in trees:
        layout.add(credit)
    return layout.batch(pad_multiple)


def plan_packs(
    trees: Sequence[TreeCredit], budget_tokens: int, *, counts_copies: bool = False
) -> list[list[TreeCredit]]:
    """Share trees out over packs of at most `budget_tokens` tokens, first fit, largest first.

    A tree above the budget is split at trajectory borders. Gradients add up over trajectories, so that is exact: every
    step's weights go to one shard, and later shards carry the shared prefix as context of weight zero. A single path
    above the budget is packed alone. The same trees always give the same packs.

    Args:
        counts_copies: a token counts once for each trajectory through it, as for a layout that computes them apart;
            else once.
    Raises: ConfigError for a budget below one token.
    """
    if budget_tokens < 1:
        raise ConfigError(
            f"learner.pack_tokens={budget_tokens} leaves no room for a token, so nothing could be trained. "
            "Use at least the longest path, e.g. rollout.max_context_tokens."
        )
    shards = [shard for credit in trees for shard in _split(credit, budget_tokens, counts_copies)]
    sizes = [_size(shard, counts_copies) for shard in shards]
    packs: list[list[TreeCredit]] = []
    room: list[int] = []
    for index in sorted(range(len(shards)), key=lambda index: (-sizes[index], index)):
        fitting = next((bin for bin, free in enumerate(room) if free >= sizes[index]), None)
        if fitting is None:
            fitting = len(packs)
            packs.append([])
            room.append(budget_tokens)
        packs[fitting].append(shards[index])
        room[fitting] -= sizes[index]
    return packs


def edges_of_steps(batch: PackedBatch, trees: Sequence[TreeCredit]) -> Iterator[tuple[int, int, slice]]:
    """Of each trained step: the number of its tree in the pack, its row, and its edges."""
    start = 0
    for number, row in batch.trained_steps:
        stop = start + len(trees[number].tree.nodes[row].action_ids)
        yield number, row, slice(start, stop)
        start = stop


def unique_tokens(credit: TreeCredit) -> int:
    """Tokens that the tree takes in a pack; 0 when it trains nothing."""
    shape = _shape(credit)
    return len(credit.tree.prompt.token_ids) + sum(shape.own.values()) if shape.own else 0


@dataclass(kw_only=True, slots=True)
class _Shape:
    """The part of a tree that is packed."""

    children: dict[int, list[int]]
    """Packed children of each packed row and of ROOT."""
    own: dict[int, int]
    """Packed tokens of each packed row alone, in row order."""

    def subtree_tokens(self, parents: dict[int, int]) -> dict[int, int]:
        """Packed tokens of each row and all below it."""
        totals = dict(self.own)
        for row in reversed(self.own):
            if parents[row] != ROOT:
                totals[parents[row]] += totals[row]
        return totals

    def leaves(self) -> list[int]:
        """Rows where a packed trajectory ends, depth first."""
        return [row for row in self.depth_first() if not self.children[row]]

    def depth_first(self) -> list[int]:
        """Packed rows in the order they are laid out."""
        return _walk(self.children)


def _shape(credit: TreeCredit) -> _Shape:
    nodes = credit.tree.nodes
    live = [credit.is_trained(row) for row in range(len(nodes))]
    for row in reversed(range(len(nodes))):
        if live[row] and nodes[row].parent != ROOT:
            live[nodes[row].parent] = True
    rows = [row for row in range(len(nodes)) if live[row]]
    children: dict[int, list[int]] = {row: [] for row in [ROOT, *rows]}
    for row in rows:
        children[nodes[row].parent].append(row)
    own = {row: len(_step_ids(credit.tree, row, has_children=bool(children[row]))) for row in rows}
    return _Shape(children=children, own=own)


def _step_ids(tree: Tree, row: int, *, has_children: bool) -> list[int]:
    """Tokens of one step as packed: nothing follows the last action of a trajectory, so its observation is left out."""
    node = tree.nodes[row]
    assert node.action_ids, "a sampled step has at least its stop token"
    return node.action_ids + node.observation_ids if has_children else node.action_ids


def path_tokens(credit: TreeCredit) -> int:
    """Tokens of all trajectories that a pack of the tree holds, each counted apart; 0 when it trains nothing."""
    shape = _shape(credit)
    return sum(len(credit.tree.prompt.token_ids) + _path_size(credit, leaf, shape.own) for leaf in shape.leaves())


def _path_size(credit: TreeCredit, leaf: int, own: dict[int, int]) -> int:
    return sum(own.get(row, 0) for row in credit.tree.path(leaf))


def _size(credit: TreeCredit, counts_copies: bool) -> int:
    return path_tokens(credit) if counts_copies else unique_tokens(credit)


def _split(credit: TreeCredit, budget_tokens: int, counts_copies: bool) -> list[TreeCredit]:
    if _size(credit, counts_copies) <= budget_tokens:
        return [credit] if _shape(credit).own else []
    split = _split_paths if credit.paths else _split_rows
    return split(credit, budget_tokens, counts_copies)


def _split_rows(credit: TreeCredit, budget_tokens: int, counts_copies: bool) -> list[TreeCredit]:
    """A step that several shards hold is trained by the first of them and only context in the others."""
    shards: list[set[int]] = []
    for paths in _shards(credit, _shape(credit).leaves(), budget_tokens, counts_copies):
        rows = {row for leaf in paths for row in credit.tree.path(leaf)}
        shards.append({row for row in rows if not any(row in shard for shard in shards)})
    return [credit.only_rows(rows) for rows in shards]


def _split_paths(credit: TreeCredit, budget_tokens: int, counts_copies: bool) -> list[TreeCredit]:
    """Every trajectory is trained whole, by one shard."""
    live = {path.leaf: path for path in credit.paths if any(path.weight)}
    leaves = [row for row in _depth_first(credit.tree) if row in live]
    shards = _shards(credit, leaves, budget_tokens, counts_copies)
    return [credit.only_paths([live[leaf] for leaf in shard]) for shard in shards]


def _shards(credit: TreeCredit, leaves: list[int], budget_tokens: int, counts_copies: bool) -> list[list[int]]:
    """Neighbouring trajectories that fit the budget together, by their last rows; one above the budget is alone."""
    own = _shape(credit).own
    prompt_tokens = len(credit.tree.prompt.token_ids)
    shards: list[list[int]] = []
    held: set[int] = set()
    used = 0
    for leaf in leaves:
        path = [row for row in credit.tree.path(leaf) if row in own]
        whole = prompt_tokens + _path_size(credit, leaf, own)
        extra = whole if counts_copies else sum(own[row] for row in path if row not in held)
        if not shards or used + extra > budget_tokens:
            shards.append([])
            held, used, extra = set(), 0, whole
        held.update(path)
        used += extra
        shards[-1].append(leaf)
    return shards


def _depth_first(tree: Tree) -> list[int]:
    children: dict[int, list[int]] = {row: [] for row in range(ROOT, len(tree.nodes))}
    for row, node in enumerate(tree.nodes):
        children[node.parent].append(row)
    return _walk(children)


def _walk(children: dict[int, list[int]]) -> list[int]:
    """Rows below ROOT, each before its children and these before its siblings."""
    rows: list[int] = []
    stack = children[ROOT][::-1]
    while stack:
        rows.append(stack.pop())
        stack += children[rows[-1]][::-1]
    return rows


@dataclass(slots=True)
class _Layout:
    """The pack as it grows, in plain lists."""

    input_ids: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    edge_row: list[int] = field(default_factory=list)
    edge_token: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    engine_logprob: list[float] = field(default_factory=list)
    w_pos: list[float] = field(default_factory=list)
    w_neg: list[float] = field(default_factory=list)
    w0: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    target: list[float] = field(default_factory=list)
    path_edge: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    path_advantage: list[float] = field(default_factory=list)
    path_weight: list[float] = field(default_factory=list)
    num_paths: int = 0
    num_trees: int = 0
    trained_steps: list[tuple[int, int]] = field(default_factory=list)
    traj_index: list[int] = field(default_factory=list)
    traj_ptr: list[int] = field(default_factory=lambda: [0])

    def add(self, credit: TreeCredit) -> None:
        """Append one tree."""
        number, self.num_trees = self.num_trees, self.num_trees + 1
        shape = _shape(credit)
        if not shape.own:
            return
        prompt_ids = credit.tree.prompt.token_ids
        if not prompt_ids:
            raise DataError(
                f"prompt {credit.tree.prompt.id!r} has no tokens, so nothing predicts the first token of its steps. "
                "Give it at least a start token, for instance by a chat template."
            )
        totals = shape.subtree_tokens({row: credit.tree.nodes[row].parent for row in shape.own})
        start = len(self.input_ids)
        roots_tokens = sum(totals[row] for row in shape.children[ROOT])
        self._append(list(prompt_ids), position=0, end=start + len(prompt_ids) + roots_tokens)
        spans = {ROOT: (start, len(self.input_ids))}
        first_edge: dict[int, int] = {}
        for row in shape.depth_first():
            previous = spans[credit.tree.nodes[row].parent][1] - 1
            spans[row] = self._add_step(credit, row, previous, shape, totals[row])
            if credit.is_trained(row):
                first_edge[row] = self._add_edges(credit, row, previous, spans[row][0])
                self.trained_steps.append((number, row))
        for leaf in shape.leaves():
            for row in [ROOT, *credit.tree.path(leaf)]:
                self.traj_index.extend(range(*spans[row]))
            self.traj_ptr.append(len(self.traj_index))
        for path in credit.paths:
            if any(path.weight):
                self._add_path(credit, path, first_edge)

    def _add_step(
        self, credit: TreeCredit, row: int, previous: int, shape: _Shape, subtree_tokens: int
    ) -> tuple[int, int]:
        """Append one step behind the token `previous`; returns where it starts and stops."""
        start = len(self.input_ids)
        token_ids = _step_ids(credit.tree, row, has_children=bool(shape.children[row]))
        self._append(token_ids, position=self.position[previous] + 1, end=start + subtree_tokens)
        return start, len(self.input_ids)

    def _add_edges(self, credit: TreeCredit, row: int, previous: int, start: int) -> int:
        """Append the trained tokens of the step that starts at token `start`; returns their first edge."""
        first, node = len(self.edge_row), credit.tree.nodes[row]
        num_actions = len(node.action_ids)
        self.edge_row += [previous, *range(start, start + num_actions - 1)]
        self.edge_token += range(start, start + num_actions)
        self.depth += [credit.tree.depth(row)] * num_actions
        self.engine_logprob += node.action_logprobs
        self.w0 += [credit.w0[row]] * num_actions
        if credit.tokens is None:
            self.w_pos += [credit.w_pos[row]] * num_actions
            self.w_neg += [credit.w_neg[row]] * num_actions
        else:  # summed over the trajectories as they are added
            self.w_pos += [0.0] * num_actions
            self.w_neg += [0.0] * num_actions
            self.value += credit.tokens.value[row]
            self.target += credit.tokens.target[row]
        return first

    def _add_path(self, credit: TreeCredit, path: PathCredit, first_edge: dict[int, int]) -> None:
        """Append the trained tokens of one trajectory, from its first step to its last."""
        for row, advantage, weight in zip(credit.tree.path(path.leaf), path.advantage, path.weight, strict=True):
            if not weight:
                continue
            num_actions = len(credit.tree.nodes[row].action_ids)
            added = [0.0] * num_actions if credit.tokens is None else credit.tokens.advantage[row]
            advantages = [advantage + extra for extra in added]
            edges = range(first_edge[row], first_edge[row] + num_actions)
            if credit.tokens is not None:
                for edge, total in zip(edges, advantages, strict=True):
                    self.w_pos[edge] += weight * max(total, 0.0)
                    self.w_neg[edge] += weight * min(total, 0.0)
            self.path_edge += edges
            self.path += [self.num_paths] * num_actions
            self.path_advantage += advantages
            self.path_weight += [weight] * num_actions
        self.num_paths += 1

    def _append(self, token_ids: list[int], position: int, end: int) -> None:
        self.input_ids += token_ids
        self.position += range(position, position + len(token_ids))
        self.end += [end] * len(token_ids)

    def batch(self, pad_multiple: int) -> PackedBatch:
        """The pack as tensors."""
        num_tokens = len(self.input_ids)
        for index in range(num_tokens, num_tokens + -num_tokens % pad_multiple):
            self._append([PAD_ID], position=0, end=index + 1)
        input_ids_T, edge_token_E = _ids(self.input_ids), _ids(self.edge_token)
        engine_logprob_E = _floats(self.engine_logprob)
        return PackedBatch(
            input_ids_T=input_ids_T,
            position_T=_ids(self.position),
            end_T=_ids(self.end),
            edge_row_E=_ids(self.edge_row),
            edge_token_E=edge_token_E,
            edge_target_E=input_ids_T[edge_token_E],
            depth_E=_ids(self.depth),
            engine_logprob_E=engine_logprob_E,
            old_logprob_E=engine_logprob_E,
            w_pos_E=_floats(self.w_pos),
            w_neg_E=_floats(self.w_neg),
            w0_E=_floats(self.w0),
            value_E=_floats(self.value) if self.value else None,
            target_E=_floats(self.target) if self.target else None,
            paths=self._paths() if self.num_paths else None,
            traj_index_P=_ids(self.traj_index),
            traj_ptr=self.traj_ptr,
            trained_steps=self.trained_steps,
            num_tokens=num_tokens,
        )

    def _paths(self) -> PathTokens:
        return PathTokens(
            edge_M=_ids(self.path_edge),
            path_M=_ids(self.path),
            advantage_M=_floats(self.path_advantage),
            weight_M=_floats(self.path_weight),
            num_paths=self.num_paths,
        )


def _ids(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _floats(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
