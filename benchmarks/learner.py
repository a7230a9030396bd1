"""Training on packed trees against training on each trajectory apart: speed, memory, and how close to the ideal.

    python -m benchmarks.learner [--quick] [--sizes 4M 52M] [--shapes tool grpo comb chains]
                                [--repeats 7] [--threads 2]

All sides compute the same gradient (compared before anything is timed): forward, log-probs of the trained tokens, PPO
loss, backward; the optimiser's step is the same for all and left out. None computes more than PACK_TOKENS tokens at
once. The other two sides get their best form:

- padded: rows sorted by length, stock attention without a mask, the output layer on trained rows alone;
- varlen: trajectories one behind the other without padding, attention within each, one call for those of one length.

Every side of a line runs in a process of its own, and they take turns; the fastest repetition counts. The forests are
trees of tool calls, answers to one prompt (a GRPO group), candidates compared at every step, and chains that share
nothing, where packed has nothing to win.

- `x_padded`, `x_varlen`: how much faster packed is than the other two; `ratio`: than the faster of them.
- `ideal`: operations of the trajectories over operations of the trees (layers, visible pairs, trained rows).
- `efficiency`: ratio / ideal.
- `..._mib`: peak memory of the gradient's computation, without weights and gradients.

Two more tables: what the packed side can trade for memory, and the output layer with a large vocabulary.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial

import torch

from benchmarks.apart import Apart, Measured, Step
from benchmarks.forests import (
    CHAINS,
    COMB,
    GRPO,
    TOOL,
    Shape,
    operations,
    packed_work,
    random_forest,
    separate_work,
)
from benchmarks.policies import MEDIUM, SMALL, TINY, Size, random_policy
from benchmarks.sides import Side, gradient_gap, packed, padded, varlen
from benchmarks.tables import Row, report
from conf.schema import Layout, LearnerConfig
from rl.policy.logprobs import Head, edge_logprobs
from rl.policy.memory import keep_freed_memory
from rl.policy.model import HEAD_CHUNK_LOGITS
from rl.policy.pack import pack

PACK_TOKENS = 4096
GRADIENT_TOLERANCE = 1e-4
"""See `gradient_gap`; float32 gives about 1e-6."""
WARM_UP_TOKENS = 64
PRELOAD = ["benchmarks.sides", "transformers.models.qwen3.modeling_qwen3"]
CPU = torch.device("cpu")

SIDES: dict[str, Side] = {
    "packed": packed(Layout.segments),
    "padded": padded,
    "varlen": varlen,
    "depth first": packed(Layout.depth_first),
}
REPEATS = {TINY: 1, SMALL: 7, MEDIUM: 3}
"""Timed repetitions of each side, after one that is not."""
SHAPES = [TOOL, GRPO, COMB, CHAINS]
HEAD = (2048, 151_936, 256)
"""Rows, vocabulary and width of the output layer."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and small trees: does it run?")
    parser.add_argument("--sizes", nargs="+", default=["4M", "52M"], help="parameters of the models")
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES], help="forests")
    parser.add_argument(
        "--threads", type=int, default=LearnerConfig().num_threads, help="torch threads of each process"
    )
    parser.add_argument("--repeats", type=int, help="timed repetitions (default: 7 with 4M parameters, 3 with 52M)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    threads, prefix = options.threads, "quick_" if options.quick else ""
    if options.quick:
        sizes, shapes, head = [TINY], [shape.resized(256) for shape in SHAPES], (64, 2048, 32)
    else:
        sizes, shapes, head = [size for size in (SMALL, MEDIUM) if size.name in options.sizes], SHAPES, HEAD
    shapes = [shape for shape in shapes if shape.name in options.shapes]
    for shape in shapes:
        require_same_gradients(sizes[0], shape)
    where = f"{threads} threads, at most {PACK_TOKENS} tokens at once"
    repeats = {size: options.repeats or REPEATS[size] for size in sizes}
    rows = [against_trajectories(size, shape, repeats[size], threads) for size in sizes for shape in shapes]
    report(f"{prefix}learner", f"packed trees against trajectories apart, {where}", rows, own_memory=False)
    rows = [
        row
        for shape in shapes
        if shape.name != CHAINS.name
        for row in memory_rows(sizes[0], shape, repeats[sizes[0]], threads)
    ]
    report(f"{prefix}learner_memory", f"time for memory, {sizes[0].name} parameters, {where}", rows, own_memory=False)
    title = f"output layer, forward and backward, float32, {threads} threads"
    report(f"{prefix}learner_head", title, head_rows(*head, threads), own_memory=False)


def against_trajectories(size: Size, shape: Shape, repeats: int, num_threads: int) -> Row:
    """One forest on three sides."""
    names = ("packed", "padded", "varlen")
    best = measured([partial(gradient_step, size, shape, name) for name in names], repeats, num_threads)
    seconds, peaks = [each.seconds for each in best], [each.peak_mib for each in best]
    ratio, ideal = min(seconds[1:]) / seconds[0], ideal_ratio(size, shape)
    return {
        "name": f"{shape.name} {size.name}",
        **{f"{name}_s": each for name, each in zip(names, seconds, strict=True)},
        "x_padded": seconds[1] / seconds[0],
        "x_varlen": seconds[2] / seconds[0],
        "ratio": ratio,
        "ideal": ideal,
        "efficiency": ratio / ideal,
        **{f"{name}_mib": round(each) for name, each in zip(names, peaks, strict=True)},
    }


def memory_rows(size: Size, shape: Shape, repeats: int, num_threads: int) -> list[Row]:
    """One forest on the packed side and on those that compute activations again instead of keeping them."""
    steps = {
        "packed": partial(gradient_step, size, shape, "packed"),
        "packed, gradient checkpointing": partial(gradient_step, size, shape, "packed", checkpointing=True),
        "depth first": partial(gradient_step, size, shape, "depth first"),
    }
    best = measured(list(steps.values()), repeats, num_threads)
    return [
        {"name": f"{shape.name}: {name}", "seconds": each.seconds, "mib": round(each.peak_mib)}
        for name, each in zip(steps, best, strict=True)
    ]


def head_rows(num_rows: int, vocabulary: int, width: int, num_threads: int) -> list[Row]:
    """Log-probs through one large table of logits, and in chunks."""
    steps = {
        "all logits at once": partial(naive_head_step, num_rows, vocabulary, width),
        "in chunks (edge_logprobs)": partial(chunked_head_step, num_rows, vocabulary, width),
    }
    rows: list[Row] = []
    for name, make in steps.items():
        best = measured([make], 1, num_threads)[0]
        size = {"rows": num_rows, "vocabulary": vocabulary, "hidden": width}
        rows.append({"name": name, **size, "seconds": best.seconds, "mib": round(best.peak_mib)})
    return rows


def measured(makers: list[partial[Step]], repeats: int, num_threads: int) -> list[Measured]:
    """First peak of each, and its fastest seconds after that; they take turns, so that all meet the same machine.

    A process takes gigabytes from the system in its first step, which is slow and which no second step of a run does.
    """
    with ExitStack() as stack:
        sides = [stack.enter_context(Apart(make, num_threads, preload=PRELOAD)) for make in makers]
        first, *rounds = [[side.step() for side in sides] for _ in range(1 + repeats)]
    return [
        Measured(seconds=min(each.seconds for each in mine), peak_mib=peak.peak_mib)
        for peak, *mine in zip(first, *rounds, strict=True)
    ]


def ideal_ratio(size: Size, shape: Shape) -> float:
    """Operations of the trajectories apart over those of the trees."""
    forest = random_forest(shape, size.vocabulary)
    works = separate_work(forest.trajectories), packed_work(pack(forest.credits))
    apart, together = (operations(work, size.config(), head_passes=4) for work in works)
    return apart / together


def require_same_gradients(size: Size, shape: Shape) -> None:
    """Compare what the sides compute, on the forest that is then measured."""
    policy, forest = random_policy(size, CPU), random_forest(shape, size.vocabulary)
    gap = gradient_gap(policy, forest, [SIDES["packed"], SIDES["varlen"], SIDES["padded"]], PACK_TOKENS)
    assert gap < GRADIENT_TOLERANCE, f"{shape.name}: the sides' gradients differ by {gap:.1e}"


def gradient_step(size: Size, shape: Shape, side: str, *, checkpointing: bool = False) -> Step:
    """One gradient of one side, in a process set up as a learner's; the gradients' own memory is there before."""
    keep_freed_memory()
    policy = random_policy(size, CPU, checkpointing=checkpointing)
    SIDES[side](policy, random_forest(shape.resized(WARM_UP_TOKENS), size.vocabulary), PACK_TOKENS)
    forest = random_forest(shape, size.vocabulary)

    def step() -> None:
        policy.zero_grad(set_to_none=False)
        SIDES[side](policy, forest, PACK_TOKENS)

    return step


def naive_head_step(num_rows: int, vocabulary: int, width: int) -> Step:
    """Log-probs from logits that all exist at once, as one would write it."""
    hidden_RD, weight_VD, target_R = head_inputs(num_rows, vocabulary, width)

    def step() -> None:
        logp_RV = (hidden_RD @ weight_VD.T).log_softmax(-1)
        logp_RV.gather(1, target_R[:, None]).sum().backward()

    return step


def chunked_head_step(num_rows: int, vocabulary: int, width: int) -> Step:
    """The same by `edge_logprobs`, which gives entropies too."""
    hidden_RD, weight_VD, target_R = head_inputs(num_rows, vocabulary, width)
    chunk_rows = max(1, HEAD_CHUNK_LOGITS["cpu"] // vocabulary)

    def step() -> None:
        logprob_R, _ = edge_logprobs(
            hidden_RD, Head(weight_VD), torch.arange(num_rows), target_R, 1.0, chunk_rows=chunk_rows
        )
        logprob_R.sum().backward()

    return step


def head_inputs(num_rows: int, vocabulary: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and targets at random; the gradients' own memory is there before."""
    torch.manual_seed(0)
    hidden_RD = torch.randn(num_rows, width).requires_grad_()
    weight_VD = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
    hidden_RD.grad, weight_VD.grad = torch.zeros_like(hidden_RD), torch.zeros_like(weight_VD)
    return hidden_RD, weight_VD, torch.randint(vocabulary, (num_rows,))


if __name__ == "__main__":
    main()
