"""The environment of a chat with tools: reads a turn, runs its calls, answers in tokens of the model's own template."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import ConfigError
from conf.schema import Config, OnMalformed, TaskConfig, ToolFormat
from rollout.environment import Environment, Turn
from rollout.toolbox import task_tools
from rollout.tools import Tool, ToolOutcome, ToolReply
from rollout.turns import Call, ParsedTurn, parse_turn
from rollout.types import Prompt, StepFacts, StepKind, StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD_TURN_ENDS = ("</call>", "</answer>")
LLAMA_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>")
"""Of a turn, and of one that awaits a tool's result."""
MARK = "GROVE-ASSISTANT-TURN"
"""Stands for the policy's turn while the template is rendered; plain text that no template treats specially."""


@dataclass(frozen=True, slots=True)
class Episode:
    """State between steps: a value, so that every sibling acts from the same one."""

    prompt: Prompt
    num_calls: int
    max_calls: int


class ToolTemplate:
    """The tokens a chat template puts between the policy's turn and its next one, for given tool results.

    The sampled turn is never encoded again: a conversation with a stand-in turn is rendered, and what follows the
    stand-in is encoded. Tokens that close a turn and were sampled already (usually the stop token) are not repeated;
    those that were not sampled are part of the observation. So a path only ever grows at its end, also where the
    template would render earlier turns anew in another way.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any] | None = None,
        closers: Sequence[int] = (),
    ) -> None:
        """Read what the template puts behind a turn.

        Args:
            arguments: `task.template_arguments`.
            closers: tokens that close a turn as well as the template's own does.
        Raises: ConfigError for a tokenizer without a chat template, or with one that knows no tool messages.
        """
        self._tokenizer = tokenizer
        self._arguments = dict(arguments or {})
        self._closers = frozenset(closers)
        require_chat_template(tokenizer)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        # Few replies are new ones (an error, a common answer), and rendering costs more than all the rest of a turn.
        self._tail_ids = lru_cache(maxsize=4096)(self._encoded_tail)
        self.closing_ids = self._encode(self._tail([], add_generation_prompt=False))
        """Tokens with which the template closes an assistant turn."""

    role = "tool"
    """Of the messages that answer a turn."""

    def require_tool_messages(self) -> None:
        """Raises: ConfigError when the template cannot show a tool's result to the model."""
        shown = self._tail(["GROVE-TOOL-RESULT"], add_generation_prompt=True)
        if "GROVE-TOOL-RESULT" not in shown:
            raise ConfigError(
                f'The chat template of "{self._tokenizer.name_or_path}" leaves out messages with role "tool": the '
                "policy would never see what a tool returned. Use a model that was trained to call tools, or give "
                "its tokenizer a chat template that renders them."
            )

    def observation_ids(self, results: Sequence[str], action_ids: Sequence[int]) -> list[int]:
        """Tokens between `action_ids` and the next turn's first token, one tool message per result."""
        tail_ids = self._tail_ids(tuple(self._harmless(result) for result in results))
        return tail_ids[self._num_sampled(tail_ids, action_ids) :]

    def _harmless(self, result: str) -> str:
        """A result that cannot end its own message: the policy could write, or find, the markers of a turn in it."""
        return self._special.sub(lambda found: f"{found[0][0]}\u200b{found[0][1:]}", result)

    def _encoded_tail(self, results: tuple[str, ...]) -> list[int]:
        return self._encode(self._tail(results, add_generation_prompt=True))

    def _num_sampled(self, tail_ids: list[int], action_ids: Sequence[int]) -> int:
        if action_ids and action_ids[-1] in self._closers and tail_ids[:1] == self.closing_ids[:1]:
            return 1
        longest = min(len(self.closing_ids), len(action_ids))
        overlaps = (size for size in range(longest, 0, -1) if list(action_ids[-size:]) == tail_ids[:size])
        return next(overlaps, 0)

    def _tail(self, results: Sequence[str], *, add_generation_prompt: bool) -> str:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        messages += [{"role": self.role, "content": result} for result in results]
        text = self._render(messages, add_generation_prompt=add_generation_prompt)
        _, found, tail = text.partition(MARK)
        if not found:
            raise ConfigError(
                f'The chat template of "{self._tokenizer.name_or_path}" changes or drops the assistant\'s text, so '
                "what follows a turn cannot be told. Give the tokenizer a template that renders message.content as "
                "it is."
            )
        return tail

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._arguments
            )
        except Exception as error:  # jinja's own errors, and whatever the template raises on purpose
            raise ConfigError(
                f'The chat template of "{self._tokenizer.name_or_path}" does not render a tool message after an '
                f"assistant turn ({error}): the policy could not be shown what a tool returned. Use a model that was "
                "trained to call tools, or give its tokenizer a chat template that renders them."
            ) from error
        return str(text)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: ConfigError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f'The tokenizer of "{tokenizer.name_or_path}" has no chat template, so it is not known how this model '
            "reads a conversation. Use an instruction-tuned model, or save a chat_template.jinja beside its "
            "tokenizer."
        )


