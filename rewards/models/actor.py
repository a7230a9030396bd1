"""A reward model in a process of its own, as a Ray actor, and the client through which sources ask it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from conf.errors import ConfigError
from conf.schema import ModelKind, RewardModelConfig
from rewards.models.base import MarkedText, Message, ModelError, Reply
from rewards.models.local import identity_of, resolved
from rollout.process import begin_actor, engine_environment


class RewardModelActor:
    """Carries one model. Calls run side by side on one event loop: the engine sees them together and batches them."""

    def __init__(self, name: str, cfg: RewardModelConfig, log_path: str) -> None:
        begin_actor(Path(log_path))
        self._name, self._cfg = name, cfg
        self._model: Any = None

    async def start(self) -> str:
        """Load the weights; returns their identity."""
        if self._model is None:
            self._model = build_model(self._name, self._cfg)
        return self._model.identity

    async def chat(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Reply:
        """Answer a conversation."""
        return await self._model.chat(messages, **options)

    async def choose(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        """Log-probability of each choice as the next token."""
        return await self._model.choose(messages, choices)

    async def score_steps(self, texts: Sequence[MarkedText]) -> list[list[float]]:
        """Score of each step of each text."""
        return await self._model.score_steps(texts)

    async def close(self) -> None:
        """Stop the engine and its processes."""
        if self._model is not None:
            await self._model.close()


def build_model(name: str, cfg: RewardModelConfig) -> Any:
    """The model of a record, loaded here; the choice imports only what it needs.

    Raises: ConfigError when it is no model that Grove runs itself, or its files do not fit.
    """
    if cfg.kind is ModelKind.vllm:
        from rewards.models.vllm_model import VllmModel

        return VllmModel(cfg, name)
    if cfg.kind is ModelKind.transformers:
        from rewards.models.hf_model import TransformersModel

        return TransformersModel(cfg, name)
    raise ConfigError(f"rewards.models.{name}.kind={cfg.kind.value} runs somewhere else: no process is started for it.")


class ActorModel:
    """A `RewardModel` that asks an actor. It can be sent to other actors; each counts its own requests."""

    def __init__(self, name: str, handle: Any, cfg: RewardModelConfig, identity: str) -> None:
        self.handle = handle
        self._name, self._cfg, self._identity = name, cfg, identity
        # A semaphore belongs to the event loop it was first waited for in.
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    def __reduce__(self) -> Any:
        # Whoever receives the client has event loops of its own.
        return ActorModel, (self._name, self.handle, self._cfg, self._identity)

    @property
    def identity(self) -> str:
        """Folder, family, precision and a digest of the weights."""
        return self._identity

    def ready(self) -> Any:
        """The call that loads the weights, to be awaited once before the first question."""
        return self.handle.start.remote()

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Reply:
        """Answer a conversation; see `RewardModel`."""
        options = {"schema": schema, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        return await self._ask(self.handle.chat, list(messages), options)

    async def choose(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        """Log-probability of each choice as the next token; see `RewardModel`."""
        return await self._ask(self.handle.choose, list(messages), list(choices))

    async def score_steps(self, texts: Sequence[MarkedText]) -> list[list[float]]:
        """Score of each step of each text; see `RewardModel`."""
        scores = await self._ask(self.handle.score_steps, list(texts))
        for text, each in zip(texts, scores, strict=True):
            if len(each) != len(text.steps):
                raise ModelError(f"rewards.models.{self._name} gave {len(each)} scores for {len(text.steps)} steps")
        return scores

    async def _ask(self, method: Any, *args: Any) -> Any:
        where = f"rewards.models.{self._name}"
        async with self._free_slot():
            call = method.remote(*args)
            try:
                async with asyncio.timeout(self._cfg.timeout_s):
                    return await call
            except asyncio.CancelledError:
                ray.cancel(call)
                raise
            except TimeoutError as error:
                ray.cancel(call)  # nobody waits for it any more
                raise TimeoutError(f"{where} did not answer within timeout_s={self._cfg.timeout_s:g}") from error
            except RayTaskError as error:
                if isinstance(error.cause, ModelError):
                    raise error.cause from error
                raise ModelError(f"{where}: {error.cause!r}") from error
            except RayActorError as error:
                raise ModelError(f"the process of {where} is dead, see logs/model_{self._name}.log") from error
            except RayError as error:
                raise ModelError(f"{where}: {error}") from error

    def _free_slot(self) -> asyncio.Semaphore:
        return self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._cfg.max_concurrent))


def start_model(name: str, cfg: RewardModelConfig, log_dir: Path, *, place: Mapping[str, Any]) -> ActorModel:
    """A new model actor, still loading: wait for `ready()` before the first question.

    Args:
        name: its name under rewards.models.
        log_dir: folder of the file that takes what the process prints.
        place: options for Ray that bind it to a node and GPUs; {} for anywhere, without a GPU.
    Raises: ConfigError when its path is neither a folder nor a name that the hub knows.
    """
    here = resolved(cfg, name)
    options: dict[str, Any] = {
        # As the reward service: a small machine's cores are counted for its rollout workers.
        "num_cpus": 0,
        "max_concurrency": 1000,
        "max_restarts": 0,
        "runtime_env": {"env_vars": engine_environment(on_gpu=bool(place.get("num_gpus")))},
        **place,
    }
    handle = ray.remote(RewardModelActor).options(**options).remote(name, here, str(log_dir / f"model_{name}.log"))
    return ActorModel(name, handle, here, identity_of(here))
