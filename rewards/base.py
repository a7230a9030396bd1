"""A reward source: a user's own function or class, its level, and how its arguments are filled by name."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import math
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from conf.plugin import load_object
from conf.schema import Level, RewardsConfig, SourceConfig
from rewards.types import Score
from rollout.tree import Tree
from rollout.types import Prompt

STEP_ARGUMENTS = ("step", "siblings")
"""Arguments that only exist where single steps are scored: asking for one makes a source a step source."""
ARGUMENTS = (*STEP_ARGUMENTS, "trajectory", "tree", "prompt", "question", "answer", "facts")
"""Every argument that the tree can fill; any other name is a column of the prompt or one of the source's `args`."""
SHIPPED_PACKAGE = "rewards.sources."
MAX_REASON_CHARS = 500
"""A reason travels with every failed score: a page of model output inside it would fill the records."""


class Source:
    """One configured source. Making it reads the signature and runs none of the user's code but its import.

    A function gets its arguments by name:

    - `step`: the `Node` that is scored; `siblings`: the other steps tried at the same fork, pruned ones included;
    - `trajectory`: the `Node`s from the first step to the scored one, or to the leaf; `facts`: those of its last step;
    - `tree`, `prompt`, `question`, `answer`: as they are;
    - any other name: the entry of `SourceConfig.args`, else the prompt's column of that name, else its own default.

    A class is made once per process with `args` as keyword arguments; its `__call__` is then the function. Functions
    may be async: one tree's scores are then awaited together. A function returns a number, a `Score`, or None for
    "nothing to say here". Whatever else it returns or raises is a failed score, never a zero.
    """

    def __init__(self, name: str, cfg: SourceConfig, columns: Collection[str] | None = None):
        """Load and check a source.

        Args:
            name: its name under rewards.sources.
            cfg: its record.
            columns: columns that every prompt has, where known, so that a misspelt argument is refused here.
        Raises: ConfigError when it names no callable, or asks for something that nothing can fill.
        """
        self.name = name
        self.key = f"rewards.sources.{name}"
        self.spec = _absolute(_spec(self.key, cfg))
        self.cfg = replace(cfg, fn=self.spec, target="")
        _check_numbers(self.key, cfg)
        self._plugin: Any = _plugin(self.key, self.spec)
        self._is_class = inspect.isclass(self._plugin)
        self._parameters = _parameters(self.key, self._plugin)
        self.level = _level(self.key, cfg, self._parameters)
        _check_args(self.key, cfg.args, self._plugin, self._parameters)
        self._check_columns(columns)
        self._function: Callable[..., Any] | None = None
        self._setup_error = ""

    @property
    def is_shipped(self) -> bool:
        """True for Grove's own sources, which need no process of their own."""
        return getattr(self._plugin, "__module__", "").startswith(SHIPPED_PACKAGE)

    @property
    def signal(self) -> str:
        """The signal its scores add to."""
        return self.cfg.signal or default_signal(self.level)

    def rows(self, tree: Tree) -> list[int]:
        """Rows it is asked about: the trained leaves, or every step on a path to one, each once."""
        leaves = tree.trained_leaves()
        if self.level is Level.trajectory:
            return leaves
        return sorted({row for leaf in leaves for row in tree.path(leaf)})

    def set_up(self) -> None:
        """Make the class, unless that is done; a failure is the reason of every score until a later call succeeds."""
        if self._function is not None:
            return
        try:
            self._function = self._plugin(**self.cfg.args) if self._is_class else self._plugin
            self._setup_error = ""
        except (Exception, SystemExit) as error:
            self._setup_error = f"set-up: {_told(error)}"

    def score_tree(self, tree: Tree, runner: asyncio.Runner | None = None) -> dict[int, Score]:
        """Score every row it is asked about.

        Args:
            tree: a grown tree.
            runner: event loop for async functions; None makes one for this tree.
        Returns: row -> score. Errors of the function are scores too; nothing is raised.
        """
        self.set_up()
        rows = self.rows(tree)
        reason = self._setup_error or self._missing_columns(tree.prompt)
        if reason:
            return dict.fromkeys(rows, Score.failed(reason))
        replies = {row: self._reply(tree, row) for row in rows}
        awaited = {row: reply for row, reply in replies.items() if inspect.isawaitable(reply)}
        if awaited:
            replies.update(_run(_settle(awaited), runner))
        return {row: _as_score(reply) for row, reply in replies.items()}

    def _reply(self, tree: Tree, row: int) -> Any:
        assert self._function is not None, "set_up comes before the first score"
        arguments = {name: self._argument(name, tree, row) for name in self._filled(tree.prompt)}
        try:
            return self._function(**arguments)
        except (Exception, SystemExit) as error:
            return Score.failed(_told(error))

    def _filled(self, prompt: Prompt) -> list[str]:
        """Parameters that get a value; the others keep their default."""
        return [name for name in self._parameters if self._is_known(name, prompt.data)]

    def _is_known(self, name: str, columns: Collection[str]) -> bool:
        return name in ARGUMENTS or name in self._function_args() or name in columns

    def _function_args(self) -> dict[str, Any]:
        # The args of a class went to its constructor.
        return {} if self._is_class else self.cfg.args

    def _argument(self, name: str, tree: Tree, row: int) -> Any:
        node, prompt = tree.nodes[row], tree.prompt
        match name:
            case "step":
                return node
            case "siblings":
                return [tree.nodes[other] for other in tree.children(node.parent) if other != row]
            case "trajectory":
                return [tree.nodes[each] for each in tree.path(row)]
            case "facts":
                return node.facts
            case "tree":
                return tree
            case "prompt":
                return prompt
            case "question":
                return prompt.question
            case "answer":
                return prompt.answer
        args = self._function_args()
        return args[name] if name in args else prompt.data[name]

    def _unfilled(self, columns: Collection[str]) -> list[str]:
        return [
            name
            for name, parameter in self._parameters.items()
            if parameter.default is parameter.empty and not self._is_known(name, columns)
        ]

    def _missing_columns(self, prompt: Prompt) -> str:
        missing = self._unfilled(prompt.data)
        if not missing:
            return ""
        hint = _hint(missing[0], [*ARGUMENTS, *prompt.data])
        return f'prompt "{prompt.id}" has no column "{missing[0]}" for the argument of that name.{hint}'

    def _check_columns(self, columns: Collection[str] | None) -> None:
        missing = [] if columns is None else self._unfilled(columns)
        if missing:
            raise ConfigError(
                f'{self.key}: nothing can fill the argument "{missing[0]}" of {self.spec}: it is neither one of '
                f"{', '.join(ARGUMENTS)}, nor a column of the task ({', '.join(sorted(columns or ()))}), nor in "
                f"{self.key}.args.{_hint(missing[0], [*ARGUMENTS, *(columns or ())])}"
            )


