from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_trees import VOCABULARY, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conf.errors import ConfigError
from conf.schema import LoraConfig
from rl.policy.logprobs import Head, edge_logprobs, output_head, require_known_head
from rl.policy.lora import base_causal_lm, with_lora, without_adapters

ROWS = torch.tensor([4, 0, 2, 2, 2, 1, 4])
"""Row 2 predicts three edges, row 4 two, row 3 none; not in order."""
TARGETS = torch.tensor([3, 5, 1, 1, 0, 6, 2])
"""Two edges of row 2 even have the same target, as siblings that start with the same token do."""

HEADS = {"plain": (None, 1.0), "scaled": (None, 0.25), "capped": (1.5, 1.0), "scaled and capped": (1.5, 3.0)}
"""(softcap, scale); the tests add a weight and a bias."""


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((5, 4), (7, 4), (7,)))
    return hidden, weight, bias


def logits(hidden: Tensor, head: Head) -> Tensor:
    """The definition, written out."""
    z = hidden @ head.weight_VD.T
    z = head.scale * (z if head.bias_V is None else z + head.bias_V)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def written_out(hidden: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (logits(hidden, head) / temperature).log_softmax(-1)
    return logp[ROWS, TARGETS], -(logp.exp() * logp).sum(-1)[ROWS]


def test_equal_logits_are_a_fair_choice():
    head = Head(torch.ones(8, 2))
    logprob, entropy = edge_logprobs(torch.zeros(1, 2), head, torch.tensor([0]), torch.tensor([3]), 1.0, 4)
    assert logprob.item() == pytest.approx(-math.log(8))
    assert entropy.item() == pytest.approx(math.log(8))


def test_a_capped_logit_never_passes_its_cap():
    head = Head(torch.tensor([[100.0], [0.0]]), softcap=2.0)
    logprob, _ = edge_logprobs(torch.ones(1, 1), head, torch.tensor([0]), torch.tensor([1]), 1.0, 1)
    assert logprob.item() == pytest.approx(-math.log(math.exp(2.0) + 1.0))  # logits 2 tanh(50) = 2 and 0


def test_scale_and_bias_come_before_the_cap():
    head = Head(torch.tensor([[3.0], [0.0]]), bias_V=torch.tensor([1.0, 0.0]), softcap=4.0, scale=0.5)
    assert head.logits(torch.ones(1, 1)).tolist() == [[pytest.approx(4.0 * math.tanh(0.5)), 0.0]]  # 0.5 * (3 + 1) / 4


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", HEADS)
def test_chunks_change_neither_values_nor_gradients(kind: str, chunk_rows: int, temperature: float):
    hidden, weight, bias = leaves = inputs()
    head = Head(weight, bias, *HEADS[kind])
    found = edge_logprobs(hidden, head, ROWS, TARGETS, temperature, chunk_rows)
    expected = written_out(hidden, head, temperature)
    torch.testing.assert_close(found, expected)
    mixing = torch.randn(2, len(ROWS), dtype=torch.float64)
    grads = torch.autograd.grad((torch.stack(found) * mixing).sum(), leaves)
    torch.testing.assert_close(grads, torch.autograd.grad((torch.stack(expected) * mixing).sum(), leaves))


@pytest.mark.parametrize("chunk_rows", [1, 2, 64])
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_agree_with_finite_differences(kind: str, chunk_rows: int):
    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, *HEADS[kind])
        return edge_logprobs(hidden, head, ROWS, TARGETS, 0.7, chunk_rows)

    assert torch.autograd.gradcheck(both, inputs())


@pytest.mark.parametrize("output", [0, 1])
def test_a_loss_of_log_probabilities_or_of_entropies_alone_has_its_gradient(output: int):
    hidden, weight, _ = inputs()
    found = torch.autograd.grad(edge_logprobs(hidden, Head(weight), ROWS, TARGETS, 0.7, 2)[output].sum(), weight)
    expected = torch.autograd.grad(written_out(hidden, Head(weight), 0.7)[output].sum(), weight)
    torch.testing.assert_close(found, expected)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(len(ROWS))))
def test_edges_may_come_in_any_order(order: list[int]):
    hidden, weight, _ = inputs()
    logprob, entropy = edge_logprobs(hidden, Head(weight), ROWS[order], TARGETS[order], 1.0, 2)
    expected_logprob, expected_entropy = written_out(hidden, Head(weight), 1.0)
    torch.testing.assert_close(logprob, expected_logprob[order])
    torch.testing.assert_close(entropy, expected_entropy[order])


