"""Worlds: environments with a state of their own behind the chat. Text in, text out, and a stated way to fork.

    class Guess:
        '''Guess a number that the row names.'''

        fork = Fork.copy

        def reset(self, prompt):
            return {"tries": 0, "number": int(prompt.answer)}, ""

        def act(self, session, action):
            session["tries"] += 1
            won = action.strip() == str(session["number"])
            return Observed(text="wrong", done=won, score=float(won), won=won, answer=action)

`WorldEnvironment` makes a `rollout.environment.Environment` of it: the state of a step is the tuple of actions that led
there, and the live session behind them is a convenience that may be lost at any time.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from conf.errors import ConfigError, DataError, GroveError, ToolError
from conf.plugin import load_object
from conf.schema import Config, OnMalformed, TaskConfig, ToolFormat
from rollout.chat import ToolTemplate, find_stop_token_ids
from rollout.environment import Turn
from rollout.tools import TimeUpError, idle_thread, run_in_thread
from rollout.types import Prompt, StepFacts, StepKind, StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHOWN = 200
"""Characters of an observation shown in a message."""


class Fork(Enum):
    """How a world gives siblings a session each."""

    stateless = "stateless"
    """Acting changes no session: one serves every step of a prompt."""
    copy = "copy"
    """A session is copied: by the world's `copy(session)`, else the session's own `copy()`, else copy.deepcopy."""
    replay = "replay"
    """A new session acts the same actions again. What it observes must be what was observed before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a world says of one action."""

    text: str = ""
    """Told to the policy as the next user message; not told when `done`."""
    done: bool = False
    """The episode is over."""
    score: float | None = None
    """Score gained by this action alone; None where the world keeps none."""
    won: bool | None = None
    """Whether the goal is reached; None where the world does not say."""
    progress: float | None = None
    """Above 0 where the action brought the goal nearer, below 0 where further; None where the world cannot tell."""
    answer: str | None = None
    """The action as a final answer, for worlds that take one."""
    refused: bool = False
    """The world did not understand or allow the action."""


class World(Protocol):
    """A world's rules. Two sessions may be acted on at the same time, one session never twice at a time."""

    fork: Fork

    def reset(self, prompt: Prompt) -> tuple[Any, str]:
        """A new session, and what it opens with: the prompt's question again, or "" to leave that to the row."""
        ...

    def act(self, session: Any, action: str) -> Observed:
        """Answer one action. `conf.errors.ToolError` is told as a refusal; anything else raised is a crash."""
        ...

    def close(self, session: Any) -> None:
        """Free what a session holds. Optional."""
        ...


class WorldFailed(GroveError, RuntimeError):
    """A world raised what it did not mean to, hung, or its process died: says nothing of the policy."""


class SessionLost(GroveError, RuntimeError):
    """The session is gone, with its process; acting its actions again brings it back."""


def load_world(fn: str, args: Mapping[str, Any]) -> World:
    """The world that `task.world` names.

    Raises: ConfigError when it cannot be made, or is no world.
    """
    made = load_object(fn, key="task.world.fn")
    try:
        world = made(**args)
    except GroveError:
        raise
    except Exception as error:
        raise ConfigError(
            f'task.world.fn="{fn}" could not be made with the arguments {dict(args)}: {type(error).__name__}: {error}. '
            "Correct task.world.args."
        ) from error
    missing = [name for name in ("reset", "act") if not callable(getattr(world, name, None))]
    if missing or not isinstance(getattr(world, "fork", None), Fork):
        lacks = f"method {missing[0]}" if missing else "attribute fork = Fork.stateless, Fork.copy or Fork.replay"
        raise ConfigError(f'task.world.fn="{fn}" is no world: it has no {lacks}. See rollout.world.World.')
    return world


