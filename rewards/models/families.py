"""Families of process reward models: how a question and its steps become tokens, and where each step's score is read.

A family is a small class made with the model's tokenizer. Name one of `FAMILIES` in rewards.models.NAME.family, or your
own class as "file.py:Class"; it needs what `Family` lists.

What policies and tools wrote is text that the model judges. Markers and control tokens in it are broken up before it is
encoded, so that a policy can neither add a row of scores nor speak as somebody else.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, StrictUndefined, Template

from conf.errors import ConfigError
from conf.plugin import load_object
from rewards.models.base import MarkedText, Message, ModelError

YES_NO_PROMPT = Path(__file__).parents[1] / "prompts" / "prm_yes_no.jinja"
YES, NO = "Yes", "No"


class Head(Enum):
    """What a family's model ends in, which decides how it is loaded and served."""

    labels = "labels"
    """Logits of a few labels at every token: token classification, or Qwen's two-layer process reward head."""
    tokens = "tokens"
    """A language model: the log-probabilities of two tokens as the next one are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Token ids of one pass through the model, and the places of it where scores are read."""

    token_ids: list[int]
    places: list[int]
    """Indices into token_ids, one per score, in the order of the steps."""


class Family(Protocol):
    """How one kind of process reward model is read. Its class is called with the tokenizer."""

    @property
    def head(self) -> Head:
        """What the model ends in."""
        ...

    @property
    def good(self) -> int:
        """labels: index of the label for a good step; tokens: id of the token that says good."""
        ...

    @property
    def bad(self) -> int:
        """tokens: id of the token that says bad; labels: not read."""
        ...

    @property
    def step_tag_id(self) -> int | None:
        """labels: the token that stands at every place and nowhere else, which lets an engine return those rows alone;
        None where no token is so rare."""
        ...

    def read(self, text: MarkedText) -> list[Reading]:
        """The passes that score a text; their places together are as many as its steps. Raises: ModelError."""
        ...


class QwenPrm:
    """Qwen2.5-Math-PRM: `<extra_0>` closes each step of the assistant's turn; two labels, the second is good."""

    head = Head.labels
    marker = "<extra_0>"
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    good = 1
    bad = 0

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.step_tag_id = only_id(tokenizer, self.marker)

    def read(self, text: MarkedText) -> list[Reading]:
        """One pass over the conversation."""
        steps = [plain(step, self._tokenizer, self.marker) for step in text.steps]
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": plain(text.question, self._tokenizer, self.marker)},
            {"role": "assistant", "content": "".join(step + self.marker for step in steps)},
        ]
        token_ids = encode(self._tokenizer, render(self._tokenizer, messages, reply_follows=False))
        return [Reading(token_ids=token_ids, places=places_of(self.step_tag_id, token_ids))]


class MathShepherd:
    """Math-Shepherd: each step is closed by the tag "ки", and after it "+" or "-" is the likelier next token.

    Steps are numbered "Step 1: ", as in its training data, unless they begin so (our reading). Another model of this
    kind, with another tag, is a subclass that names it.
    """

    head = Head.tokens
    tag = "ки"
    good_word, bad_word = "+", "-"
    step_tag_id = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tag_id = encode(tokenizer, f" {self.tag}")[-1]
        if tokenizer.decode([self._tag_id]).strip() != self.tag:
            raise ConfigError(
                f'The step tag "{self.tag}" is not one token of this tokenizer, so no token marks the end of a step. '
                "Use the tokenizer that came with the model, or the family that it was trained as."
            )
        self.good, self.bad = only_id(tokenizer, self.good_word), only_id(tokenizer, self.bad_word)

    def read(self, text: MarkedText) -> list[Reading]:
        """One pass; the scores are read at the tags."""
        question = self._without_tag(text.question)
        steps = [self._numbered(self._without_tag(step), number) for number, step in enumerate(text.steps, start=1)]
        joined = f"{question} " + "\n".join(f"{step} {self.tag}" for step in steps)
        token_ids = [*_bos(self._tokenizer), *encode(self._tokenizer, joined)]
        return [Reading(token_ids=token_ids, places=places_of(self._tag_id, token_ids))]

    def _numbered(self, step: str, number: int) -> str:
        return step if step.startswith(f"Step {number}:") else f"Step {number}: {step}"

    def _without_tag(self, text: str) -> str:
        # The tag is an ordinary word: break it only where it would come out as the tag's token.
        holds_tag = self._tag_id in encode(self._tokenizer, text)
        return plain(text, self._tokenizer, self.tag if holds_tag else "")


