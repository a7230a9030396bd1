"""The real engine: vLLM. It and `rewards.models.vllm_model` alone import vllm; import it in the process that serves.

On CPU vLLM needs the environment of `rollout.process.engine_environment` set before the import.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import PoolingParams, SamplingParams
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
from vllm.logprobs import FlatLogprobs
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.utils.nccl import unpinned_nccl_env
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

from conf.errors import EngineLost
from conf.schema import Config, Placement
from rollout.engine import Groups
from rollout.lines import Offer, Receiver
from rollout.types import Sampled, Sampling

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TRANSFER = "grove"
SHARED_MEMORY = Path("/dev/shm")
CLOSE_LIMIT_S = 10.0
SLEEP_LEVEL = 1
"""Weights wait in the host's memory. Level 2 would drop them and save that copy, but then an engine whose update fails,
or leaves a layer out, wakes up with noise."""
CPU_BLOCK_TOKENS = 32
"""Smallest prefix-cache block that vLLM's CPU attention takes; its default of 128 would miss most short prefixes."""


VLLM_COUNTERS = ("prompt_tokens", "prompt_tokens_cached", "generation_tokens")


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """An engine's own account of its tokens."""

    context: int
    """Of all requests."""
    cached: int
    """Of them, found in the prefix cache."""
    generated: int


@dataclass
class _NoInit(WeightTransferInitInfo):
    """Tensors on this node need no handshake."""


@dataclass
class _Group(WeightTransferUpdateInfo):
    """Some of the new weights: tensors, or a safetensors file of them where the model is in another process; or where
    to take all of them from."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    path: str = ""
    offer: dict[str, Any] = field(default_factory=dict)
    """A `rollout.lines.Offer`, as it goes to another process."""


class GroupTransfer(WeightTransferEngine[_NoInit, _Group]):
    """Loads groups of tensors into the running model through vLLM's weight-transfer calls, on CPU and GPU.

    vLLM 0.32 ships transfer back-ends for GPUs only.
    """

    init_info_cls = _NoInit
    update_info_cls = _Group

    def init_transfer_engine(self, init_info: _NoInit) -> None:
        """Get ready to hear lines, which are joined by the first offer that names them."""
        self._receiver = Receiver(self.device, self.parallel_config.rank)

    def start_weight_update(self) -> None:
        """Give every layer back its loaders, which packing for the CPU took away."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _Group) -> None:
        """Load every tensor of the group, or all that comes over the learner's lines."""
        model: Any = self.model  # every vLLM model has load_weights; nn.Module does not say so
        if update_info.offer:
            # NCCL hangs where the processes of a communicator differ in the variables that vLLM sets for its own.
            with unpinned_nccl_env():
                for tensors in self._receiver.groups(Offer.from_plain(update_info.offer)):
                    model.load_weights(iter(tensors.items()))
            return
        tensors = load_file(update_info.path) if update_info.path else update_info.tensors
        model.load_weights(iter(tensors.items()))

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


if TRANSFER not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(TRANSFER, GroupTransfer)


