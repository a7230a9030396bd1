"""Trees laid out depth first, so that every token of a forest is computed once.

A pack is one long row of tokens. `end_T` alone says who sees whom (`rl.policy.mask`), a token's position is its depth
in its own path, and an edge is one trained prediction: the row it is read from and the token it predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from conf.errors import ConfigError, DataError, ShapeError
from rollout.tree import ROOT, Tree

PAD_ID = 0
"""Token of the padding; any id would do, since nothing sees it and nothing is predicted from it."""


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

    def __post_init__(self) -> None:
        num_nodes = len(self.tree.nodes)
        for name in ("w_pos", "w_neg", "w0"):
            length = len(getattr(self, name))
            if length != num_nodes:
                raise ShapeError(
                    f"{name} has {length} weights but the tree of {self.tree.prompt.id!r} has {num_nodes} steps: "
                    "weights would land on other steps. Pass one weight per row of tree.nodes, 0 for untrained steps."
                )

    def is_trained(self, row: int) -> bool:
        """True when the step has any weight."""
        return bool(self.w_pos[row] or self.w_neg[row] or self.w0[row])

    def total_weight(self) -> float:
        """Sum of w0 over trained tokens: this tree's part of the denominator of a mean over tokens."""
        return sum(weight * len(node.action_ids) for weight, node in zip(self.w0, self.tree.nodes, strict=True))

    def only(self, rows: set[int]) -> TreeCredit:
        """The same tree with the weights of all other rows set to zero."""

        def kept(weights: list[float]) -> list[float]:
            return [weight if row in rows else 0.0 for row, weight in enumerate(weights)]

        return TreeCredit(tree=self.tree, w_pos=kept(self.w_pos), w_neg=kept(self.w_neg), w0=kept(self.w0))


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
    old_logprob_E: Tensor
    """float64 [E], log-probability when it was sampled, in nats."""
    w_pos_E: Tensor
    """float64 [E], see `TreeCredit`."""
    w_neg_E: Tensor
    """float64 [E]."""
    w0_E: Tensor
    """float64 [E]."""
    traj_index_P: Tensor
    """int64 [P], index in the pack of every token of every trajectory, trajectories one after the other."""
    traj_ptr: list[int]
    """Where each trajectory starts in traj_index_P; one more entry than trajectories."""
    num_tokens: int
    """T without padding."""

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


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


def plan_packs(trees: Sequence[TreeCredit], budget_tokens: int) -> list[list[TreeCredit]]:
    """Share trees out over packs of at most `budget_tokens` unique tokens, first fit, largest first.

    A tree above the budget is split at trajectory borders. Gradients add up over trajectories, so that is exact: every
    step's weights go to one shard, and later shards carry the shared prefix as context of weight zero. A single path
    above the budget is packed alone. The same trees always give the same packs.

    Raises: ConfigError for a budget below one token.
    """
    if budget_tokens < 1:
        raise ConfigError(
            f"learner.pack_tokens={budget_tokens} leaves no room for a token, so nothing could be trained. "
            "Use at least the longest path, e.g. rollout.max_context_tokens."
        )
    shards = [shard for credit in trees for shard in _split(credit, budget_tokens)]
    sizes = [unique_tokens(shard) for shard in shards]
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
        rows: list[int] = []
        stack = self.children[ROOT][::-1]
        while stack:
            rows.append(stack.pop())
            stack += self.children[rows[-1]][::-1]
        return rows


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


def _split(credit: TreeCredit, budget_tokens: int) -> list[TreeCredit]:
    if unique_tokens(credit) <= budget_tokens:
        return [credit] if _shape(credit).own else []
    shape = _shape(credit)
    prompt_tokens = len(credit.tree.prompt.token_ids)
    shards: list[set[int]] = []
    held: set[int] = set()
    used = 0
    for leaf in shape.leaves():
        path = credit.tree.path(leaf)
        extra = sum(shape.own[row] for row in path if row not in held)
        if not shards or used + extra > budget_tokens:
            shards.append(set())
            held, used = set(), prompt_tokens
            extra = sum(shape.own[row] for row in path)
        held.update(path)
        used += extra
        # A step that several shards hold is trained by the first of them and only context in the others.
        shards[-1].update(row for row in path if not any(row in shard for shard in shards[:-1]))
    return [credit.only(rows) for rows in shards]


