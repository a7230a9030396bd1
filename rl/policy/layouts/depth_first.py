"""A pack computed one piece of a path at a time, depth first, so that memory holds one path and not the forest.

Forward keeps the last hidden states alone. Backward walks the tree again: on the way down pieces are computed without
a graph, for the keys and values that those below need; on the way up each is computed once more with one, and passes
the gradient of the keys and values before it to its ancestors (arXiv 2602.00482 walks so; our reading: gradients of
keys and values add up in float32).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from rl.policy.layouts.attention import masked_attention
from rl.policy.layouts.backend import use_tree_attention
from rl.policy.mask import segments
from rl.policy.pack import PackedBatch

CUT_TOKENS = 512
"""Longest piece. Longer ones use more memory; a chain of shorter ones is computed up to three times, not two."""


def depth_first_hidden(backbone: nn.Module, batch: PackedBatch, cut_tokens: int = CUT_TOKENS) -> Tensor:
    """Last hidden states [T, D] of a pack, zeros for padding.

    Parameters get their gradients while backward runs through this function, as with reentrant checkpointing: use
    `backward()`, since `torch.autograd.grad` finds no path to them. The model must give the same twice (no dropout).
    The number of calls depends on the trees, so processes that share a model's shards would wait for each other
    forever: one process only.

    Args:
        backbone: a model of transformers without its output layer; afterwards it has the tree attention.
        cut_tokens: longer runs without a fork are cut into pieces of this many tokens.
    """
    use_tree_attention(backbone)
    is_trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in backbone.parameters())
    # Autograd calls backward only for a function with an input that wants a gradient; the token ids cannot.
    anchor = torch.empty(0, requires_grad=is_trained)
    hidden_TD = _DepthFirst.apply(anchor, _Walk(backbone, batch, _pieces(batch, cut_tokens)))
    assert isinstance(hidden_TD, Tensor), "apply gives what forward returns"
    return hidden_TD


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens [start, stop) of a pack, a run without a fork."""

    start: int
    stop: int
    depth: int
    """Tokens before it on its path."""
    end: int
    """One past the last token of the subtree below it."""

    def depths(self) -> slice:
        """Its tokens' places on its path."""
        return slice(self.depth, self.depth + self.stop - self.start)

    def has_children(self) -> bool:
        """True when others follow it on a path."""
        return self.end > self.stop


def _pieces(batch: PackedBatch, cut_tokens: int) -> list[_Piece]:
    """Segments cut to size, in depth-first order; padding is left out."""
    assert cut_tokens > 0, "a piece has at least one token"
    end_T, depth_T = batch.end_T.tolist(), batch.position_T.tolist()
    return [
        _Piece(start, min(start + cut_tokens, stop), depth_T[start], end_T[start])
        for first, stop in segments(batch.end_T)
        for start in range(first, stop, cut_tokens)
        if start < batch.num_tokens
    ]


@dataclass(slots=True)
class _Layer:
    """Keys and values of one layer along the current path: a token's place is its depth, so siblings overwrite.

    All are [1, heads, longest path, head_dim].
    """

    key: Tensor
    value: Tensor
    grad_key: Tensor | None = None
    """What the descendants met so far send back, at least float32; only in backward."""
    grad_value: Tensor | None = None

    def grads(self) -> tuple[Tensor, Tensor]:
        """Gradients of the keys and of the values, 0 at first."""
        if self.grad_key is None or self.grad_value is None:
            wide = torch.promote_types(self.key.dtype, torch.float32)
            self.grad_key = torch.zeros_like(self.key, dtype=wide)
            self.grad_value = torch.zeros_like(self.value, dtype=wide)
        return self.grad_key, self.grad_value


@dataclass(slots=True)
class _Path:
    """What is known of the current path."""

    num_tokens: int
    """Of the longest path."""
    layers: dict[int, _Layer] = field(default_factory=dict)

    def write(self, layer: int, piece: _Piece, key: Tensor, value: Tensor) -> None:
        """Keep a piece's keys and values."""
        if layer not in self.layers:
            self.layers[layer] = _Layer(self._room(key), self._room(value))
        self.layers[layer].key[:, :, piece.depths()] = key
        self.layers[layer].value[:, :, piece.depths()] = value

    def add_gradients(self, layer: int, depths: slice, grad_key: Tensor, grad_value: Tensor) -> None:
        """Add what a piece sends back to the keys and values of its ancestors."""
        for total, grad in zip(self.layers[layer].grads(), (grad_key, grad_value), strict=True):
            total[:, :, depths] += grad

    def take_gradients(self, layer: int, piece: _Piece) -> list[Tensor]:
        """What all descendants of a piece have sent back; forgotten here, since the next piece there is another."""
        taken = []
        for total in self.layers[layer].grads():
            taken.append(total[:, :, piece.depths()].to(self.layers[layer].key.dtype, copy=True))
            total[:, :, piece.depths()] = 0.0
        return taken

    def _room(self, like: Tensor) -> Tensor:
        return like.new_zeros(1, like.shape[1], self.num_tokens, like.shape[3])


