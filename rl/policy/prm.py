"""The process reward model that a run trains beside its policy: scores steps, learns from outcomes. No Ray in it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from conf.errors import CheckpointError
from conf.schema import Config, PrmKind
from rl.generators import generators_tensor, restore_generators_tensor
from rl.policy.layouts.choose import choose_layout
from rl.policy.load import checkpoint_activations, load_causal_lm, load_critic
from rl.policy.logprobs import require_known_head
from rl.policy.loss import path_sums
from rl.policy.model import TreeCritic, TreePolicy
from rl.policy.pack import PackedBatch, PathCredit, TreeCredit, edges_of_steps, pack, plan_packs
from rl.policy.prm_metrics import prm_metrics
from rl.policy.rank_files import Shards, begin_shards
from rl.policy.ranks import Ranks
from rl.policy.stored import Writing
from rl.policy.trained import Trained
from rl.policy.written import PRM, Written
from rollout.seeds import derive_seed
from rollout.tree import Tree

GENERATORS = "generators/prm"
NUM_DRIFT_TREES = 8
"""Trees that are scored once more after an update, to see how far it moved the scores."""

Outcomes = Mapping[int, float]
"""Row of a leaf -> the outcome of its trajectory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Steps:
    """What the model says of a pack: S steps, K trajectories, M (step, trajectory) pairs."""

    score_S: Tensor
    place_S: list[tuple[int, int]]
    """Number of the tree in the pack, and row."""
    step_M: Tensor
    path_M: Tensor
    outcome_K: Tensor


