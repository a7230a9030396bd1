"""What several ranks do together: each case is a function of the ranks, run in processes that start once for all."""

from __future__ import annotations

import multiprocessing
import random
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from policy_trees import grown, paired, tiny
from torch import Tensor
from torch.distributed.tensor import DTensor

from conf.errors import CheckpointError
from conf.schema import Config, Layout, LearnerConfig, LoraConfig, ModelConfig, OptimizerKind
from rl.policy.lora import with_lora
from rl.policy.model import EdgeOutputs, TreeCritic, TreePolicy
from rl.policy.moments import load_moments, load_weights, moment_tensors, weight_tensors
from rl.policy.optimizer import build_optimizer
from rl.policy.pack import PackedBatch, TreeCredit, pack, plan_packs
from rl.policy.rank_files import Shards, save_shards
from rl.policy.ranks import Ranks, dummy_batch, join, share_packs
from rl.policy.sharding import clip_gradients, full_weights, shard
from rl.policy.shards import policy_pieces
from rollout.meeting import meeting_address, open_meeting
from rollout.shards import as_bytes
from rollout.tree import ROOT

SHAPE = [ROOT, 0, 0, 1, 1, ROOT]
NUM_RANKS = 2
TIMEOUT_S = 120.0
WEIGHTS, MOMENTS = "weights/", "moments/"

shared = Path()
"""Folder that all ranks of a case see."""


def store(module: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, ranks: Ranks) -> None:
    """Weights and moments as a checkpoint has them."""
    weights, moments = weight_tensors(module), moment_tensors(module, optimizer)
    save_shards(
        folder,
        {WEIGHTS + name: each for name, each in weights.items()}
        | {MOMENTS + name: each for name, each in moments.items()},
        ranks,
    )


def take(module: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, ranks: Ranks) -> None:
    """Go on from them."""
    stored = Shards(folder)
    load_weights(module, stored, WEIGHTS, ranks)
    load_moments(module, optimizer, stored, MOMENTS, ranks)


