"""Learns: credit on trees, the policy update, the loop, and the commands."""
