"""Grows trees: engines, environments, expanders, and the Ray actors that carry them."""
