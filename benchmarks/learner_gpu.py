"""Training on packed trees by FlexAttention against training on each trajectory apart, on one GPU.

    python -m benchmarks.learner_gpu [--tokens 16384 65536] [--no-checkpointing] [--peak-tflops 989]
    python -m benchmarks.learner_gpu --quick        # a tiny model and forest on the CPU, by segments

A model of the size of Qwen3-0.6B with random weights in bfloat16 and the three forests of `benchmarks.learner`, made
longer. No side computes more tokens at once than the forest has, so packed is one pack. Sides and columns as there; the
other two use torch's flash attention without a mask. The first call of each side is apart from the timed ones.

- `compile_s`: the packed side's first call less its fastest one: the compiler's run for this model in the first line,
  what a new shape costs in the others.
- `mfu`: operations of the tree over seconds, over the device's dense bfloat16 peak; what is computed twice, by
  checkpointing and in the output layer, counts once.

The sides' gradients are compared before, in float32 by a smaller model on shorter forests: bfloat16 rounds, and tokens
at the border of PPO's clip then fall on either side of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.apart import Step
from benchmarks.forests import (
    COMB,
    GRPO,
    TOOL,
    Forest,
    Shape,
    Work,
    operations,
    packed_work,
    random_forest,
    separate_work,
)
from benchmarks.policies import LARGE, SMALL, TINY, Size, random_policy
from benchmarks.sides import Side, gradient_gap, packed, padded, varlen
from benchmarks.tables import Row, report
from conf.schema import Layout
from rl.policy.layouts.flex import BLOCK
from rl.policy.model import TreePolicy
from rl.policy.pack import pack

PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}
"""Dense bfloat16 peak by a part of the device's name, from NVIDIA's data sheets (SXM boards)."""
REPEATS = 3
CHECKED_TOKENS = 1024
GRADIENT_TOLERANCE = 1e-3
"""See `gradient_gap`; float32 gives about 1e-6."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all lines share."""

    size: Size
    checked_size: Size
    """Of the model whose gradients are compared."""
    device: torch.device
    dtype: torch.dtype
    checkpointing: bool
    packed: Side
    peak_tflops: float | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and forest on the CPU: does it run?")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 65_536], help="unique tokens of a forest")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--peak-tflops", type=float, help="the device's dense bfloat16 peak, where it is not known here"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        side = packed(Layout.segments)
        bench = Bench(TINY, TINY, torch.device("cpu"), torch.float32, options.checkpointing, side, options.peak_tflops)
        name, forests = "CPU", [TOOL.resized(64)]
    elif torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        forests = [shape.resized(tokens) for tokens in options.tokens for shape in (TOOL, GRPO, COMB)]
        peak = options.peak_tflops or next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
        side = packed(Layout.flex, pad_multiple=BLOCK)
        bench = Bench(LARGE, SMALL, torch.device("cuda"), torch.bfloat16, options.checkpointing, side, peak)
    else:
        sys.exit("no CUDA device was found, and FlexAttention trains on no other. Try --quick, or benchmarks.learner.")
    started = time.perf_counter()
    for shape in dict.fromkeys(shape.resized(CHECKED_TOKENS) for shape in forests):
        require_same_gradients(bench, shape)
    print(f"the gradients agree; with the compiler's first run that took {time.perf_counter() - started:.1f} s")
    rows = [line(bench, shape) for shape in forests]
    peak_text = f"{bench.peak_tflops:,.0f} TFLOP/s peak" if bench.peak_tflops else "peak unknown"
    checkpointing = "with" if bench.checkpointing else "without"
    title = f"packed trees against trajectories apart, {bench.size.name} parameters, {bench.dtype}, {checkpointing} "
    report(
        "quick_learner_gpu" if options.quick else "learner_gpu",
        f"{title}gradient checkpointing, {name}, {peak_text}",
        rows,
    )


def require_same_gradients(bench: Bench, shape: Shape) -> None:
    """Compare what the sides compute, in float32."""
    policy = random_policy(bench.checked_size, bench.device)
    forest = random_forest(shape, bench.checked_size.vocabulary)
    gap = gradient_gap(policy, forest, [bench.packed, varlen, padded], CHECKED_TOKENS)
    assert gap < GRADIENT_TOLERANCE, f"{shape.name}: the sides' gradients differ by {gap:.1e}"


def line(bench: Bench, shape: Shape) -> Row:
    """One forest on three sides."""
    policy = random_policy(bench.size, bench.device, dtype=bench.dtype, checkpointing=bench.checkpointing)
    forest = random_forest(shape, bench.size.vocabulary)
    tokens = shape.unique_tokens()
    sides = {"packed": bench.packed, "padded": padded, "varlen": varlen}
    first_s = seconds_of(lambda: bench.packed(policy, forest, tokens), bench.device)
    runs = {name: fastest(policy, forest, side, tokens, bench.device) for name, side in sides.items()}
    seconds = {name: run[0] for name, run in runs.items()}
    together, apart = packed_work(pack(forest.credits)), separate_work(forest.trajectories)
    ideal = flops(bench.size, apart, head_passes=4) / flops(bench.size, together, head_passes=4)
    ratio = min(seconds["padded"], seconds["varlen"]) / seconds["packed"]
    mfu = None
    if bench.peak_tflops:
        mfu = flops(bench.size, together, head_passes=3) / seconds["packed"] / bench.peak_tflops / 1e12
    return {
        "name": shape.name,
        "tokens": tokens,
        **{f"{name}_s": each for name, each in seconds.items()},
        "ratio": ratio,
        "ideal": ideal,
        "efficiency": ratio / ideal,
        "mfu": mfu,
        "compile_s": first_s - seconds["packed"],
        **{f"{name}_mib": run[1] for name, run in runs.items()},
    }


def flops(size: Size, work: Work, head_passes: int) -> int:
    """Operations of one gradient; see `operations`."""
    return operations(work, size.config(), head_passes=head_passes)


def fastest(
    policy: TreePolicy, forest: Forest, side: Side, max_tokens: int, device: torch.device
) -> tuple[float, int | None]:
    """Seconds of the fastest repetition, and peak memory in MiB above weights and gradients; None on a CPU."""
    side(policy, forest, max_tokens)  # warms up, and makes the gradients
    before = 0
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(REPEATS):
        policy.zero_grad(set_to_none=False)
        seconds.append(seconds_of(lambda: side(policy, forest, max_tokens), device))
    peak_mib = (torch.cuda.max_memory_allocated() - before) // 2**20 if device.type == "cuda" else None
    policy.zero_grad()
    return min(seconds), peak_mib


def seconds_of(step: Step, device: torch.device) -> float:
    """Wall time until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