def find_stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, tool_format: ToolFormat, closing_ids: Sequence[int] = ()
) -> tuple[int, ...]:
    """Tokens that end a turn.

    In the words format `</call>` and `</answer>`; otherwise the end-of-sequence tokens of tokenizer and generation
    config, and the special token with which the template closes a turn (base models name another one); in the llama
    format also those with which Llama ends a turn.

    Raises: ConfigError when there is none, since every turn would then run into its token limit.
    """
    if tool_format is ToolFormat.words:
        words = tokenizer.get_vocab()
        missing = [word for word in WORD_TURN_ENDS if word not in words]
        if missing:
            raise ConfigError(
                f"task.tool_format=words needs {' and '.join(WORD_TURN_ENDS)} as single tokens, and the tokenizer of "
                f'"{tokenizer.name_or_path}" has no {missing[0]}. Use task.tool_format=hermes for this model.'
            )
        return tuple(words[word] for word in WORD_TURN_ENDS)
    added = tokenizer.added_tokens_decoder
    closing = [each for each in closing_ids[:1] if each in added and added[each].special]
    found = [tokenizer.eos_token_id, *_generation_eos(tokenizer.name_or_path), *closing]
    if tool_format is ToolFormat.llama:
        found += _llama_turn_ends(tokenizer)
    stops = tuple(dict.fromkeys(each for each in found if each is not None))
    if not stops:
        raise ConfigError(
            f'The tokenizer of "{tokenizer.name_or_path}" names no end-of-sequence token: no turn would ever end. Set '
            "eos_token in its tokenizer_config.json to the token that closes a turn."
        )
    return stops


def _llama_turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    words = tokenizer.get_vocab()
    return [words[word] for word in LLAMA_TURN_ENDS if word in words]


def _generation_eos(folder: str) -> list[int]:
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return []
    eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    if eos is None:
        return []
    return eos if isinstance(eos, list) else [eos]