class WorkerExtension:
    """Importing this class in vLLM's own worker process registers `GroupTransfer` there."""


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
        "weight_transfer_config": WeightTransferConfig(backend=TRANSFER),
    }
    if torch.cuda.is_available():
        return AsyncEngineArgs(
            **common,
            tensor_parallel_size=cfg.rollout.tensor_parallel_size,
            gpu_memory_utilization=cfg.rollout.gpu_memory_share,
            enable_sleep_mode=cfg.cluster.placement is Placement.time_share,
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
    """`rollout.engine.Engine` over vLLM: token ids in, token ids out.

    On a GPU the engine is AsyncLLM, with processes of its own. On CPU it is the same engine stepped by a thread of this
    process: on two cores two workers with one process each are faster than with two, and start sooner.
    """

    def __init__(self, cfg: Config, model_path: str, *, counts_tokens: bool = False) -> None:
        """Load the model; takes seconds. Needs a running event loop.

        Args:
            counts_tokens: let vLLM keep its own account, for `token_counts`.
        """
        self.version = 0
        self._ids = itertools.count()
        args = replace(engine_args(cfg, model_path), disable_log_stats=not counts_tokens)
        self._served = serve(args, own_processes=cfg.rollout.engine_processes)
        self._transfer_ready = self._sleeps = False

    async def sample(self, context_ids: list[int], sampling: Sampling) -> Sampled:
        """Continue `context_ids` by one step; see `rollout.engine.Engine`."""
        assert not self._sleeps, "an engine that gave its memory away samples nothing before new weights come"
        version = self.version
        request = TokensPrompt(prompt_token_ids=context_ids)
        with _or_lost():
            output = await self._served.generate(request, _params(sampling), f"step-{next(self._ids)}")
        return _sampled(output, version)

    async def load_weights(self, groups: Groups, version: int) -> None:
        """Swap the weights in place; running requests are preempted and go on under the new ones."""

        async def take() -> None:
            async for tensors in groups:
                await self._served.receive(tensors)

        with _or_lost():
            await self._swap(take, str(version))
        self.version = version

    async def receive_weights(self, offer: Offer) -> None:
        """As `load_weights`: the process that has the model takes them straight from the learner's lines."""
        with _or_lost():
            await self._swap(lambda: self._served.receive_offered(offer), str(offer.version))
        self.version = offer.version

    async def _swap(self, take: Callable[[], Awaitable[None]], version: str) -> None:
        if not self._transfer_ready:
            await self._served.init_transfer()
            self._transfer_ready = True
        if self._sleeps:
            await self._served.wake_up("weights")
        await self._served.begin_update()
        try:
            await take()
        except BaseException:
            with contextlib.suppress(Exception):  # half-loaded layers would spoil the next update
                await self._served.end_update()
            raise  # the engine stays paused: it holds a policy that nobody trained
        await self._served.end_update(version)
        if self._sleeps:  # the cache comes last: until here its memory was free for what loading needs
            await self._served.wake_up("kv_cache")
            self._sleeps = False
        # vLLM keeps cached keys and values of the old weights unless told otherwise.
        dropped = await self._served.go_on()
        assert dropped, "the prefix cache must go with the weights that filled it"

    async def sleep(self) -> None:
        """Weights go to the host's memory, and the cache goes altogether; on a CPU vLLM only says that it slept."""
        if not self._sleeps:
            self._sleeps = True
            await self._served.sleep()

    def token_counts(self) -> TokenCounts:
        """What vLLM itself has counted since it started; needs `counts_tokens`, and is of all engines of a process."""
        values = {each.name: each.value for each in get_metrics_snapshot() if isinstance(each, Counter)}
        return TokenCounts(*(int(values[f"vllm:{name}"]) for name in VLLM_COUNTERS))

    async def close(self) -> None:
        """Stop vLLM's threads and child processes and release its shared memory."""
        await self._served.close()


@contextlib.contextmanager
def _or_lost() -> Iterator[None]:
    """Tell that the engine's own processes are gone in Grove's words, so that the pool replaces the worker."""
    try:
        yield
    except EngineDeadError as error:
        raise EngineLost(f"vLLM's engine process ended ({error})") from error


def serve(args: AsyncEngineArgs, *, own_processes: bool = False) -> OwnProcesses | ThisProcess:
    """A running engine: on a GPU in processes of its own, on CPU in this one unless told otherwise."""
    return OwnProcesses(args) if torch.cuda.is_available() or own_processes else ThisProcess(args)


class OwnProcesses:
    """AsyncLLM: the scheduler and the model run in child processes."""

    def __init__(self, args: AsyncEngineArgs) -> None:
        self._llm = AsyncLLM.from_engine_args(args)

    async def generate(self, prompt: TokensPrompt, params: SamplingParams, request_id: str) -> RequestOutput:
        """What the model says after the prompt."""
        # FINAL_ONLY: exactly one output comes, when the request is finished.
        (output,) = [output async for output in self._llm.generate(prompt, params, request_id)]
        return output

    async def pool(self, prompt: TokensPrompt, params: PoolingParams, request_id: str) -> PoolingRequestOutput:
        """Rows that a reward model's head gives for the prompt."""
        (output,) = [output async for output in self._llm.encode(prompt, params, request_id)]
        return output

    async def init_transfer(self) -> None:
        """Make the weight transfer ready."""
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))

    async def begin_update(self) -> None:
        """Stop sampling and get ready for new weights."""
        await self._llm.pause_generation(mode="keep")
        await self._llm.start_weight_update()

    async def receive(self, tensors: dict[str, Tensor]) -> None:
        """Load some of the new weights, by way of a file in memory that the processes share."""
        parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        with tempfile.NamedTemporaryFile(prefix="grove-weights-", suffix=".safetensors", dir=parent) as file:
            await asyncio.to_thread(save_file, tensors, file.name)
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"path": file.name}))

    async def receive_offered(self, offer: Offer) -> None:
        """Load all that comes over the learner's lines."""
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"offer": offer.plain()}))

    async def end_update(self, version: str | None = None) -> None:
        """All weights of a version are there, or no more come."""
        await self._llm.finish_weight_update(version)

    async def go_on(self) -> bool:
        """Drop the prefix cache and sample again; False when it could not be dropped."""
        dropped = await self._llm.reset_prefix_cache(reset_running_requests=True)
        await self._llm.resume_generation()
        return dropped

    async def sleep(self) -> None:
        """Free the GPU."""
        await self._llm.sleep(SLEEP_LEVEL)

    async def wake_up(self, tag: str) -> None:
        """Take the memory of weights or kv_cache again."""
        await self._llm.wake_up([tag])

    async def close(self) -> None:
        """Stop the child processes."""
        self._llm.shutdown()


