"""Where prompts come from: rows of a file, a named dataset, or a task that makes its own questions."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conf.errors import ConfigError, DataError
from conf.schema import Config, DataConfig, HopSearchConfig, TaskConfig
from rollout.chat import call_budget, require_chat_template
from rollout.envs.hop_search import TOOLS
from rollout.seeds import derive_seed
from rollout.toolbox import task_tools
from rollout.tools import Tool
from rollout.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_KINDS = (".jsonl", ".json", ".parquet")
CHECK_CHUNK = 1000
"""Prompts encoded at a time when a file is checked."""


GENERATED_ROWS = {
    "hop_search": "rollout.envs.hop_search:HopSearchRows",
    "textworld": "rollout.envs.textworld:TextWorldRows",
    "reasoning_gym": "rollout.envs.reasoning_gym:ReasoningGymRows",
    "verifiers": "rollout.envs.verifiers:VerifiersRows",
}
"""Rows of each `task.generator`, made of its record in TaskConfig, the run's seed, and "train" or "eval"."""


class Rows(Protocol):
    """Rows of one split, in a fixed order."""

    @property
    def num_rows(self) -> int | None:
        """How many there are; None when there is no end."""
        ...

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`, by column."""
        ...


@dataclass(slots=True)
class StoredRows:
    """Rows that were read from somewhere."""

    rows: Sequence[dict[str, Any]]
    place: Callable[[int], str]
    """Where row i stands, for messages: "train.jsonl line 18"."""
    max_rows: int = 0
    """Use only the first so many; 0 for all."""

    @property
    def num_rows(self) -> int:
        """How many are used."""
        return min(len(self.rows), self.max_rows or len(self.rows))

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`, by column."""
        return self.rows[index]


def read_rows(data: DataConfig, key: str) -> StoredRows:
    """The rows of one split.

    Args:
        data: `cfg.task.train` or `cfg.task.eval`.
        key: its config key, for messages.
    Raises: DataError for a file that is missing, empty or broken, naming the line; ConfigError for a name without
        split.
    """
    suffix = Path(data.path).suffix.lower()
    rows = _read_file(Path(data.path), suffix, key) if suffix in FILE_KINDS else _read_named(data, key)
    rows.max_rows = data.max_rows
    if not rows.num_rows:
        raise DataError(f'{key}.path="{data.path}" holds no rows, so there is nothing to ask. Give a file with data.')
    return rows


def _read_file(path: Path, suffix: str, key: str) -> StoredRows:
    path = path.expanduser()
    if not path.is_file():
        beside = [each.name for each in path.parent.iterdir() if each.is_file()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, beside, n=1)
        hint = (
            f'Did you mean "{path.parent / near[0]}"?' if near else "Give a path relative to the folder you start in."
        )
        raise DataError(f'{key}.path: there is no file "{path}". {hint}')
    if suffix == ".jsonl":
        return _read_json_lines(path)
    return _read_json(path) if suffix == ".json" else _read_parquet(path)


def _read_json_lines(path: Path) -> StoredRows:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is not JSON ({error}): {_shortened(line)} Every line must be one JSON object; "
                "correct or remove this one."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path} line {number} is {_shortened(line)} and not a JSON object: a row needs its columns by name, "
                "like "
                '{"question": "...", "answer": "..."}.'
            )
        rows.append(row)
        lines.append(number)
    return StoredRows(rows, lambda index: f"{path} line {lines[index]}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path} line {line} is not UTF-8 ({error.reason}): save the file as UTF-8.") from error


def _read_json(path: Path) -> StoredRows:
    try:
        rows = json.loads(_read_text(path))
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}): correct the file, or write one object per line as .jsonl."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{path} must be a JSON list of objects, one per row, or a .jsonl file with one object per line."
        )
    return StoredRows(rows, lambda index: f"{path} row {index}")


def _read_parquet(path: Path) -> StoredRows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as parquet ({error}): it is damaged or another kind of file."
        ) from error
    return StoredRows(rows, lambda index: f"{path} row {index}")


def _read_named(data: DataConfig, key: str) -> StoredRows:
    if not data.split:
        raise ConfigError(
            f'{key}.path="{data.path}" does not end in {", ".join(FILE_KINDS)}, so it is taken for the name of a '
            f"dataset, and {key}.split says nothing. Give {key}.split=train (or what the split is called), or the "
            "path of a file."
        )
    from datasets import load_dataset

    name, _, configuration = data.path.partition(":")
    try:
        dataset = load_dataset(name, configuration or None, split=data.split)
    except Exception as error:  # no network, no such name, no such split: the library raises a dozen classes
        raise DataError(
            f'{key}.path="{data.path}", split "{data.split}" cannot be loaded ({type(error).__name__}: {error}). '
            'Check name and split; a dataset with several configurations is written "owner/name:configuration".'
        ) from error
    return StoredRows(dataset, lambda index: f"{data.path} {data.split} row {index}")  # type: ignore[arg-type]


def _shortened(text: str, limit: int = 120) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")


def reference_answer(value: Any, pattern: str) -> str:
    """The reference answer inside the answer column.

    Args:
        value: what the column holds: text or a number.
        pattern: `task.answer_pattern`; "" takes all.
    Returns: first group of the pattern's last match, stripped, without the commas that group digits.
    Raises: DataError when the value is neither text nor a number, or the pattern does not occur in it.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"the answer is {_shortened(repr(value))}, neither text nor a number")
    text = str(value).strip()
    if not pattern:
        return text
    matches = list(re.finditer(pattern, text, re.MULTILINE))
    if not matches:
        raise DataError(f'task.answer_pattern="{pattern}" does not occur in the answer {_shortened(text)}')
    return re.sub(r"(?<=\d),(?=\d)", "", matches[-1].group(1).strip())


