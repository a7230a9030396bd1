from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from conf.errors import ConfigError
from conf.schema import Config, ModelConfig, TinyModelConfig
from rl.tiny import tiny_model, tiny_tokenizer, vocabulary, write_tiny_model
from rollout.envs.hop_search import HopSearchRows

TALK = [
    {"role": "user", "content": "who is Anna Reed 's boss ?"},
    {"role": "assistant", "content": "<call> office boss Anna Reed </call>"},
    {"role": "tool", "content": "Tom Hill"},
    {"role": "assistant", "content": "<answer> Tom Hill </answer>"},
]


def test_the_template_adds_nothing_but_the_marks_around_results():
    text = tiny_tokenizer().apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert text == (
        "who is Anna Reed 's boss ? <call> office boss Anna Reed </call> <result> Tom Hill </result> "
        "<answer> Tom Hill </answer>"
    )
    assert len(tiny_tokenizer()(text)["input_ids"]) == 7 + 6 + 4 + 4


def test_every_question_is_in_the_vocabulary():
    tokenizer, config = tiny_tokenizer(), Config()
    for split in ("train", "eval"):
        rows = HopSearchRows(config.task.hop_search, 0, split)
        for index in range(50):
            question = rows.row(index)["question"]
            token_ids = tokenizer(question)["input_ids"]
            assert tokenizer.unk_token_id not in token_ids
            assert tokenizer.decode(token_ids) == question


def test_the_folder_is_an_ordinary_checkpoint(tmp_path: Path):
    config = Config(model=ModelConfig(tiny=TinyModelConfig(hidden_size=32, num_layers=1, intermediate_size=64)))
    folder = write_tiny_model(tmp_path / "tiny", config)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, Qwen3ForCausalLM)
    assert (model.dtype, model.config.tie_word_embeddings, model.config.head_dim) == (torch.float32, True, 32)
    assert tokenizer.get_vocab() == vocabulary()
    assert tokenizer.apply_chat_template(TALK, tokenize=False).endswith("<answer> Tom Hill </answer>")
    ends = [vocabulary()["</call>"], vocabulary()["</answer>"]]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == ends
    fresh = tiny_model(config.model.tiny, config.seed)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_weights_follow_from_the_seed_and_leave_the_global_one_alone():
    sizes = TinyModelConfig(hidden_size=32, num_layers=1, intermediate_size=64)
    before = torch.get_rng_state()
    first, again, other = (tiny_model(sizes, seed).state_dict()["lm_head.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_the_default_size_is_a_third_of_a_million_weights():
    assert tiny_model(TinyModelConfig(), 0).num_parameters() == 369_408


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (TinyModelConfig(num_heads=4, num_kv_heads=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
        (TinyModelConfig(head_dim=15), "head_dim=15 is odd"),
    ],
)
def test_sizes_that_qwen3_cannot_have_are_refused(sizes: TinyModelConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        tiny_model(sizes, 0)
