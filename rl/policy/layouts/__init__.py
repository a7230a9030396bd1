"""The ways a forest goes through a model: packed with one attention back end or another, apart, or depth first."""
