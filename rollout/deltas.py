"""The difference of two versions of some bytes, for networks on which sending is slower than comparing.

One Adam step at the small rates of large models changes few percent of the weights once they are rounded to 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
POSITION_BYTES = 4
WORTH = 0.5
"""A difference above this share of the whole is not sent: both ends work for it."""


def difference(last: Tensor, new: Tensor, word_bytes: int) -> Tensor | None:
    """What turns `last` into `new`: positions, as int32, and behind them the new words.

    Args:
        last, new: uint8 [bytes], equally long.
        word_bytes: size of a number in them.
    Returns: uint8 [changed * (4 + word_bytes)]; None where the whole is better sent.
    """
    word = WORDS[word_bytes]
    old_W, new_W = last.view(word), new.view(word)
    changed_C = (old_W != new_W).nonzero().flatten()
    if len(changed_C) * (POSITION_BYTES + word_bytes) > WORTH * new.numel():
        return None
    return torch.cat([changed_C.to(torch.int32).view(torch.uint8), new_W[changed_C].view(torch.uint8)])


def applied(last: Tensor, delta: Tensor, word_bytes: int) -> Tensor:
    """`last` with a difference in it; uint8 [bytes]. `last` stays as it is."""
    num = delta.numel() // (POSITION_BYTES + word_bytes)
    position_C = delta[: num * POSITION_BYTES].view(torch.int32).long()
    new = last.clone()
    new.view(WORDS[word_bytes])[position_C] = delta[num * POSITION_BYTES :].clone().view(WORDS[word_bytes])
    return new
