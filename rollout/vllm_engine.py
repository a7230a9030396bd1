"""The real engine: vLLM's AsyncLLM. The only file that imports vllm; import it in the process that serves.

On CPU vLLM needs the environment of `cpu_environment()` set before the import.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferInitRequest,
    WeightTransferUpdateInfo,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from conf.schema import Config
from rollout.types import Sampled, Sampling

FILE_TRANSFER = "grove_file"
CPU_BLOCK_TOKENS = 32
"""Smallest prefix-cache block that vLLM's CPU attention takes; its default of 128 would miss most short prefixes."""


@dataclass
class _NoInit(WeightTransferInitInfo):
    """A file needs no handshake."""


@dataclass
class _FileUpdate(WeightTransferUpdateInfo):
    """Where the new weights are."""

    path: str


class FileTransfer(WeightTransferEngine[_NoInit, _FileUpdate]):
    """Loads a safetensors file into the running model through vLLM's weight-transfer calls, on CPU and GPU.

    vLLM 0.32 ships transfer back-ends for GPUs only; this one serves every engine that sees the learner's file system
    (/dev/shm on one machine).
    """

    init_info_cls = _NoInit
    update_info_cls = _FileUpdate

    def init_transfer_engine(self, init_info: _NoInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Give every layer back its loaders, which packing for the CPU took away."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _FileUpdate) -> None:
        """Load every tensor of the file."""
        self.model.load_weights(iter(load_file(update_info.path).items()))

    def finish_weight_update(self) -> None:
        """Pack the layers again, the tied head included."""
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""


def _repack_tied_head(model: Any) -> None:
    """Pack a tied lm_head once more.

    On CPU every layer holds a packed copy of its weight. A tied head has a copy of its own, and vLLM's layerwise reload
    skips it since no checkpoint tensor bears its name: without this the body is new and the head stays old, silently.
    """
    embedding, head = getattr(getattr(model, "model", None), "embed_tokens", None), getattr(model, "lm_head", None)
    if head is None or embedding is None or head is embedding or not hasattr(head, "quant_method"):
        return
    if head.weight is embedding.weight and head.weight.device.type == "cpu":
        head.quant_method.process_weights_after_loading(head)


if FILE_TRANSFER not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(FILE_TRANSFER, FileTransfer)


class WorkerExtension:
    """Importing this class in vLLM's own worker process registers `FileTransfer` there."""


def engine_args(cfg: Config, model_path: str) -> AsyncEngineArgs:
    """AsyncLLM's arguments for this machine."""
    common: dict[str, Any] = {
        "model": model_path,
        "dtype": cfg.model.dtype,
        "seed": cfg.seed,
        "max_model_len": cfg.rollout.max_context_tokens,
        "max_num_seqs": cfg.rollout.max_running_requests,
        "enable_prefix_caching": True,
        # What was really drawn from: the ratio of the learner needs temperature and top_p in it.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
        "worker_extension_cls": "rollout.vllm_engine.WorkerExtension",
        "weight_transfer_config": WeightTransferConfig(backend=FILE_TRANSFER),
    }
    if torch.cuda.is_available():
        return AsyncEngineArgs(
            **common,
            tensor_parallel_size=cfg.rollout.tensor_parallel_size,
            gpu_memory_utilization=cfg.rollout.gpu_memory_share,
        )
    return AsyncEngineArgs(
        **common,
        enforce_eager=True,
        block_size=CPU_BLOCK_TOKENS,
        # Set, it skips the check for 92 % of the machine's memory.
        kv_cache_memory_bytes=cfg.rollout.kv_cache_mib * 2**20,
        # A seeded request whose prefill is split kills vLLM 0.32's CPU engine.
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(4096, cfg.rollout.max_context_tokens),
    )


class VllmEngine:
    """`rollout.engine.Engine` over AsyncLLM: token ids in, token ids out."""

    def __init__(self, cfg: Config, model_path: str) -> None:
        """Load the model; takes seconds. Needs a running event loop for the output handler."""
        self.version = 0
        self._ids = itertools.count()
        self._llm = AsyncLLM.from_engine_args(engine_args(cfg, model_path))
        self._transfer_ready = False

    async def sample(self, context_ids: list[int], sampling: Sampling) -> Sampled:
        """Continue `context_ids` by one step; see `rollout.engine.Engine`."""
        version = self.version
        request = TokensPrompt(prompt_token_ids=context_ids)
        outputs = self._llm.generate(request, _params(sampling), f"step-{next(self._ids)}")
        # FINAL_ONLY: exactly one output comes, when the request is finished.
        (output,) = [output async for output in outputs]
        return _sampled(output, version)

    async def load_weights(self, path: str, version: int) -> None:
        """Swap the weights in place; running requests are preempted and go on under the new ones."""
        if not self._transfer_ready:
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
            self._transfer_ready = True
        await self._llm.pause_generation(mode="keep")
        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"path": path}))
        await self._llm.finish_weight_update(str(version))
        # vLLM keeps cached keys and values of the old weights otherwise.
        dropped = await self._llm.reset_prefix_cache(reset_running_requests=True)
        assert dropped, "the prefix cache must go with the weights that filled it"
        self.version = version
        await self._llm.resume_generation()

    async def close(self) -> None:
        """Stop vLLM's child processes and release its shared memory."""
        self._llm.shutdown()


def _params(sampling: Sampling) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        seed=sampling.seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sampled(output: RequestOutput, version: int) -> Sampled:
    completion = output.outputs[0]
    assert completion.logprobs is not None, "log-probs were asked for"
    token_ids = list(completion.token_ids)
    return Sampled(
        token_ids=token_ids,
        logprobs=[logprobs[token].logprob for logprobs, token in zip(completion.logprobs, token_ids, strict=True)],
        stopped=completion.finish_reason == "stop",
        version=version,
        context_ids=list(output.prompt_token_ids or []),
        num_cached_tokens=output.num_cached_tokens or 0,
    )
