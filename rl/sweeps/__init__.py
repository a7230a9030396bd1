"""Several runs by one command: planned, checked together, run, recorded, resumed."""
