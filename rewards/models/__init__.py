"""Models that rewards ask: judges and process reward models, whoever serves them."""
