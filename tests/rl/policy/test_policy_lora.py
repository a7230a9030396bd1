from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from policy_trees import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, Qwen3MoeConfig

from conf.errors import CheckpointError, ConfigError
from conf.schema import LoraConfig
from rl.policy.lora import (
    PREFIX,
    base_causal_lm,
    load_adapter,
    merged_weights,
    save_adapter,
    with_lora,
    without_adapters,
)
from rl.policy.model import TreePolicy

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])
LORA = LoraConfig(rank=4, alpha=8.0)


def adapted(model: PreTrainedModel, lora: LoraConfig = LORA, seed: int = 1) -> PeftModel:
    """Adapters as if they had been trained for a while."""
    found = with_lora(model, lora, seed)
    torch.manual_seed(2)
    for name, weight in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return found


def weights_of(model: PeftModel) -> dict[str, Tensor]:
    """By the names of a TreePolicy with a value head."""
    return TreePolicy(model, 1.0, has_value_head=True).state_dict()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def mixture_of_experts() -> PreTrainedModel:
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    experts = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **experts, **ids))


def test_fresh_adapters_change_nothing():
    model = tiny("qwen3")
    plain = logits(model)
    assert torch.equal(logits(with_lora(model, LORA, seed=1)), plain)


def test_adapters_alone_are_trained():
    model = with_lora(tiny("qwen3"), LORA, seed=1)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert len(trained) == 2 * 2 * 7  # A and B; layers; q, k, v, o, gate, up and down


