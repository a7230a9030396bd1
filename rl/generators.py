"""The state of a process's global random generators, as text: Grove draws by seeds, a user's own code may not."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Begin Python's, NumPy's and torch's generators of a process of ours at a seed instead of at whatever it finds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generators_text() -> str:
    """State of Python's, NumPy's and torch's generators, the present GPU's among them."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, place, has_gauss, cached = legacy
    state = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), place, has_gauss, cached],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return json.dumps(state)


def restore_generators(text: str) -> None:
    """Put the generators of this process back; a GPU's only where there is one."""
    state = json.loads(text)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def generators_tensor() -> torch.Tensor:
    """The same as bytes, for files that hold tensors alone."""
    return torch.tensor(list(generators_text().encode()), dtype=torch.uint8)


def restore_generators_tensor(stored: torch.Tensor) -> None:
    """Put back what `generators_tensor` gave."""
    restore_generators(bytes(stored.tolist()).decode())


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
