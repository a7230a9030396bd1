"""Named tensors in a folder, by torch.distributed.checkpoint: each rank writes its own rows to a file of its own.

Files are safetensors, which cannot carry code; the library's own format keeps its index as a pickle. Read back, the
rows go to however many ranks there are then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from conf.errors import CheckpointError
from rl.policy.ranks import Ranks

PLACES = "DCP_SHARDING_INFO"
"""Where HuggingFaceStorageReader looks in a file's header for the place of each tensor's rows in the whole."""


class ShardWriter(StorageWriter):
    """One file for each rank, written from where its tensors lie.

    The library's HuggingFaceStorageWriter makes the file in memory first, which takes the size of the shard once more
    and holds the interpreter's lock meanwhile, so that training would stand still.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """True: any path will do."""
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing differs on the coordinator."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank a file."""
        return [SavePlan(plan.items, storage_data=_file(rank), usable=plan.usable) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write this rank's file."""
        tensors: dict[str, Tensor] = {}
        places: dict[str, dict[str, list[int]]] = {}
        results = []
        for item in plan.items:
            assert item.tensor_data is not None, "only tensors are saved"
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor), "only tensors are saved"
            tensors[item.index.fqn] = value.detach().cpu().contiguous()
            places[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            results.append(WriteResult(index=item.index, size_in_bytes=value.nbytes, storage_data=plan.storage_data))
        if tensors:
            # One entry alone: the library writes several in no fixed order, and equal states would be unequal files.
            save_file(tensors, self._folder / plan.storage_data, metadata={PLACES: json.dumps(places)})
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The files' own headers say all there is to know."""


def save_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write tensors, whole or sharded, as they are now. Collective, among threads that train nothing meanwhile."""
    save(dict(tensors), storage_writer=ShardWriter(folder), process_group=ranks.background())


def begin_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> Future[Any]:
    """Copy tensors to the host's memory, then write the copies on a thread of its own. Collective.

    Returns: at once when the copy is made; the future is done once the files are written.
    """
    group = ranks.background()
    return async_save(dict(tensors), storage_writer=ShardWriter(folder), process_group=group)  # pyright: ignore[reportReturnType]


class Shards:
    """What `save_shards` wrote: names and shapes, and the tensors when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises: CheckpointError where there are none.
        """
        if not any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{folder} holds no training state, so there is nothing to go on from: what wrote it trained something "
                "else or is another version of Grove. Resume with the settings of the run that wrote it."
            )
        self._folder = folder
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
        self.shapes = {name: tuple(found.size) for name, found in metadata.state_dict_metadata.items()}  # pyright: ignore[reportAttributeAccessIssue]

    def fill(self, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
        """Copy what is stored into tensors of the same names and shapes; each rank reads its own rows. Collective."""
        ranks.background()
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(self._folder)))

    def whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors by name, on the CPU."""
        wanted, found = set(names), {}
        for file in sorted(self._folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                places = json.loads(stored.metadata()[PLACES])
                for name in wanted.intersection(stored.keys()):
                    rows = stored.get_tensor(name)
                    whole = found.setdefault(name, torch.empty(self.shapes[name], dtype=rows.dtype))
                    offsets = places[name]["saved_offsets"]
                    part = tuple(slice(start, start + size) for start, size in zip(offsets, rows.shape, strict=True))
                    whole[part] = rows
        return found


def _file(rank: int) -> str:
    return f"rank{rank}.safetensors"