class _PieceAttention:
    """Attention plan of one piece: its ancestors' keys and values come from memory, its own go there.

    No dataclass: FSDP hands a layer copies of those, and what the layer noted in one would be lost.
    """

    def __init__(self, path: _Path, piece: _Piece, *, keeps_graph: bool) -> None:
        self.path, self.piece, self.keeps_graph = path, piece, keeps_graph
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        """With a graph: the piece's own keys and values of each layer."""
        self.before: dict[int, tuple[slice, Tensor, Tensor]] = {}
        """With a graph: depths of the ancestors seen, and their keys and values as leaves."""
        self.masks: dict[int | None, Tensor] = {}
        """By window."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        layer: int,
    ) -> Tensor:
        """See `rl.policy.layouts.attention.AttentionPlan`."""
        first = 0 if window is None else max(0, self.piece.depth + 1 - window)
        if not self.keeps_graph:
            self.path.write(layer, self.piece, key, value)
        elif layer not in self.own:  # a checkpointed layer comes here again in backward
            self.own[layer] = key, value
        if self.piece.depth > first:
            key_before, value_before = self._before(layer, first)
            key, value = torch.cat([key_before, key], dim=2), torch.cat([value_before, value], dim=2)
        mask_QK = self._mask(query, key, window)
        return masked_attention(query, key, value, mask_QK, scaling=scaling, softcap=softcap)

    def _before(self, layer: int, first: int) -> tuple[Tensor, Tensor]:
        if layer not in self.before:
            memory, depths = self.path.layers[layer], slice(first, self.piece.depth)
            key, value = memory.key[:, :, depths].detach(), memory.value[:, :, depths].detach()
            if not self.keeps_graph:
                return key, value
            self.before[layer] = depths, key.requires_grad_(), value.requires_grad_()
        return self.before[layer][1:]

    def _mask(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """bool [Q, K]; the last key belongs to the last query."""
        if window not in self.masks:
            num_queries, num_keys = query.shape[2], key.shape[2]
            mask_QK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            mask_QK = mask_QK.tril(num_keys - num_queries)
            self.masks[window] = mask_QK if window is None else mask_QK.triu(num_keys - num_queries - window + 1)
        return self.masks[window]


@dataclass(frozen=True, slots=True)
class _Walk:
    """A model and the pieces of a pack that it is to compute."""

    backbone: nn.Module
    batch: PackedBatch
    pieces: list[_Piece]

    def new_path(self) -> _Path:
        """Room for the longest path."""
        return _Path(max(piece.depths().stop for piece in self.pieces))

    def hidden(self, piece: _Piece, plan: _PieceAttention) -> Tensor:
        """Last hidden states of one piece, with its ancestors as context."""
        tokens = slice(piece.start, piece.stop)
        output = self.backbone(
            input_ids=self.batch.input_ids_T[None, tokens],
            position_ids=self.batch.position_T[None, tokens],
            use_cache=False,
            tree_plan=plan,
        )
        return output.last_hidden_state[0]

    def upwards(self, path: _Path) -> Iterator[_Piece]:
        """Pieces, each after all below it, with its ancestors on the path by then."""
        open_pieces: list[_Piece] = []
        for piece in self.pieces:
            while open_pieces and open_pieces[-1].end <= piece.start:
                yield open_pieces.pop()
            if piece.has_children():
                with torch.no_grad():
                    self.hidden(piece, _PieceAttention(path, piece, keeps_graph=False))
            open_pieces.append(piece)
        yield from reversed(open_pieces)

    def add_gradients(self, piece: _Piece, path: _Path, grad_hidden_TD: Tensor) -> None:
        """Backward through one piece: into the parameters, and into its ancestors' keys and values."""
        plan = _PieceAttention(path, piece, keeps_graph=True)
        with torch.enable_grad():
            hidden = self.hidden(piece, plan)
        outputs, grads = [hidden], [grad_hidden_TD[piece.start : piece.stop]]
        if piece.has_children():
            for layer, own in plan.own.items():
                taken = path.take_gradients(layer, piece)
                # With adapters, the first layers' keys may depend on nothing that is trained.
                pairs = [pair for pair in zip(own, taken, strict=True) if pair[0].requires_grad]
                outputs += [tensor for tensor, _ in pairs]
                grads += [grad for _, grad in pairs]
        torch.autograd.backward(outputs, grads)
        for layer, (depths, key, value) in plan.before.items():
            assert key.grad is not None and value.grad is not None, "attention reads every key it is given"
            path.add_gradients(layer, depths, key.grad, value.grad)
        self._ready_for_forward()

    def _ready_for_forward(self) -> None:
        """Tell a sharded model (one process, for mixed precision) that a backward pass is over.

        FSDP takes all passes inside the outer one for one, and would add only the first piece's gradients.
        """
        for module in self.backbone.modules():
            if isinstance(module, FSDPModule):
                state = module._get_fsdp_state()
                state._training_state = TrainingState.IDLE
                for group in state._fsdp_param_groups:
                    group._training_state = TrainingState.IDLE


class _DepthFirst(torch.autograd.Function):
    """The whole pack as one function of nothing: its parameters are reached from inside backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, walk: _Walk) -> Tensor:
        ctx.walk = walk
        path = walk.new_path()
        parts = [walk.hidden(piece, _PieceAttention(path, piece, keeps_graph=False)) for piece in walk.pieces]
        hidden_TD = parts[0].new_zeros(len(walk.batch.input_ids_T), parts[0].shape[-1])
        hidden_TD[: walk.batch.num_tokens] = torch.cat(parts)
        return hidden_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        path = ctx.walk.new_path()
        for piece in ctx.walk.upwards(path):
            ctx.walk.add_gradients(piece, path, grads[0])
        return None, None