def build_sources(cfg: RewardsConfig, columns: Collection[str] | None = None) -> list[Source]:
    """Every configured source, in the order of the config.

    Args:
        cfg: the rewards record.
        columns: columns that every prompt has, where known.
    Raises: ConfigError that lists the problems of all sources together.
    """
    sources, problems = [], []
    for name, each in cfg.sources.items():
        try:
            sources.append(Source(name, each, columns))
        except ConfigError as error:
            problems.append(str(error))
    problems += _mixed_signals(sources)
    if problems:
        raise ConfigError("\n".join(problems))
    return sources


def default_signal(level: Level) -> str:
    """Signal of a source that names none."""
    return "step" if level is Level.step else "outcome"


def _mixed_signals(sources: Iterable[Source]) -> list[str]:
    fed: dict[str, Source] = {}
    problems = []
    for source in (each for each in sources if each.cfg.weight != 0):
        first = fed.setdefault(source.signal, source)
        if first.level is not source.level:
            problems.append(
                f'signal "{source.signal}" is fed by {first.key}, which scores a {first.level.value}, and by '
                f"{source.key}, which scores a {source.level.value}: the two cannot be added. "
                f"Give one of them a signal of another name."
            )
    return problems


def _spec(key: str, cfg: SourceConfig) -> str:
    if cfg.fn and cfg.target:
        raise ConfigError(
            f'{key} has both fn="{cfg.fn}" and _target_="{cfg.target}": which one scores would be a guess. Keep one.'
        )
    if not cfg.fn and not cfg.target:
        raise ConfigError(
            f"{key} names no function, so it has nothing to score with. "
            f'Set {key}.fn="file.py:name" or {key}._target_="package.module.name".'
        )
    return cfg.fn or cfg.target


def _absolute(spec: str) -> str:
    # Another process may have another working folder.
    place, colon, name = spec.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if colon and place.endswith(".py") else spec


def _check_numbers(key: str, cfg: SourceConfig) -> None:
    if not cfg.timeout_s > 0:
        raise ConfigError(f"{key}.timeout_s={cfg.timeout_s} leaves no time to score. Give seconds above 0.")
    if not math.isfinite(cfg.weight):
        raise ConfigError(f"{key}.weight={cfg.weight} would make every signal it feeds infinite or NaN. Use a number.")


