"""Reward models on a vLLM engine of the run's own; import it in the process that serves.

On CPU vLLM needs the environment of `rollout.process.engine_environment` set before the import.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from vllm import PoolingParams, SamplingParams
from vllm.config import PoolerConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from conf.schema import RewardModelConfig
from rewards.models.base import MarkedText, Message, ModelError, Reply
from rewards.models.families import Family, Head, Reading, label_score, require_rows, token_score
from rewards.models.local import LocalText
from rollout.vllm_engine import CPU_BLOCK_TOKENS, serve

Result = TypeVar("Result")

POOLING_TASK = "token_classify"


class VllmModel:
    """A `RewardModel` on one engine, which either pools or generates: the family's head decides which.

    A head of labels is pooled, and rows at the family's own step tag come back: left to itself vLLM takes the tag of
    Qwen's model and answers other prompts with no rows and no error. Heads of tokens are read by generating one token
    and asking for the log-probabilities of the two that matter, since pooling returns hidden states for them.
    """

    def __init__(self, cfg: RewardModelConfig, name: str = "model") -> None:
        """Load the model; takes seconds. Needs a running event loop.

        Raises: ConfigError when the folder holds no such model.
        """
        self._cfg = cfg
        self._text = LocalText(cfg, name)
        self._ids = itertools.count()
        self._served = serve(engine_args(cfg, self._text))

    @property
    def identity(self) -> str:
        """Folder, family, precision and a digest of the weights."""
        return self._text.identity

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Reply:
        """Answer a conversation; see `RewardModel`. Without a seed it is 0: the order of requests decides nothing."""
        conversation = self._text.conversation(messages)
        form = StructuredOutputsParams(json=dict(schema)) if schema is not None and self._cfg.structured else None
        params = SamplingParams(
            temperature=self._cfg.temperature if temperature is None else temperature,
            max_tokens=min(max_tokens or self._cfg.max_tokens, self._text.max_tokens - len(conversation.token_ids)),
            stop_token_ids=self._text.stop_token_ids,
            seed=seed or 0,
            structured_outputs=form,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._ask(self._served.generate(_prompt(conversation.token_ids), params, self._next_id()))
        reply_ids = list(output.outputs[0].token_ids)
        text = self._text.decode(reply_ids)
        return Reply(text=text, prompt_tokens=len(conversation.token_ids), reply_tokens=len(reply_ids))

    async def choose(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        """Log-probability of each choice as the next token; see `RewardModel`."""
        conversation = self._text.conversation(messages, think=False)
        token_ids = self._text.choice_ids(conversation, choices)
        logprobs = await self._next_logprobs(conversation.token_ids, token_ids)
        return dict(zip(choices, logprobs, strict=True))

    async def score_steps(self, texts: Sequence[MarkedText]) -> list[list[float]]:
        """Score of each step of each text; see `RewardModel`."""
        read = [self._text.readings(text) for text in texts]
        return await asyncio.gather(*(self._scores(*each) for each in read))

    async def close(self) -> None:
        """Stop vLLM's threads and child processes."""
        await self._served.close()

    async def _scores(self, family: Family, read: list[Reading]) -> list[float]:
        score = self._label_scores if family.head is Head.labels else self._token_scores
        parts = await asyncio.gather(*(score(family, reading) for reading in read))
        return [each for part in parts for each in part]

    async def _label_scores(self, family: Family, reading: Reading) -> list[float]:
        # Raw logits: the activation is ours, the same for every engine.
        params = PoolingParams(task=POOLING_TASK, use_activation=False)
        output = await self._ask(self._served.pool(_prompt(reading.token_ids), params, self._next_id()))
        rows = output.outputs.data
        if family.step_tag_id is None:
            require_rows(len(rows), len(reading.token_ids))
            rows = rows[reading.places]
        require_rows(len(rows), len(reading.places))
        return [label_score(row, family.good) for row in rows.float().tolist()]

    async def _token_scores(self, family: Family, reading: Reading) -> list[float]:
        contexts = [reading.token_ids[: place + 1] for place in reading.places]
        words = [family.good, family.bad]
        pairs = await asyncio.gather(*(self._next_logprobs(context_ids, words) for context_ids in contexts))
        return [token_score(good, bad) for good, bad in pairs]

    async def _next_logprobs(self, context_ids: list[int], token_ids: list[int]) -> list[float]:
        """Log-probabilities of a few tokens as the next one, however unlikely they are."""
        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            logprob_token_ids=token_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._ask(self._served.generate(_prompt(context_ids), params, self._next_id()))
        (given,) = output.outputs[0].logprobs or [{}]
        require_rows(len(set(token_ids) & set(given)), len(token_ids))
        return [given[token_id].logprob for token_id in token_ids]

    async def _ask(self, answer: Awaitable[Result]) -> Result:
        try:
            return await answer
        except Exception as error:  # vLLM raises kinds of its own, which other processes may not be able to read
            raise ModelError(f"{self._text.key}: vLLM: {type(error).__name__}: {error}") from error

    def _next_id(self) -> str:
        return f"reward-{next(self._ids)}"


def engine_args(cfg: RewardModelConfig, text: LocalText) -> AsyncEngineArgs:
    """vLLM's arguments for this machine and this kind of head."""
    common: dict[str, Any] = {
        "model": cfg.path,
        "dtype": cfg.dtype,
        "seed": 0,
        "max_model_len": text.max_tokens,
        "max_num_seqs": cfg.max_concurrent,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "trust_remote_code": False,
        "load_format": "safetensors",
        # A reply in the form of a schema is spelt with the tokenizer; everything else is ids in, ids out.
        "skip_tokenizer_init": text.head is Head.labels,
        **_pooling(text),
    }
    if torch.cuda.is_available():
        return AsyncEngineArgs(
            **common,
            tensor_parallel_size=cfg.tensor_parallel_size,
            gpu_memory_utilization=cfg.gpu_memory_share,
        )
    return AsyncEngineArgs(
        **common,
        enforce_eager=True,
        block_size=CPU_BLOCK_TOKENS,
        # Set, it skips the check for 92 % of the machine's memory.
        kv_cache_memory_bytes=cfg.kv_cache_mib * 2**20,
        # A seeded request whose prefill is split kills vLLM 0.32's CPU engine.
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(4096, text.max_tokens),
    )


def _pooling(text: LocalText) -> dict[str, Any]:
    if text.head is Head.tokens:
        return {"runner": "generate"}
    tag_id = None if text.family is None else text.family.step_tag_id
    config = PoolerConfig(
        task=POOLING_TASK,
        use_activation=False,
        tok_pooling_type="ALL" if tag_id is None else "STEP",
        step_tag_id=tag_id,
    )
    return {"runner": "pooling", "pooler_config": config}


def _prompt(token_ids: list[int]) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=token_ids)