class PromptEncoder:
    """Makes a prompt of a row: the template applied to system prompt, tools and question, and the answer found."""

    def __init__(self, cfg: Config, tokenizer: PreTrainedTokenizerBase, tools: dict[str, Tool]) -> None:
        """Raises: ConfigError for a tokenizer without chat template, or an answer pattern without a group."""
        require_chat_template(tokenizer)
        _check_pattern(cfg.task.answer_pattern)
        self._task, self._tokenizer = cfg.task, tokenizer
        self._tools = list(tools.values())
        self._schemas = [tool.schema for tool in self._tools] or None
        self.max_tokens = cfg.rollout.max_context_tokens

    def prompt(self, row: dict[str, Any], prompt_id: str, place: str) -> Prompt:
        """Encode one row.

        Raises: DataError naming `place` for a row without its columns or answer, or longer than the context.
        """
        question, answer = self.check(row, place)
        token_ids = self.encode([row])[0]
        if len(token_ids) >= self.max_tokens:
            raise DataError(
                f"{place}: the prompt has {len(token_ids)} tokens, which leaves none of "
                f"rollout.max_context_tokens={self.max_tokens} for a reply. Raise the limit or shorten the prompt."
            )
        return Prompt(id=prompt_id, token_ids=tuple(token_ids), question=question, answer=answer, data=dict(row))

    def check(self, row: dict[str, Any], place: str) -> tuple[str, str]:
        """Question and reference answer.

        Raises: DataError naming `place` and what is wrong; ConfigError for a column that a tool or the budget needs.
        """
        columns = self._task.columns
        question = _column(row, columns.question, "question", place)
        if not isinstance(question, str) or not question.strip():
            raise DataError(
                f'{place}: column "{columns.question}" is {_shortened(repr(question))}, not a question\'s text.'
            )
        for tool in self._tools:
            tool.hidden_arguments(row)
        call_budget(self._task, row)
        if not columns.answer:
            return question, ""
        try:
            return question, reference_answer(_column(row, columns.answer, "answer", place), self._task.answer_pattern)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Token ids of each row's prompt."""
        texts = [
            self._tokenizer.apply_chat_template(
                self._messages(row),
                tools=self._schemas,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=True,
                **self._task.template_arguments,
            )
            for row in rows
        ]
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def _messages(self, row: dict[str, Any]) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self._task.system_prompt}] if self._task.system_prompt else []
        return [*system, {"role": "user", "content": row[self._task.columns.question]}]


def _check_pattern(pattern: str) -> None:
    try:
        num_groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(f'task.answer_pattern="{pattern}" is not a regular expression: {error}.') from error
    if pattern and not num_groups:
        raise ConfigError(
            f'task.answer_pattern="{pattern}" has no group, and the first group is the answer: put parentheses around '
            "it, "
            r"as in '####\s*(.+)$'."
        )


def _column(row: dict[str, Any], column: str, meaning: str, place: str) -> Any:
    if column in row:
        return row[column]
    near = get_close_matches(column, list(row), n=1)
    suggested = near[0] if near else "<column>"
    raise DataError(
        f'{place}: there is no column "{column}" to take the {meaning} from; the row has '
        f"{', '.join(row) or 'no columns'}. "
        f"Name the right one with task.columns.{meaning}={suggested}."
    )


def check_rows(rows: StoredRows, encoder: PromptEncoder) -> None:
    """Look at every row before a run starts, so that none stops it hours later.

    Raises: DataError for the first row that cannot be used, or counting the prompts that are too long;
        ConfigError for a column that a tool or the call budget needs.
    """
    too_long = 0
    longest, longest_index = 0, 0
    for index, length in _prompt_lengths(rows, encoder):
        too_long += length >= encoder.max_tokens
        if length > longest:
            longest, longest_index = length, index
    if too_long:
        raise DataError(
            f"{too_long} of {rows.num_rows} prompts have rollout.max_context_tokens={encoder.max_tokens} tokens or "
            f"more, which leaves no room for a reply; the longest, {rows.place(longest_index)}, has {longest}. "
            "Nothing is cut silently: raise rollout.max_context_tokens, or remove these rows."
        )