def _plugin(key: str, spec: str) -> Callable[..., Any]:
    try:
        plugin = load_object(spec, key=key)
    except SystemExit as error:
        raise ConfigError(f"{key}: importing {spec} called sys.exit({error.code!r}). Move that into main().") from error
    if not callable(plugin):
        raise ConfigError(f"{key}: {spec} is a {type(plugin).__name__}; a reward is a function or a class.")
    if inspect.isclass(plugin) and not any("__call__" in vars(base) for base in plugin.__mro__):
        raise ConfigError(
            f"{key}: class {plugin.__name__} has no __call__, so there is nothing to score with. "
            f"Define `def __call__(self, step): ...` on it."
        )
    return plugin


def _parameters(key: str, plugin: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Arguments of the function, or of the class's `__call__`."""
    is_class = inspect.isclass(plugin)
    try:
        parameters = list(inspect.signature(plugin.__call__ if is_class else plugin).parameters.values())
    except ValueError as error:
        raise ConfigError(f"{key}: its arguments cannot be read ({error}). Wrap it in a Python function.") from error
    parameters = parameters[1:] if is_class else parameters  # without self
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(
                f'{key}: "{parameter}" cannot be filled by name, and names are how a reward gets its arguments. '
                f"Write every argument out, e.g. def reward(step, answer): ..."
            )
    return {parameter.name: parameter for parameter in parameters}


def _level(key: str, cfg: SourceConfig, parameters: Collection[str]) -> Level:
    asked = [name for name in STEP_ARGUMENTS if name in parameters]
    if not cfg.level:
        return Level.step if asked else Level.trajectory
    if cfg.level not in Level.__members__:
        raise ConfigError(f'{key}.level="{cfg.level}" is no level. Use step or trajectory, or leave it empty.')
    if Level[cfg.level] is Level.trajectory and asked:
        raise ConfigError(
            f'{key}.level=trajectory, but its function asks for "{asked[0]}", which only a single step has. '
            f"Ask for `trajectory` instead, or use level=step."
        )
    return Level[cfg.level]


def _check_args(key: str, args: dict[str, Any], plugin: Callable[..., Any], parameters: Collection[str]) -> None:
    if inspect.isclass(plugin):
        _check_constructor(key, args, plugin)
        return
    for name in args:
        if name in ARGUMENTS:
            raise ConfigError(
                f"{key}.args.{name} would hide what the tree says. Rename it in the function and in the config."
            )
        if name not in parameters:
            raise ConfigError(
                f"{key}.args.{name} is no argument of its function, so it would change nothing."
                f"{_hint(name, parameters)}"
            )


def _check_constructor(key: str, args: dict[str, Any], plugin: type) -> None:
    signature = inspect.signature(plugin)
    try:
        signature.bind(**args)
    except TypeError as error:
        raise ConfigError(
            f"{key}.args does not fit the constructor of {plugin.__name__}: {error}. "
            f"Its arguments: {', '.join(signature.parameters) or 'none'}."
        ) from error


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def _run(scores: Any, runner: asyncio.Runner | None) -> dict[int, Any]:
    return asyncio.run(scores) if runner is None else runner.run(scores)


async def _settle(replies: dict[int, Awaitable[Any]]) -> dict[int, Any]:
    return dict(zip(replies, await asyncio.gather(*map(_settled, replies.values())), strict=True))


async def _settled(reply: Awaitable[Any]) -> Any:
    try:
        return await reply
    except (Exception, SystemExit) as error:
        return Score.failed(_told(error))


def _as_score(reply: Any) -> Score:
    if reply is None:
        return Score.not_applicable()
    if isinstance(reply, Score):
        return reply
    if not isinstance(reply, Real):
        return Score.failed(f"it returned a {type(reply).__name__}; a reward is a number, None or a Score")
    try:
        value = float(reply)
    except OverflowError as error:
        return Score.failed(_told(error))
    if not math.isfinite(value):
        return Score.failed(f"it returned {value}; return None when there is nothing to say")
    return Score(value)


def _told(error: BaseException) -> str:
    """The error in one line, with the line of the user's function it came through."""
    inner = error.__traceback__.tb_next if error.__traceback__ else None
    where = f" ({Path(inner.tb_frame.f_code.co_filename).name}:{inner.tb_lineno})" if inner else ""
    return f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS] + where
