"""Attention over a packed forest for unmodified Hugging Face models, registered as "grove_tree".

The pack is cut into pieces. A piece is a subtree small enough to be computed as one masked square, or the unforked run at
the top of a subtree that is not; its keys are its ancestors and itself. Pieces of like shape share one call. How the
cut is made changes the cost and nothing else: what a query sees is always decided by `end_T`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rl.policy.mask import ancestor_ranges, segments

ATTENTION_NAME = "grove_tree"
"""Value of attn_implementation that selects `tree_attention`."""

SUBTREE_TOKENS = 384
QUERY_MULTIPLE = 8
KEY_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries [start, stop) and the ranges of tokens before `start` that they all see."""

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]

    def num_keys(self) -> int:
        return self.stop - self.start + sum(stop - start for start, stop in self.ancestors)

    def key_rows(self) -> list[int]:
        rows: list[int] = []
        for start, stop in self.ancestors:
            rows += range(start, stop)
        return rows + list(range(self.start, self.stop))


@dataclass(slots=True)
class Block:
    """G pieces padded to one shape and computed in one call."""

    num_pieces: int
    num_queries: int
    num_keys: int
    mask: Tensor


@dataclass(slots=True)
class TreePlan:
    query_rows_Q: Tensor
    key_rows_K: Tensor
    blocks: list[Block]
    place_T: Tensor


def plan_pieces(end_T: Tensor, subtree_tokens: int) -> list[Piece]:
    end = end_T.tolist()
    pieces: list[Piece] = []
    covered = 0
    for (start, stop), ancestors in zip(segments(end_T), ancestor_ranges(end_T), strict=True):
        if start < covered:
            continue
        covered = end[start] if end[start] - start <= subtree_tokens else stop
        pieces.append(Piece(start, covered, tuple(ancestors)))
    return pieces


def plan_attention(end_T, subtree_tokens=SUBTREE_TOKENS, qm=QUERY_MULTIPLE, km=KEY_MULTIPLE) -> TreePlan:
    groups: dict[tuple[int, int], list[Piece]] = {}
    for piece in plan_pieces(end_T, subtree_tokens):
        q = piece.stop - piece.start
        k = piece.num_keys()
        groups.setdefault((-(-q // qm) * qm, -(-k // km) * km), []).append(piece)
    query_rows, key_rows, place, blocks = [], [], torch.zeros(len(end_T), dtype=torch.long), []
    for (nq, nk), pieces in groups.items():
        q_list, k_list = [], []
        for p in pieces:
            q = list(range(p.start, p.stop))
            base = len(query_rows) + len(q_list)
            place[p.start:p.stop] = torch.arange(base, base + len(q))
            q_list += q + [-1] * (nq - len(q))
            k = p.key_rows()
            k_list += k + [-1] * (nk - len(k))
        qi = torch.tensor(q_list).view(len(pieces), nq, 1)
        ki = torch.tensor(k_list).view(len(pieces), 1, nk)
        mask = (ki >= 0) & (ki <= qi) & (qi < end_T[ki.clamp(min=0)])
        mask |= (qi < 0) & (torch.arange(nk) == 0)
        blocks.append(Block(len(pieces), nq, nk, mask[:, None]))
        query_rows += q_list
        key_rows += k_list
    return TreePlan(torch.tensor(query_rows).clamp(min=0), torch.tensor(key_rows).clamp(min=0), blocks, place)

MODE = {"gqa": "expand"}

def tree_attention(module, query, key, value, attention_mask, *, tree_plan=None, scaling=None, dropout=0.0, **kw):
    if tree_plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kw)
    H, T, D = query.shape[1:]
    q_QHD = query[0].transpose(0, 1).index_select(0, tree_plan.query_rows_Q)
    kv_T = torch.cat([key[0], value[0]], dim=-1).transpose(0, 1)
    kv = kv_T.index_select(0, tree_plan.key_rows_K)
    qs = q_QHD.split([b.num_pieces * b.num_queries for b in tree_plan.blocks])
    kvs = kv.split([b.num_pieces * b.num_keys for b in tree_plan.blocks])
    outs = []
    for b, q, kv in zip(tree_plan.blocks, qs, kvs):
        q = q.view(b.num_pieces, b.num_queries, H, D).transpose(1, 2)
        k, v = kv.view(b.num_pieces, b.num_keys, -1, 2 * D).transpose(1, 2).split(D, dim=-1)
        if MODE["gqa"] == "expand":
            g = H // k.shape[1]
            k = k.repeat_interleave(g, 1); v = v.repeat_interleave(g, 1)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=b.mask, scale=scaling)
        elif MODE["gqa"] == "flag":
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=b.mask, scale=scaling, enable_gqa=True)
        elif MODE["gqa"] == "fold":
            g = H // k.shape[1]
            q = q.unflatten(1, (-1, g)).flatten(2, 3)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=b.mask.repeat(1, 1, g, 1), scale=scaling)
            o = o.unflatten(2, (g, -1)).flatten(1, 2)
        outs.append(o.transpose(1, 2).reshape(-1, H, D))
    out = torch.cat(outs).index_select(0, tree_plan.place_T)
    return out[None], None
