"""Tiny process reward models with random weights and their tokenizers, made on the spot for tests."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from chatml import chatml_tokenizer
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForTokenClassification,
)

WORDS = [*"\n+-?", "ки", "Yes", "No", "user", "assistant", "system", "Step", "1:", "2:", "3:", *map(str, range(10))]
WORDS += ["one", "two", "three", "four", "plus", "times", "is", "so", "the", "answer", *'{}[]":,', "true", "false"]
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"intermediate_size": 128, "max_position_embeddings": 512, "initializer_range": 0.2}
"""Heads of 64: vLLM's CPU attention takes no smaller than 32."""
CHATML = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


@cache
def word_tokenizer() -> Any:
    """Words and line ends are tokens, unknown words are [UNK], and <extra_0> is a token that is not "special"."""
    known = ["[UNK]", "<|endoftext|>", *WORDS]
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    tokenizer.add_tokens([AddedToken("<extra_0>", special=False, normalized=False)])
    return tokenizer


@cache
def byte_tokenizer() -> Any:
    """One token per byte, and <extra_0>. For Qwen2, whose own tokenizer transformers takes whatever the folder says."""
    tokenizer = copy.deepcopy(chatml_tokenizer())
    tokenizer.add_tokens([AddedToken("<extra_0>", special=False, normalized=False)])
    return tokenizer


def tag_id(word: str) -> int:
    """Id of one word."""
    (token_id,) = word_tokenizer()(word, add_special_tokens=False)["input_ids"]
    return token_id


def write_qwen_prm(folder: Path, *, seed: int = 0) -> Path:
    """Qwen2 with the two-layer process reward head, in the layout of Qwen2.5-Math-PRM."""
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=len(byte_tokenizer()), **SIZES)
    body = Qwen2Model(config)
    score = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    tensors = {f"model.{name}": value for name, value in body.state_dict().items()}
    tensors |= {f"score.{name}": value for name, value in score.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    record = config.to_dict() | {"architectures": ["Qwen2ForProcessRewardModel"], "num_labels": 2}
    (folder / "config.json").write_text(json.dumps(record))
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_token_classifier(folder: Path, *, seed: int = 0) -> Path:
    """Qwen3 with a head of two labels, as TRL's PRMTrainer saves it."""
    torch.manual_seed(seed)
    config = Qwen3Config(vocab_size=len(word_tokenizer()), head_dim=64, num_labels=2, **SIZES)
    return _written(Qwen3ForTokenClassification(config), folder)


def write_causal(folder: Path, *, seed: int = 0) -> Path:
    """A Llama that could say + and -, Yes and No."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(word_tokenizer()), tie_word_embeddings=False, eos_token_id=None, **SIZES)
    return _written(LlamaForCausalLM(config), folder)


def _written(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
