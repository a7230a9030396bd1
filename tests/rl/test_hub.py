"""A run's model as a folder for the hub: it loads, its card is true, and nothing of this machine is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from conf.compose import compose
from conf.errors import CheckpointError, ConfigError
from rl import checkpoint
from rl.cli import main
from rl.hub import export_model, hub_name, recipe
from rl.run_folder import RunFolder, installed_versions, open_run_folder, settings

BASE = "Qwen/Qwen3-0.6B"
SECRET = "sk-live-0123456789"


def tiny() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=8, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, **sizes)
    return Qwen3ForCausalLM(config)


def counters(step: int, success: float) -> dict[str, Any]:
    return {
        "generated_tokens": 12345,
        "trained_tokens": 6789,
        "success_before": 0.25,
        "success_after": success,
        "success_standard_error": 0.03,
        "evaluated_step": step,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of adapters on a hub model, with checkpoints of steps 10, 20 and 30; step 20 was the best."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    overrides = [f"run.dir={folder}", f"model.path={BASE}", "model.lora.rank=2", "loss.kl_coef=0.01", "seed=3"]
    cfg = compose(["experiment=hop_search", *overrides, f"cluster.address={folder}"])
    opened = open_run_folder(folder, settings(cfg))
    opened.metrics.touch()

    def write(place: Path) -> None:
        model = tiny()
        model.generation_config.max_new_tokens = 5
        model.save_pretrained(place / "model")
        words = {f"w{number}": number for number in range(8)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
        tokenizer.save_pretrained(place / "model")
        described = json.loads((place / "model" / "config.json").read_text())
        (place / "model" / "config.json").write_text(json.dumps(described | {"_name_or_path": str(folder)}))
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        adapted.save_pretrained(str(place / "adapter"))
        described = json.loads((place / "adapter" / "adapter_config.json").read_text())
        local = json.dumps(described | {"base_model_name_or_path": str(folder / "cache")})
        (place / "adapter" / "adapter_config.json").write_text(local)

    for step, success in ((10, 0.5), (20, 0.75), (30, 0.625)):
        state = {"seed": 3, "run": counters(step, success), "versions": installed_versions()}
        checkpoint.save(opened.checkpoints, step, write, state, keep=3, keep_best=1, success=success)
    return folder


def texts(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors")


def test_the_folder_loads_in_transformers_and_computes_what_the_checkpoint_does(run: Path, tmp_path: Path):
    found = export_model(run, tmp_path / "searcher")
    assert (found["step"], found["success_share"]) == (30, 0.625)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "searcher")
    assert torch.equal(loaded(torch.tensor([[1, 2]])).logits, tiny()(torch.tensor([[1, 2]])).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "searcher").get_vocab()["w7"] == 7
    assert loaded.generation_config.max_new_tokens == 5
    assert [path.name for path in tmp_path.iterdir()] == ["searcher"]


def test_the_card_says_what_was_trained_how_and_how_well(run: Path, tmp_path: Path):
    export_model(run, tmp_path / "searcher", best=True, license="apache-2.0")
    card = ModelCard.load(tmp_path / "searcher" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == BASE
    assert card.data.library_name == "transformers" and "reinforcement-learning" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_value) == ("hop_search", 0.75)
    for said in (
        "Checkpoint of step 20, after 12,345 sampled and 6,789 trained tokens. Seed 3.",
        "| before training | 0.250 ± 0.027 |",  # sqrt(.25 * .75 / 256)
        "| step 20 | 0.750 ± 0.030 |",
        "loss.kl_coef: 0.01",
        f"| torch | {torch.__version__} |",
        'from_pretrained("searcher")',
    ):
        assert said in card.text, said


def test_without_a_licence_the_card_states_none(run: Path, tmp_path: Path):
    export_model(run, tmp_path / "searcher")
    card = (tmp_path / "searcher" / "README.md").read_text()
    assert "license:" not in card and "No licence was stated." in card


def test_nothing_of_this_machine_or_secret_is_in_the_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    config = RunFolder(run).config
    plain = yaml.safe_load(config.read_text())
    plain["rewards"]["models"] = {"judge": {"url": "http://10.1.2.3/v1", "path": str(run / "judge")}}
    before = config.read_text()
    config.write_text(yaml.safe_dump(plain))
    try:
        for name, adapter in (("merged", False), ("adapters", True)):
            export_model(run, tmp_path / name, adapter=adapter)
            said = texts(tmp_path / name)
            assert not any(
                word in said for word in (str(run), str(tmp_path), SECRET, "10.1.2.3", str(Path.home()) + "/")
            )
    finally:
        config.write_text(before)


def test_adapters_alone_name_the_model_they_belong_on(run: Path, tmp_path: Path):
    export_model(run, tmp_path / "adapters", adapter=True)
    described = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == BASE
    names = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert names >= {"adapter_model.safetensors", "tokenizer.json", "README.md"} and "model.safetensors" not in names
    peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "adapters"))
    assert ModelCard.load(tmp_path / "adapters" / "README.md").data.library_name == "peft"


def test_what_cannot_be_exported_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 11; there are: 10, 20, 30"):
        export_model(run, tmp_path / "out", step=11)
    with pytest.raises(ConfigError, match="is no run folder"):
        export_model(tmp_path, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="two models would be mixed"):
        export_model(run, tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_adapters_of_a_model_that_only_this_machine_has_need_its_name(tmp_path: Path):
    cfg = compose(["experiment=hop_search", f"run.dir={tmp_path / 'run'}", "model.lora.rank=2"])
    opened = open_run_folder(tmp_path / "run", settings(cfg))
    state = {"run": counters(1, 0.5), "versions": {}}
    checkpoint.save(opened.checkpoints, 1, lambda place: (place / "adapter").mkdir(), state, keep=1)
    with pytest.raises(ConfigError, match=r"model\.path=\(none\) is on this machine alone"):
        export_model(tmp_path / "run", tmp_path / "out", adapter=True)
    with pytest.raises(CheckpointError, match="no checkpoint whose held-out success was measured"):
        export_model(tmp_path / "run", tmp_path / "out", best=True)


def test_a_hub_name_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    found = [hub_name(path) for path in (BASE, "models/mine", str(tmp_path), "", "../mine")]
    assert found == [BASE, "", "", "", ""]


def test_the_recipe_is_what_differs_without_what_is_of_the_machine():
    found = recipe(compose(["seed=3", "run.num_steps=7", "learner.learning_rate=0.5", "model.path=/models/mine"]))
    assert found["seed"] == 3 and found["learner.learning_rate"] == 0.5
    assert not any(key.startswith("run.") for key in found) and "model.path" not in found


def test_the_command_exports_and_says_how_to_publish(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(run), str(tmp_path / "searcher"), "--step", "10"]) == 0
    shown = capsys.readouterr().out
    assert "success_share  0.5" in shown and f"hf upload YOUR_NAME/searcher {tmp_path / 'searcher'}" in shown