class TrlPrm:
    """TRL's PRMTrainer: prompt and steps are encoded one by one, each step and a separator; two labels, second good.

    The score stands at the separator's last token. A separator may also occur inside a step, so rows are taken by
    index and never by token.
    """

    head = Head.labels
    separator = "\n"
    good = 1
    bad = 0
    step_tag_id = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._separator_ids = encode(tokenizer, self.separator)
        if not self._separator_ids:
            raise ConfigError(
                f"The step separator {self.separator!r} is no token of this tokenizer, so there is no place to read a "
                "step's score at. Use the tokenizer that the model was trained with."
            )

    def read(self, text: MarkedText) -> list[Reading]:
        """One pass; the scores are read at the last token of each separator."""
        token_ids = [*_bos(self._tokenizer), *self._plain_ids(text.question)]
        places = []
        for step in text.steps:
            token_ids += self._plain_ids(step) + self._separator_ids
            places.append(len(token_ids) - 1)
        return [Reading(token_ids=token_ids, places=places)]

    def _plain_ids(self, text: str) -> list[int]:
        return encode(self._tokenizer, plain(text, self._tokenizer))


class RlhFlow:
    """RLHFlow's Llama-3.1-8B-PRM: each step is a user's turn (the first with the question), each answer "+" or "-".

    Steps before the judged one are answered "+", whatever they got; the score is read where the answer begins.
    """

    head = Head.tokens
    step_tag_id = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.good, self.bad = only_id(tokenizer, "+"), only_id(tokenizer, "-")

    def read(self, text: MarkedText) -> list[Reading]:
        """One pass over the conversation; raises ModelError where the template rewrites earlier turns."""
        said = [plain(step, self._tokenizer) for step in text.steps]
        said[0] = f"{plain(text.question, self._tokenizer)} {said[0]}"
        messages: list[Message] = []
        places, context_ids = [], []
        for step in said:
            messages.append({"role": "user", "content": step})
            before, context_ids = context_ids, encode(self._tokenizer, render(self._tokenizer, messages))
            if context_ids[: len(before)] != before:
                raise ModelError("the chat template changes earlier turns when one is added: use family yes_no")
            places.append(len(context_ids) - 1)
            messages.append({"role": "assistant", "content": "+"})
        return [Reading(token_ids=context_ids, places=places)]


class YesNo:
    """Any chat model: it is asked in words whether a step is right; P(Yes) against P(No) as its first word.

    Every step is a question of its own over the steps before it: rewards/prompts/prm_yes_no.jinja.
    """

    head = Head.tokens
    step_tag_id = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template = yes_no_template()
        asked = self._asked("?", ["?"])
        self.good, self.bad = choice_ids(tokenizer, asked, [YES, NO])

    def read(self, text: MarkedText) -> list[Reading]:
        """One pass for each step, read at its last token."""
        steps = [plain(step, self._tokenizer) for step in text.steps]
        question = plain(text.question, self._tokenizer)
        contexts = [encode(self._tokenizer, self._asked(question, steps[:end])) for end in range(1, len(steps) + 1)]
        return [Reading(token_ids=token_ids, places=[len(token_ids) - 1]) for token_ids in contexts]

    def _asked(self, question: str, steps: Sequence[str]) -> str:
        return render(self._tokenizer, yes_no_messages(self._template, question, steps), think=False)


FAMILIES: dict[str, Callable[[Any], Family]] = {
    "qwen_prm": QwenPrm,
    "math_shepherd": MathShepherd,
    "trl_prm": TrlPrm,
    "rlhflow": RlhFlow,
    "yes_no": YesNo,
}


def build_family(spec: str, tokenizer: Any, *, key: str) -> Family:
    """The family that a config names.

    Args:
        spec: a name of `FAMILIES`, or a class as "file.py:Class" or "package.module:Class".
        tokenizer: the model's own.
        key: config key, for messages.
    Raises: ConfigError for a name that is none, and for a tokenizer that the family cannot use.
    """
    if spec in FAMILIES:
        make: Callable[[Any], Family] = FAMILIES[spec]
    elif ":" in spec or "." in spec:
        make = load_object(spec, key=key)
    else:
        near = difflib.get_close_matches(spec, FAMILIES, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(
            f'{key}="{spec}" is no family of process reward models: Grove has {", ".join(FAMILIES)}. '
            f'Name a class of your own as "file.py:Class" for a model that is read in another way.{hint}'
        )
    try:
        family = make(tokenizer)
    except ModelError as error:
        raise ConfigError(f"{key}={spec} does not fit the model: {error}.") from error
    missing = [name for name in ("head", "good", "bad", "step_tag_id", "read") if not hasattr(family, name)]
    if missing:
        raise ConfigError(f'{key}="{spec}" lacks {", ".join(missing)}: see Family in rewards/models/families.py.')
    return family


def readings(family: Family, text: MarkedText, limit: int) -> list[Reading]:
    """What `family` reads of a text, held against the number of its steps.

    Args:
        limit: most tokens of one pass.
    Raises: ModelError when scores and steps differ in number or an input is too long; nothing is cut off silently.
    """
    if not text.steps:
        return []
    made = family.read(text)
    num_places = sum(len(reading.places) for reading in made)
    if num_places != len(text.steps):
        raise ModelError(
            f"{num_places} places to read a score at, but {len(text.steps)} steps: a marker was lost or added on the "
            "way into tokens"
        )
    for reading in made:
        size = len(reading.token_ids)
        if size > limit:
            raise ModelError(f"{size} tokens are more than the model's {limit}, and a cut text would lose steps")
        assert all(0 <= place < size for place in reading.places), "places are indices of the tokens"
        tagged = reading.places if family.step_tag_id is None else places_of(family.step_tag_id, reading.token_ids)
        if tagged != reading.places:
            raise ModelError(
                f"{len(tagged)} step tags stand in the tokens, but {len(reading.places)} belong to steps: a tag "
                "came in with the text"
            )
    return made


def require_rows(num_rows: int, num_expected: int) -> None:
    """Raises: ModelError when a model gave more or fewer rows than there are places to read."""
    if num_rows != num_expected:
        raise ModelError(
            f"the model gave {num_rows} rows for {num_expected} places: its step tag is not the family's, or the "
            "family is not the model's"
        )


def label_score(logits: Sequence[float], good: int) -> float:
    """Probability of label `good`: softmax over the labels, or the sigmoid of a head with one label."""
    if len(logits) == 1:
        return _sigmoid(logits[0])
    if not 0 <= good < len(logits):
        raise ModelError(f"the model has {len(logits)} labels, and its family reads label {good}")
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    return weights[good] / sum(weights)


def token_score(good_logprob: float, bad_logprob: float) -> float:
    """P(good) / (P(good) + P(bad)), from log-probabilities or logits."""
    return _sigmoid(good_logprob - bad_logprob)


def yes_no_template(text: str = "") -> Template:
    """A jinja template over question, steps, yes, no and reason; the shipped one without a text."""
    rules = Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)
    return rules.from_string(text or YES_NO_PROMPT.read_text(encoding="utf-8"))


