"""Credit: from scores on a forest to an advantage for every (node, trajectory) pair."""
