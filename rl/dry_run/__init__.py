"""The dry run: one whole step of a run on this machine's CPU, with a tiny stand-in for its model, and a plan."""
