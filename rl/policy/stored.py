"""A policy in files: what a checkpoint keeps of the learner. Nothing stored is executed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoTokenizer

from conf.schema import Config, LoraConfig
from rl.generators import generators_tensor, restore_generators_tensor
from rl.policy.lora import base_causal_lm, merged_weights, save_adapter
from rl.policy.model import TreeCritic, TreePolicy
from rl.policy.moments import weight_tensors
from rl.policy.rank_files import Shards, begin_shards, save_shards
from rl.policy.ranks import Ranks
from rl.policy.trained import Trained, weights_prefix
from rl.policy.written import MODEL, Written

ADAPTER = "adapter"
"""Folder of the adapters alone, as peft writes them."""
TRAINING = "training"
"""Folder of what training goes on from: weights, moments and generators, a file for each rank."""
POLICY, CRITIC = "policy", "critic"
"""Whose weights and moments are which in TRAINING."""
PREFIX = "model."
"""Before the Hugging Face name of every weight of a model without adapters, in a TreePolicy."""
FROZEN = ".frozen"
"""Folder of the weights under adapters, there only until they are merged."""


class Writing:
    """Files of a checkpoint that are written on a thread of their own; at most one at a time."""

    def __init__(self) -> None:
        self._future: Future[None] | None = None

    def begin(self, begun: Callable[[], Callable[[], None]]) -> None:
        """Wait for the one before, then take a copy of what is to be written and write it meanwhile.

        Args:
            begun: takes the copy and returns what writes it.
        """
        self.wait()
        write = begun()
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._future = thread.submit(write)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Return once nothing is being written; what went wrong is told by `status` alone."""
        if self._future is not None:
            self._future.exception()

    def status(self) -> Written:
        """At once, of the newest."""
        if self._future is None or not self._future.done():
            return Written(done=self._future is None)
        error = self._future.exception()
        if isinstance(error, CheckpointException):  # of all ranks; the first of them says what it was
            error = next(iter(error.failures.values()))[0]
        said = "" if error is None else f"{type(error).__name__}: {error}"
        return Written(done=True, error=said, by_system=isinstance(error, OSError))


def begin_checkpoint(
    folder: Path,
    policy: Trained[TreePolicy],
    critic: Trained[TreeCritic] | None,
    cfg: Config,
    ranks: Ranks,
    tokenizer_path: str,
) -> Callable[[], None]:
    """Copy what training goes on from to the host's memory. Collective.

    Returns: what writes it, to be called on every rank while training goes on: each rank's own rows to TRAINING, then
        by rank 0 the policy as a Hugging Face folder, put together from those files, and the adapters alone.
    """
    state = policy.state(POLICY) | (critic.state(CRITIC) if critic is not None else {})
    state[_generators(ranks)] = generators_tensor()
    copied = begin_shards(folder / TRAINING, state, ranks)

    def write() -> None:
        copied.result()
        if cfg.model.lora.rank:  # frozen weights need no copy: nothing changes them
            save_shards(folder / FROZEN, weight_tensors(policy.module, trained=False), ranks)
        if ranks.rank == 0:
            _write_model(folder, policy.module, cfg, tokenizer_path)
            shutil.rmtree(folder / FROZEN, ignore_errors=True)

    return write


def read_checkpoint(
    folder: Path, policy: Trained[TreePolicy], critic: Trained[TreeCritic] | None, ranks: Ranks
) -> None:
    """Take back what `begin_checkpoint` wrote, on as many ranks as there are now; each reads its own rows. Collective.

    Raises: CheckpointError when it is of another model or another optimiser.
    """
    stored = Shards(folder / TRAINING)
    policy.load(stored, POLICY)
    if critic is not None:
        critic.load(stored, CRITIC)
    name = _generators(ranks)
    if name in stored.shapes:  # a rank that there was not then goes on from its seeds
        restore_generators_tensor(stored.whole([name])[name])


def plain_weights(weights: dict[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Weights of the plain model by the names transformers has in memory: adapters merged, a value head left out."""
    if lora.rank:
        return merged_weights(weights, lora)
    return {name.removeprefix(PREFIX): weight for name, weight in weights.items() if name.startswith(PREFIX)}


def _write_model(folder: Path, module: TreePolicy, cfg: Config, tokenizer_path: str) -> None:
    """The Hugging Face folder, in model.dtype as the engines have it, and the adapters as they are trained."""
    stored, prefix = Shards(folder / TRAINING), weights_prefix(POLICY)
    found = stored.whole(name for name in stored.shapes if name.startswith(prefix))
    weights = {name.removeprefix(prefix): weight for name, weight in found.items()}
    if cfg.model.lora.rank:
        frozen = Shards(folder / FROZEN)
        weights |= frozen.whole(frozen.shapes)
        save_adapter(module.model, weights, folder / ADAPTER)
    model = base_causal_lm(module.model)
    model.save_pretrained(folder / MODEL, state_dict=_in_dtype(plain_weights(weights, cfg.model.lora), cfg))
    described = json.loads((folder / MODEL / "config.json").read_text(encoding="utf-8"))
    described["dtype"] = cfg.model.dtype  # transformers names the type that the weights are trained in
    (folder / MODEL / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(folder / MODEL)


def _in_dtype(weights: dict[str, Tensor], cfg: Config) -> dict[str, Tensor]:
    dtype = getattr(torch, cfg.model.dtype)
    return {name: weight.to(dtype) for name, weight in weights.items()}


def _generators(ranks: Ranks) -> str:
    return f"generators/rank{ranks.rank}"
