"""One question, answered by every layout: the last hidden state of each token of a pack."""

from __future__ import annotations

from torch import Tensor, nn

from conf.schema import Layout
from rl.policy.layouts.attention import AttentionPlan
from rl.policy.layouts.backend import use_tree_attention
from rl.policy.layouts.dense_mask import MaskPlan
from rl.policy.layouts.depth_first import depth_first_hidden
from rl.policy.layouts.flex import FlexPlan
from rl.policy.layouts.segments import SegmentPlan
from rl.policy.layouts.trajectories import Hidden, trajectory_hidden
from rl.policy.layouts.varlen import VarlenPlan
from rl.policy.pack import PackedBatch

PLANS = {
    Layout.flex: FlexPlan,
    Layout.segments: SegmentPlan,
    Layout.varlen: VarlenPlan,
    Layout.mask: MaskPlan,
}
"""The layouts that send a pack through the model in one piece, and what plans their attention."""


def tree_hidden(backbone: nn.Module, batch: PackedBatch, layout: Layout) -> Tensor:
    """Last hidden states [T, D] of a pack; arguments as `tree_forward` has them."""
    return tree_forward(backbone, batch, layout).hidden_TD


def tree_forward(backbone: nn.Module, batch: PackedBatch, layout: Layout) -> Hidden:
    """What a layout makes of a pack: last hidden states, and the router loss where the layout can compute it.

    Args:
        backbone: a model of transformers without its output layer; afterwards it has the layout's attention.
        batch: the pack; a packed layout makes its plan at first use and keeps it there.
        layout: any but `auto`.
    """
    if layout is Layout.trajectories:
        return trajectory_hidden(backbone, batch)
    if layout is Layout.depth_first:
        return Hidden(depth_first_hidden(backbone, batch))
    kind = PLANS[layout]
    if not isinstance(batch.plan, kind):
        batch.plan = kind(batch.end_T)
    return Hidden(packed_hidden(backbone, batch, batch.plan))


def packed_hidden(backbone: nn.Module, batch: PackedBatch, plan: AttentionPlan) -> Tensor:
    """Last hidden states [T, D] of a pack that goes through the model in one piece."""
    use_tree_attention(backbone)
    output = backbone(
        input_ids=batch.input_ids_T[None], position_ids=batch.position_T[None], use_cache=False, tree_plan=plan
    )
    return output.last_hidden_state[0]
