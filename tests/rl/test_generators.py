from __future__ import annotations

import json
import random

import numpy as np
import torch

from rl.generators import (
    generators_tensor,
    generators_text,
    restore_generators,
    restore_generators_tensor,
    seed_generators,
)


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
    ]


def test_generators_go_on_where_they_were():
    draws()  # the second of a pair of normal draws is kept by Python's generator and NumPy's
    text, tensor = generators_text(), generators_tensor()
    wanted = draws()
    assert draws() != wanted
    restore_generators(text)
    assert draws() == wanted
    restore_generators_tensor(tensor)
    assert draws() == wanted


def test_the_same_seed_begins_the_same_draws():
    found = []
    for _ in range(2):
        seed_generators(2**40 + 1)
        found.append(draws())
    assert found[0] == found[1]


def test_the_state_is_json():
    assert json.loads(generators_text()).keys() >= {"python", "numpy", "torch"}