@dataclass(slots=True)
class ToolEnvironment:
    """Implements `rollout.environment.Environment` for chats with tools."""

    task: TaskConfig
    tokenizer: PreTrainedTokenizerBase
    tools: dict[str, Tool]
    template: ToolTemplate = field(init=False)
    stop_token_ids: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        closers = _llama_turn_ends(self.tokenizer) if self.task.tool_format is ToolFormat.llama else ()
        self.template = ToolTemplate(self.tokenizer, self.task.template_arguments, closers)
        self.stop_token_ids = find_stop_token_ids(self.tokenizer, self.task.tool_format, self.template.closing_ids)
        if self.tools or self.task.on_malformed is OnMalformed.reply:
            self.template.require_tool_messages()

    def reset(self, prompt: Prompt) -> Episode:
        """State before the first step.

        Raises: ConfigError when the row lacks its own call budget or a column that a tool needs.
        """
        for tool in self.tools.values():
            tool.hidden_arguments(prompt.data)
        return Episode(prompt, 0, call_budget(self.task, prompt.data))

    async def act(self, state: Episode, action_ids: list[int], *, stopped: bool) -> Turn:
        """Answer one step; `stopped` is False when its token limit cut it.

        Raises: ConfigError when a called tool needs a column that the row lacks.
        """
        action_text = self._decode(action_ids)
        if not stopped:
            facts = StepFacts(kind=StepKind.malformed, error="the turn reached its token limit before it ended")
            return Turn(state=state, facts=facts, stop=StopReason.turn_tokens, action_text=action_text)
        parsed = self._parse(action_ids)
        if parsed.error:
            turn = self._malformed(state, parsed.error, action_ids)
        elif parsed.answer is not None:
            facts = StepFacts(kind=StepKind.answer, answer=parsed.answer)
            turn = Turn(state=state, facts=facts, stop=StopReason.answered)
        else:
            turn = await self._call(state, parsed.calls, action_ids)
        return replace(turn, action_text=action_text, observation_text=self._decode(turn.observation_ids))

    async def read(self, state: Episode, action_ids: list[int], *, stopped: bool) -> Turn:
        """What a turn says, before anything is called: facts of a call without outcome; see `act`."""
        if not stopped:
            return await self.act(state, action_ids, stopped=False)
        parsed, action_text = self._parse(action_ids), self._decode(action_ids)
        if parsed.error:
            facts, stop = StepFacts(kind=StepKind.malformed, error=parsed.error), StopReason.malformed
        elif parsed.answer is not None:
            facts, stop = StepFacts(kind=StepKind.answer, answer=parsed.answer), StopReason.answered
        else:
            call, *later = parsed.calls
            facts = StepFacts(
                kind=StepKind.call,
                tool=call.tool,
                arguments=call.arguments,
                later_calls=[
                    {"tool": each.tool, "arguments": each.arguments, "tool_ok": None, "result": None} for each in later
                ],
            )
            stop = StopReason.continues
        return Turn(state=state, facts=facts, stop=stop, action_text=action_text)

    def _parse(self, action_ids: list[int]) -> ParsedTurn:
        ended = bool(action_ids) and action_ids[-1] in self.stop_token_ids
        is_bare = ended and self.task.tool_format is not ToolFormat.words  # whose stop words are part of what is said
        return parse_turn(self._decode(action_ids[:-1] if is_bare else action_ids), self.task.tool_format, self.tools)

    def _decode(self, token_ids: list[int]) -> str:
        # Special tokens stay: some vocabularies count the markers of a call among them.
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _malformed(self, state: Episode, error: str, action_ids: list[int]) -> Turn:
        facts = StepFacts(kind=StepKind.malformed, error=error)
        if self.task.on_malformed is OnMalformed.end:
            return Turn(state=state, facts=facts, stop=StopReason.malformed)
        return self._reply(state, facts, [self._refusal_text(error)], action_ids)

    def _reply(self, state: Episode, facts: StepFacts, results: list[str], action_ids: list[int]) -> Turn:
        observation_ids = self.template.observation_ids(results, action_ids)
        return Turn(state=state, facts=facts, stop=StopReason.continues, observation_ids=observation_ids)

    def _refusal_text(self, message: str) -> str:
        # A word-level vocabulary has no words to explain with.
        return "error" if self.task.tool_format is ToolFormat.words else f"error: {message}"

    async def _call(self, state: Episode, calls: tuple[Call, ...], action_ids: list[int]) -> Turn:
        num_calls = state.num_calls + len(calls)
        after = replace(state, num_calls=num_calls)
        if num_calls > state.max_calls:
            over = ToolReply(ToolOutcome.refused, f"the budget of {state.max_calls} calls is used up")
            return Turn(state=after, facts=_facts(calls, [over] * len(calls)), stop=StopReason.call_budget)
        # At once: tools keep no state, so the calls of a turn cannot know of each other.
        replies = await asyncio.gather(*(self._run(call, state.prompt) for call in calls))
        for call, reply in zip(calls, replies, strict=True):
            if reply.outcome is ToolOutcome.crashed:
                facts = _facts((call,), [reply])
                return Turn(state=after, facts=facts, stop=StopReason.tool_crashed)
        results = [
            reply.text if reply.outcome is ToolOutcome.returned else self._refusal_text(reply.text) for reply in replies
        ]
        return self._reply(after, _facts(calls, replies), results, action_ids)

    async def _run(self, call: Call, prompt: Prompt) -> ToolReply:
        if call.tool in self.tools:
            return await self.tools[call.tool].call(call.arguments, prompt.data, self.task.tool_timeout_s)
        near = get_close_matches(call.tool, self.tools, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(self.tools) or "none"
        return ToolReply(ToolOutcome.refused, f'there is no tool "{call.tool}", the tools are {known}{hint}')


def _facts(calls: Sequence[Call], replies: Sequence[ToolReply]) -> StepFacts:
    outcomes = [_outcome(call, reply) for call, reply in zip(calls, replies, strict=True)]
    error = next((reply.text for reply in replies if reply.outcome is ToolOutcome.crashed), "")
    return StepFacts(kind=StepKind.call, error=error, later_calls=outcomes[1:], **outcomes[0])


def _outcome(call: Call, reply: ToolReply) -> dict[str, Any]:
    crashed = reply.outcome is ToolOutcome.crashed
    return {
        "tool": call.tool,
        "arguments": call.arguments,
        "tool_ok": None if crashed else reply.outcome is ToolOutcome.returned,
        "result": None if crashed else reply.text,
    }


def call_budget(task: TaskConfig, data: Mapping[str, Any]) -> int:
    """Tool calls allowed in an episode: the row's own when `task.columns.max_calls` names a column.

    Raises: ConfigError when the row has no such column, or something else than a whole number in it.
    """
    column = task.columns.max_calls
    if not column:
        return task.max_calls
    budget = data.get(column)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise ConfigError(
            f'task.columns.max_calls="{column}" is {budget!r} in a row with the columns {", ".join(data) or "none"}: '
            "each row must hold its number of tool calls, 0 or more, there. Correct the data, or leave it empty to "
            "use task.max_calls."
        )
    return budget


def build_environment(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> Environment:
    """The environment of `cfg.task` for the policy that this tokenizer belongs to.

    Raises: ConfigError for a tool or world that cannot be loaded, or a chat template that cannot show a tool's result.
    """
    if cfg.task.world.fn:
        from rollout.world import build_world_environment

        return build_world_environment(cfg, tokenizer)
    return ToolEnvironment(cfg.task, tokenizer, task_tools(cfg.task))
