"""Reward sources that ship with Grove."""
