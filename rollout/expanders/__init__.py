"""Expanders: each a pure policy over the tree so far."""
