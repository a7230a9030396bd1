"""Reward models on plain transformers: slow and exact, the reference for the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, DynamicCache

from conf.errors import ConfigError
from conf.schema import RewardModelConfig
from rewards.models.base import MarkedText, Message, ModelError, Reply
from rewards.models.families import Family, Head, Reading, label_score, require_rows, token_score
from rewards.models.local import TWO_LAYER_HEADS, LocalText
from rollout.hf_engine import draw
from rollout.types import Sampling

Result = TypeVar("Result")


class TransformersModel:
    """A `RewardModel` that runs one text at a time, in a thread of its own so that the event loop stays free."""

    def __init__(self, cfg: RewardModelConfig, name: str = "model") -> None:
        """Load the weights, from safetensors alone.

        Raises: ConfigError when the folder holds no such model, or a weight is missing in it.
        """
        self._cfg = cfg
        self._text = LocalText(cfg, name)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(cfg, self._text).to(self._device).eval()
        # One thread: two passes at once would only share the same cores.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-model")

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
        """Answer a conversation; see `RewardModel`. The schema is not enforced; without a seed it is 0."""
        conversation = self._text.conversation(messages)
        sampling = Sampling(
            max_tokens=min(max_tokens or self._cfg.max_tokens, self._text.max_tokens - len(conversation.token_ids)),
            temperature=self._cfg.temperature if temperature is None else temperature,
            stop_token_ids=tuple(self._text.stop_token_ids),
            seed=seed or 0,
        )
        reply_ids = await self._run(lambda: self._generate(conversation.token_ids, sampling))
        text = self._text.decode(reply_ids)
        return Reply(text=text, prompt_tokens=len(conversation.token_ids), reply_tokens=len(reply_ids))

    async def choose(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        """Log-probability of each choice as the next token; see `RewardModel`."""
        conversation = self._text.conversation(messages, think=False)
        token_ids = self._text.choice_ids(conversation, choices)
        reading = Reading(token_ids=conversation.token_ids, places=[len(conversation.token_ids) - 1])
        rows = await self._run(lambda: self._next_logprobs(reading, token_ids))
        return dict(zip(choices, rows[0], strict=True))

    async def score_steps(self, texts: Sequence[MarkedText]) -> list[list[float]]:
        """Score of each step of each text; see `RewardModel`."""
        read = [self._text.readings(text) for text in texts]
        return [await self._run(lambda each=each: self._scores(*each)) for each in read]

    async def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _scores(self, family: Family, read: list[Reading]) -> list[float]:
        scores = []
        for reading in read:
            if family.head is Head.labels:
                scores += [label_score(row, family.good) for row in self._label_rows(reading)]
            else:
                pairs = self._next_logprobs(reading, [family.good, family.bad])
                scores += [token_score(good, bad) for good, bad in pairs]
        return scores

    @torch.inference_mode()
    def _label_rows(self, reading: Reading) -> list[list[float]]:
        """Label logits at each place."""
        logits_TL = self._model(input_ids=self._batch(reading.token_ids), use_cache=False).logits[0]
        require_rows(logits_TL.shape[0], len(reading.token_ids))
        return logits_TL[reading.places].float().tolist()

    @torch.inference_mode()
    def _next_logprobs(self, reading: Reading, token_ids: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of a few tokens as the next one after each place."""
        kept = torch.tensor(reading.places, device=self._device)  # all rows over a vocabulary would take gigabytes
        out = self._model(input_ids=self._batch(reading.token_ids), logits_to_keep=kept, use_cache=False)
        require_rows(out.logits.shape[1], len(reading.places))
        return out.logits[0].float().log_softmax(-1)[:, list(token_ids)].tolist()

    @torch.inference_mode()
    def _generate(self, context_ids: list[int], sampling: Sampling) -> list[int]:
        """Tokens of a reply, without the one that ends it."""
        generator = torch.Generator().manual_seed(sampling.seed or 0)
        cache, reply_ids, ids = DynamicCache(), [], context_ids
        while len(reply_ids) < sampling.max_tokens:
            out = self._model(input_ids=self._batch(ids), past_key_values=cache, logits_to_keep=1)
            token, _ = draw(out.logits[0, -1].float().cpu(), sampling, generator)
            if token in sampling.stop_token_ids:
                break
            reply_ids.append(token)
            ids = [token]
        return reply_ids

    def _batch(self, token_ids: list[int]) -> Tensor:
        return torch.tensor([token_ids], device=self._device)

    async def _run(self, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(f"{self._text.key}: {type(error).__name__}: {error}") from error


class _TwoLayerHead(nn.Module):
    """Linear, ReLU, linear on every hidden state: the head of Qwen's reward models, without their remote code."""

    def __init__(self, backbone: Any, score: nn.Sequential) -> None:
        super().__init__()
        self.backbone, self.score = backbone, score

    def forward(self, **inputs: Any) -> Any:
        hidden = self.backbone(**inputs)
        hidden.logits = self.score(hidden.last_hidden_state)
        return hidden


def _load(cfg: RewardModelConfig, text: LocalText) -> Any:
    if text.architecture in TWO_LAYER_HEADS:
        return _TwoLayerHead(_pretrained(AutoModel, cfg, text), _two_layer_score(cfg, text))
    kind = AutoModelForTokenClassification if text.head is Head.labels else AutoModelForCausalLM
    return _pretrained(kind, cfg, text)


def _pretrained(kind: Any, cfg: RewardModelConfig, text: LocalText) -> Any:
    try:
        model, info = kind.from_pretrained(
            cfg.path,
            dtype=getattr(torch, cfg.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f'{text.key}.path="{cfg.path}" cannot be loaded: {error}') from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills them with random numbers and goes on: the scores would be noise.
        raise ConfigError(
            f'{text.key}.path="{cfg.path}" lacks {len(missing)} weights of a {type(model).__name__}, among them '
            f'"{missing[0]}", so its scores would be random. Use the whole checkpoint, or the family it was trained as.'
        )
    return model


def _two_layer_score(cfg: RewardModelConfig, text: LocalText) -> nn.Sequential:
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(cfg.path).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("score.")]  # noqa: SIM118 (no mapping)
            tensors |= {name.removeprefix("score."): file.get_tensor(name) for name in names}
    needed = {f"{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    if set(tensors) != needed:
        raise ConfigError(
            f'{text.key}.path="{cfg.path}" holds {", ".join(sorted(tensors)) or "nothing"} under "score.", and a '
            f"{text.architecture} has {', '.join(sorted(needed))}: its scores would be random. Use the whole "
            "checkpoint."
        )
    sizes = [tensors[f"{layer}.weight"].shape for layer in (0, 2)]
    # On meta nothing is drawn for weights that come from the file anyway.
    first, second = (nn.Linear(width, height, device="meta") for height, width in sizes)
    score = nn.Sequential(first, nn.ReLU(), second)
    score.load_state_dict(tensors, assign=True)
    return score.to(getattr(torch, cfg.dtype))
