"""The learner: holds the policy and its optimiser, and turns trees with credit into new weights. No Ray in it.

Where the policy is sharded, every rank holds a learner and gets every call; each trains on its own packs, all step
together, and rank 0 answers and writes.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import ConfigError
from conf.plugin import load_object
from conf.schema import Config, CriticKind, Layout, LossKind, OldLogprobs
from rl.credit.measured import Measured, Needs, measurements_needed
from rl.policy.layouts.choose import choose_layout, self_check, smallest_forest
from rl.policy.load import load_critic, load_policy, load_reference
from rl.policy.lora import without_adapters
from rl.policy.model import EdgeOutputs, TreeCritic
from rl.policy.objective import Objective, Totals, objective
from rl.policy.pack import PackedBatch, TreeCredit, edges_of_steps, pack, path_tokens, plan_packs, unique_tokens
from rl.policy.ranks import Ranks, dummy_batch, is_dummy, share_packs
from rl.policy.shards import policy_pieces
from rl.policy.stored import Writing, begin_checkpoint, read_checkpoint
from rl.policy.tally import Tally
from rl.policy.trained import Trainable, Trained
from rl.policy.written import Written
from rollout.seeds import derive_seed
from rollout.shards import Rows
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason

logger = logging.getLogger(__name__)

PAD_MULTIPLE = {"cpu": 1, "cuda": 128}
"""On a GPU few distinct sizes let the caching allocator reuse its blocks; on a CPU padding is only work."""


@dataclass(kw_only=True, slots=True)
class MiniBatch:
    """Whole prompts that one optimiser step learns from, as this rank's packs."""

    batches: list[PackedBatch]
    totals: Totals
    """Of all ranks."""
    tokens: int
    """In the packs of all ranks."""
    can_learn: bool
    """False when every term of the loss has a zero gradient."""

    def real_batches(self) -> list[PackedBatch]:
        """Those that train something, unlike dummies that only keep step with other ranks."""
        return [batch for batch in self.batches if not is_dummy(batch)]


