"""What one update adds up for its metrics."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field

from rl.policy.objective import Objective, finished
from rl.policy.pack import PackedBatch
from rl.policy.ranks import Ranks

TOKEN_COUNTS = ("learner/trained_tokens", "learner/packed_tokens", "learner/path_tokens")


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts of tokens, and parts of means, of the packs that one rank went through."""

    tokens: Counter[str] = field(default_factory=Counter)
    parts: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    mini_batches: Counter[str] = field(default_factory=Counter)
    """Mini-batches that a part was measured in."""
    grad_norms: list[float] = field(default_factory=list)
    """Of the policy, over all ranks already, one for each optimiser step."""
    critic_grad_norms: list[float] = field(default_factory=list)

    def count(self, batch: PackedBatch) -> None:
        """Count one pack's tokens."""
        numbers = (len(batch.edge_target_E), batch.num_tokens, len(batch.traj_index_P))
        self.tokens.update(dict(zip(TOKEN_COUNTS, numbers, strict=True)))

    def add(self, found: list[Objective]) -> None:
        """Add what the packs of one mini-batch came to."""
        for each in found:
            for name, part in each.parts.items():
                self.parts[name] = self.parts.get(name, 0.0) + part
            for name, value in each.maxima.items():
                self.maxima[name] = max(self.maxima.get(name, value), value)
        self.mini_batches.update({name for each in found for name in each.parts})

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """Metrics by name, of all ranks together. Collective."""
        measured = ranks.max({name: float(count) for name, count in self.mini_batches.items()})
        metrics = dict.fromkeys(TOKEN_COUNTS, 0.0) | ranks.sum(dict(self.tokens))
        metrics |= finished({name: total / measured[name] for name, total in ranks.sum(self.parts).items()})
        metrics |= ranks.max(self.maxima)
        for name, norms in (("grad_norm", self.grad_norms), ("critic_grad_norm", self.critic_grad_norms)):
            if norms:
                metrics[f"learner/{name}"] = statistics.fmean(norms)
        return metrics
