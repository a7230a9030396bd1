from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_prms import tag_id, word_tokenizer, write_causal, write_qwen_prm, write_token_classifier
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2Model, Qwen3ForTokenClassification

from conf.errors import ConfigError
from conf.schema import ModelKind, RewardModelConfig
from rewards.models.base import MarkedText, ModelError
from rewards.models.families import Head, Reading, build_family, readings
from rewards.models.hf_model import TransformersModel
from rewards.models.local import LocalText, identity_of, resolved

TEXT = MarkedText(question="two plus two ?", steps=("two is 2", "so four", "the answer is 4"))
ASKED = [{"role": "user", "content": "is four the answer ?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint that fits a family."""
    place = tmp_path_factory.mktemp("prms")
    made = {
        "qwen_prm": write_qwen_prm(place / "qwen"),
        "trl_prm": write_token_classifier(place / "classifier"),
        "math_shepherd": write_causal(place / "causal"),
    }
    return lambda family: made.get(family, made["math_shepherd"])


def record(path: Path, family: str, **settings: Any) -> RewardModelConfig:
    return RewardModelConfig(kind=ModelKind.transformers, path=str(path), family=family, **settings)


def places_read(family: str, text: MarkedText = TEXT) -> list[Reading]:
    return readings(build_family(family, word_tokenizer(), key="family"), text, 512)


class RawIds:
    """Steps are written as token ids; 7 closes each."""

    head, good, bad, step_tag_id = Head.labels, 1, 0, 7

    def __init__(self, tokenizer: Any) -> None: ...

    def read(self, text: MarkedText) -> list[Reading]:
        token_ids, places = [], []
        for step in text.steps:
            token_ids += [*map(int, step.split()), 7]
            places.append(len(token_ids) - 1)
        return [Reading(token_ids=token_ids, places=places)]


def test_qwens_head_reads_three_rows_of_the_example_sequence(folder: Callable[[str], Path], tmp_path: Path):
    # [5, 9, 11, 7, 20, 21, 7, 30, 31, 32, 7] with tag 7 has rows at 3, 6 and 10.
    path = folder("qwen_prm")
    (tmp_path / "raw_ids.py").write_text(f"from {__name__} import RawIds\n")
    model = TransformersModel(record(path, f"{tmp_path}/raw_ids.py:RawIds"))
    text = MarkedText(question="", steps=("5 9 11", "20 21", "30 31 32"))
    (scores,) = asyncio.run(model.score_steps([text]))
    tensors = load_file(path / "model.safetensors")
    body = Qwen2Model(Qwen2Config.from_pretrained(path)).eval()
    body.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    with torch.no_grad():
        hidden = body(torch.tensor([[5, 9, 11, 7, 20, 21, 7, 30, 31, 32, 7]])).last_hidden_state[0, [3, 6, 10]]
    inner = (hidden @ tensors["score.0.weight"].T + tensors["score.0.bias"]).relu()
    logits = inner @ tensors["score.2.weight"].T + tensors["score.2.bias"]
    assert logits.shape == (3, 2)
    torch.testing.assert_close(torch.tensor(scores), logits.softmax(-1)[:, 1], rtol=0, atol=1e-4)


def test_a_token_classifier_is_read_at_the_last_token_of_each_separator(folder: Callable[[str], Path]):
    model = TransformersModel(record(folder("trl_prm"), "trl_prm"))
    # A line end inside a step is no place of its own.
    text = MarkedText(question="two", steps=("two \n is 2", "so four"))
    (reading,) = places_read("trl_prm", text)
    with torch.no_grad():
        plain = Qwen3ForTokenClassification.from_pretrained(folder("trl_prm")).eval()
        expected = plain(torch.tensor([reading.token_ids])).logits[0, reading.places].softmax(-1)[:, 1]
    assert asyncio.run(model.score_steps([text])) == [pytest.approx(expected.tolist(), abs=1e-5)]


@pytest.mark.parametrize("family", ["math_shepherd", "rlhflow", "yes_no"])
def test_a_causal_model_is_read_as_the_softmax_of_two_tokens(folder: Callable[[str], Path], family: str):
    model = TransformersModel(record(folder(family), family))
    plain = LlamaForCausalLM.from_pretrained(folder(family)).eval()
    pair = [tag_id(word) for word in (("Yes", "No") if family == "yes_no" else ("+", "-"))]
    expected = []
    for reading in places_read(family):
        with torch.no_grad():
            logits = plain(torch.tensor([reading.token_ids])).logits[0, reading.places]
        expected += logits[:, pair].softmax(-1)[:, 0].tolist()
    (scores,) = asyncio.run(model.score_steps([TEXT]))
    assert scores == pytest.approx(expected, abs=1e-5) and len(scores) == 3


def test_texts_of_any_number_of_steps_are_scored_in_order(folder: Callable[[str], Path]):
    model = TransformersModel(record(folder("qwen_prm"), "qwen_prm"))
    texts = [TEXT, MarkedText(question="two", steps=()), replace(TEXT, steps=TEXT.steps[:1])]
    scores = asyncio.run(model.score_steps(texts))
    assert [len(each) for each in scores] == [3, 0, 1]
    assert scores[0][0] == pytest.approx(scores[2][0], abs=1e-5), "a causal model does not look ahead"


def test_a_text_beyond_the_context_is_an_error(folder: Callable[[str], Path]):
    model = TransformersModel(record(folder("qwen_prm"), "qwen_prm", max_context_tokens=20))
    with pytest.raises(ModelError, match=r"\d+ tokens are more than the model's 20, and a cut text would lose steps"):
        asyncio.run(model.score_steps([TEXT]))


def test_a_tokenizer_that_reads_nothing_is_refused(folder: Callable[[str], Path], tmp_path: Path):
    shutil.copytree(folder("qwen_prm"), tmp_path / "wordless")
    word_tokenizer().save_pretrained(tmp_path / "wordless")  # transformers takes it for Qwen2's own
    with pytest.raises(ConfigError, match="makes no tokens of plain words"):
        LocalText(record(tmp_path / "wordless", "qwen_prm"), "prm")


def test_the_context_is_never_more_than_the_model_was_made_for(folder: Callable[[str], Path]):
    assert LocalText(record(folder("qwen_prm"), "qwen_prm", max_context_tokens=4096), "prm").max_tokens == 512


def test_choices_get_the_log_probabilities_of_the_next_token(folder: Callable[[str], Path]):
    model = TransformersModel(record(folder(""), ""))
    found = asyncio.run(model.choose(ASKED, ["Yes", "No", "+"]))
    text = word_tokenizer().apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    token_ids = word_tokenizer()(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(folder("")).eval()
        logprob_V = plain(torch.tensor([token_ids])).logits[0, -1].log_softmax(-1)
    assert found == {word: pytest.approx(float(logprob_V[tag_id(word)]), abs=1e-5) for word in ("Yes", "No", "+")}


def test_a_choice_of_two_tokens_is_an_error(folder: Callable[[str], Path]):
    with pytest.raises(ModelError, match='the choice "one two"'):
        asyncio.run(TransformersModel(record(folder(""), "")).choose(ASKED, ["one two", "No"]))


def test_the_same_seed_gives_the_same_reply_and_another_seed_another(folder: Callable[[str], Path]):
    model = TransformersModel(record(folder(""), "", temperature=1.0, max_tokens=12))
    replies = [asyncio.run(model.chat(ASKED, seed=seed)) for seed in (1, 1, 2)]
    assert replies[0] == replies[1] and replies[0].text != replies[2].text
    assert replies[0].prompt_tokens == 13 and 0 < replies[0].reply_tokens <= 12


def test_greedy_replies_need_no_seed_and_keep_their_limit(folder: Callable[[str], Path]):
    model = TransformersModel(record(folder(""), ""))
    long, short = (asyncio.run(model.chat(ASKED, max_tokens=limit)) for limit in (6, 2))
    assert long.text.startswith(short.text) and short.reply_tokens <= 2


def test_a_conversation_that_fills_the_context_is_an_error(folder: Callable[[str], Path]):
    model = TransformersModel(record(folder(""), "", max_context_tokens=13))
    with pytest.raises(ModelError, match=r"has 13 tokens, which leaves no room in rewards.models.model's 13"):
        asyncio.run(model.chat(ASKED))


def test_a_head_of_labels_does_not_chat_and_a_chat_model_without_family_scores_no_steps(folder: Callable[[str], Path]):
    with pytest.raises(ModelError, match="answers no conversation"):
        asyncio.run(TransformersModel(record(folder("qwen_prm"), "qwen_prm"), "prm").choose(ASKED, ["Yes", "No"]))
    with pytest.raises(ModelError, match=r"set rewards.models.judge.family"):
        asyncio.run(TransformersModel(record(folder(""), ""), "judge").score_steps([TEXT]))


def test_the_event_loop_stays_free_while_the_model_works(folder: Callable[[str], Path]):
    model = TransformersModel(record(folder(""), ""))
    model._generate = lambda *_: time.sleep(0.3) or []  # type: ignore[method-assign]

    async def both() -> int:
        reply, turns = asyncio.ensure_future(model.chat(ASKED)), 0
        while not reply.done():
            await asyncio.sleep(0.01)
            turns += 1
        return turns

    assert asyncio.run(both()) > 5


def test_a_family_of_the_wrong_head_is_refused(folder: Callable[[str], Path]):
    with pytest.raises(ConfigError, match=r'is a LlamaForCausalLM, and family "qwen_prm" reads a head of labels'):
        TransformersModel(record(folder("math_shepherd"), "qwen_prm"))
    with pytest.raises(ConfigError, match=r"is a Qwen3ForTokenClassification, and .* reads a language model's head"):
        TransformersModel(record(folder("trl_prm"), "math_shepherd"))


@pytest.mark.parametrize("family, lost", [("trl_prm", "score.weight"), ("qwen_prm", "score.2.bias")])
def test_a_checkpoint_without_its_head_is_refused(
    folder: Callable[[str], Path], tmp_path: Path, family: str, lost: str
):
    path = tmp_path / "headless"
    shutil.copytree(folder(family), path)
    tensors = load_file(path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != lost}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="would be random"):
        TransformersModel(record(path, family))


def test_weights_that_are_not_safetensors_are_refused(folder: Callable[[str], Path], tmp_path: Path):
    path = tmp_path / "pickled"
    shutil.copytree(folder("math_shepherd"), path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        TransformersModel(record(path, "math_shepherd"))


def test_code_that_comes_with_a_model_is_not_run(folder: Callable[[str], Path], tmp_path: Path):
    path = tmp_path / "remote"
    shutil.copytree(folder("qwen_prm"), path)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text("raise SystemExit('run')\n")
    assert asyncio.run(TransformersModel(record(path, "qwen_prm")).score_steps([TEXT]))


def test_identity_changes_with_the_weights_and_not_with_the_place(folder: Callable[[str], Path], tmp_path: Path):
    here = record(folder("qwen_prm"), "qwen_prm")
    shutil.copytree(folder("qwen_prm"), tmp_path / "copy")
    other = write_qwen_prm(tmp_path / "other", seed=1)
    digests = [identity_of(replace(here, path=str(path))).split()[-1] for path in (tmp_path / "copy", other)]
    assert identity_of(here).endswith(digests[0]) and digests[0] != digests[1]


def test_a_path_that_is_nowhere_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"rewards.models.prm.path is empty"):
        resolved(record(Path(), "").__class__(), "prm")
    with pytest.raises(ConfigError, match="neither a folder on this machine nor a model that the hub gives out"):
        resolved(record(tmp_path / "gone", ""), "prm")
    with pytest.raises(ConfigError, match="cannot be read"):
        TransformersModel(record(tmp_path, ""))
