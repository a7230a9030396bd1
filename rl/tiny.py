"""The tiny policy that Grove makes itself: an ordinary Hugging Face checkpoint folder with its own word vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conf.errors import ConfigError
from conf.schema import Config, TinyModelConfig
from rollout.envs.hop_search import WORDING
from rollout.seeds import derive_seed
from rollout.teaching import Wording, has_teacher, teacher_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PAD, UNKNOWN = "<pad>", "<unk>"


def vocabulary(wording: Wording = WORDING) -> dict[str, int]:
    """Every word of a task, word -> token id."""
    words = [PAD, UNKNOWN, *wording.words]
    assert len(set(words)) == len(words), "a word listed twice would have two ids"
    return {word: token_id for token_id, word in enumerate(words)}


def tiny_tokenizer(wording: Wording = WORDING) -> PreTrainedTokenizerFast:
    """One token per word; words outside the vocabulary become <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocab=vocabulary(wording), unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=wording.turn_ends[-1],
        chat_template=wording.chat_template,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def tiny_model(sizes: TinyModelConfig, seed: int, wording: Wording = WORDING) -> Qwen3ForCausalLM:
    """A fresh Qwen3 in float32 whose weights depend on the sizes, the number of words and the seed alone.

    Raises: ConfigError for sizes that Qwen3 cannot have.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    _check_sizes(sizes)
    word_ids = vocabulary(wording)
    config = Qwen3Config(
        vocab_size=len(word_ids),
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate_size,
        initializer_range=sizes.initializer_range,
        max_position_embeddings=sizes.max_position_embeddings,
        tie_word_embeddings=True,
        pad_token_id=word_ids[PAD],
        eos_token_id=[word_ids[word] for word in wording.turn_ends],
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("tiny model", seed))
        return Qwen3ForCausalLM(config).float()


def _check_sizes(sizes: TinyModelConfig) -> None:
    if sizes.num_heads % sizes.num_kv_heads:
        raise ConfigError(
            f"model.tiny.num_heads={sizes.num_heads} is not a multiple of num_kv_heads={sizes.num_kv_heads}: query "
            f"heads share key-value heads in equal groups. Use num_kv_heads=1 or num_kv_heads={sizes.num_heads}."
        )
    if sizes.head_dim % 2:
        raise ConfigError(
            f"model.tiny.head_dim={sizes.head_dim} is odd: rotary positions need pairs. Use an even number."
        )


def write_tiny_model(folder: str | Path, cfg: Config) -> Path:
    """Write a freshly initialised tiny policy, seeded by `cfg.seed`, and return its folder.

    It knows the words of the task's teacher, and where the task has none those of hop_search.

    Raises: ConfigError for sizes that Qwen3 cannot have.
    """
    wording = teacher_of(cfg.task).wording if has_teacher(cfg.task) else WORDING
    return save_tiny_model(folder, tiny_model(cfg.model.tiny, cfg.seed, wording), wording)


def save_tiny_model(folder: str | Path, model: Qwen3ForCausalLM, wording: Wording = WORDING) -> Path:
    """Write weights, tokenizer, chat template and generation settings, as any loader of checkpoints expects them."""
    from transformers import GenerationConfig

    word_ids = vocabulary(wording)
    turn_ends = [word_ids[word] for word in wording.turn_ends]
    model.generation_config = GenerationConfig(pad_token_id=word_ids[PAD], eos_token_id=turn_ends, do_sample=True)
    write_weights(model, folder)
    tiny_tokenizer(wording).save_pretrained(folder)
    return Path(folder)


def write_weights(model: Any, folder: str | Path) -> None:
    """Write a small model and its config, without a progress bar that would break into the run's own."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if enabled:
            logging.enable_progress_bar()