class ThisProcess:
    """LLMEngine, which is not thread-safe: one thread owns it and runs every call between two of its steps."""

    def __init__(self, args: AsyncEngineArgs) -> None:
        self._engine = LLMEngine.from_engine_args(args)
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._closed = self._paused = False
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    async def generate(self, prompt: TokensPrompt, params: SamplingParams, request_id: str) -> RequestOutput:
        """What the model says after the prompt."""
        return await self._ask(prompt, params, request_id)

    async def pool(self, prompt: TokensPrompt, params: PoolingParams, request_id: str) -> PoolingRequestOutput:
        """Rows that a reward model's head gives for the prompt."""
        return await self._ask(prompt, params, request_id)

    async def _ask(self, prompt: TokensPrompt, params: SamplingParams | PoolingParams, request_id: str) -> Any:
        answer: asyncio.Future[Any] = self._loop.create_future()

        def add() -> None:
            self._waiting[request_id] = answer
            try:
                self._engine.add_request(request_id, prompt, params)
            except Exception as error:
                self._resolve([(self._waiting.pop(request_id), error)])

        self._calls.put(add)
        try:
            return await answer
        except asyncio.CancelledError:
            self._calls.put(lambda: self._abort(request_id))
            raise

    async def init_transfer(self) -> None:
        """Make the weight transfer ready."""
        await self._on_thread(lambda: self._rpc("init_weight_transfer_engine", init_info={}))

    async def begin_update(self) -> None:
        """Stop sampling and get ready for new weights."""

        def begin() -> None:
            self._paused = True
            self._rpc("start_weight_update")

        await self._on_thread(begin)

    async def receive(self, tensors: dict[str, Tensor]) -> None:
        """Load some of the new weights."""
        await self._on_thread(lambda: self._rpc("update_weights", update_info={"tensors": tensors}))

    async def receive_offered(self, offer: Offer) -> None:
        """Load all that comes over the learner's lines."""
        await self._on_thread(lambda: self._rpc("update_weights", update_info={"offer": offer.plain()}))

    async def end_update(self, version: str | None = None) -> None:
        """All weights of a version are there, or no more come."""

        def end() -> None:
            self._rpc("finish_weight_update")
            if version is not None:
                self._engine.set_weight_version(version)

        await self._on_thread(end)

    async def go_on(self) -> bool:
        """Drop the prefix cache and sample again; False when it could not be dropped."""

        def go_on() -> bool:
            self._paused = False
            return self._engine.reset_prefix_cache(reset_running_requests=True)

        return await self._on_thread(go_on)

    async def sleep(self) -> None:
        """Free the GPU."""
        await self._on_thread(lambda: self._engine.sleep(SLEEP_LEVEL))

    async def wake_up(self, tag: str) -> None:
        """Take the memory of weights or kv_cache again."""
        await self._on_thread(lambda: self._engine.wake_up([tag]))

    async def close(self) -> None:
        """Stop the thread."""

        def stop() -> None:
            self._closed = True

        self._calls.put(stop)
        await asyncio.to_thread(self._thread.join, CLOSE_LIMIT_S)

    def _run(self) -> None:
        while not self._closed:
            self._make_calls(block=self._paused or not self._waiting)
            if self._paused or not self._waiting:
                continue
            try:
                outputs = self._engine.step()
            except Exception as error:  # the engine's state is unknown now: everything it holds is lost
                logger.exception("the engine's step failed")
                lost = EngineLost(f"vLLM's step failed ({type(error).__name__}: {error})")
                self._resolve([(answer, lost) for answer in self._waiting.values()])
                self._waiting.clear()
                continue
            finished = [(self._waiting.pop(each.request_id, None), each) for each in outputs if each.finished]
            self._resolve([(answer, output) for answer, output in finished if answer is not None])

    def _make_calls(self, *, block: bool) -> None:
        with contextlib.suppress(queue.Empty):
            self._calls.get(block=block)()
            while True:
                self._calls.get_nowait()()

    def _abort(self, request_id: str) -> None:
        if self._waiting.pop(request_id, None) is not None:
            self._engine.abort_request([request_id])

    def _rpc(self, method: str, **kwargs: Any) -> None:
        self._engine.collective_rpc(method, kwargs=kwargs)

    async def _on_thread(self, call: Callable[[], Result]) -> Result:
        answer: asyncio.Future[Result] = self._loop.create_future()

        def run() -> None:
            try:
                self._resolve([(answer, call())])
            except Exception as error:
                self._resolve([(answer, error)])

        self._calls.put(run)
        return await answer

    def _resolve(self, answers: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        """Hand results to the event loop in one wake-up for a whole step of the engine."""

        def settle() -> None:
            for answer, result in answers:
                if answer.done():
                    continue  # cancelled meanwhile
                if isinstance(result, Exception):
                    answer.set_exception(result)
                else:
                    answer.set_result(result)

        if answers:
            self._loop.call_soon_threadsafe(settle)


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
    assert isinstance(completion.logprobs, FlatLogprobs), "flat log-probs were asked for"
    token_ids = list(completion.token_ids)
    assert completion.logprobs.token_ids == token_ids, "logprobs=0 gives the sampled token's alone"
    return Sampled(
        token_ids=token_ids,
        logprobs=list(completion.logprobs.logprobs),
        stopped=completion.finish_reason == "stop",
        version=version,
        context_ids=list(output.prompt_token_ids or []),
        num_cached_tokens=output.num_cached_tokens or 0,
    )
