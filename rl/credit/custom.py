"""A term whose values are a user's own function of the forest (`fn` of a credit term)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conf.errors import ConfigError
from conf.plugin import load_object
from conf.schema import Backup, Level, TermConfig
from rl.credit.forest import Forest


def custom_values(forest: Forest, term: TermConfig) -> tuple[Tensor, Tensor]:
    """What the function says of each trajectory, step, or pair of the two; compared like any other term's values.

    X is L with level=trajectory; with level=step it is N, and P with backup=none (letters as in `Forest`).

    Returns: float64 [X], 0 where it said NaN; bool [X], where it said a number.
    Raises: ConfigError when it raises, or returns anything but finite numbers and NaN in that shape.
    """
    values: Any
    try:
        values = load_object(term.fn, key="fn")(forest, **term.args)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_refusal(term, f"raised {type(error).__name__}: {error}")) from error
    letter, size = _expected(forest, term)
    if not isinstance(values, Tensor):
        raise ConfigError(_refusal(term, f"returned {type(values).__name__}, not a tensor of floats"))
    if values.shape != (size,):
        found = f"returned shape {list(values.shape)}, but needs one value for each of {size} {letter}"
        raise ConfigError(_refusal(term, found))
    if not values.is_floating_point():
        raise ConfigError(_refusal(term, f"returned {values.dtype}, in which nothing can be NaN: use float64"))
    if values.isinf().any():
        raise ConfigError(_refusal(term, "returned inf, which would make every value of its group infinite or NaN"))
    valid_X = ~values.isnan()
    return torch.where(valid_X, values, 0).to(torch.float64).detach(), valid_X


def _expected(forest: Forest, term: TermConfig) -> tuple[str, int]:
    if term.level is Level.trajectory:
        return "trajectories (L, level=trajectory)", len(forest.leaf_node_L)
    if term.backup is Backup.none:
        return "pairs (P, level=step and backup=none)", len(forest.pair_node_P)
    return "steps (N, level=step)", len(forest.parent_N)


def _refusal(term: TermConfig, what: str) -> str:
    return (
        f'the credit term with fn="{term.fn}" {what}. It is called with a Forest (rl/credit/forest.py) and the term\'s '
        f"args, and returns a float tensor with NaN where it has nothing to say; docs/new_method.md builds one."
    )
