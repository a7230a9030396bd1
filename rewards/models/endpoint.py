"""A judge behind an OpenAI-compatible server: a provider's API, or one's own vLLM, SGLang, llama.cpp and the like."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import os
import random
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from aiolimiter import AsyncLimiter
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError, omit

from conf.errors import ConfigError
from conf.schema import RewardModelConfig
from rewards.models.base import MarkedText, Message, ModelError, Reply
from rewards.models.breaker import Breaker

RETRIED = frozenset({408, 409, 425, 429})
"""Statuses below 500 that may pass; so may all from 500 on."""
BACKOFF_S = 0.5
MAX_PAUSE_S = 60.0
"""Neither our own pauses nor those that a server asks for are longer: a longer one loses the request."""
TOP_LOGPROBS = 20
"""The most that OpenAI and vLLM, as it comes, tell of one token."""
OPENAI_HOST = "api.openai.com"
MAX_SHOWN_CHARS = 200
SCHEMA_NAME = "reply"
NO_KEY = "none"
"""Never sent. Without one the client would send the environment's OPENAI_API_KEY to any server."""


class EndpointModel:
    """One model of one server, for any number of requests at once.

    Works in whatever event loop it is called from, and keeps connections open as long as that loop runs: they are
    closed by `aclose`, or when `asyncio.run` or `asyncio.Runner` ends. Limits hold for each loop. The key is read once,
    here; it is in no message, record or pickle, and a copy in another process reads that process's environment.
    """

    def __init__(
        self, cfg: RewardModelConfig, *, backoff_s: float = BACKOFF_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Connects to nothing yet.

        Args:
            cfg: its record.
            backoff_s: pause before the second try; it doubles from try to try, and half of it is drawn.
            clock: seconds by which a server that answered nobody rests.
        Raises: ConfigError for a record with which no request could be made, or whose key is not there.
        """
        self.cfg = cfg
        self._backoff_s = backoff_s
        self._url = _checked_url(cfg)
        _check_numbers(cfg)
        self._secret = _Secret(_key(cfg))
        self._breaker = Breaker(cfg.breaker_failures, cfg.breaker_rest_s, clock)
        self._last_reason = ""
        self._lines: dict[asyncio.AbstractEventLoop, _Line] = {}
        self._random = random.Random()  # spreads the tries of many clients; no result hangs on it

    def __repr__(self) -> str:
        return f"EndpointModel({self.identity})"

    def __reduce__(self) -> tuple[type[EndpointModel], tuple[RewardModelConfig]]:
        return EndpointModel, (self.cfg,)

    @property
    def identity(self) -> str:
        """Which model answers where, e.g. "gpt-5-mini at api.openai.com"."""
        port = f":{self._url.port}" if self._url.port else ""
        return f"{self.cfg.path} at {self._url.hostname}{port}"

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Reply:
        """Answer a conversation; see `RewardModel.chat`.

        Raises: ModelError; TimeoutError when no try was answered in time.
        """
        body = self._body(messages, temperature=temperature, max_tokens=max_tokens, seed=seed)
        if schema is not None and self.cfg.structured:
            form = {"name": SCHEMA_NAME, "strict": True, "schema": dict(schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        completion, num_tries = await self._asked(body)
        text = _text_of(completion, body)
        usage = completion.get("usage")
        return Reply(
            text=text,
            prompt_tokens=_count(usage, "prompt_tokens"),
            reply_tokens=_count(usage, "completion_tokens"),
            num_tries=num_tries,
        )

    async def choose(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        """Log-probability of each choice as the next token; see `RewardModel.choose`.

        Raises: ModelError, also where the server tells no log-probabilities or a choice is not among the likeliest
            `TOP_LOGPROBS` tokens; TimeoutError.
        """
        body = self._body(messages, temperature=1.0, max_tokens=1, seed=None)  # some servers tell what is left after it
        body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        completion, _ = await self._asked(body)
        known = _first_logprobs(completion)
        missing = [choice for choice in choices if choice not in known]
        if missing:
            likeliest = ", ".join(json.dumps(token, ensure_ascii=False) for token in list(known)[:3])
            raise ModelError(
                f'"{missing[0]}" is not among the {len(known)} likeliest next tokens ({likeliest}, ...): it is no '
                f"single token of this model, or the prompt does not lead to it"
            )
        return {choice: known[choice] for choice in choices}

    async def score_steps(self, texts: Sequence[MarkedText]) -> list[list[float]]:
        """Raises: ModelError; an endpoint gives text."""
        raise ModelError(
            f"{self.identity} is an endpoint and scores no steps; a process reward model is served with kind=vllm or "
            f"kind=transformers"
        )

    async def aclose(self) -> None:
        """Close the connections that this event loop has opened."""
        line = self._lines.get(asyncio.get_running_loop())
        if line is not None:
            await line.closing.aclose()

    def _body(
        self, messages: Sequence[Message], *, temperature: float | None, max_tokens: int | None, seed: int | None
    ) -> dict[str, Any]:
        # OpenAI's newer models refuse max_tokens; other servers may know nothing else.
        limit = "max_completion_tokens" if self._url.hostname == OPENAI_HOST else "max_tokens"
        body: dict[str, Any] = {
            "model": self.cfg.path,
            "messages": [dict(message) for message in messages],
            limit: self.cfg.max_tokens if max_tokens is None else max_tokens,
            **self.cfg.extra_body,
        }
        if self.cfg.sends_temperature:
            body["temperature"] = self.cfg.temperature if temperature is None else temperature
        return body if seed is None else body | {"seed": seed}

    async def _asked(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The server's answer and the number of tries it took."""
        line = await self._line()
        is_admitted = False
        lost: list[_Lost] = []
        try:
            while True:
                async with line.slots:
                    if not is_admitted:
                        self._admit()
                        is_admitted = True
                    if line.limiter is not None:
                        await line.limiter.acquire()
                    try:
                        async with asyncio.timeout(self.cfg.timeout_s):
                            completion = await self._tried(line.client, body)
                        self._breaker.succeeded()
                        return completion, len(lost) + 1
                    except _Lost as error:
                        lost.append(error)
                    except TimeoutError:
                        lost.append(_Lost(f"no reply within {self.cfg.timeout_s:g} s", is_late=True))
                await asyncio.sleep(self._pause_s(lost))
        except _Lost as error:
            self._last_reason = str(error)
            self._breaker.failed()
            raise (TimeoutError if error.is_late else ModelError)(str(error)) from None
        except _Refused as error:
            self._breaker.succeeded()  # it is there
            raise ModelError(str(error)) from None
        except BaseException:  # cancelled, or a request that cannot be written: nothing was learnt of the server
            if is_admitted:
                self._breaker.abandoned()
            raise

    def _admit(self) -> None:
        if not self._breaker.admit():
            raise ModelError(
                f"not asked: the last {self._breaker.num_lost} requests to {self.identity} were lost "
                f"({self._last_reason}); one is tried in {self._breaker.rest_left_s:.0f} s"
            )

    def _pause_s(self, lost: Sequence[_Lost]) -> float:
        """Seconds until the next try. Raises: _Lost where there is none."""
        last = lost[-1]
        tries = f" ({len(lost)} tries)" if len(lost) > 1 else ""
        if len(lost) > self.cfg.max_retries:
            raise _Lost(f"{last}{tries}", is_late=all(each.is_late for each in lost))
        if last.retry_after_s > MAX_PAUSE_S:
            raise _Lost(f"{last}{tries}; it asks to come back in {last.retry_after_s:.0f} s, which is too long to wait")
        pause_s = min(self._backoff_s * 2.0 ** (len(lost) - 1), MAX_PAUSE_S)
        return max(last.retry_after_s, pause_s * (1 + self._random.random()) / 2)

    async def _tried(self, client: AsyncOpenAI, body: dict[str, Any]) -> dict[str, Any]:
        # What the client reads from the environment by itself is for OpenAI and for nobody else.
        unsent: list[str] = [] if self._url.hostname == OPENAI_HOST else ["OpenAI-Organization", "OpenAI-Project"]
        headers = dict.fromkeys(unsent if self._secret.value else [*unsent, "Authorization"], omit)
        try:
            raw = await client.chat.completions.with_raw_response.create(**body, extra_headers=headers)
            text = raw.text
        except APIStatusError as error:
            raise self._fault(error.status_code, error.response.text, error.response.headers) from None
        except APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
                raise _Lost(f"not reached or no reply ({type(cause).__name__})", is_late=True) from None
            raise _Lost(self._safe(f"not reached: {type(cause).__name__}: {cause}".rstrip(": "))) from None
        except (OpenAIError, UnicodeError) as error:
            raise _Lost(self._safe(f"{type(error).__name__}: {error}")) from None
        return self._completion(text)

    def _completion(self, text: str) -> dict[str, Any]:
        """The body of a reply with status 200."""
        try:
            completion = json.loads(text)
        except (ValueError, RecursionError):
            if re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE):
                raise _Refused(
                    f"the server sent a web page; is rewards.models.*.url={self.cfg.url} the address of an API? Most "
                    f"end with /v1"
                ) from None
            raise _Lost(f"the server's reply is no JSON: {self._shown(text)}") from None
        if not isinstance(completion, dict):
            raise _Lost(f"the server's reply is no completion: {self._shown(text)}")
        if "choices" not in completion and completion.get("error"):  # some proxies wrap errors in a 200
            raise _Lost(f"the server sent an error: {self._shown(_told_by(text))}")
        choices = completion.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise _Lost(f"the server's reply has no choices: {self._shown(text)}")
        return completion

    def _fault(self, status: int, text: str, headers: Mapping[str, str]) -> Exception:
        told = self._shown(_told_by(text))
        if status in RETRIED or status >= 500:
            return _Lost(f"the server said {status}: {told}", retry_after_s=_retry_after_s(headers))
        return _Refused(f"the server said {status}: {told}. {self._advice(status, told)}")

    def _advice(self, status: int, told: str) -> str:
        cfg = self.cfg
        if status in (401, 403):
            if not cfg.api_key_env:
                return (
                    "It wants a key: put it into an environment variable and name that in rewards.models.*.api_key_env"
                )
            return f"Is the key in {cfg.api_key_env} right, and may it use {cfg.path}?"
        if status == 404:
            return (
                f"Is there a model {cfg.path} (rewards.models.*.path), and is rewards.models.*.url={cfg.url} right? "
                f"Most end with /v1"
            )
        if 300 <= status < 400:
            return f"It has moved; rewards.models.*.url={cfg.url} must be where it is now"
        if "response_format" in told or "json_schema" in told:
            return "If it does not know response_format, set rewards.models.*.structured=false"
        if "context" in told:
            return "Shorten what the judge is shown (its max_chars), or lower rewards.models.*.max_tokens"
        return "It does not accept what is asked; see rewards.models"

    def _shown(self, text: str) -> str:
        text = " ".join(self._safe(text).split())
        return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."

    def _safe(self, text: str) -> str:
        return text.replace(self._secret.value, "***") if self._secret.value else text

    async def _line(self) -> _Line:
        """What this event loop has: made by its first request."""
        loop = asyncio.get_running_loop()
        for other in [each for each in self._lines if each.is_closed()]:
            del self._lines[other]
        if loop not in self._lines:
            self._lines[loop] = line = self._opened(loop)
            await anext(line.closing)
        return self._lines[loop]

    def _opened(self, loop: asyncio.AbstractEventLoop) -> _Line:
        cfg = self.cfg
        # A proxy of the environment cannot reach this machine; a redirect would turn the request into another one.
        http = DefaultAsyncHttpxClient(timeout=None, follow_redirects=False, trust_env=not _is_loopback(self._url))
        client = AsyncOpenAI(
            base_url=cfg.url,
            api_key=self._secret.value or NO_KEY,
            http_client=http,
            max_retries=0,
            timeout=None,
        )
        return _Line(
            client=client,
            slots=asyncio.Semaphore(cfg.max_concurrent),
            # One request after the other, evenly: a bucket of a minute's requests would let twice as many through.
            limiter=AsyncLimiter(1, 60 / cfg.requests_per_minute) if cfg.requests_per_minute else None,
            closing=self._closing(loop, client),
        )

    async def _closing(self, loop: asyncio.AbstractEventLoop, client: AsyncOpenAI) -> AsyncGenerator[None, None]:
        # asyncio.run closes the generators that are still open before it closes their loop: the one moment in which the
        # sockets of a loop can be closed without being told to.
        try:
            yield
        finally:
            self._lines.pop(loop, None)
            await client.close()


