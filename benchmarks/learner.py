"""Training on packed trees against training each trajectory as a padded row of its own.

    python -m benchmarks.learner

Both sides compute the same gradient: forward, log-probs of the trained tokens, PPO loss, backward. The padded side gets
its best form: rows sorted by length, batches of at most learner.pack_tokens tokens, the output layer on trained rows
alone. `ratio` is packed / padded in path tokens per second; `ideal` is the ratio of the floating-point operations that
the two cannot avoid (no padding, attention pairs that are visible); `efficiency` is ratio / ideal.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.tables import Row, report
from conf.schema import LearnerConfig, LossConfig, TinyModelConfig
from rl.policy.attention import ATTENTION_NAME, plan_attention, register_tree_attention
from rl.policy.learner import head_weight, tree_hidden
from rl.policy.logprobs import edge_logprobs
from rl.policy.loss import log_ratio, ppo_clip
from rl.policy.pack import PackedBatch, TreeCredit, pack, plan_packs
from rollout.tree import ROOT, Node, Tree
from rollout.types import Prompt, StepFacts, StepKind, StopReason

VOCABULARY = 512
PACK_TOKENS = LearnerConfig().pack_tokens


@dataclass(frozen=True, slots=True)
class Shape:
    """Trees of one kind."""

    name: str
    num_trees: int
    widths: tuple[int, ...]
    """Steps at each depth; every step has equally many children."""
    prompt_tokens: int
    action_tokens: int
    observation_tokens: int
    sizes: TinyModelConfig


SMALL = TinyModelConfig()
MEDIUM = TinyModelConfig(hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=4, intermediate_size=768)
SHAPES = (
    Shape("16 trees of short turns", 16, (2, 4, 8, 8, 8), 22, 6, 5, SMALL),
    Shape("8 answers to a long prompt", 1, (8,), 1024, 256, 0, MEDIUM),
    Shape("tool calls, forks all the way", 1, (1, 2, 4, 8), 256, 128, 128, MEDIUM),
)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions; the fastest counts")
    parser.add_argument("--threads", type=int, default=LearnerConfig().num_threads, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    register_tree_attention()
    rows = [measured(shape, arguments.repeats) for shape in SHAPES]
    report("learner", f"packed trees against padded trajectories, {arguments.threads} threads", rows)


def measured(shape: Shape, repeats: int) -> Row:
    """One line of the table."""
    model, trees = random_model(shape.sizes), random_trees(shape)
    batch = pack(trees)
    packed_s, padded_s = fastest([lambda: train_packed(model, trees), lambda: train_padded(model, batch)], repeats)
    ratio, ideal = padded_s / packed_s, ideal_ratio(batch, model)
    return {
        "name": shape.name,
        "path_tokens": len(batch.traj_index_P),
        "packed_tokens": batch.num_tokens,
        "packed_tokens_per_s": len(batch.traj_index_P) / packed_s,
        "padded_tokens_per_s": len(batch.traj_index_P) / padded_s,
        "ratio": ratio,
        "ideal": ideal,
        "efficiency": ratio / ideal,
    }


def fastest(sides: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Seconds of the fastest repetition of each; the sides take turns, so that both meet the same machine."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats + 1):
        for side, mine in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            side()
            mine.append(time.perf_counter() - started)
    return [min(mine[1:]) for mine in seconds]  # the first warms up


def train_packed(model: PreTrainedModel, trees: Sequence[TreeCredit]) -> None:
    """One gradient, each token computed once; planning and packing are in the time."""
    for packed_trees in plan_packs(trees, PACK_TOKENS):
        batch = pack(packed_trees)
        hidden_TD = tree_hidden(model, batch.input_ids_T, batch.position_T, plan_attention(batch.end_T))
        backward(model, hidden_TD, batch, batch.edge_row_E, torch.arange(len(batch.edge_row_E)))
    model.zero_grad()


def train_padded(model: PreTrainedModel, batch: PackedBatch) -> None:
    """The same gradient, from trajectories that are rows of their own."""
    edge_of_T = torch.full((len(batch.input_ids_T),), -1)
    edge_of_T[batch.edge_token_E] = torch.arange(len(batch.edge_token_E))
    paths = [batch.traj_index_P[start:stop] for start, stop in pairwise(batch.traj_ptr)]
    for group in padded_groups(sorted(paths, key=len)):
        index_BT = torch.nn.utils.rnn.pad_sequence(group, batch_first=True)
        # Padding comes last and attention is causal: no real token sees it and no mask is needed.
        hidden_BTD = model.base_model(input_ids=batch.input_ids_T[index_BT], use_cache=False).last_hidden_state
        tokens = [torch.nonzero(edge_of_T[path] >= 0).flatten() for path in group]
        rows_E = torch.cat([place * index_BT.shape[1] + found - 1 for place, found in enumerate(tokens)])
        edges_E = torch.cat([edge_of_T[path[found]] for path, found in zip(group, tokens, strict=True)])
        backward(model, hidden_BTD.flatten(0, 1), batch, rows_E, edges_E)
    model.zero_grad()


def padded_groups(paths: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours in length, at most PACK_TOKENS tokens each, padding included."""
    groups: list[list[Tensor]] = [[]]
    for path in paths:
        if groups[-1] and (len(groups[-1]) + 1) * len(path) > PACK_TOKENS:
            groups.append([])
        groups[-1].append(path)
    return groups


