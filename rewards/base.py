"""A reward source: a user's own function or class, its level, and how its arguments are filled by name."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from conf.plugin import load_object
from conf.schema import Cache, Level, RewardModelConfig, RewardsConfig, SourceConfig
from conf.subject import ARGUMENTS, SERVICES, Subject, argument_names, subject_of
from rewards.arguments import MODEL, Arguments, Call
from rewards.returned import failed_call, score_of, scores_of, told
from rewards.types import BROKEN, Origin, Score
from rollout.tree import ROOT, Tree
from rollout.types import Prompt

SHIPPED_PACKAGE = "rewards.sources."
RUNS_APART = "RUNS_APART"
"""A module of shipped sources that sets this to True asks for a process that can be killed, as user code has."""
TIMEOUT_S = 10.0
SERVED_TIMEOUT_S = 600.0
"""Of a source that asks a model or an engine, whose every request has a limit of its own."""
DIGEST_BYTES = 6

Answers = list[list[Score]]
"""For each call, a score of each of its rows."""


class Source:
    """One configured source. Making it reads the signature and runs none of the user's code but its import.

    A function gets its arguments by name:

    - `step`: the `Node` that is scored; `siblings`: the other steps tried at the same fork, pruned ones included;
    - `trajectory`: the `Node`s from the first step to the scored one, or to the leaf; `facts`: those of its last step;
    - `steps` or `trajectories`: all that are scored, in one call, which returns a list as long; `rows`: their rows;
    - `other`, `other_trajectory`: what the step or the trajectory is compared with;
    - `tree`, `prompt`, `question`, `answer`: as they are;
    - `model`: the one that `SourceConfig.model` names; `engine`: grows trajectories on from a step (`rewards.engine`);
    - a parameter of another name that is annotated `Node`, `StepFacts`, `Tree` or `Prompt`: that;
    - any other name: the entry of `SourceConfig.args`, else the prompt's column of that name, else its own default.

    A class is made once per process with `args` as keyword arguments; its `__call__` is then the function. Functions
    may be async: one tree's scores are then awaited together. A function returns a number, a `Score`, a mapping of
    named parts, or None for "nothing to say here". Whatever else it returns or raises is a failed score, never a zero.
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
        self._argument_of = argument_names(self._parameters)
        self.subject = subject_of(self.key, cfg.level, self._argument_of.values())
        _check_args(self.key, cfg.args, self._plugin, self._parameters)
        self._check_services()
        self._check_columns(columns)
        self._function: Callable[..., Any] | None = None
        self._setup_error = ""
        if self.runs_here:
            self.set_up()
            if self._setup_error:
                raise ConfigError(f"{self.key}: {self._setup_error}")

    @property
    def level(self) -> Level:
        """What gets its scores."""
        return self.subject.level

    @property
    def runs_here(self) -> bool:
        """True for Grove's own sources that need no process of their own."""
        module = getattr(self._plugin, "__module__", "")
        return module.startswith(SHIPPED_PACKAGE) and not getattr(sys.modules[module], RUNS_APART, False)

    @property
    def is_async(self) -> bool:
        """Whether its function is awaited."""
        return inspect.iscoroutinefunction(inspect.unwrap(self._plugin.__call__ if self._is_class else self._plugin))

    @property
    def services(self) -> set[str]:
        """`model`, `engine`: what it asks for that is not in the tree."""
        return set(self._argument_of.values()) & set(SERVICES)

    @property
    def uses_cache(self) -> bool:
        """Whether equal calls are answered once."""
        return self.cfg.cache is Cache.on or (self.cfg.cache is Cache.auto and MODEL in self.services)

    @property
    def timeout_s(self) -> float:
        """Longest scoring one tree may take."""
        return self.cfg.timeout_s or (SERVED_TIMEOUT_S if self.services else TIMEOUT_S)

    @property
    def signal(self) -> str:
        """The signal its scores add to."""
        return self.cfg.signal or default_signal(self.level)

    def origin(self, model: RewardModelConfig | None = None, identity: str = "") -> Origin:
        """What its scores come from. `version` changes with its file, its arguments, files they name, and its model.

        A module that its file imports is not looked at: give the function an attribute `version` and count it up.

        Args:
            model: the record of the model it asks; identity: what the model calls itself.
        """
        shown = self._function or self._plugin
        prompt_hash = str(getattr(shown, "prompt_hash", ""))
        parts = [
            self.spec,
            _file_digest(_source_file(self._plugin)),
            repr(getattr(shown, "version", "")),
            prompt_hash,
            *(f"{arg}={value!r}" for arg, value in sorted(self.cfg.args.items())),
            *(_file_digest(value) for value in self.cfg.args.values() if isinstance(value, str)),
            identity,
            repr(_answering(model)),
        ]
        version = blake2b("\0".join(parts).encode(), digest_size=DIGEST_BYTES).hexdigest()
        return Origin(source=self.spec, version=version, prompt_hash=prompt_hash, model=identity)

    def rows(self, tree: Tree) -> list[int]:
        """Rows it scores: the trained leaves, or every step on a path to one, each once; with the prompt's own where a
        class says `of_prompt = True`."""
        leaves = tree.trained_leaves()
        if self.level is Level.trajectory:
            return tree.outcome_leaves()
        prompt = [ROOT] if leaves and getattr(self._plugin, "of_prompt", False) else []
        steps = sorted({row for leaf in leaves for row in tree.path(leaf)})
        # A part of a turn was no call: its turn is scored where it ends.
        return prompt + [row for row in steps if not tree.nodes[row].is_part]

    def calls(self, tree: Tree) -> list[Call]:
        """The calls of its function that score a tree."""
        rows = self.rows(tree)
        if not rows:
            return []
        if self.subject.is_batch or self.subject is Subject.tree:
            return [Call(tuple(rows))]
        if not self.subject.is_pair:
            return [Call((row,)) for row in rows]
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(tree.nodes[row].parent if self.level is Level.step else ROOT, []).append(row)
        return [Call((row,), other) for group in groups.values() for row in group for other in group if other != row]

    def digests(self, tree: Tree, calls: Sequence[Call], version: str) -> list[str]:
        """Names of the calls' contents (`Arguments.digest`)."""
        arguments = Arguments(tree, self._function_args(), dict.fromkeys(SERVICES))
        names = self._filled(tree.prompt)
        return [arguments.digest(call, names, version) for call in calls]

    def set_up(self) -> None:
        """Make the class, unless that is done; a failure is the reason of every score until a later call succeeds."""
        if self._function is not None:
            return
        try:
            self._function = self._plugin(**self.cfg.args) if self._is_class else self._plugin
            self._setup_error = ""
        except (Exception, SystemExit) as error:
            self._setup_error = f"set-up: {told(error)}"

    def score_tree(self, tree: Tree, services: Mapping[str, Any] | None = None) -> dict[int, Score]:
        """Score every row it is asked about, here and now; for a notebook or a test, outside an event loop.

        Args:
            tree: a grown tree.
            services: what fills `model` and `engine`.
        Returns: row -> score. Errors of the function are scores too; nothing is raised.
        """
        calls = self.calls(tree)
        return self.folded(tree, calls, asyncio.run(self.answers(tree, calls, services or {})))

    async def answers(
        self,
        tree: Tree,
        calls: Sequence[Call],
        services: Mapping[str, Any],
        starts: Callable[[int], None] = lambda number: None,
    ) -> Answers:
        """What its function says in each call. What is awaited beyond `timeout_s` is cancelled and timed out.

        Args:
            starts: told the number of each call of a plain function before it is made.
        """
        self.set_up()
        reason = self._setup_error or self._missing_columns(tree.prompt)
        if reason:
            return [[Score.failed(reason)] * len(call.rows) for call in calls]
        arguments, names = Arguments(tree, self._function_args(), services), self._filled(tree.prompt)
        if self.is_async:
            tasks = [asyncio.ensure_future(self._awaited(arguments.of(call, names), call)) for call in calls]
            return await _settled(tasks, calls, self.timeout_s)
        said = []
        for number, call in enumerate(calls):
            starts(number)
            said.append(self._called(arguments.of(call, names), call))
        return said

    def folded(self, tree: Tree, calls: Sequence[Call], answers: Answers) -> dict[int, Score]:
        """The score of each row, from all calls; of pairs, the mean over the others of half the difference of the two
        orders, so that a liking for the first place cancels. A row that was never asked about is not applicable."""
        if not self.subject.is_pair:
            said = {
                row: score
                for call, scores in zip(calls, answers, strict=True)
                for row, score in zip(call.rows, scores, strict=True)
            }
        else:
            said = _mean_of_pairs(
                {(call.rows[0], call.other): scores[0] for call, scores in zip(calls, answers, strict=True)}
            )
        alone = Score.not_applicable("nothing to compare with" if self.subject.is_pair else "")
        return {row: said.get(row, alone) for row in self.rows(tree)}

    def _called(self, arguments: dict[str, Any], call: Call) -> list[Score]:
        assert self._function is not None, "set_up comes before the first score"
        try:
            return scores_of(self._function(**arguments), call, self.subject)
        except (Exception, SystemExit) as error:
            return failed_call(error, call)

    async def _awaited(self, arguments: dict[str, Any], call: Call) -> list[Score]:
        assert self._function is not None, "set_up comes before the first score"
        try:
            return scores_of(await self._function(**arguments), call, self.subject)
        except (Exception, SystemExit) as error:
            return failed_call(error, call)

    def _filled(self, prompt: Prompt) -> dict[str, str]:
        """Parameters that get a value, and the argument each asks for; the others keep their default."""
        return {parameter: name for parameter, name in self._argument_of.items() if self._is_known(name, prompt.data)}

    def _is_known(self, name: str, columns: Collection[str]) -> bool:
        return name in ARGUMENTS or name in self._function_args() or name in columns

    def _function_args(self) -> dict[str, Any]:
        # The args of a class went to its constructor.
        return {} if self._is_class else self.cfg.args

    def _unfilled(self, columns: Collection[str]) -> list[str]:
        return [
            name
            for name, parameter in self._parameters.items()
            if parameter.default is parameter.empty and not self._is_known(self._argument_of[name], columns)
        ]

    def _missing_columns(self, prompt: Prompt) -> str:
        missing = self._unfilled(prompt.data)
        if not missing:
            return ""
        hint = _hint(missing[0], [*ARGUMENTS, *prompt.data])
        return f'prompt "{prompt.id}" has no column "{missing[0]}" for the argument of that name.{hint}'

    def _check_services(self) -> None:
        if MODEL in self.services and not self.cfg.model:
            raise ConfigError(
                f"{self.key}: its function asks for `model`, and no model is named. Describe one under rewards.models "
                f"and name it in {self.key}.model."
            )
        if self.cfg.model and MODEL not in self.services:
            raise ConfigError(
                f'{self.key}.model="{self.cfg.model}" is never asked: its function has no argument `model`. '
                f"Add the argument, or leave the setting away."
            )
        if self.services and not self.is_async:
            raise ConfigError(
                f"{self.key}: its function asks for `{min(self.services)}`, whose answers are awaited. "
                f"Write it as `async def`."
            )

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
        if each.prm:
            continue  # the learner's peer scores for it
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
    if not cfg.timeout_s >= 0:
        raise ConfigError(
            f"{key}.timeout_s={cfg.timeout_s} leaves no time to score. Give seconds, or 0 for the default."
        )
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