def _prompt_lengths(rows: StoredRows, encoder: PromptEncoder) -> Iterator[tuple[int, int]]:
    for start in range(0, rows.num_rows, CHECK_CHUNK):
        chunk = [rows.row(index) for index in range(start, min(start + CHECK_CHUNK, rows.num_rows))]
        for index, row in enumerate(chunk, start):
            encoder.check(row, rows.place(index))
        for index, token_ids in enumerate(encoder.encode(chunk), start):
            yield index, len(token_ids)


@lru_cache(maxsize=4)
def _shuffled(num_rows: int, seed: int) -> list[int]:
    order = list(range(num_rows))
    random.Random(seed).shuffle(order)
    return order


class PromptSource:
    """Prompts of a run. It holds no position: a batch follows from seed and step, so resuming needs nothing saved."""

    def __init__(self, train: Rows, held_out: Rows | None, encoder: PromptEncoder, seed: int) -> None:
        self._train, self._held_out, self._encoder, self._seed = train, held_out, encoder, seed

    def draw(self, first: int, num: int) -> list[Prompt]:
        """The `num` training prompts from the run's `first` on; the same place always holds the same prompt.

        Stored rows come in a new order every epoch. In later epochs ids carry the epoch ("train/17#2" for the second),
        so that an id names one prompt of the run and two copies in a batch are two prompts.

        Raises: DataError for a made-up question that is too long.
        """
        return [self._train_prompt(position) for position in range(first, first + num)]

    def _train_prompt(self, position: int) -> Prompt:
        num_rows = self._train.num_rows
        if num_rows is None:
            return self._prompt(self._train, "train", position)
        epoch, place = divmod(position, num_rows)
        index = _shuffled(num_rows, derive_seed("epoch", self._seed, epoch))[place]
        return self._prompt(self._train, "train", index, f"#{epoch + 1}" if epoch else "")

    def held_out(self, num: int) -> list[Prompt]:
        """Up to `num` prompts that are never trained on, the same for every seed, so that runs can be compared.

        Of stored rows, a fixed random sample: files are often sorted.
        """
        if num == 0 or self._held_out is None:
            return []
        num_rows = self._held_out.num_rows
        rows = range(num) if num_rows is None else _shuffled(num_rows, derive_seed("held out"))[:num]
        return [self._prompt(self._held_out, "eval", index) for index in rows]

    def _prompt(self, rows: Rows, split: str, index: int, suffix: str = "") -> Prompt:
        place = rows.place(index) if isinstance(rows, StoredRows) else f"{split} question {index}"
        return self._encoder.prompt(rows.row(index), f"{split}/{index}{suffix}", place)


def build_prompt_source(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> PromptSource:
    """The prompts of `cfg.task`, every stored row checked.

    Raises: ConfigError for settings that name no data or tools that do not fit it; DataError for rows that cannot be
        used.
    """
    encoder = PromptEncoder(cfg, tokenizer, task_tools(cfg.task))
    if cfg.task.generator:
        return PromptSource(*_generated_rows(cfg.task, cfg.seed), encoder, cfg.seed)
    if not cfg.task.train.path:
        raise ConfigError(
            "task.train.path is empty and the task makes no questions of its own: there is nothing to train on. Give "
            "task.train.path=train.jsonl, or use task=hop_search."
        )
    if not cfg.task.eval.path and cfg.run.eval_prompts:
        raise ConfigError(
            f"task.eval.path is empty but run.eval_prompts={cfg.run.eval_prompts}: progress is measured on questions "
            "that are never trained on. Give task.eval.path=test.jsonl, or run.eval_prompts=0 to measure nothing."
        )
    train = _checked_rows(cfg.task.train, "task.train", encoder)
    held_out = _checked_rows(cfg.task.eval, "task.eval", encoder) if cfg.task.eval.path else None
    return PromptSource(train, held_out, encoder, cfg.seed)


def _checked_rows(data: DataConfig, key: str, encoder: PromptEncoder) -> StoredRows:
    rows = read_rows(data, key)
    check_rows(rows, encoder)
    return rows


def _generated_rows(task: TaskConfig, seed: int) -> tuple[Rows, Rows]:
    if task.generator not in GENERATED_ROWS:
        raise ConfigError(
            f'task.generator="{task.generator}" is no task that makes its own questions; there are '
            f"{', '.join(GENERATED_ROWS)}. Use one, or leave task.generator empty and give task.train.path."
        )
    if task.generator == "hop_search":
        _check_hop_tools(task.hop_search, task.tools)
    module, _, name = GENERATED_ROWS[task.generator].partition(":")
    rows = getattr(import_module(module), name)
    config = getattr(task, task.generator)
    return rows(config, seed, "train"), rows(config, seed, "eval")


def _check_hop_tools(config: HopSearchConfig, tools: list[str]) -> None:
    wanted = [f"rollout.envs.hop_search:{name}" for name in TOOLS[: config.num_tools]]
    missing = [spec for spec in wanted if spec not in tools]
    if missing:
        raise ConfigError(
            f"task.hop_search.num_tools={config.num_tools} but task.tools lacks {missing[0]}: questions that need it "
            f"could not be answered. Give task.tools=[{','.join(wanted)}]."
        )