@dataclass(slots=True)
class _Layout:
    """The pack as it grows, in plain lists."""

    input_ids: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    edge_row: list[int] = field(default_factory=list)
    edge_token: list[int] = field(default_factory=list)
    old_logprob: list[float] = field(default_factory=list)
    w_pos: list[float] = field(default_factory=list)
    w_neg: list[float] = field(default_factory=list)
    w0: list[float] = field(default_factory=list)
    traj_index: list[int] = field(default_factory=list)
    traj_ptr: list[int] = field(default_factory=lambda: [0])

    def add(self, credit: TreeCredit) -> None:
        """Append one tree."""
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
        for row in shape.depth_first():
            spans[row] = self._add_step(credit, row, spans[credit.tree.nodes[row].parent][1] - 1, shape, totals[row])
        for leaf in shape.leaves():
            for row in [ROOT, *credit.tree.path(leaf)]:
                self.traj_index.extend(range(*spans[row]))
            self.traj_ptr.append(len(self.traj_index))

    def _add_step(
        self, credit: TreeCredit, row: int, previous: int, shape: _Shape, subtree_tokens: int
    ) -> tuple[int, int]:
        """Append one step behind the token `previous`; returns where it starts and stops."""
        start = len(self.input_ids)
        token_ids = _step_ids(credit.tree, row, has_children=bool(shape.children[row]))
        self._append(token_ids, position=self.position[previous] + 1, end=start + subtree_tokens)
        if credit.is_trained(row):
            node = credit.tree.nodes[row]
            num_actions = len(node.action_ids)
            self.edge_row += [previous, *range(start, start + num_actions - 1)]
            self.edge_token += range(start, start + num_actions)
            self.old_logprob += node.action_logprobs
            self.w_pos += [credit.w_pos[row]] * num_actions
            self.w_neg += [credit.w_neg[row]] * num_actions
            self.w0 += [credit.w0[row]] * num_actions
        return start, len(self.input_ids)

    def _append(self, token_ids: list[int], position: int, end: int) -> None:
        self.input_ids += token_ids
        self.position += range(position, position + len(token_ids))
        self.end += [end] * len(token_ids)

    def batch(self, pad_multiple: int) -> PackedBatch:
        """The pack as tensors."""
        num_tokens = len(self.input_ids)
        for index in range(num_tokens, num_tokens + -num_tokens % pad_multiple):
            self._append([PAD_ID], position=0, end=index + 1)
        input_ids_T = torch.tensor(self.input_ids, dtype=torch.int64)
        edge_token_E = torch.tensor(self.edge_token, dtype=torch.int64)
        return PackedBatch(
            input_ids_T=input_ids_T,
            position_T=torch.tensor(self.position, dtype=torch.int64),
            end_T=torch.tensor(self.end, dtype=torch.int64),
            edge_row_E=torch.tensor(self.edge_row, dtype=torch.int64),
            edge_token_E=edge_token_E,
            edge_target_E=input_ids_T[edge_token_E],
            old_logprob_E=torch.tensor(self.old_logprob, dtype=torch.float64),
            w_pos_E=torch.tensor(self.w_pos, dtype=torch.float64),
            w_neg_E=torch.tensor(self.w_neg, dtype=torch.float64),
            w0_E=torch.tensor(self.w0, dtype=torch.float64),
            traj_index_P=torch.tensor(self.traj_index, dtype=torch.int64),
            traj_ptr=self.traj_ptr,
            num_tokens=num_tokens,
        )
