"""One question, answered by every layout: the last hidden state of each token of a pack."""

from __future__ import annotations

from torch import Tensor, nn

from conf.schema import Layout
from rl.policy.layouts.segments import plan_segments
from rl.policy.pack import PackedBatch


def tree_hidden(backbone: nn.Module, batch: PackedBatch, layout: Layout) -> Tensor:
    """Last hidden states [T, D] of a pack.

    Args:
        backbone: the model without its output layer, loaded with attn_implementation="grove_tree".
        batch: the pack; its plan is made at first use and kept.
        layout: any but `auto`.
    """
    assert layout is Layout.segments, "not yet"
    if batch.plan is None:
        batch.plan = plan_segments(batch.end_T)
    output = backbone(
        input_ids=batch.input_ids_T[None], position_ids=batch.position_T[None], use_cache=False, tree_plan=batch.plan
    )
    return output.last_hidden_state[0]
