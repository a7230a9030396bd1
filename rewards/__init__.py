"""Scores trees: sources, the service that runs them, and the four values a score can be."""
