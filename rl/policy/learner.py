"""The learner: holds the policy and its optimiser, and turns trees with credit into new weights. No Ray in it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conf.errors import ConfigError, GroveError
from conf.schema import Config
from rl.policy.attention import ATTENTION_NAME, TreePlan, plan_attention, register_tree_attention
from rl.policy.logprobs import edge_logprobs
from rl.policy.loss import UpdateStats, k3_divergence, log_ratio, ppo_clip, update_stats, weighted_mean
from rl.policy.pack import PackedBatch, TreeCredit, pack, plan_packs
from rollout.seeds import derive_seed

HEAD_CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that exist at once; about three times as many floats are held while a chunk is computed."""

PAD_MULTIPLE = {"cpu": 1, "cuda": 128}
"""On a GPU few distinct sizes let the caching allocator reuse its blocks; on a CPU padding is only work."""


class NonFiniteGradient(GroveError, RuntimeError):
    """A gradient that is NaN or infinite, caught before the optimiser could spread it over all weights."""


class Learner:
    """Trains a causal LM on packed trees.

    Args:
        cfg: the run; reads seed, model.dtype, rollout.temperature, loss and learner.
        model_path: folder or hub name of the policy's first weights, also the frozen reference of the KL term.
    Raises: ConfigError for a model that a packed tree cannot train exactly.
    """

    def __init__(self, cfg: Config, model_path: str) -> None:
        register_tree_attention()
        self.cfg = cfg
        self.model_path = model_path
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(cfg.learner.num_threads)
        self.model = self._load(model_path)
        require_tree_exact(self.model)
        self.model.train()
        if cfg.learner.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.reference = self._load(model_path).requires_grad_(False) if cfg.loss.kl_coef > 0 else None
        self.optimizer = _optimizer(self.model, cfg)

    def update(self, trees: Sequence[TreeCredit], step: int) -> dict[str, float]:
        """One step of the run: an optimiser step for each mini-batch of whole prompts.

        A mini-batch whose gradient can only be zero is measured and leaves the weights alone: momentum would still move
        them.

        Args:
            trees: one per prompt; trees that train nothing are passed over.
            step: of the run, from 0; decides the mini-batches and the warm-up, so that a resumed run repeats them.
        Returns: metrics by name; what was not measured is left out: loss/* without a trained token, loss/kl without
            a reference, learner/grad_norm without an optimiser step.
        Raises: NonFiniteGradient, with the weights as they were before that mini-batch.
        """
        learning_rate = self._set_learning_rate(step)
        tally = _Tally()
        for index, mini_batch in enumerate(self._mini_batches(trees, step)):
            self._accumulate_gradients(mini_batch, tally, measures_gap=index == 0)
            if self._can_learn(mini_batch):
                tally.grad_norms.append(self._optimizer_step())
            self.optimizer.zero_grad()
        return {**tally.metrics(), "learner/learning_rate": learning_rate}

    @torch.no_grad()
    def score(self, context_ids: list[int], action_ids: list[int]) -> list[float]:
        """Log-probability in nats, at temperature 1, of each token of a step behind its context, as a plain sequence.

        The weight canary compares it with what the engines say; nothing of the packed path is used.
        """
        input_ids = torch.tensor([context_ids + action_ids], device=self.device)
        output = self.model(input_ids=input_ids, use_cache=False, logits_to_keep=len(action_ids) + 1)
        logprobs = output.logits[0, :-1].to(_at_least_float32(output.logits.dtype)).log_softmax(-1)
        return logprobs.gather(1, input_ids[0, -len(action_ids) :, None]).flatten().tolist()

    def save_weights(self, path: str | Path) -> None:
        """Write the parameters to one safetensors file under their Hugging Face names, a tied output layer left out.

        The file appears whole or not at all, so that an engine never reads half of it.
        """
        path = Path(path)
        # named_parameters names a shared tensor once, by the input embedding.
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self.model.named_parameters()}
        partial = path.with_name(path.name + ".partial")
        save_file(weights, partial, metadata={"format": "pt"})
        partial.replace(path)

    def save_model(self, folder: str | Path) -> None:
        """Write the policy and its tokenizer as a Hugging Face folder."""
        self.model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self.model_path).save_pretrained(folder)

    def load_model(self, folder: str | Path) -> None:
        """Take the weights of a folder that `save_model` wrote; the optimiser and the reference stay as they are."""
        self.model.load_state_dict(self._load(str(folder)).state_dict())

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's moments, loadable by torch.load(weights_only=True). The tensors are live: save at once."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take back what `optimizer_state` gave."""
        self.optimizer.load_state_dict(state)

    def _load(self, path: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, self.cfg.model.dtype), attn_implementation=ATTENTION_NAME
        )
        model.to(device=self.device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return model.eval()

    def _set_learning_rate(self, step: int) -> float:
        learner = self.cfg.learner
        learning_rate = learner.learning_rate * min(1.0, (step + 1) / max(1, learner.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def _mini_batches(self, trees: Sequence[TreeCredit], step: int) -> Iterator[list[TreeCredit]]:
        """Trained trees in an order drawn for this step, cut whole into nearly equal parts."""
        order = [credit for credit in trees if any(credit.is_trained(row) for row in range(len(credit.tree.nodes)))]
        random.Random(derive_seed(self.cfg.seed, "mini_batches", step)).shuffle(order)
        num_parts = min(self.cfg.learner.mini_batches, len(order))
        for part in range(num_parts):
            yield order[part * len(order) // num_parts : (part + 1) * len(order) // num_parts]

    def _can_learn(self, trees: list[TreeCredit]) -> bool:
        """False when every term of the loss has a zero gradient."""
        if self.cfg.loss.kl_coef or self.cfg.loss.entropy_coef:
            return True
        return any(any(credit.w_pos) or any(credit.w_neg) for credit in trees)

    def _accumulate_gradients(self, trees: list[TreeCredit], tally: _Tally, *, measures_gap: bool) -> None:
        total_weight = sum(credit.total_weight() for credit in trees)
        assert total_weight > 0, "a trained step has w0 > 0: w0 sums the weights that w_pos and w_neg multiply"
        tally.num_mini_batches += 1
        for packed_trees in plan_packs(trees, self.cfg.learner.pack_tokens):
            batch = pack(packed_trees, PAD_MULTIPLE[self.device.type]).to(self.device)
            tally.count(batch)
            self._loss(batch, total_weight, tally, measures_gap=measures_gap).backward()

    def _loss(self, batch: PackedBatch, total_weight: float, tally: _Tally, *, measures_gap: bool) -> Tensor:
        """This pack's part of its mini-batch's loss."""
        loss = self.cfg.loss
        plan = plan_attention(batch.end_T)
        logprob_E, entropy_E = self._edge_logprobs(self.model, batch, plan)
        old_logprob_E, w_pos_E, w_neg_E, w0_E = (
            values.to(logprob_E.dtype) for values in (batch.old_logprob_E, batch.w_pos_E, batch.w_neg_E, batch.w0_E)
        )
        if measures_gap:
            tally.gaps.append((logprob_E.detach() - old_logprob_E).abs())
        log_ratio_E = log_ratio(logprob_E, old_logprob_E)
        clip = {"clip_low": loss.clip_low, "clip_high": loss.clip_high, "dual_clip": loss.dual_clip}
        tally.add_stats(update_stats(log_ratio_E, entropy_E, w_pos_E, w_neg_E, w0_E, total_weight=total_weight, **clip))
        policy = ppo_clip(log_ratio_E, w_pos_E, w_neg_E, **clip).sum() / total_weight
        tally.add("loss/policy", policy)
        total = policy - loss.entropy_coef * weighted_mean(entropy_E, w0_E, total_weight)
        if self.reference is not None:
            with torch.no_grad():
                reference_E, _ = self._edge_logprobs(self.reference, batch, plan)
            kl = weighted_mean(k3_divergence(logprob_E, reference_E), w0_E, total_weight)
            tally.add("loss/kl", kl)
            total = total + loss.kl_coef * kl
        tally.add("loss/total", total)
        return total

    def _edge_logprobs(self, model: PreTrainedModel, batch: PackedBatch, plan: TreePlan) -> tuple[Tensor, Tensor]:
        head = head_weight(model)
        return edge_logprobs(
            tree_hidden(model, batch.input_ids_T, batch.position_T, plan),
            head,
            batch.edge_row_E,
            batch.edge_target_E,
            self.cfg.rollout.temperature,
            chunk_rows=max(1, HEAD_CHUNK_LOGITS[self.device.type] // len(head)),
        )

    def _optimizer_step(self) -> float:
        """Clip and apply the gradients; returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.learner.max_grad_norm).item()
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise NonFiniteGradient(
                f"the gradient norm is {norm}: the optimiser would turn every weight into NaN, so it was not run and "
                "the weights are as before it. Look for log-probabilities or advantages that are not finite in "
                "the recorded trees of this step; else lower learner.learning_rate, or use a wider model.dtype."
            )
        self.optimizer.step()
        return norm


def head_weight(model: PreTrainedModel) -> Tensor:
    """Weight [V, D] of the output layer, the input embedding where they are tied."""
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear), "a causal LM ends in a linear layer"
    return head.weight


def tree_hidden(model: PreTrainedModel, input_ids_T: Tensor, position_T: Tensor, plan: TreePlan) -> Tensor:
    """Last hidden states [T, D] of a pack, each token computed once.

    Args:
        model: loaded with attn_implementation="grove_tree".
        input_ids_T: int64 [T]; position_T: int64 [T]; plan: all of one `PackedBatch`.
    """
    output = model.base_model(
        input_ids=input_ids_T[None], position_ids=position_T[None], use_cache=False, tree_plan=plan
    )
    return output.last_hidden_state[0]


@torch.no_grad()
def require_tree_exact(model: PreTrainedModel) -> None:
    """Refuse a model that a packed tree would train inexactly: by its configuration, and by trying a small fork.

    Raises: ConfigError naming what is in the way.
    """
    config = model.config.get_text_config()
    dropouts = {name: value for name, value in config.to_dict().items() if "drop" in name and value}
    if dropouts:
        raise ConfigError(
            f"the model has dropout ({dropouts}): steps shared by several trajectories would share one random mask, "
            "and the ratio to the sampling policy would be noise. Set it to 0 in the model's config.json."
        )
    other_layers = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if other_layers:
        raise ConfigError(
            f"the model has layers of type {sorted(other_layers)}: packed trees know only full attention and would "
            "train on a context the engine never sampled from. Use a model whose layers are all full_attention."
        )
    gap = _fork_gap(model)
    if not gap < (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1):
        raise ConfigError(
            f"{type(model).__name__} gives other logits on a packed tree than on the same path alone (relative gap "
            f"{gap:.2g}): its attention ignores the packing, or its output layer scales or caps the logits, so "
            "training would be inexact. Use a model with plain attention and output layers, such as Qwen3 or Llama."
        )


def _fork_gap(model: PreTrainedModel) -> float:
    """Mean difference, relative to the logits' spread, between a path behind a fork in a pack and the path alone."""
    vocabulary = head_weight(model)
    ids_T = torch.arange(1, 13, device=vocabulary.device) % len(vocabulary)
    # A prompt of 4 tokens, a first branch of 4, and the branch that is compared.
    end_T = torch.tensor([12] * 4 + [8] * 4 + [12] * 4, device=ids_T.device)
    position_T = torch.tensor([*range(8), *range(4, 8)], device=ids_T.device)
    packed_LD = tree_hidden(model, ids_T, position_T, plan_attention(end_T))[8:]
    packed_LV = (packed_LD @ vocabulary.T).double()
    path_ids = torch.cat([ids_T[:4], ids_T[8:]])
    alone_LV = model(input_ids=path_ids[None], use_cache=False).logits[0, 4:].double()
    return ((packed_LV - alone_LV).abs().mean() / alone_LV.std()).item()


def _optimizer(model: PreTrainedModel, cfg: Config) -> torch.optim.AdamW:
    """AdamW; norms and biases are not decayed, since pulling them to 0 pulls the activations to 0."""
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in parameters if weight.ndim >= 2], "weight_decay": cfg.learner.weight_decay},
        {"params": [weight for weight in parameters if weight.ndim < 2], "weight_decay": 0.0},
    ]
    first, second = cfg.learner.betas
    return torch.optim.AdamW(groups, lr=cfg.learner.learning_rate, betas=(first, second))


@dataclass(slots=True)
class _Tally:
    """What one update adds up for its metrics; losses and statistics are means over mini-batches."""

    sums: dict[str, float] = field(default_factory=dict)
    ratio_max: float = 0.0
    gaps: list[Tensor] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    num_mini_batches: int = 0
    trained_tokens: int = 0
    packed_tokens: int = 0
    path_tokens: int = 0

    def count(self, batch: PackedBatch) -> None:
        """Count one pack's tokens."""
        self.trained_tokens += len(batch.edge_target_E)
        self.packed_tokens += batch.num_tokens
        self.path_tokens += len(batch.traj_index_P)

    def add(self, name: str, part: Tensor | float) -> None:
        """Add one pack's part of a mean."""
        self.sums[name] = self.sums.get(name, 0.0) + (part.item() if isinstance(part, Tensor) else part)

    def add_stats(self, stats: UpdateStats) -> None:
        """Add one pack's part of the statistics."""
        self.add("loss/entropy_nats", stats.entropy_nats)
        self.add("loss/clip_share", stats.clip_share)
        self.add("loss/approx_kl_nats", stats.approx_kl_nats)
        self.ratio_max = max(self.ratio_max, stats.ratio_max)

    def metrics(self) -> dict[str, float]:
        """Metrics by name."""
        metrics: dict[str, float] = {
            "learner/trained_tokens": self.trained_tokens,
            "learner/packed_tokens": self.packed_tokens,
            "learner/path_tokens": self.path_tokens,
        }
        if self.num_mini_batches:
            metrics |= {name: value / self.num_mini_batches for name, value in self.sums.items()}
            metrics["loss/ratio_max"] = self.ratio_max
            metrics["loss/logprob_gap_nats"] = torch.cat(self.gaps).mean().item()
        if self.grad_norms:
            metrics["learner/grad_norm"] = sum(self.grad_norms) / len(self.grad_norms)
        return metrics


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