def test_the_seed_alone_decides_the_first_adapters():
    name = PREFIX + "model.layers.1.mlp.up_proj.lora_A.default.weight"
    first, second, other = (weights_of(with_lora(tiny("llama"), LORA, seed))[name] for seed in (5, 5, 6))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_global_generator_is_left_as_it_was():
    model = tiny("llama")
    state = torch.random.get_rng_state()
    with_lora(model, LORA, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_adapters_of_a_narrow_model_are_float32():
    model = with_lora(tiny("qwen3", torch.bfloat16), LORA, seed=1)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    assert logits(model).dtype is torch.bfloat16


def test_only_the_named_layers_are_adapted():
    lora = LoraConfig(rank=2, targets=["q_proj", "layers.1.mlp.up_proj"])
    names = {name for name, weight in with_lora(tiny("qwen3"), lora, seed=1).named_parameters() if weight.requires_grad}
    assert {name.removeprefix("base_model.model.model.").partition(".lora_")[0] for name in names} == {
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
    }


def test_a_name_that_matches_nothing_is_refused_with_near_ones():
    with pytest.raises(ConfigError, match=r"names 'q_prj', but Qwen3ForCausalLM has no such.*has: q_proj"):
        with_lora(tiny("qwen3"), LoraConfig(rank=2, targets=["v_proj", "q_prj"]), seed=1)


def test_a_model_without_linear_layers_is_refused():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has no such linear layer.*model.lora.rank=0"):
        with_lora(model, LORA, seed=1)


def test_an_output_layer_that_shares_its_weight_is_refused():
    with pytest.raises(ConfigError, match="shares its weight with the input embedding"):
        with_lora(tiny("qwen3", tied=True), LoraConfig(rank=2, targets=["q_proj", "lm_head"]), seed=1)


def test_fused_experts_are_refused_and_the_attention_beside_them_is_not():
    for targets in (["all-linear"], ["all-linear", "q_proj"]):
        with pytest.raises(ConfigError, match=r"experts are fused tensors.*k_proj, o_proj, q_proj, v_proj"):
            with_lora(mixture_of_experts(), LoraConfig(rank=2, targets=targets), seed=1)
    with pytest.raises(ConfigError, match="no such linear layer"):
        with_lora(mixture_of_experts(), LoraConfig(rank=2, targets=["gate_proj"]), seed=1)
    model = adapted(mixture_of_experts(), LoraConfig(rank=4, alpha=8.0, targets=["q_proj", "o_proj"]))
    merged = merged_weights(weights_of(model), LORA)
    found, plain = logits(model), mixture_of_experts()
    assert plain.load_state_dict(merged, strict=True)
    torch.testing.assert_close(logits(plain), found)


def test_without_its_adapters_the_model_is_what_it_was():
    model = tiny("qwen3")
    plain = logits(model)
    changed = adapted(model)
    trained = [weight.requires_grad for weight in changed.parameters()]
    loss = changed(input_ids=IDS).logits.square().sum()
    with without_adapters(changed):
        assert torch.equal(logits(changed), plain)
        assert [weight.requires_grad for weight in changed.parameters()] == trained  # FSDP2 needs it constant
    assert not torch.equal(logits(changed), plain)
    loss.backward()  # a graph made before is still whole
    assert all(weight.grad is not None for weight in changed.parameters() if weight.requires_grad)


def test_adapters_come_back_after_an_error():
    model = adapted(tiny("qwen3"))
    expected = logits(model)
    with pytest.raises(KeyError), without_adapters(model):
        raise KeyError
    assert torch.equal(logits(model), expected)


def test_the_base_model_is_reached_with_and_without_adapters():
    model = tiny("qwen3")
    assert base_causal_lm(model) is model
    assert base_causal_lm(with_lora(model, LORA, seed=1)) is model


def test_merging_adds_the_scaled_product():
    layer = PREFIX + "model.layers.0.self_attn.q_proj"
    weights = {
        f"{layer}.base_layer.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        f"{layer}.base_layer.bias": torch.tensor([0.5, 0.5]),
        f"{layer}.lora_A.default.weight": torch.tensor([[1.0, -1.0]]),
        f"{layer}.lora_B.default.weight": torch.tensor([[2.0], [0.0]]),
        PREFIX + "model.norm.weight": torch.tensor([5.0, 6.0]),
        "value_head.weight": torch.tensor([[7.0, 8.0]]),
    }
    merged = merged_weights(weights, LoraConfig(rank=1, alpha=3.0))
    assert {name: weight.tolist() for name, weight in merged.items()} == {
        "model.layers.0.self_attn.q_proj.weight": [[7.0, -4.0], [3.0, 4.0]],  # + 3 * [[2, -2], [0, 0]]
        "model.layers.0.self_attn.q_proj.bias": [0.5, 0.5],
        "model.norm.weight": [5.0, 6.0],
    }


def test_narrow_weights_are_merged_in_float32_and_rounded_once():
    layer = PREFIX + "model.layers.0.self_attn.q_proj"
    weights = {
        f"{layer}.base_layer.weight": torch.tensor([[1.0]], dtype=torch.bfloat16),
        f"{layer}.lora_A.default.weight": torch.full((2, 1), 1.0),
        f"{layer}.lora_B.default.weight": torch.full((1, 2), 2.0**-9),
    }
    merged = merged_weights(weights, LoraConfig(rank=2, alpha=4.0))["model.layers.0.self_attn.q_proj.weight"]
    # 1 + 2 * (2^-9 + 2^-9) = 1 + 2^-7, the next bfloat16 after 1; half of it alone would be rounded away.
    assert (merged.dtype, merged.item()) == (torch.bfloat16, 1.0 + 2.0**-7)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_compute_what_the_adapted_model_does(family: str, tied: bool):
    model = adapted(tiny(family, torch.float64, tied=tied))
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    merged = merged_weights(before, LORA)
    found, plain = logits(model), tiny(family, torch.float64, tied=tied)
    assert plain.load_state_dict(merged, strict=True)
    torch.testing.assert_close(logits(plain), found, rtol=1e-10, atol=1e-10)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_folder_loads_in_transformers_as_it_is(tied: bool, tmp_path: Path):
    targets = ["all-linear"] if tied else ["all-linear", "lm_head"]
    model = adapted(tiny("qwen3", tied=tied), LoraConfig(rank=4, alpha=8.0, targets=targets))
    weights = dict(TreePolicy(model, 1.0).named_parameters())  # a tied output layer is named once, as sharding names it
    base_causal_lm(model).save_pretrained(tmp_path, state_dict=merged_weights(weights, LORA))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_saved_adapters_load_in_peft(tmp_path: Path):
    model = adapted(tiny("qwen3"))
    save_adapter(model, weights_of(model), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny("qwen3"), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model))
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (described["r"], described["lora_alpha"], described["inference_mode"]) == (4, 8.0, True)
    assert not model.peft_config["default"].inference_mode


def test_saved_adapters_come_back_under_the_names_of_the_policy(tmp_path: Path):
    model = adapted(tiny("qwen3"))
    weights = weights_of(model)
    save_adapter(model, weights, tmp_path)
    loaded = load_adapter(tmp_path)
    assert loaded.keys() == {name for name in weights if ".lora_" in name}
    fresh = TreePolicy(with_lora(tiny("qwen3"), LORA, seed=9), 1.0)
    assert not fresh.load_state_dict(loaded, strict=False).unexpected_keys
    assert torch.equal(logits(fresh.model), logits(model))


def test_a_checkpoint_without_adapters_says_so(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(tmp_path)
