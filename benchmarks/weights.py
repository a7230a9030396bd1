"""A version of the weights from the learner's processes to an engine: the ways Grove has against one gathered file.

    python -m benchmarks.weights [--quick] [--sizes 4M 52M] [--ranks 1 2] [--repeats 5] [--dtype float32]

All ways begin with trained weights in real learner processes (FSDP2 over gloo where there are two) and end when the
engine's side has copied every tensor into a model of its own, as an engine does:

- file: all weights gathered on rank 0, written as one safetensors file in shared memory, read by the engine, as Grove
  did it before.
- shards: each rank puts its rows into the object store of its node with a checksum; the engine checks them and makes
  tensors whole, a group at a time (cluster.weights=object_store).
- broadcast: each rank sends its rows over gloo while the engine takes them (cluster.weights=broadcast).
- ipc: rank 0 makes each group whole in memory that the engine maps (cluster.weights=ipc).
- delta: broadcast of what has changed, after a change of `--changed` of all weights (cluster.weights_delta=true).

They take turns; the fastest repetition counts.

- `seconds`: of the whole way; `lay_out`: of it until the learner is free again; `take`: the engine's part. With
  broadcast and ipc both work at once, and the part of who began last counts.
- `ratio`: file / this way in `seconds`.
- `ideal`: the fewest copies there can be between two processes, one into shared memory and one out of it, at the
  speed of this machine's memcpy; `efficiency`: ideal / this way.
- `sent`: share of the bytes that was sent; `pays_below_gbit`: the network, in Gbit/s, on which sending the others would
  take as long as finding them took here beyond a broadcast, so that delta is faster on any slower one.
- `rank0_mib`, `engine_mib`: resident memory at its highest, above that before; pages of shared memory count where they
  are mapped.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load_file, save_file

from benchmarks.apart import status_mib
from benchmarks.policies import MEDIUM, SMALL, TINY, Size, random_policy
from benchmarks.tables import Row, report
from conf.check_machine import DTYPE_BYTES
from conf.schema import Config, LearnerConfig, ModelConfig, WeightPath
from rl.policy.actor import LearnerGroup
from rl.policy.sharding import full_weights, local_rows
from rl.policy.stored import plain_weights
from rollout.lines import Offer, Receiver, Sent
from rollout.meeting import LOOPBACK
from rollout.shards import Arriving, Published

LIMIT_S = 600.0
SHARED_MEMORY = Path("/dev/shm")
LINES = [WeightPath.broadcast, WeightPath.ipc]


@dataclass(frozen=True, slots=True)
class Part:
    """What one process did."""

    seconds: float
    mib: float


@dataclass(frozen=True, slots=True)
class Way:
    """One version, brought once."""

    ranks: list[Part]
    engine: Part
    at_once: bool = False
    """The engine takes while the learner sends."""

    @property
    def lay_out_seconds(self) -> float:
        """Of the slowest rank."""
        return max(part.seconds for part in self.ranks)

    @property
    def seconds(self) -> float:
        """Of the whole way, without the calls between the processes, which all ways have.

        Both ends end together where they work at once; whoever began last has waited for nobody.
        """
        parts = [self.lay_out_seconds, self.engine.seconds]
        return min(parts) if self.at_once else sum(parts)


class Engine:
    """The engine's side: a model of its own, into which every tensor is copied."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        torch.set_num_threads(1)
        self._model = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self._receivers = {path: Receiver(torch.device("cpu")) for path in LINES}

    def take_file(self, path: str) -> Part:
        """From a safetensors file."""
        return measured_work(lambda: self._copy(load_file(path)))

    def take_shards(self, published: Published) -> Part:
        """From the object store."""

        async def fetch(ref: Any) -> list[np.ndarray]:
            return ray.get(ref)

        async def take() -> None:
            async for tensors in Arriving(published, fetch).tensors():
                self._copy(tensors)

        return measured_work(lambda: asyncio.run(take()))

    def take_offered(self, offer: Offer) -> Part:
        """From the learner's lines."""

        def take() -> None:
            for tensors in self._receivers[offer.path].groups(offer):
                self._copy(tensors)

        return measured_work(take)

    def sums(self) -> dict[str, float]:
        """Something that tells one version from another."""
        return {name: float(weight.double().sum()) for name, weight in self._model.items()}

    def forget(self) -> None:
        """Every weight is 0, so that nothing of one way counts for the next."""
        for weight in self._model.values():
            weight.zero_()

    def _copy(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._model[name].copy_(tensor)


def measured_work(work: Callable[[], Any]) -> Part:
    """How long `work` takes, and resident memory at its highest meanwhile, above that before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    started = time.perf_counter()
    work()
    return Part(time.perf_counter() - started, status_mib("VmHWM") - before)


def write_file(actor: Any, path: str) -> Part:
    """Called in every learner process: gather everything on rank 0, which writes it."""

    def write() -> None:
        learner = actor._learner
        weights = full_weights(learner.policy.module)
        if learner.ranks.rank == 0:
            dtype = getattr(torch, learner.cfg.model.dtype)
            plain = plain_weights(weights, learner.cfg.model.lora)
            save_file({name: weight.to(dtype).contiguous() for name, weight in plain.items()}, path)

    return measured_work(write)


def publish(actor: Any) -> tuple[Any, Part]:
    """Called in every learner process: what it does in a run. Returns its pieces, too."""
    found: list[Any] = []
    part = measured_work(lambda: found.extend(actor.publish(1)[1]))
    return found, part


class OverLines:
    """Brings weights by the lines of one path, which are made once, as in a run."""

    def __init__(self, path: WeightPath, group: LearnerGroup, ranks: int, *, delta: bool = False) -> None:
        self._group, self.brought_bytes = group, 0
        ray.get([each.__ray_call__.remote(choose, delta) for each in group._actors], timeout=LIMIT_S)
        heard = range(ranks) if path is WeightPath.broadcast else range(1)
        addresses = group.open_lines(path, [int(rank in heard) for rank in range(ranks)], [LOOPBACK] * ranks)
        self._offer = Offer(1, 0, path, tuple(addresses[rank] for rank in heard), 0, 1, LIMIT_S)

    def __call__(self, engine: Any) -> Way:
        """Bring it once more."""
        self._offer = self._offer.of(1, self._offer.sending + 1)
        sending = [each.__ray_call__.remote(send, self._offer.sending) for each in self._group._actors]
        taken: Any = ray.get(engine.take_offered.remote(self._offer), timeout=LIMIT_S)
        found: list[Any] = ray.get(sending, timeout=LIMIT_S)
        self.brought_bytes = sum(sent.brought_bytes for sent, _ in found)
        return Way([part for _, part in found], taken, at_once=True)


def choose(actor: Any, delta: bool) -> None:
    """Called in every learner process: as the run's settings would say."""
    actor._cfg.cluster.weights_delta = delta


def send(actor: Any, sending: int) -> tuple[Sent, Part]:
    """Called in every learner process: what it does in a run."""
    found: list[Sent] = []
    part = measured_work(lambda: found.append(actor.send(1, sending)))
    return found[0], part


def change(actor: Any, share: float) -> None:
    """Called in every learner process: an update that changes so many of the weights that it holds."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in actor._learner.policy.module.parameters():
            rows = local_rows(each)[0]
            rows += (torch.rand(rows.shape, generator=generator) < share) * 0.5


def by_file(group: LearnerGroup, engine: Any, path: Path) -> Way:
    """Gathered on one rank."""
    calls = [each.__ray_call__.remote(write_file, str(path)) for each in group._actors]
    ranks: list[Any] = ray.get(calls, timeout=LIMIT_S)
    taken: Any = ray.get(engine.take_file.remote(str(path)), timeout=LIMIT_S)
    path.unlink()
    return Way(ranks, taken)


def by_shards(group: LearnerGroup, engine: Any) -> Way:
    """From every rank."""
    of_rank: list[Any] = ray.get([each.__ray_call__.remote(publish) for each in group._actors], timeout=LIMIT_S)
    groups = zip(*(pieces for pieces, _ in of_rank), strict=True)
    published = Published(1, tuple(tuple(piece for piece in each if piece.rows) for each in groups))
    taken: Any = ray.get(engine.take_shards.remote(published), timeout=LIMIT_S)
    return Way([part for _, part in of_rank], taken)


def copy_seconds(size_bytes: int) -> float:
    """Of one memcpy of so many bytes into memory that is there, the fastest of five."""
    source, target = np.ones(size_bytes, np.uint8), np.zeros(size_bytes, np.uint8)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measured(size: Size, ranks: int, dtype: str, repeats: int, changed: float, folder: Path) -> list[Row]:
    """A line of the table for each way."""
    model = folder / size.name
    policy = random_policy(size, torch.device("cpu"))
    policy.model.save_pretrained(str(model))
    write_tokenizer(model, size.vocabulary)
    weights = {
        name.removeprefix("model."): each.detach().to(getattr(torch, dtype)) for name, each in policy.named_parameters()
    }
    learner = LearnerConfig(num_processes=ranks, num_threads=1)
    group = LearnerGroup(Config(model=ModelConfig(dtype=dtype), learner=learner), str(model), folder / "logs")
    engine: Any = ray.remote(Engine).options(num_cpus=0).remote(weights)
    group.answer(group.ready(), limit_s=LIMIT_S, what="the learner to load")
    path = SHARED_MEMORY / f"grove-benchmark-{folder.name}.safetensors"
    wanted: dict[str, float] = {}
    found: Any = {}
    measured_ways: dict[str, list[Way]] = {name: [] for name in ("file", "shards", *(each.value for each in LINES))}
    for _ in range(repeats + 1):  # the first warms up
        for name, ways in measured_ways.items():
            if name == "file":
                ways.append(by_file(group, engine, path))
            elif name == "shards":
                ways.append(by_shards(group, engine))
            else:  # a rank has one line at a time
                over = OverLines(WeightPath(name), group, ranks)
                over(engine)
                ways.append(over(engine))
            found = ray.get(engine.sums.remote(), timeout=LIMIT_S)
            wanted = wanted or found
            assert found == wanted and any(found.values()), f"{name} brings other weights than the file"
            ray.get(engine.forget.remote(), timeout=LIMIT_S)
    over, deltas = OverLines(WeightPath.broadcast, group, ranks, delta=True), []
    over(engine)
    for _ in range(repeats):
        ray.get([each.__ray_call__.remote(change, changed) for each in group._actors], timeout=LIMIT_S)
        deltas.append(over(engine))
    found = ray.get(engine.sums.remote(), timeout=LIMIT_S)
    by_shards(group, engine)
    assert found == ray.get(engine.sums.remote(), timeout=LIMIT_S), "changes make other weights"
    group.close()
    ray.kill(engine)
    measured_ways["delta"] = [deltas[0], *deltas]
    best = {name: min(ways[1:], key=lambda way: way.seconds) for name, ways in measured_ways.items()}
    size_bytes = sum(weight.nbytes for weight in weights.values())
    ideal = 2 * copy_seconds(size_bytes)
    extra = best["delta"].seconds - best["broadcast"].seconds
    saved_gbit = (size_bytes - over.brought_bytes) * 8e-9
    rows: list[Row] = []
    for name, way in best.items():
        row: Row = {
            "name": f"{size.name} {dtype}, {ranks} rank{'s' if ranks > 1 else ''}: {name}",
            "mib": round(size_bytes / 2**20),
            "seconds": way.seconds,
            "lay_out": way.lay_out_seconds,
            "take": way.engine.seconds,
            "ratio": best["file"].seconds / way.seconds,
            "efficiency": ideal / way.seconds,
            "rank0_mib": round(way.ranks[0].mib),
            "engine_mib": round(way.engine.mib),
            "sent": over.brought_bytes / size_bytes if name == "delta" else 1.0,
        }
        rows.append(row)
    rows[-1]["pays_below_gbit"] = saved_gbit / extra if extra > 0 else float("inf")
    return rows


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A learner's folder has one; nothing here reads it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, vocabulary)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure and print; returns the table."""
    sizes = {size.name: size for size in (TINY, SMALL, MEDIUM)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny model, one rank, one repetition: does it run?")
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=["4M", "52M"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="float32")
    parser.add_argument("--changed", type=float, default=0.024, help="share of the weights that an update changes")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.sizes, chosen.ranks, chosen.repeats = ["tiny"], [1], 1
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=2**30, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="grove-weights-") as folder:
            rows = [
                row
                for size in chosen.sizes
                for ranks in chosen.ranks
                for row in measured(sizes[size], ranks, chosen.dtype, chosen.repeats, chosen.changed, Path(folder))
            ]
    finally:
        ray.shutdown()
    report("weights", "weights from the learner to one engine", rows, own_memory=False)
    return rows


if __name__ == "__main__":
    main()