class Learner:
    """Trains a causal LM on trees.

    Args:
        cfg: the run; reads seed, model, rollout.temperature, loss and learner.
        model_path: folder or hub name of the policy's first weights, also the frozen reference of the KL term.
        ranks: this process among those that share the model.
    Raises: ConfigError for a layout that cannot train this model exactly, or a loss function that cannot be loaded.
    """

    def __init__(self, cfg: Config, model_path: str, ranks: Ranks) -> None:
        self.cfg, self.model_path, self.ranks, self.device = cfg, model_path, ranks, ranks.device
        if self.device.type == "cpu":
            torch.set_num_threads(cfg.learner.num_threads)
        policy = load_policy(cfg, model_path, self.device)
        requested = cfg.learner.layout
        self.layout, reason = choose_layout(policy.model, requested, self.device, ranks.size)
        logger.info(
            "learner.layout=%s: the policy trains by layout %s (%s)", requested.value, self.layout.value, reason
        )
        self._layout_checked = self.layout is Layout.trajectories
        self.policy = self._trained(policy, cfg.learner.learning_rate, cfg.learner.max_grad_norm)
        self.critic, self.critic_layout = self._load_critic()
        self.reference = None
        compares = cfg.loss.kl_coef > 0 or measurements_needed(cfg.credit).kl
        if compares and not cfg.model.lora.rank:  # adapters can be switched off, and what is left is the reference
            self.reference = load_reference(cfg, model_path, self.device)
        self._writing = Writing()
        self.custom = load_object(cfg.loss.fn, key="loss.fn") if cfg.loss.kind is LossKind.custom else None

    def update(self, trees: Sequence[TreeCredit], step: int) -> dict[str, float]:
        """One step of the run: an optimiser step for each mini-batch of whole prompts, learner.epochs times.

        A mini-batch whose gradient can only be zero is measured and leaves the weights alone: momentum would still move
        them.

        Args:
            trees: one per prompt; trees that train nothing are passed over.
            step: of the run, from 0; decides the mini-batches and the warm-up, so that a resumed run repeats them.
        Returns: metrics by name; what was not measured is left out: loss/* without a trained token, loss/kl without
            a reference, learner/grad_norm without an optimiser step.
        Raises: NonFiniteGradient, with the weights as they were before that mini-batch.
        """
        torch.manual_seed(derive_seed(self.cfg.seed, "dropout", step, self.ranks.rank))
        self._check_layout(trees)
        learning_rate = self._set_learning_rates(step)
        trains_policy = step >= self.cfg.loss.critic.warmup_steps or self.cfg.loss.critic.kind is CriticKind.none
        mini_batches = [self._mini_batch(part) for part in self._parts(trees, step)]
        self._prepare(mini_batches)
        tally = Tally()
        for mini_batch in mini_batches:
            for batch in mini_batch.real_batches():
                tally.count(batch)
        for epoch in range(self.cfg.learner.epochs):
            for number, mini_batch in enumerate(mini_batches):
                tally.add(self._accumulate(mini_batch, trains_policy=trains_policy, untouched=epoch == number == 0))
                if mini_batch.can_learn:
                    self._step(tally, trains_policy=trains_policy)
        return tally.metrics(self.ranks) | {"learner/learning_rate": learning_rate}

    @torch.no_grad()
    def measure(self, trees: Sequence[Tree], needs: Needs) -> list[Measured]:
        """What credit must know of the policy, at every step of a trained path.

        Returns: one per tree, on rank 0; [] elsewhere.
        """
        whole = [_unweighted(tree) for tree in trees]
        number_of = {id(tree): number for number, tree in enumerate(trees)}
        found = []
        for packed_trees in self._own_share(self._plan(whole)):
            batch = self._packed(packed_trees)
            value_E = self._values(batch) if needs.value else None
            kl_E = self._policy_logprobs(batch) - self._reference_logprobs(batch) if needs.kl else None
            for number, row, edges in edges_of_steps(batch, packed_trees):
                kl = math.nan if kl_E is None else kl_E[edges].sum().item()
                value = [] if value_E is None else value_E[edges].tolist()
                found.append((number_of[id(packed_trees[number].tree)], row, kl, value))
        gathered = self.ranks.gather(found)
        if gathered is None:
            return []
        kl = [[math.nan] * len(tree.nodes) for tree in trees]
        values: list[list[list[float]]] = [[[] for _ in tree.nodes] for tree in trees]
        for number, row, step_kl, step_values in (step for part in gathered for step in part):
            kl[number][row], values[number][row] = step_kl, step_values
        return [
            Measured(kl=tree_kl if needs.kl else None, value=tree_values if needs.value else None)
            for tree_kl, tree_values in zip(kl, values, strict=True)
        ]

    @torch.no_grad()
    def score(self, samples: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Log-probability in nats, at temperature 1, of each token of a step behind its context, as a plain sequence.

        The weight canary compares it with what the engines say; nothing of the packed path is used.
        """
        chains = [_chain(number, *sample) for number, sample in enumerate(samples)]
        batch = self._packed(chains)
        logprob_E = self.policy.module(batch, Layout.trajectories, temperature=1.0).logprob_E
        return [logprob_E[edges].tolist() for _, _, edges in edges_of_steps(batch, chains)]

    def pieces(self, *, whole: bool = False) -> Iterator[tuple[list[Rows], list[Tensor]]]:
        """This rank's part of what engines load, or all of it, group by group (`rl.policy.shards.policy_pieces`)."""
        return policy_pieces(self.policy.module, self.cfg, self.ranks, whole=whole)

    def begin_save(self, folder: str | Path) -> None:
        """Copy what a checkpoint needs, and write it while training goes on. Collective.

        The policy becomes a Hugging Face folder; what else training goes on from lies beside it.
        """
        self._writing.begin(
            lambda: begin_checkpoint(Path(folder), self.policy, self.critic, self.cfg, self.ranks, self.model_path)
        )

    def saved(self) -> Written:
        """How far this rank is with the checkpoint that was begun last; at once."""
        return self._writing.status()

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint folder, without executing anything stored in it. Collective."""
        self._writing.wait()
        read_checkpoint(Path(folder), self.policy, self.critic, self.ranks)

    def _trained(self, module: Trainable, learning_rate: float, max_grad_norm: float) -> Trained[Trainable]:
        return Trained(
            module,
            self.cfg.learner,
            self.ranks,
            compute_dtype=self.cfg.model.dtype,
            learning_rate=learning_rate,
            head_learning_rate=self.cfg.loss.critic.learning_rate,
            max_grad_norm=max_grad_norm,
        )

    def _load_critic(self) -> tuple[Trained[TreeCritic] | None, Layout]:
        critic = self.cfg.loss.critic
        if critic.kind is not CriticKind.model:
            return None, self.layout
        module = load_critic(self.cfg, critic.path or self.model_path, self.device)
        layout, reason = choose_layout(module.backbone, self.cfg.learner.layout, self.device, self.ranks.size)
        logger.info("the critic trains by layout %s (%s)", layout.value, reason)
        return self._trained(module, critic.learning_rate, critic.max_grad_norm), layout

    def _set_learning_rates(self, step: int) -> float:
        if self.critic is not None:
            self.critic.set_learning_rate(step)
        return self.policy.set_learning_rate(step)

    def _check_layout(self, trees: Sequence[TreeCredit]) -> None:
        """Once in a run: the chosen layout must agree with plain trajectories on some of the run's own trees."""
        if self._layout_checked or not any(_trains(credit) for credit in trees):
            return
        self._layout_checked = True
        found = self_check(self.policy.module, self.layout, self._packed(smallest_forest(trees)))
        if found.passed:
            logger.info("layout %s agrees with plain trajectories: %s", self.layout.value, found)
            return
        if self.cfg.learner.layout is not Layout.auto:
            raise ConfigError(
                f"learner.layout={self.layout.value} computes other log-probabilities or gradients for this model than "
                f"plain trajectories do ({found}), so training would be inexact. Use learner.layout=trajectories."
            )
        logger.warning(
            "layout %s computes other log-probabilities or gradients for this model than plain trajectories do (%s): "
            "the run goes on by layout trajectories, which is slower and exact",
            self.layout.value,
            found,
        )
        self.layout = self.critic_layout = Layout.trajectories

    def _parts(self, trees: Sequence[TreeCredit], step: int) -> Iterator[list[TreeCredit]]:
        """Trained trees in an order drawn for this step, cut whole into nearly equal parts."""
        order = [credit for credit in trees if _trains(credit)]
        random.Random(derive_seed(self.cfg.seed, "mini_batches", step)).shuffle(order)
        num_parts = min(self.cfg.learner.mini_batches, len(order))
        for part in range(num_parts):
            yield order[part * len(order) // num_parts : (part + 1) * len(order) // num_parts]

    def _mini_batch(self, trees: list[TreeCredit]) -> MiniBatch:
        loss = self.cfg.loss
        totals = Totals(
            denominator=sum(credit.denominator for credit in trees),
            weight=sum(credit.total_weight() for credit in trees),
        )
        assert totals.weight > 0, "a trained step has w0 > 0: w0 sums the weights that w_pos and w_neg multiply"
        has_advantage = any(any(credit.w_pos) or any(credit.w_neg) or credit.tokens for credit in trees)
        packs = self._plan(trees)
        return MiniBatch(
            batches=[self._packed(packed_trees) for packed_trees in self._own_share(packs)],
            totals=totals,
            tokens=sum(unique_tokens(shard) for packed_trees in packs for shard in packed_trees),
            can_learn=bool(has_advantage or loss.kl_coef or loss.entropy_coef or loss.kind is LossKind.custom),
        )

    def _plan(self, trees: list[TreeCredit]) -> list[list[TreeCredit]]:
        """Packs of at most learner.pack_tokens; smaller ones where there would be fewer of them than ranks."""
        apart = self.layout is Layout.trajectories
        each_rank = -(-sum(map(path_tokens if apart else unique_tokens, trees)) // self.ranks.size)
        return plan_packs(trees, max(1, min(self.cfg.learner.pack_tokens, each_rank)), counts_copies=apart)

    def _own_share(self, packs: list[list[TreeCredit]]) -> list[list[TreeCredit]]:
        """This rank's packs; [] stands for one that only keeps step with the other ranks."""
        return share_packs(packs, self.ranks.size)[self.ranks.rank]

    def _packed(self, trees: Sequence[TreeCredit]) -> PackedBatch:
        batch = pack(trees, PAD_MULTIPLE[self.device.type]) if trees else dummy_batch(PAD_MULTIPLE[self.device.type])
        return batch.to(self.device)

    @torch.no_grad()
    def _prepare(self, mini_batches: list[MiniBatch]) -> None:
        """Log-probabilities of the policy before its first update, and of the reference, where the loss needs them."""
        recomputes = self.cfg.loss.old_logprobs is OldLogprobs.recompute
        if recomputes and len(mini_batches) == self.cfg.learner.epochs == 1:
            recomputes = False  # the one forward pass of the update is before any update
        for mini_batch in mini_batches:
            for batch in mini_batch.batches:
                if recomputes:
                    batch.old_logprob_E = self._policy_logprobs(batch).double()
                if self.cfg.loss.kl_coef > 0:
                    batch.reference_logprob_E = self._reference_logprobs(batch).double()

    def _accumulate(self, mini_batch: MiniBatch, *, trains_policy: bool, untouched: bool) -> list[Objective]:
        """Add the gradients of a mini-batch; returns what its real packs came to.

        Args:
            untouched: no update of this step has moved the policy yet.
        """
        recomputes = self.cfg.loss.old_logprobs is OldLogprobs.recompute
        found = []
        for batch in mini_batch.batches:
            outputs = self._forward(batch, trains_policy=trains_policy)
            if untouched and recomputes:
                batch.old_logprob_E = outputs.logprob_E.detach().double()
            part = objective(
                outputs,
                batch,
                self.cfg.loss,
                mini_batch.totals,
                trains_policy=trains_policy,
                measures_gap=untouched,
                custom=self.custom,
            )
            loss = part.loss
            if outputs.router_loss is not None and trains_policy:
                # It is no sum over tokens, so packs share it by size: our reading, as in any accumulated gradient.
                loss = loss + outputs.router_loss * (batch.num_tokens / mini_batch.tokens)
            loss.backward()
            if not is_dummy(batch):
                found.append(part)
        return found

    def _step(self, tally: Tally, *, trains_policy: bool) -> None:
        if self.critic is not None:
            tally.critic_grad_norms.append(self.critic.step())
        if trains_policy or self.critic is None:
            tally.grad_norms.append(self.policy.step())
        else:
            self.policy.optimizer.zero_grad()

    def _forward(self, batch: PackedBatch, *, trains_policy: bool = True) -> EdgeOutputs:
        if self.critic is None:  # while it warms up, a value head learns and the trunk below it does not
            return self.policy.module(batch, self.layout, trains_trunk=trains_policy)
        with torch.set_grad_enabled(trains_policy and torch.is_grad_enabled()):
            outputs = self.policy.module(batch, self.layout)
        return replace(outputs, value_E=self._values(batch))

    def _policy_logprobs(self, batch: PackedBatch) -> Tensor:
        return self.policy.module(batch, self.layout).logprob_E

    def _values(self, batch: PackedBatch) -> Tensor:
        if self.critic is not None:
            return self.critic.module(batch, self.critic_layout)
        value_E = self.policy.module(batch, self.layout).value_E
        assert value_E is not None, "values are asked for with a critic alone"
        return value_E

    def _reference_logprobs(self, batch: PackedBatch) -> Tensor:
        if self.reference is not None:
            return self.reference(batch, self.layout).logprob_E
        with without_adapters(self.policy.module.model):
            return self.policy.module(batch, self.layout).logprob_E


def _trains(credit: TreeCredit) -> bool:
    return any(credit.is_trained(row) for row in range(len(credit.tree.nodes)))


def _unweighted(tree: Tree) -> TreeCredit:
    """Every step of a trained path once, so that a pass over the pack sees them all."""
    rows = {row for leaf in tree.trained_leaves() for row in tree.path(leaf)}
    nothing = [0.0] * len(tree.nodes)
    return TreeCredit(tree=tree, w_pos=nothing, w_neg=nothing, w0=[float(row in rows) for row in range(len(nothing))])


def _chain(number: int, context_ids: list[int], action_ids: list[int]) -> TreeCredit:
    """One step behind one context."""
    tree = Tree(prompt=Prompt(id=str(number), token_ids=tuple(context_ids), question="", answer=""))
    tree.add(
        Node(
            parent=ROOT,
            action_ids=action_ids,
            action_logprobs=[0.0] * len(action_ids),
            observation_ids=[],
            facts=StepFacts(kind=StepKind.answer),
            stop=StopReason.answered,
            version=0,
        )
    )
    return TreeCredit(tree=tree, w_pos=[0.0], w_neg=[0.0], w0=[1.0])