def run_ranks(cases: list[Callable[[Ranks], Any]], folder: Path) -> dict[str, list[Any]]:
    """What each case returned, by its name and then by rank; a traceback where it raised."""
    meeting = open_meeting(TIMEOUT_S)
    spawn = multiprocessing.get_context("spawn")
    arguments = [(rank, meeting_address(meeting), cases, str(folder)) for rank in range(NUM_RANKS)]
    processes = [spawn.Process(target=_run, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(2 * TIMEOUT_S)
        assert process.exitcode == 0, "a rank died or hangs"
    of_rank = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]
    return {case.__name__: [found[case.__name__] for found in of_rank] for case in cases}


def _run(rank: int, address: str, cases: list[Callable[[Ranks], Any]], folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    global shared
    shared = Path(folder)
    ranks = join(rank, NUM_RANKS, address, torch.device("cpu"), TIMEOUT_S)
    found: dict[str, Any] = {}
    for case in cases:
        try:
            found[case.__name__] = case(ranks)
        except Exception:
            found[case.__name__] = traceback.format_exc()
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    ranks.close()


def forest(num_trees: int = 5) -> list[TreeCredit]:
    rng = random.Random(3)
    trees = [grown(SHAPE, [(rng.randint(1, 4), 2) for _ in SHAPE], rng, name=f"test/{n}") for n in range(num_trees)]
    return [paired(tree, rng).credit() for tree in trees]


def packs_of(trees: list[TreeCredit]) -> list[list[TreeCredit]]:
    """Three packs of five trees: one rank gets two of them, the other one."""
    packs = plan_packs(trees, budget_tokens=50)
    assert len(packs) == 3
    return packs


def policy(*, tied: bool = True, has_value_head: bool = False, checkpointed: bool = False) -> TreePolicy:
    """The same at every call."""
    model = tiny("qwen3", tied=tied)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    made = TreePolicy(model, 1.0, has_value_head=has_value_head).train()
    if made.value_head is not None:
        torch.manual_seed(1)
        torch.nn.init.normal_(made.value_head.weight, std=0.1)
    return made


def adapted_policy() -> TreePolicy:
    """Adapters that already do something: fresh ones multiply by 0, and half of their gradients are 0."""
    made = TreePolicy(with_lora(tiny("qwen3"), LoraConfig(rank=4), seed=0), 1.0).train()
    torch.manual_seed(2)
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def loss_of(outputs: EdgeOutputs, batch: PackedBatch) -> Tensor:
    """Anything that uses all outputs and adds up over packs."""
    weight_E = (batch.w_pos_E + batch.w_neg_E).to(outputs.logprob_E.dtype)
    loss = -(weight_E * outputs.logprob_E).sum() - 0.1 * (batch.w0_E.to(weight_E.dtype) * outputs.entropy_E).sum()
    return loss if outputs.value_E is None else loss + (batch.w0_E.to(weight_E.dtype) * outputs.value_E**2).sum()


def train_on(module: TreePolicy, packs: list[list[TreeCredit]]) -> None:
    """Gradients of some packs, [] for a dummy."""
    for trees in packs:
        batch = pack(trees) if trees else dummy_batch()
        loss_of(module(batch, Layout.segments), batch).backward()


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(each.grad) for name, each in module.named_parameters() if each.grad is not None}


def sharded_gradients(module: TreePolicy, ranks: Ranks) -> dict[str, Tensor]:
    shard(module, ranks, torch.float32, offload=False)
    train_on(module, share_packs(packs_of(forest()), ranks.size)[ranks.rank])
    return gradients(module)


def tied_gradients(ranks: Ranks) -> dict[str, Tensor]:
    return sharded_gradients(policy(), ranks)


def untied_gradients(ranks: Ranks) -> dict[str, Tensor]:
    return sharded_gradients(policy(tied=False), ranks)


def checkpointed_gradients(ranks: Ranks) -> dict[str, Tensor]:
    return sharded_gradients(policy(checkpointed=True), ranks)


def value_head_gradients(ranks: Ranks) -> dict[str, Tensor]:
    return sharded_gradients(policy(has_value_head=True), ranks)


def adapter_gradients(ranks: Ranks) -> dict[str, Tensor]:
    return sharded_gradients(adapted_policy(), ranks)


def critic() -> TreeCritic:
    """The same at every call."""
    made = TreeCritic(tiny("qwen3")).train()
    torch.manual_seed(1)
    torch.nn.init.normal_(made.value_head.weight, std=0.1)
    return made


def critic_gradients(ranks: Ranks) -> dict[str, Tensor]:
    module = critic()
    shard(module, ranks, torch.float32, offload=False)
    (module(pack(packs_of(forest())[ranks.rank]), Layout.segments) - 1.0).square().sum().backward()
    return gradients(module)


def head_alone(ranks: Ranks) -> list[list[str]]:
    """Names with a gradient after a pack of a value head's warm-up, and after a pack of the whole policy behind it."""
    module = policy(has_value_head=True)
    shard(module, ranks, torch.float32, offload=False)
    value_E = module(pack(forest(1)), Layout.segments, trains_trunk=False).value_E
    value_E.sum().backward()
    alone = sorted(gradients(module))
    train_on(module, [forest(1)])
    return [alone, sorted(gradients(module))]


def clipped(ranks: Ranks) -> tuple[float, dict[str, Tensor]]:
    module = policy()
    shard(module, ranks, torch.float32, offload=False)
    train_on(module, share_packs(packs_of(forest()), ranks.size)[ranks.rank])
    return clip_gradients(module.parameters(), 0.5), gradients(module)


def statistics(ranks: Ranks) -> list[Any]:
    parts = {"tokens": 0.1 + ranks.rank, **({"alone": 2.0} if ranks.rank == 1 else {})}
    return [ranks.sum(parts), ranks.max(parts), ranks.gather({"from": ranks.rank})]


def unseen_update(ranks: Ranks) -> list[list[float]]:
    """Log-probabilities after: a pass without gradients, then an update; and of a module that never had that pass."""
    found = []
    for looks_first in (True, False):
        module = policy()
        shard(module, ranks, torch.float32, offload=False)
        optimizer = build_optimizer(module, LearnerConfig(), 1e-2, 1e-2)
        train_on(module, [packs_of(forest())[ranks.rank]])
        with torch.no_grad():
            if looks_first:
                module(pack(forest(1)), Layout.segments)
            optimizer.step()
            found.append(module(pack(forest(1)), Layout.segments).logprob_E.tolist())
    return found


def stepped(module: TreePolicy, optimizer: torch.optim.Optimizer, ranks: Ranks, num_steps: int) -> None:
    for _ in range(num_steps):
        train_on(module, share_packs(packs_of(forest()), ranks.size)[ranks.rank])
        clip_gradients(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def trained(ranks: Ranks, optimizer_kind: OptimizerKind = OptimizerKind.adamw) -> dict[str, Any]:
    """Two steps, a checkpoint, one more step; sizes of this rank's moments."""
    module, optimizer = wide_learner(ranks, optimizer_kind)
    stepped(module, optimizer, ranks, 2)
    store(module, optimizer, shared / optimizer_kind.value, ranks)
    own = sum(optimizer.state[each]["exp_avg"].to_local().numel() for each in module.parameters())
    stepped(module, optimizer, ranks, 1)
    after = full_weights(module)
    again, resumed = wide_learner(ranks, optimizer_kind)
    take(again, resumed, shared / optimizer_kind.value, ranks)
    stepped(again, resumed, ranks, 1)
    return {"after": after, "own": own, "resumed": full_weights(again)}


def took_over(ranks: Ranks) -> dict[str, Tensor]:
    """Goes on where one process stopped after two steps."""
    module, optimizer = wide_learner(ranks, OptimizerKind.adamw)
    take(module, optimizer, shared / ONE_PROCESS, ranks)
    stepped(module, optimizer, ranks, 1)
    return full_weights(module)


ONE_PROCESS = "one_process"


def wide_learner(ranks: Ranks, optimizer_kind: OptimizerKind) -> tuple[TreePolicy, torch.optim.Optimizer]:
    module = wide_policy()
    if ranks.size > 1:
        shard(module, ranks, torch.float32, offload=False)
    return module, build_optimizer(module, LearnerConfig(weight_decay=0.1, optimizer=optimizer_kind), 1e-2, 1e-3)


def trained_8bit(ranks: Ranks) -> dict[str, Any]:
    return trained(ranks, OptimizerKind.adamw_8bit)


def wide_policy() -> TreePolicy:
    """Half of a layer of the feed-forward network is large enough for moments in 8 bits: 4,096 values."""
    return TreePolicy(tiny("qwen3", hidden_size=64, intermediate_size=128), 1.0, has_value_head=True).train()


def bfloat16_compute(ranks: Ranks) -> dict[str, Any]:
    """Small steps that bfloat16 weights would round away."""
    module = policy(has_value_head=True)
    shard(module, ranks, torch.bfloat16, offload=False)
    optimizer = build_optimizer(module, LearnerConfig(), 1e-5, 1e-5)
    before = full_weights(module)
    outputs = module(pack(forest(1)), Layout.segments)
    stepped(module, optimizer, ranks, 1)
    return {
        "types": [str(each.dtype) for each in (outputs.logprob_E, outputs.entropy_E, outputs.value_E)],
        "logprobs": outputs.logprob_E.detach(),
        "before": before,
        "after": full_weights(module),
    }


def pieces(module: TreePolicy, ranks: Ranks, lora: LoraConfig | None = None) -> Any:
    """What this rank gives to the engines in small groups, and all weights beside it."""
    shard(module, ranks, torch.float32, offload=False)
    cfg = Config(model=ModelConfig(dtype="bfloat16", lora=lora or LoraConfig()))
    found = {}
    for name, whole in (("pieces", False), ("whole", True)):
        found[name] = [
            [
                (each.name, each.dtype, list(each.shape), each.start, torch.from_numpy(as_bytes(tensor).copy()))
                for each, tensor in zip(rows, tensors, strict=True)
            ]
            for rows, tensors in policy_pieces(module, cfg, ranks, group_bytes=2000, whole=whole)
        ]
    return {**found, "weights": full_weights(module)}


def published(ranks: Ranks) -> Any:
    return pieces(policy(has_value_head=True), ranks)


def published_adapters(ranks: Ranks) -> Any:
    return pieces(adapted_policy(), ranks, LoraConfig(rank=4))


def published_experts(ranks: Ranks) -> Any:
    """Fused in memory, one by one on the hub."""
    return pieces(TreePolicy(tiny("qwen3_moe"), 1.0), ranks)


def wrong_weights(ranks: Ranks) -> str:
    """Every rank raises, and none waits for another."""
    module = policy()
    shard(module, ranks, torch.float32, offload=False)
    save_shards(shared / "wrong", {f"{WEIGHTS}model.other": torch.zeros(2)}, ranks)
    try:
        load_weights(module, Shards(shared / "wrong"), WEIGHTS, ranks)
    except CheckpointError as error:
        return str(error)
    return "accepted"
