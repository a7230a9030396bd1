"""What the models that Grove runs itself share: where their files are, and how a question becomes their token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from conf.schema import RewardModelConfig
from rewards.models.base import MarkedText, Message, ModelError
from rewards.models.families import Family, Head, Reading, build_family, choice_ids, encode, plain, readings, render

TWO_LAYER_HEADS = ("Qwen2ForProcessRewardModel", "Qwen2ForRewardModel")
"""Architectures whose head is linear, ReLU, linear; transformers knows them by remote code alone."""
SAMPLE_BYTES, NUM_SAMPLES = 65536, 16
"""How much of each file the digest of the weights reads: training changes all of it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as its model reads it, up to where the answer begins."""

    text: str
    token_ids: list[int]


class LocalText:
    """The text side of one model: tokenizer, template, family and context limit."""

    def __init__(self, cfg: RewardModelConfig, name: str) -> None:
        """Read tokenizer and config, no weights.

        Raises: ConfigError when the folder holds no model, or another kind than the family is for.
        """
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        self.key = f"rewards.models.{name}"
        try:
            # A model's files are data: code that comes with them is never run.
            self.tokenizer: Any = AutoTokenizer.from_pretrained(cfg.path, trust_remote_code=False)
            self.model_config: Any = AutoConfig.from_pretrained(cfg.path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f'{self.key}.path="{cfg.path}" cannot be read: {error}. Give a folder with config.json, tokenizer and '
                "safetensors weights of an architecture that transformers knows without remote code."
            ) from error
        if not encode(self.tokenizer, "two words"):
            # transformers may take another class of tokenizer than the files are for, which then drops what it reads.
            raise ConfigError(
                f'{self.key}.path="{cfg.path}": its tokenizer, loaded as {type(self.tokenizer).__name__}, makes no '
                "tokens of plain words, so the model would judge empty text. Use the tokenizer files that came with it."
            )
        try:
            self._ends = GenerationConfig.from_pretrained(cfg.path).eos_token_id
        except OSError:  # most reward models have no such file
            self._ends = None
        self.family: Family | None = None
        if cfg.family:
            self.family = build_family(cfg.family, self.tokenizer, key=f"{self.key}.family")
        self.architecture = (getattr(self.model_config, "architectures", None) or [""])[0]
        self._check_head(cfg)
        longest = getattr(self.model_config, "max_position_embeddings", None) or cfg.max_context_tokens
        self.max_tokens = min(cfg.max_context_tokens, longest)
        self.identity = identity_of(cfg)

    @property
    def head(self) -> Head:
        """What the model ends in; a model without a family is there to chat."""
        return Head.tokens if self.family is None else self.family.head

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end a reply."""
        told = [self._ends, getattr(self.model_config, "eos_token_id", None), self.tokenizer.eos_token_id]
        ends = {each for some in told for each in (some if isinstance(some, list) else [some])}
        return sorted(ends - {None})

    def readings(self, text: MarkedText) -> tuple[Family, list[Reading]]:
        """The family, and the passes that score a text. Raises: ModelError."""
        if self.family is None:
            raise ModelError(
                f"{self.key} has no family, so where a step's score stands is not known: set {self.key}.family"
            )
        # The engine counts the token that is asked for.
        room = self.max_tokens - (1 if self.head is Head.tokens else 0)
        return self.family, readings(self.family, text, room)

    def conversation(self, messages: Sequence[Message], *, think: bool = True) -> Conversation:
        """The tokens of a conversation; think=False where its very next token is the answer.

        Raises: ModelError when it is too long or the model does not chat.
        """
        if self.head is Head.labels:
            raise ModelError(f"{self.key} has a head of labels: it scores steps and answers no conversation")
        said = [{**message, "content": plain(message["content"], self.tokenizer)} for message in messages]
        text = render(self.tokenizer, said, think=think)
        token_ids = encode(self.tokenizer, text)
        if len(token_ids) >= self.max_tokens:
            raise ModelError(
                f"the conversation has {len(token_ids)} tokens, which leaves no room in {self.key}'s {self.max_tokens}"
            )
        return Conversation(text, token_ids)

    def choice_ids(self, conversation: Conversation, choices: Sequence[str]) -> list[int]:
        """Ids of the choices as next tokens. Raises: ModelError when one is no single token."""
        return choice_ids(self.tokenizer, conversation.text, choices)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a reply."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def _check_head(self, cfg: RewardModelConfig) -> None:
        has_labels = self.architecture in TWO_LAYER_HEADS or self.architecture.endswith("ForTokenClassification")
        if has_labels == (self.head is Head.labels):
            return
        wanted = "a head of labels" if self.head is Head.labels else "a language model's head"
        raise ConfigError(
            f'{self.key}: "{cfg.path}" is a {self.architecture or "model of unknown architecture"}, and '
            f'family "{cfg.family}" reads {wanted}: the scores would be made up by random weights. Choose the family '
            "the model was trained as."
        )


def resolved(cfg: RewardModelConfig, name: str) -> RewardModelConfig:
    """The record with `path` as a folder of this machine; a hub name is fetched.

    Raises: ConfigError when there is no such folder and the hub does not give it out.
    """
    key = f"rewards.models.{name}.path"
    if not cfg.path:
        raise ConfigError(f"{key} is empty, so there are no weights to load. Give a folder or a hub name.")
    if Path(cfg.path).is_dir():
        return replace(cfg, path=str(Path(cfg.path).resolve()))
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
        return replace(cfg, path=snapshot_download(cfg.path, allow_patterns=wanted))
    except Exception as error:
        raise ConfigError(
            f'{key}="{cfg.path}" is neither a folder on this machine nor a model that the hub gives out '
            f"({type(error).__name__}: {error}). Check the name, log in with `hf auth login` for a gated model, or "
            "give the path of a folder that holds config.json, the tokenizer and safetensors weights."
        ) from error


def identity_of(cfg: RewardModelConfig) -> str:
    """Folder, precision and family of a model, and a digest of its files: other weights have another identity."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted([*Path(cfg.path).glob("*.safetensors"), *Path(cfg.path).glob("*.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(NUM_SAMPLES):
                file.seek(place * max(0, size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return f"{cfg.path} ({cfg.family or 'chat'}, {cfg.dtype}, {digest.hexdigest()})"
