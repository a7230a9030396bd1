"""The policy update: packing trees, log-probs, losses, the learner and the actor that carries it."""