class ProcessRewardModel:
    """An implicit model or a progress estimator.

    implicit: score of a step = beta * sum over its tokens of log pi(y_t) - log pi_ref(y_t), so that the sum over a
    trajectory is r(y); it learns -[z log sigmoid(r) + (1 - z) log(1 - sigmoid(r))], z the outcome (arXiv 2412.01981).

    progress: score of a step = c_t, read at its last token; it learns (sum of c_t - R)^2 (arXiv 2505.20732). The
    authors read c_t from the logits of the vocabulary; those are linear in the hidden state, from which we read it.

    Args:
        cfg: reads seed, model, learner and prm.
        policy_path: the policy's first weights, from which the model starts where prm.path is empty.
    Raises: ConfigError as the learner's own models do.
    """

    def __init__(self, cfg: Config, policy_path: str, device: torch.device) -> None:
        self.cfg, self.prm, self.device = cfg, cfg.prm, device
        path = cfg.prm.path or policy_path
        if device.type == "cpu":
            torch.set_num_threads(cfg.learner.num_threads)
        self._is_implicit = cfg.prm.kind is PrmKind.implicit
        # The temperature of sampling is none of its business: both log-probabilities are at 1.
        at_one = replace(cfg, rollout=replace(cfg.rollout, temperature=1.0))
        module = _implicit(at_one, path, device) if self._is_implicit else load_critic(cfg, path, device)
        backbone = module.model if isinstance(module, TreePolicy) else module.backbone
        self._ranks, self._writing = Ranks.alone(device), Writing()
        self.layout, _ = choose_layout(backbone, cfg.learner.layout, device, 1)
        self.model: Trained[TreePolicy | TreeCritic] = Trained(
            module,
            replace(cfg.learner, warmup_steps=cfg.prm.warmup_steps),
            self._ranks,
            compute_dtype=cfg.model.dtype,
            learning_rate=cfg.prm.learning_rate,
            head_learning_rate=cfg.prm.head_learning_rate,
            max_grad_norm=cfg.prm.max_grad_norm,
        )
        self.reference: TreePolicy | None = None
        if self._is_implicit:
            reference = load_causal_lm(cfg.prm.reference_path or path, cfg.model.dtype)
            self.reference = TreePolicy(reference, 1.0).requires_grad_(False).to(device).eval()

    @torch.no_grad()
    def score(self, trees: Sequence[Tree]) -> list[dict[int, float]]:
        """Score of every step of a trained path, in reward units.

        Returns: row -> score, one mapping per tree; a score may be NaN where a model has diverged.
        """
        self.model.module.eval()
        scores: list[dict[int, float]] = [{} for _ in trees]
        number_of = {id(tree): number for number, tree in enumerate(trees)}
        for packed in self._packs([_credit(tree, dict.fromkeys(tree.trained_leaves(), 0.0)) for tree in trees]):
            steps = self._steps(packed, self._batch(packed))
            for (number, row), score in zip(steps.place_S, steps.score_S.tolist(), strict=True):
                scores[number_of[id(packed[number].tree)]][row] = score
        return scores

    def update(self, trees: Sequence[Tree], outcomes: Sequence[Outcomes], step: int) -> dict[str, float]:
        """Learn from how trajectories ended; those without an outcome are left out.

        Args:
            outcomes: of each tree, in reward units; an implicit model takes them for chances of success, cut to [0, 1].
            step: of the run, from 0; decides mini-batches and warm-up, so that a resumed run repeats them.
        Returns: metrics by name; {} where there is nothing to learn from.
        Raises: NonFiniteGradient, with the weights as they were before that mini-batch.
        """
        credits = [_credit(tree, its) for tree, its in zip(trees, outcomes, strict=True) if its]
        if not credits:
            return {}
        watched = [credit.tree for credit in credits[:NUM_DRIFT_TREES]]
        before = self.score(watched)
        torch.manual_seed(derive_seed(self.cfg.seed, "prm_dropout", step))
        self.model.module.train()
        self.model.set_learning_rate(step)
        losses, norms = [], []
        said: list[tuple[int, float, float]] = []  # group, score of the trajectory, outcome
        for epoch in range(self.prm.epochs):
            for part in self._parts(credits, step):
                loss, found = self._accumulate(part)
                losses.append(loss)
                norms.append(self.model.step())
                said += found if epoch == 0 else []
        after = self.score(watched)
        moved = [abs(after[tree][row] - score) for tree, its in enumerate(before) for row, score in its.items()]
        return {
            "prm/loss": sum(losses) / len(losses),
            "prm/grad_norm": sum(norms) / len(norms),
            "prm/drift": sum(moved) / len(moved),
            **prm_metrics(said, is_logit=self._is_implicit),
        }

    def begin_save(self, folder: Path) -> None:
        """Copy weights, moments and generators, and write them to a folder in `folder` while learning goes on."""

        def begun() -> Callable[[], None]:
            state = self.model.state(PRM)
            state[GENERATORS] = generators_tensor()
            copied = begin_shards(folder / PRM, state, self._ranks)
            return lambda: copied.result() and None

        self._writing.begin(begun)

    def saved(self) -> Written:
        """How far it is with the checkpoint that was begun last; at once."""
        return self._writing.status()

    def load(self, folder: Path) -> None:
        """Take back what was written; nothing stored is executed.

        Raises: CheckpointError when it is not there, or of another model.
        """
        self._writing.wait()
        if not (folder / PRM).is_dir():
            raise CheckpointError(
                f"{folder} holds no {PRM}/: the run was not training a process reward model when it was "
                f"written, so there is none to go on with. Resume with prm.kind=none, or start another run."
            )
        stored = Shards(folder / PRM)
        self.model.load(stored, PRM)
        restore_generators_tensor(stored.whole([GENERATORS])[GENERATORS])

    def _accumulate(self, credits: list[TreeCredit]) -> tuple[float, list[tuple[int, float, float]]]:
        num_paths = sum(len(credit.paths) for credit in credits)
        groups = {credit.tree.prompt.id: group for group, credit in enumerate(credits)}
        total, said = 0.0, []
        for packed in self._packs(credits):
            steps = self._steps(packed, self._batch(packed))
            found_K = path_sums(steps.score_S[steps.step_M], steps.path_M, len(steps.outcome_K))
            if self._is_implicit:
                loss_K = functional.binary_cross_entropy_with_logits(
                    found_K, steps.outcome_K.clamp(0, 1), reduction="none"
                )
            else:
                loss_K = (found_K - steps.outcome_K).square()
            loss = loss_K.sum() / num_paths
            loss.backward()
            total += loss.item()
            group_of = [groups[credit.tree.prompt.id] for credit in packed for _ in credit.paths]
            said += list(zip(group_of, found_K.tolist(), steps.outcome_K.tolist(), strict=True))
        return total, said

    def _steps(self, packed: list[TreeCredit], batch: PackedBatch) -> _Steps:
        places = list(edges_of_steps(batch, packed))
        lengths = torch.tensor([edges.stop - edges.start for _, _, edges in places], device=self.device)
        step_E = torch.arange(len(places), device=self.device).repeat_interleave(lengths)
        assert batch.paths is not None, "every trajectory came with its outcome"
        # Of each trajectory's tokens one for each step, the last: its step's place on the trajectory.
        last_E = torch.zeros_like(step_E, dtype=torch.bool)
        last_E[lengths.cumsum(0) - 1] = True
        is_last_M = last_E[batch.paths.edge_M]
        edge_M, path_M = batch.paths.edge_M[is_last_M], batch.paths.path_M[is_last_M]
        outcome_K = torch.zeros(batch.paths.num_paths, dtype=torch.float64, device=self.device)
        outcome_K[path_M] = batch.paths.advantage_M[is_last_M]
        return _Steps(
            score_S=self._scores(batch, step_E, last_E, len(places)),
            place_S=[(number, row) for number, row, _ in places],
            step_M=step_E[edge_M],
            path_M=path_M,
            outcome_K=outcome_K,
        )

    def _scores(self, batch: PackedBatch, step_E: Tensor, last_E: Tensor, num_steps: int) -> Tensor:
        """Float64 [S]: sums of many small differences."""
        module = self.model.module
        if isinstance(module, TreePolicy):
            assert self.reference is not None, "an implicit model has one"
            with torch.no_grad():
                reference_E = self.reference(batch, self.layout).logprob_E.double()
            ratio_E = module(batch, self.layout).logprob_E.double() - reference_E
            return self.prm.beta * path_sums(ratio_E, step_E, num_steps)
        return module(batch, self.layout, rows=batch.edge_token_E[last_E]).double()

    def _packs(self, credits: list[TreeCredit]) -> list[list[TreeCredit]]:
        return plan_packs(credits, self.cfg.learner.pack_tokens)

    def _batch(self, packed: list[TreeCredit]) -> PackedBatch:
        return pack(packed, 128 if self.device.type == "cuda" else 1).to(self.device)

    def _parts(self, credits: list[TreeCredit], step: int) -> Iterator[list[TreeCredit]]:
        """Trees in an order drawn for this step, cut whole into nearly equal parts."""
        order = list(credits)
        random.Random(derive_seed(self.cfg.seed, "prm_mini_batches", step)).shuffle(order)
        num_parts = min(self.prm.mini_batches, len(order))
        for part in range(num_parts):
            yield order[part * len(order) // num_parts : (part + 1) * len(order) // num_parts]


def _implicit(cfg: Config, path: str, device: torch.device) -> TreePolicy:
    model = load_causal_lm(path, cfg.learner.weights_dtype)
    require_known_head(model)
    if cfg.learner.gradient_checkpointing:
        checkpoint_activations(model)
    return TreePolicy(model, 1.0).to(device).train()


def _credit(tree: Tree, outcomes: Outcomes) -> TreeCredit:
    """Every trajectory with an outcome, which stands where an advantage would, each with weight 1."""
    paths = []
    for leaf, outcome in outcomes.items():
        assert math.isfinite(outcome), "only a real score is an outcome"
        steps = len(tree.path(leaf))
        paths.append(PathCredit(leaf=leaf, advantage=[outcome] * steps, weight=[1.0] * steps))
    nothing = [0.0] * len(tree.nodes)
    return TreeCredit(tree=tree, w_pos=nothing, w_neg=nothing, w0=nothing, denominator=1.0).only_paths(paths)