class Sessions:
    """Live sessions of one world by key. Blocking: called from a thread or from the process that holds the world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.live: dict[int, Any] = {}
        self._coming: set[int] = set()
        self._unwanted: set[int] = set()
        self._lock = threading.Lock()

    def start(self, key: int, prompt: Prompt) -> str:
        """Make session `key`; what it opens with."""
        opening = ""

        def make() -> Any:
            nonlocal opening
            session, opening = self.world.reset(prompt)
            return session

        self._add(key, make)
        return opening

    def act(self, key: int, action: str) -> Observed:
        """Answer one action in session `key`. Raises: SessionLost, and whatever the world raises."""
        session = self._session(key)
        try:
            observed = self.world.act(session, action)
        except ToolError as error:
            observed = Observed(text=str(error), refused=True)
        if not isinstance(observed, Observed) or not isinstance(observed.text, str):
            raise TypeError(f"act() returned {observed!r}, not a rollout.world.Observed with a text")
        return observed

    def copy(self, key: int, new_key: int) -> None:
        """Make session `new_key` of `key`. Raises: SessionLost."""
        session = self._session(key)
        copy = getattr(self.world, "copy", None) or _copied
        self._add(new_key, lambda: copy(session))

    def close(self, key: int) -> None:
        """Close session `key`, or let it be closed as soon as it is made; unknown keys are ignored."""
        with self._lock:
            if key in self._coming:
                self._unwanted.add(key)
                return
            session = self.live.pop(key, None)
        close = getattr(self.world, "close", None)
        if session is not None and close is not None:
            with suppress(Exception):  # it is forgotten all the same, and there is nobody to tell
                close(session)

    def _add(self, key: int, make: Callable[[], Any]) -> None:
        with self._lock:
            self._coming.add(key)
        try:
            session = make()
            with self._lock:
                self.live[key] = session
        finally:
            with self._lock:
                self._coming.discard(key)
                unwanted = key in self._unwanted
                self._unwanted.discard(key)
            if unwanted:
                self.close(key)

    def _session(self, key: int) -> Any:
        if key not in self.live:
            raise SessionLost(f"session {key} is gone")
        return self.live[key]


def _copied(session: Any) -> Any:
    return session.copy() if hasattr(session, "copy") else deepcopy(session)


class Host(Protocol):
    """Where sessions live. Its calls do not block the event loop and keep the time limit."""

    async def start(self, key: int, prompt: Prompt, timeout_s: float) -> str:
        """As `Sessions.start`. Raises: WorldFailed."""
        ...

    async def act(self, key: int, action: str, timeout_s: float) -> Observed:
        """As `Sessions.act`. Raises: WorldFailed; SessionLost."""
        ...

    async def copy(self, key: int, new_key: int, timeout_s: float) -> None:
        """As `Sessions.copy`. Raises: WorldFailed; SessionLost."""
        ...

    def new_key(self, like: int | None = None) -> int:
        """A key for a session that will be; beside session `like` when it is to be a copy of that."""
        ...

    def close(self, key: int) -> None:
        """Close a session soon; never blocks and never raises."""
        ...


class ThreadHost:
    """Holds sessions in this process. A call that hangs is given up; its thread stays behind until it returns."""

    def __init__(self, world: World) -> None:
        self.sessions = Sessions(world)
        self._keys = itertools.count()

    def new_key(self, like: int | None = None) -> int:
        """The next number."""
        return next(self._keys)

    async def start(self, key: int, prompt: Prompt, timeout_s: float) -> str:
        """As `Sessions.start`."""
        return await self._call(self.sessions.start, {"key": key, "prompt": prompt}, timeout_s)

    async def act(self, key: int, action: str, timeout_s: float) -> Observed:
        """As `Sessions.act`."""
        return await self._call(self.sessions.act, {"key": key, "action": action}, timeout_s)

    async def copy(self, key: int, new_key: int, timeout_s: float) -> None:
        """As `Sessions.copy`."""
        await self._call(self.sessions.copy, {"key": key, "new_key": new_key}, timeout_s)

    def close(self, key: int) -> None:
        """Close in a thread of its own, as closing may block."""
        if hasattr(self.sessions.world, "close"):
            idle_thread().make(partial(self.sessions.close, key))
        else:
            self.sessions.close(key)

    async def _call(self, function: Any, arguments: dict[str, Any], timeout_s: float) -> Any:
        try:
            return await run_in_thread(function, arguments, timeout_s)
        except (ConfigError, DataError, SessionLost):
            raise
        except TimeUpError:
            raise WorldFailed(f"the world did not answer within {timeout_s:g} s") from None
        except Exception as error:
            raise WorldFailed(f"the world raised {type(error).__name__}: {error}") from error


class Lease:
    """The live session at one place of a tree, if there is one; closed when nobody can act from that place any more."""

    __slots__ = ("__weakref__", "_host", "key")

    def __init__(self, host: Host) -> None:
        self._host = host
        self.key: int | None = None

    def take(self) -> int | None:
        """The session, which is the taker's from now on."""
        key, self.key = self.key, None
        return key

    def drop(self) -> None:
        """Close the session."""
        key = self.take()
        if key is not None:
            self._host.close(key)

    def __del__(self) -> None:
        self.drop()