@dataclass(slots=True)
class _Line:
    """A client and its limits, in one event loop."""

    client: AsyncOpenAI
    slots: asyncio.Semaphore
    limiter: AsyncLimiter | None
    closing: AsyncGenerator[None, None]


class _Secret:
    """A key that no record of its owner shows."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "***"

    def __reduce__(self) -> Any:
        raise TypeError("a key is never written down")


class _Lost(Exception):
    """A try that got no answer, and another may."""

    def __init__(self, reason: str, *, is_late: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.is_late, self.retry_after_s = is_late, retry_after_s


class _Refused(Exception):
    """An answer that would be the same another time."""


def _checked_url(cfg: RewardModelConfig) -> SplitResult:
    if not cfg.path:
        raise ConfigError("rewards.models.*.path is empty: a server is asked for a model by name. Give the name.")
    try:
        url = urlsplit(cfg.url)
        is_whole = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        url, is_whole = urlsplit(""), False
    if "@" in cfg.url or url.query or url.fragment:
        raise ConfigError(
            "rewards.models.*.url holds a user name, a password or a query, which would stand in every record of the "
            "run. Give the bare address, and the key in the variable that api_key_env names."
        )
    if not is_whole:
        raise ConfigError(
            f'rewards.models.*.url="{cfg.url}" is no address of a server. Give one such as https://api.openai.com/v1 '
            f"or http://127.0.0.1:8000/v1."
        )
    if cfg.api_key_env and url.scheme == "http" and not (_is_loopback(url) or _is_private(url)):
        raise ConfigError(
            f"rewards.models.*.url={cfg.url} is not encrypted and {url.hostname} is not of a private network: whoever "
            f"is on the way could read the key in {cfg.api_key_env}. Use https, or leave api_key_env empty."
        )
    return url


def _is_loopback(url: SplitResult) -> bool:
    host = url.hostname or ""
    address = _address(host)
    return address.is_loopback if address else host == "localhost" or host.endswith(".localhost")


def _is_private(url: SplitResult) -> bool:
    """An address of a private network, or a name that only such a network knows."""
    host = url.hostname or ""
    address = _address(host)
    return address.is_private if address else "." not in host or host.endswith((".local", ".internal"))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _check_numbers(cfg: RewardModelConfig) -> None:
    least = {
        "max_concurrent": 1,
        "requests_per_minute": 0,
        "max_retries": 0,
        "breaker_failures": 1,
        "breaker_rest_s": 0,
        "max_tokens": 1,
        "temperature": 0,
    }
    for name, lowest in least.items():
        if not getattr(cfg, name) >= lowest:
            raise ConfigError(
                f"rewards.models.*.{name}={getattr(cfg, name)} is below {lowest}: no request could be made."
            )
    if not cfg.timeout_s > 0:
        raise ConfigError(f"rewards.models.*.timeout_s={cfg.timeout_s} leaves no time to answer. Give seconds above 0.")


def _key(cfg: RewardModelConfig) -> str:
    name = cfg.api_key_env
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(
            f"the environment variable {name} is not set or empty, and rewards.models.*.api_key_env says that it holds "
            f"the key of {cfg.url}. Set it where the run starts; leave api_key_env empty where no key is wanted."
        )
    if not re.fullmatch(r"[!-~]+", key):  # an HTTP library would quote it in its complaint
        raise ConfigError(f"the environment variable {name} holds white space or letters that no key has. Set it anew.")
    return key


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """How long the server asks to stay away; 0 where it does not say."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit_s
        except ValueError:
            continue
        return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
    try:
        return max(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0


def _told_by(text: str) -> str:
    """The message inside an error's body, where there is one."""
    try:
        error = json.loads(text)
        error = error.get("error", error)
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, AttributeError, KeyError, RecursionError):
        return text or "nothing"


def _text_of(completion: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """The text of a whole reply. Raises: ModelError for one that is cut, withheld or none."""
    choice = completion["choices"][0]
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    if choice.get("finish_reason") == "length":
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        raise ModelError(f"the reply was cut at {limit} tokens; raise rewards.models.*.max_tokens")
    if choice.get("finish_reason") == "content_filter":
        raise ModelError("the server's content filter withheld the reply")
    if message.get("refusal"):
        raise ModelError(f"the model refused: {str(message['refusal'])[:MAX_SHOWN_CHARS]}")
    if not isinstance(message.get("content"), str):
        raise ModelError("the reply holds no text")
    return message["content"]


def _first_logprobs(completion: Mapping[str, Any]) -> dict[str, float]:
    """Token -> log-probability of the likeliest first tokens of a reply."""
    try:
        first = completion["choices"][0]["logprobs"]["content"][0]
        found = {str(each["token"]): float(each["logprob"]) for each in (first, *reversed(first["top_logprobs"]))}
    except (KeyError, IndexError, TypeError, ValueError):
        raise ModelError(
            "the server tells no log-probabilities; a judge that compares choices needs one that knows top_logprobs, "
            "such as vLLM"
        ) from None
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _count(usage: Any, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count >= 0 else 0