async def _settled(tasks: Sequence[asyncio.Future[list[Score]]], calls: Sequence[Call], limit_s: float) -> Answers:
    if not tasks:
        return []
    _, late = await asyncio.wait(tasks, timeout=limit_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)  # what was cancelled may have something to close
    reason = f"no answer within timeout_s={limit_s:g}"
    return [
        [Score.timed_out(reason)] * len(call.rows) if task in late else task.result()
        for task, call in zip(tasks, calls, strict=True)
    ]


def _mean_of_pairs(said: Mapping[tuple[int, int], Score]) -> dict[int, Score]:
    """row -> mean over the others of (what was said of row against other - what was said of other against row) / 2."""
    halves: dict[int, list[float]] = {}
    broken: dict[int, Score] = {}
    for (row, other), score in said.items():
        halves.setdefault(row, [])
        for each in (score, said[other, row]):
            if each.status in BROKEN:
                broken.setdefault(row, each)
        if score.is_scored and said[other, row].is_scored:
            halves[row].append((score.value - said[other, row].value) / 2)
    return {
        row: broken[row] if row in broken else score_of(sum(values) / len(values) if values else None)
        for row, values in halves.items()
    }


def _source_file(plugin: Any) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(plugin))
    except TypeError:  # written in C
        return None


def _file_digest(path: str | None) -> str:
    """Digest of a file's content; "" for what is no file."""
    try:
        if not path or not Path(path).is_file():
            return ""
        return blake2b(Path(path).read_bytes(), digest_size=DIGEST_BYTES).hexdigest()
    except (OSError, ValueError):  # a text too long to be a name, or one with a NUL
        return ""


def _answering(model: RewardModelConfig | None) -> dict[str, Any]:
    """Settings of a model that its answers depend on."""
    names = (
        "temperature",
        "sends_temperature",
        "max_tokens",
        "extra_body",
        "structured",
        "family",
        "dtype",
        "max_context_tokens",
    )
    return {} if model is None else {each: getattr(model, each) for each in names}
