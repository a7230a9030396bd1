"""Benchmarks: one command each, a table on the terminal, figures in benchmarks/out/."""