@dataclass(frozen=True, slots=True)
class Told:
    """One action and what came of it."""

    action: str
    observed: Observed


@dataclass(frozen=True, slots=True)
class Place:
    """State between steps: what was done, which is all that counts, and the session that may still stand there."""

    prompt: Prompt
    told: tuple[Told, ...]
    lease: Lease = field(compare=False, repr=False)


class WorldTemplate(ToolTemplate):
    """The tokens between the policy's turn and its next one where the world answers as the user."""

    role = "user"


@dataclass(slots=True)
class WorldEnvironment:
    """Implements `rollout.environment.Environment` for a chat with a world."""

    task: TaskConfig
    tokenizer: PreTrainedTokenizerBase
    host: Host
    fork: Fork
    template: WorldTemplate = field(init=False)
    stop_token_ids: tuple[int, ...] = field(init=False)
    _idle: OrderedDict[int, weakref.ref[Lease]] = field(init=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.template = WorldTemplate(self.tokenizer, self.task.template_arguments)
        self.stop_token_ids = find_stop_token_ids(self.tokenizer, ToolFormat.hermes, self.template.closing_ids)

    def reset(self, prompt: Prompt) -> Place:
        """State before the first step; the first action starts the session."""
        return Place(prompt, (), Lease(self.host))

    async def act(self, state: Place, action_ids: list[int], *, stopped: bool) -> Turn:
        """Answer one step; `stopped` is False when its token limit cut it.

        Raises: DataError when a session that acts the same actions again observes something else.
        """
        action_text = self._decode(action_ids)
        if not stopped:
            facts = StepFacts(kind=StepKind.malformed, error="the turn reached its token limit before it ended")
            return Turn(state=state, facts=facts, stop=StopReason.turn_tokens, action_text=action_text)
        ended = bool(action_ids) and action_ids[-1] in self.stop_token_ids
        action = self._decode(action_ids[:-1] if ended else action_ids).rpartition("</think>")[2].strip()
        if not action:
            turn = self._malformed(state, action_ids)
        else:
            turn = await self._answered(state, action, action_ids)
        turn.action_text = action_text
        return turn

    def _malformed(self, state: Place, action_ids: list[int]) -> Turn:
        facts = StepFacts(kind=StepKind.malformed, error="the turn says nothing")
        if self.task.on_malformed is OnMalformed.end:
            return Turn(state=state, facts=facts, stop=StopReason.malformed)
        return self._told(state, facts, f"error: {facts.error}", action_ids)

    async def _answered(self, state: Place, action: str, action_ids: list[int]) -> Turn:
        facts = StepFacts(kind=StepKind.call, tool="world", arguments={"action": action})
        try:
            key, observed = await self._observed(state, action)
        except WorldFailed as error:
            facts.error = str(error)
            return Turn(state=state, facts=facts, stop=StopReason.tool_crashed)
        facts.tool_ok, facts.result = not observed.refused, observed.text
        facts.score, facts.won, facts.progress = observed.score, observed.won, observed.progress
        if observed.answer is not None:
            facts.kind, facts.answer = StepKind.answer, observed.answer
        lease = state.lease if self.fork is Fork.stateless else Lease(self.host)
        after = Place(state.prompt, (*state.told, Told(action, observed)), lease)
        if observed.done:
            self._return(key, lease if self.fork is Fork.stateless else None)
            return Turn(state=after, facts=facts, stop=StopReason.answered, observation_text=observed.text)
        self._return(key, lease)
        return self._told(after, facts, observed.text, action_ids)

    def _told(self, state: Place, facts: StepFacts, text: str, action_ids: list[int]) -> Turn:
        observation_ids = self.template.observation_ids([text], action_ids)
        told = self._decode(observation_ids)
        return Turn(
            state=state,
            facts=facts,
            stop=StopReason.continues,
            observation_ids=observation_ids,
            observation_text=told,
        )

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    async def _observed(self, place: Place, action: str) -> tuple[int, Observed]:
        for _ in range(2):
            try:
                key = await self._session(place)
                return key, await self._acted(key, action)
            except SessionLost:  # another session hung in the same process, which was killed: make it again, once
                continue
        raise WorldFailed("the world's process was lost twice while it answered one action")

    async def _acted(self, key: int, action: str) -> Observed:
        try:
            return await self.host.act(key, action, self.task.tool_timeout_s)
        except BaseException:  # cancelled as well: nobody will ever act in this session again
            self.host.close(key)
            raise

    async def _session(self, place: Place) -> int:
        """A session at `place` that is nobody else's, or the shared one of a stateless world."""
        if self.fork is not Fork.copy:
            key = place.lease.take()
            if key is None:
                return await self._made(place)
            self._idle.pop(key, None)
            return key
        key = place.lease.key
        if key is None:
            made = await self._made(place)
            if place.lease.key is not None:
                return made  # a sibling was faster: its session is for copies, this one is ours
            key = made
            self._return(made, place.lease)
        # Taken while it is copied, so that it is not closed meanwhile.
        copied = self.host.new_key(like=key)
        self._idle.pop(key, None)
        try:
            await self.host.copy(key, copied, self.task.tool_timeout_s)
        except BaseException as error:
            if isinstance(error, SessionLost):
                place.lease.take()
            self.host.close(copied)
            raise
        if place.lease.key == key:
            self._remember(place.lease)
        return copied

    async def _made(self, place: Place) -> int:
        key = self.host.new_key()
        try:
            opening = await self.host.start(key, place.prompt, self.task.tool_timeout_s)
            if opening and opening != place.prompt.question:
                raise DataError(
                    f'prompt "{place.prompt.id}" asks {_shown(place.prompt.question)}, but its world opens with '
                    f"{_shown(opening)}: the policy would play another world than it was shown. Make the row's "
                    'question of what reset() returns, or return "".'
                )
            for number, told in enumerate(place.told, 1):
                again = await self.host.act(key, told.action, self.task.tool_timeout_s)
                if again != told.observed:
                    raise DataError(
                        f'acting step {number} of prompt "{place.prompt.id}" again, {_shown(told.action)} gave '
                        f"{_shown(again)} where it gave {_shown(told.observed)} before: siblings would not fork from "
                        "one state. Make the world a function of the prompt and the actions (seed what it draws)."
                    )
        except BaseException:
            self.host.close(key)
            raise
        return key

    def _return(self, key: int, lease: Lease | None) -> None:
        """Leave a session at a place for whoever acts next, or close it."""
        if lease is None or lease.key is not None:  # ended, or two siblings of a stateless world made one each
            self.host.close(key)
            return
        lease.key = key
        self._remember(lease)

    def _remember(self, lease: Lease) -> None:
        assert lease.key is not None, "an empty lease keeps nothing alive"
        self._idle[lease.key] = weakref.ref(lease)
        self._idle.move_to_end(lease.key)
        if len(self._idle) <= self.task.world.max_sessions:
            return
        held = {key: each for key, found in self._idle.items() if (each := found()) is not None and each.key == key}
        for key in [key for key in self._idle if key not in held]:
            del self._idle[key]
        while len(self._idle) > self.task.world.max_sessions:
            held[self._idle.popitem(last=False)[0]].drop()


def _shown(said: str | Observed) -> str:
    text = repr(said)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def build_world_environment(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> WorldEnvironment:
    """The environment of `task.world`.

    Raises: ConfigError for a world that cannot be made.
    """
    from rollout.world_process import ProcessHost

    settings = cfg.task.world
    world = load_world(settings.fn, settings.args)
    host: Host = ThreadHost(world)
    if settings.num_processes:
        host = ProcessHost(
            settings.fn, settings.args, settings.num_processes, cfg.task.tool_pass_env, settings.memory_limit_mib
        )
    return WorldEnvironment(cfg.task, tokenizer, host, world.fork)