def yes_no_messages(
    template: Template,
    question: str,
    steps: Sequence[str],
    *,
    yes: str = YES,
    no: str = NO,
    reason: bool = False,
) -> list[Message]:
    """The conversation that asks whether the last of `steps` is right, or to `reason` about it first."""
    asked = template.render(question=question, steps=list(steps), yes=yes, no=no, reason=reason)
    return [{"role": "user", "content": asked}]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the text as it stands, with nothing added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def only_id(tokenizer: Any, word: str) -> int:
    """Id of a word that is one token by itself.

    Raises: ConfigError when it is several, or unknown: its scores would be those of something else.
    """
    token_ids = encode(tokenizer, word)
    if len(token_ids) != 1 or token_ids[0] == tokenizer.unk_token_id:
        raise ConfigError(
            f'"{word}" is {_as_tokens(tokenizer, token_ids)} in this tokenizer and not one token, so no score '
            "belongs to it. Check that the model is of this family."
        )
    return token_ids[0]


def choice_ids(tokenizer: Any, context: str, choices: Sequence[str]) -> list[int]:
    """Id of each choice as the one token that follows `context`, which decides between "Yes" and " Yes".

    Raises: ModelError when a choice is no single token there, or two are the same one.
    """
    context_ids = encode(tokenizer, context)
    found = []
    for choice in choices:
        token_ids = encode(tokenizer, context + choice)
        rest = token_ids[len(context_ids) :]
        if token_ids[: len(context_ids)] != context_ids or len(rest) != 1 or rest[0] == tokenizer.unk_token_id:
            raise ModelError(
                f'the choice "{choice}" is {_as_tokens(tokenizer, rest)} after this conversation and not one token, '
                "so its probability cannot be read at once"
            )
        found += rest
    if len(set(found)) != len(found):
        raise ModelError(f"two of the choices {', '.join(choices)} are the same token")
    return found


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, reply_follows: bool = True, think: bool = True
) -> str:
    """The conversation in the model's own template.

    Args:
        think: False asks templates that know `enable_thinking` for an answer without thoughts before it, where the
            answer's first token is read.
    Raises: ModelError when there is none, or it refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("the model's tokenizer has no chat template, so a conversation cannot be put to it")
    options = {} if think else {"enable_thinking": False}
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=reply_follows, **options
        )
    except Exception as error:  # jinja's own errors, and whatever a template raises on purpose
        raise ModelError(f"the model's chat template refuses the conversation: {error}") from error


def plain(text: str, tokenizer: Any, marker: str = "") -> str:
    """The text with a space inside every control token and marker that it spells, so that it encodes as plain words."""
    for token in _control_tokens(tokenizer, marker):
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else " ")
    return text


def places_of(token_id: int, token_ids: Sequence[int]) -> list[int]:
    """Indices at which `token_id` stands."""
    return [place for place, each in enumerate(token_ids) if each == token_id]


def _control_tokens(tokenizer: Any, marker: str) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    named = {token for token in (*added, *tokenizer.all_special_tokens, marker) if token.strip()}
    # Longest first: breaking "<|im_end|>" must not depend on whether "<|" is a token too.
    return sorted(named, key=lambda token: (-len(token), token))


def _bos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _as_tokens(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return " + ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(list(token_ids))) or "nothing"


def _sigmoid(value: float) -> float:
    # exp of a large positive number overflows: take it of the negative side only.
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
