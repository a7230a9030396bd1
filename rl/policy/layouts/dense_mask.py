"""Attention over a pack with its whole mask written out: the reference; its cost grows with the square of the pack."""

from __future__ import annotations

from torch import Tensor

from rl.policy.layouts.attention import masked_attention
from rl.policy.mask import ancestor_mask


class MaskPlan:
    """The mask of one pack, bool [T, T] for each window that a layer asks for.

    Args:
        end_T: int64 [T], see `rl.policy.mask`; the masks are on its device.
    """

    def __init__(self, end_T: Tensor) -> None:
        self.end_T = end_T
        self._masks: dict[int | None, Tensor] = {}

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
        if window not in self._masks:
            self._masks[window] = ancestor_mask(self.end_T, window)
        return masked_attention(query, key, value, self._masks[window], scaling=scaling, softcap=softcap)
