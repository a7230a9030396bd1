"""The portable engine: plain transformers, for machines without vLLM."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from conf.schema import Config
from rollout.engine import Groups
from rollout.lines import Offer, Receiver
from rollout.types import Sampled, Sampling


@dataclass(slots=True)
class _Request:
    context_ids: list[int]
    sampling: Sampling
    answer: asyncio.Future[Sampled]


class TransformersEngine:
    """Samples all waiting requests as one left-padded batch, then the next ones.

    Slower than vLLM (no prefix cache, no continuous batching) and equal in what it returns. A request's draws come from
    its own seed, so its tokens do not depend on the batch it happened to be in.
    """

    def __init__(self, cfg: Config, model_path: str) -> None:
        self.version = 0
        self._max_batch = cfg.rollout.max_running_requests
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._receiver = Receiver(self._device)
        model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, cfg.model.dtype))
        self._model = model.to(self._device).eval()
        self._waiting: list[_Request] = []
        self._batching: asyncio.Task[None] | None = None
        self._model_free = asyncio.Lock()

    async def sample(self, context_ids: list[int], sampling: Sampling) -> Sampled:
        """Continue `context_ids` by one step; see `rollout.engine.Engine`."""
        request = _Request(context_ids, sampling, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._batching is None or self._batching.done():
            self._batching = asyncio.create_task(self._serve())
        return await request.answer

    async def _serve(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # let every sibling that is about to ask join this batch
            waiting = [request for request in self._waiting if not request.answer.cancelled()]
            batch, self._waiting = waiting[: self._max_batch], waiting[self._max_batch :]
            if not batch:
                break
            try:
                async with self._model_free:
                    sampled = await asyncio.to_thread(self._sample_batch, batch)
            except Exception as error:
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(error)
                continue
            for request, each in zip(batch, sampled, strict=True):
                if not request.answer.done():  # its tree may have been cut meanwhile
                    request.answer.set_result(each)

    @torch.inference_mode()
    def _sample_batch(self, batch: list[_Request]) -> list[Sampled]:
        version = self.version
        longest = max(len(request.context_ids) for request in batch)
        rows = [[0] * (longest - len(r.context_ids)) + r.context_ids for r in batch]
        pads = [[0] * (longest - len(r.context_ids)) + [1] * len(r.context_ids) for r in batch]
        ids_BT = torch.tensor(rows, device=self._device)
        mask_BT = torch.tensor(pads, device=self._device)
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        generators = [_generator(request.sampling) for request in batch]
        drawn: list[list[int]] = [[] for _ in batch]
        logprobs: list[list[float]] = [[] for _ in batch]
        stopped = [False] * len(batch)
        cache = DynamicCache()
        while True:
            out = self._model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=position_BT,
                past_key_values=cache,
                logits_to_keep=1,
            )
            logits_BV = out.logits[:, -1].float().cpu()
            for row, request in enumerate(batch):
                if stopped[row] or len(drawn[row]) >= request.sampling.max_tokens:
                    continue
                if request.answer.cancelled():  # nobody waits for it any more
                    stopped[row] = True
                    continue
                token, logprob = draw(logits_BV[row], request.sampling, generators[row])
                drawn[row].append(token)
                logprobs[row].append(logprob)
                stopped[row] = token in request.sampling.stop_token_ids
            ended = [s or len(d) >= r.sampling.max_tokens for s, d, r in zip(stopped, drawn, batch, strict=True)]
            if all(ended):
                break
            ids_BT = torch.tensor([[tokens[-1]] for tokens in drawn], device=self._device)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(batch), 1)], 1)
            position_BT = position_BT[:, -1:] + 1
        return [
            Sampled(token_ids=t, logprobs=lp, stopped=s, version=version, context_ids=r.context_ids)
            for t, lp, s, r in zip(drawn, logprobs, stopped, batch, strict=True)
        ]

    async def load_weights(self, groups: Groups, version: int) -> None:
        """Copy weights into the live model between two batches; there is no cache to drop."""
        missing = set(self._model.state_dict()) - set(getattr(self._model, "all_tied_weights_keys", None) or {})
        async with self._model_free:
            self._model.to(self._device)
            async for tensors in groups:
                unexpected = self._model.load_state_dict(tensors, strict=False).unexpected_keys
                assert not unexpected, f"weights do not fit: {unexpected}"
                missing -= tensors.keys()
            assert not missing, f"weights did not come: {missing}"
            self.version = version

    async def receive_weights(self, offer: Offer) -> None:
        """As `load_weights`, straight from the learner's lines."""
        groups = self._receiver.groups(offer)

        async def one_by_one() -> Groups:
            while (tensors := await asyncio.to_thread(next, groups, None)) is not None:
                yield tensors

        await self.load_weights(one_by_one(), offer.version)

    async def sleep(self) -> None:
        """Move the model out of the GPU."""
        async with self._model_free:
            self._model.to("cpu")

    async def close(self) -> None:
        """Nothing outlives the process."""


def _generator(sampling: Sampling) -> torch.Generator | None:
    return None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator | None) -> tuple[int, float]:
    """One token and its log-probability under the distribution it is drawn from.

    Args:
        logits_V: float [V].
        sampling: temperature 0 takes the likeliest token; top_p keeps the smallest set of tokens that holds that mass.
    Returns: token id; natural log-probability after temperature and top_p (before them at temperature 0).
    """
    if sampling.temperature == 0:
        token = int(logits_V.argmax())
        return token, float(logits_V.log_softmax(-1)[token])
    logprob_V = (logits_V / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        sorted_V, order_V = logprob_V.sort(descending=True)
        before_V = sorted_V.exp().cumsum(-1) - sorted_V.exp()
        logprob_V = logprob_V.index_fill(0, order_V[before_V >= sampling.top_p], -torch.inf).log_softmax(-1)
    token = int(torch.multinomial(logprob_V.exp(), 1, generator=generator))
    return token, float(logprob_V[token])