def test_narrow_weights_give_float32_log_probabilities_and_narrow_gradients():
    leaves = hidden, weight, bias = inputs(torch.bfloat16)
    logprob, entropy = edge_logprobs(hidden, Head(weight, bias, 5.0), ROWS, TARGETS, 1.0, 2)
    assert (logprob.dtype, entropy.dtype) == (torch.float32, torch.float32)
    grads = torch.autograd.grad(logprob.sum(), leaves)
    assert {grad.dtype for grad in grads} == {torch.bfloat16}


def test_the_softmax_of_narrow_logits_is_taken_in_float32():
    hidden, weight, _ = inputs(torch.bfloat16)
    logprob, _ = edge_logprobs(hidden, Head(weight), ROWS, TARGETS, 1.0, 2)
    expected = (hidden @ weight.T).double().log_softmax(-1)[ROWS, TARGETS]
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-6, atol=1e-6)  # bfloat16 would be off by 1e-2


def test_a_frozen_head_takes_no_gradient():
    hidden, weight, bias = inputs()
    edge_logprobs(hidden, Head(weight.detach(), bias.detach()), ROWS, TARGETS, 1.0, 2)[0].sum().backward()
    assert hidden.grad is not None


def test_a_pack_without_edges_has_no_log_probabilities():
    hidden, weight, _ = inputs()
    none = torch.empty(0, dtype=torch.int64)
    logprob, entropy = edge_logprobs(hidden, Head(weight), none, none, 1.0, 2)
    assert (logprob.shape, entropy.shape) == ((0,), (0,))
    logprob.sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()


FAMILIES = {
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "gemma3_text": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "phi": {"num_key_value_heads": 4},
    "llama": {"tie_word_embeddings": False},
    "gpt_neox": {},
}
"""Each with its own kind of output layer."""


def small(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2}
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = CONFIG_MAPPING[family](**{**sizes, **more, **ids, **changes})
    model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_the_logits_of_the_model(family: str):
    model = small(family, **FAMILIES[family])
    require_known_head(model)
    head = output_head(model)
    ids_T = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids_T).last_hidden_state[0]
        torch.testing.assert_close(head.logits(hidden), model(input_ids=ids_T).logits[0])


def test_the_heads_of_the_families_differ():
    heads = {family: output_head(small(family, **changes)) for family, changes in FAMILIES.items()}
    assert (heads["gemma2"].softcap, heads["gemma3_text"].softcap, heads["llama"].softcap) == (2.0, 2.0, None)
    assert (heads["cohere"].scale, heads["granite"].scale, heads["llama"].scale) == (0.0625, 0.125, 1.0)
    assert heads["phi"].bias_V is not None and heads["llama"].bias_V is None


def test_a_head_that_does_something_else_is_refused_with_the_gap():
    model = small("llama")
    forward = model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = 2.0 * output.logits
        return output

    model.forward = doubled
    with pytest.raises(ConfigError, match=r"largest gap [\d.]+ of their spread.*other log-probabilities"):
        require_known_head(model)
    assert not model.base_model._forward_hooks


def test_an_output_that_is_not_one_linear_layer_is_refused():
    model = small("llama")
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(ConfigError, match="ends in Sequential, not in one linear layer"):
        output_head(model)


def test_an_adapter_on_the_output_layer_is_part_of_the_head_and_is_trained():
    model = tiny("qwen3", tied=False)
    plain = output_head(model).weight_VD.detach().clone()
    adapted = with_lora(model, LoraConfig(rank=2, alpha=4.0, targets=["lm_head"]), seed=1)
    layer = model.get_output_embeddings()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    head = output_head(base_causal_lm(adapted))
    update = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / rank = 2
    torch.testing.assert_close(head.weight_VD, plain + update)
    require_known_head(base_causal_lm(adapted))
    edge_logprobs(torch.randn(5, 32), head, ROWS, TARGETS, 1.0, 2)[0].sum().backward()
    assert layer.lora_A["default"].weight.grad.any() and layer.base_layer.weight.grad is None
    with without_adapters(adapted):
        torch.testing.assert_close(output_head(base_causal_lm(adapted)).weight_VD, plain, rtol=0.0, atol=0.0)
