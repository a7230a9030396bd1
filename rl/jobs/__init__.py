"""Runs that `grove launch` started somewhere: planned, handed over, watched, stopped and continued."""
