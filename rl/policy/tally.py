"""What one update adds up for its metrics."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from rl.policy.objective import Objective
from rl.policy.pack import PackedBatch
from rl.policy.ranks import Ranks


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts, and parts of means over mini-batches, of the packs of one rank."""

    learning_rate: float
    parts: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)
    """Of the policy, over all ranks already, one for each optimiser step."""
    critic_grad_norms: list[float] = field(default_factory=list)
    num_mini_batches: int = 0
    """Trained on, each epoch counted."""
    num_measured: int = 0
    """Mini-batches that the mismatch with the engine was measured on."""

    def add(self, batch: PackedBatch, found: Objective, epoch: int) -> None:
        """Count one pack; its tokens only in the first epoch."""
        if epoch == 0:
            for name, count in (
                ("trained", len(batch.edge_target_E)),
                ("packed", batch.num_tokens),
                ("path", len(batch.traj_index_P)),
            ):
                key = f"learner/{name}_tokens"
                self.counts[key] = self.counts.get(key, 0.0) + count
        for name, part in found.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + part
        for name, value in found.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, value), value)

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """Metrics by name, of all ranks together."""
        metrics = {"learner/trained_tokens": 0.0, "learner/packed_tokens": 0.0, "learner/path_tokens": 0.0}
        metrics |= ranks.sum(self.counts) | {"learner/learning_rate": self.learning_rate}
        for name, total in ranks.sum(self.parts).items():
            measured_once = name.startswith("loss/mismatch") or name == "loss/logprob_gap_nats"
            metrics[name] = total / (self.num_measured if measured_once else self.num_mini_batches)
        metrics |= ranks.max(self.maxima)
        for name, norms in (("learner/grad_norm", self.grad_norms), ("learner/critic_grad_norm", self.critic_grad_norms)):
            if norms:
                metrics[name] = statistics.fmean(norms)
        return metrics
