"""Checks that tensors named by shape letters agree with each other."""

from __future__ import annotations

import re

from torch import Tensor

from conf.errors import ShapeError, UnscoredNode

_ITEMS = {
    "B": "rows",
    "T": "tokens",
    "N": "nodes",
    "F": "forks",
    "L": "leaves",
    "P": "(node, trajectory) pairs",
    "K": "sources",
    "V": "vocabulary entries",
}
"""What each letter counts."""

_TREE_LETTERS = frozenset("NFLP")
_SUFFIX = re.compile(r"_([A-Z]+)$")


def check_shapes(**tensors: Tensor) -> None:
    """Check that arguments whose names share a letter share that size: `check_shapes(reward_N=..., parent_N=...)`.

    Args:
        tensors: tensors by name; the capital letters after the last underscore name the dimensions in order.
    Raises: ShapeError when a tensor has another number of dimensions than letters, or two tensors disagree on a letter.
    """
    first_with: dict[str, tuple[str, int]] = {}
    for name, tensor in tensors.items():
        letters = _letters(name)
        if tensor.dim() != len(letters):
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)} but its name promises {len(letters)} dimension(s), {letters}: "
                f"entries would be matched to the wrong things. Pass a tensor of shape [{', '.join(letters)}]."
            )
        for letter, size in zip(letters, tensor.shape, strict=True):
            earlier, expected = first_with.setdefault(letter, (name, size))
            if size != expected:
                raise ShapeError(_disagreement(letter, (earlier, expected), (name, size)))


def _letters(name: str) -> str:
    match = _SUFFIX.search(name)
    assert match, f"check_shapes needs shape letters at the end of a name, got {name}"
    return match.group(1)


def _disagreement(letter: str, earlier: tuple[str, int], later: tuple[str, int]) -> str:
    items = _ITEMS.get(letter, "entries")
    whole = "tree" if letter in _TREE_LETTERS else "batch"
    return (
        f"{earlier[0]} has {letter}={earlier[1]} {items} but {later[0]} has {letter}={later[1]}; "
        f"pass arrays of the same {whole}."
    )


def require_scored(value_N: Tensor, valid_N: Tensor | None = None, *, what: str = "the value") -> None:
    """Check that every value that credit is about to use is a finite number.

    Args:
        value_N: float [N].
        valid_N: bool [N], rows that will be used; None for all.
        what: what the values are, for the message.
    Raises: ShapeError when the two disagree on N; UnscoredNode naming the first row that is NaN or infinite.
    """
    missing_N = ~value_N.isfinite()
    if valid_N is not None:
        check_shapes(value_N=value_N, valid_N=valid_N)
        missing_N = missing_N & valid_N
    if missing_N.any():
        row = int(missing_N.nonzero()[0, 0])
        raise UnscoredNode(
            f"{what} of row {row} is {value_N[row].item()}: it would make the advantages of all it is compared with "
            f"NaN. Score the row, or mark it as not valid so that it is left out."
        )