def backward(model: PreTrainedModel, hidden: Tensor, batch: PackedBatch, rows_E: Tensor, edges_E: Tensor) -> None:
    """PPO loss of some edges, read from some rows of the hidden states, and its gradient."""
    loss = LossConfig()
    logprob_E, _ = edge_logprobs(hidden, head_weight(model), rows_E, batch.edge_target_E[edges_E], 1.0, chunk_rows=8192)
    log_ratio_E = log_ratio(logprob_E, batch.old_logprob_E[edges_E].float())
    w_pos_E, w_neg_E = batch.w_pos_E[edges_E].float(), batch.w_neg_E[edges_E].float()
    ppo_clip(log_ratio_E, w_pos_E, w_neg_E, loss.clip_low, loss.clip_high).sum().backward()


def ideal_ratio(batch: PackedBatch, model: PreTrainedModel) -> float:
    """Operations of separate trajectories over operations of the tree: linear layers, visible pairs, trained rows."""
    config = model.config
    layers = sum(weight.numel() for name, weight in model.named_parameters() if ".layers." in name)
    per_pair = 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    per_row = config.vocab_size * config.hidden_size

    def operations(tokens_T: Tensor, num_rows: int) -> float:
        num_pairs = (batch.position_T[tokens_T] + 1).sum().item()
        return layers * len(tokens_T) + per_pair * num_pairs + per_row * num_rows

    trained_T = torch.zeros(len(batch.input_ids_T), dtype=torch.bool)
    trained_T[batch.edge_token_E] = True
    apart = operations(batch.traj_index_P, int(trained_T[batch.traj_index_P].sum()))
    return apart / operations(torch.arange(batch.num_tokens), len(batch.edge_row_E.unique()))


def random_model(sizes: TinyModelConfig) -> PreTrainedModel:
    """A Qwen3 of these sizes with random weights."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate_size,
        tie_word_embeddings=True,
    )
    config._attn_implementation = ATTENTION_NAME
    return Qwen3ForCausalLM(config)


def random_trees(shape: Shape) -> list[TreeCredit]:
    """Trees of random tokens, actions of varying length, every step trained with both signs."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    def grown(number: int) -> TreeCredit:
        tree = Tree(prompt=Prompt(id=str(number), token_ids=tuple(tokens(shape.prompt_tokens)), question="", answer=""))
        level = [ROOT]
        for depth, width in enumerate(shape.widths, start=1):
            last = depth == len(shape.widths)
            parents = [parent for parent in level for _ in range(width // len(level))]
            level = [tree.add(random_node(parent, last=last)) for parent in parents]
        weights = [1.0] * len(tree.nodes)
        return TreeCredit(tree=tree, w_pos=weights, w_neg=[-weight for weight in weights], w0=weights)

    def random_node(parent: int, *, last: bool) -> Node:
        num_actions = max(1, round(shape.action_tokens * rng.uniform(0.75, 1.25)))
        return Node(
            parent=parent,
            action_ids=tokens(num_actions),
            action_logprobs=[-6.0] * num_actions,
            observation_ids=[] if last else tokens(shape.observation_tokens),
            facts=StepFacts(kind=StepKind.answer if last else StepKind.call),
            stop=StopReason.answered if last else StopReason.continues,
            version=0,
        )

    return [grown(number) for number in range(shape.num_trees)]


if __name__ == "__main__":
    main()
