"""What a process needs: arithmetic that a reader can redo, and what torch says that a small model holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig

from conf.compose import compose
from conf.schema import Config
from rl.dry_run.memory import (
    Sizes,
    activation_bytes,
    cache_bytes,
    engine_part,
    layer_bytes,
    learner_part,
    logit_bytes,
    memory,
    sizes_of,
)

B8 = Sizes(
    parameters=8_000, block_parameters=200, adapter_parameters=0, layers=36, hidden=4096, heads=32, kv_heads=8,
    head_dim=128, intermediate=12288, vocabulary=151_936,
)  # fmt: skip
"""The layers of Qwen3-8B, and few enough weights to count in one's head."""
SMALL = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 288, "vocab_size": 100, "tie_word_embeddings": True,
}  # fmt: skip


def run(*overrides: str) -> Config:
    return compose(["experiment=hop_search", *overrides])


def test_a_learner_alone_holds_weights_gradients_and_two_moments_of_four_bytes():
    held = learner_part(run(), B8, on_gpu=False).bytes_of
    assert (held["weights"], held["gradients"], held["optimizer"]) == (32_000, 32_000, 64_000)
    assert "whole layers" not in held and "reference" not in held and "critic" not in held


def test_ranks_share_all_of_it_and_compute_with_two_blocks_and_what_is_no_block():
    part = learner_part(run("learner.num_processes=4", "model.dtype=bfloat16"), B8, on_gpu=True)
    assert part.num == 4
    assert (part.bytes_of["weights"], part.bytes_of["optimizer"]) == (8_000, 16_000)
    # 8,000 - 36 x 200 = 800 outside of blocks, 400 in two blocks, of 2 bytes; one block's gradient in float32
    assert part.bytes_of["whole layers"] == (800 + 400) * 2 + 200 * 4


def test_moments_of_eight_bits_take_a_byte_and_offloaded_ones_wait_on_the_host():
    assert learner_part(run("learner.optimizer=adamw_8bit"), B8, on_gpu=True).bytes_of["optimizer"] == 16_000
    part = learner_part(run("learner.offload=true"), B8, on_gpu=True)
    assert part.bytes_of["weights"] == part.bytes_of["gradients"] == part.bytes_of["optimizer"] == 0
    assert "host" in part.note


def test_adapters_train_little_over_a_frozen_base_and_need_no_reference():
    sizes = replace(B8, adapter_parameters=100)
    held = learner_part(run("model.lora.rank=4", "model.dtype=bfloat16", "loss=ppo_kl"), sizes, on_gpu=True).bytes_of
    assert held["weights"] == 8_000 * 2 + 100 * 4 and held["optimizer"] == 100 * 8
    assert "reference" not in held
    assert learner_part(run("loss=ppo_kl"), B8, on_gpu=True).bytes_of["reference"] == 32_000


def test_a_critic_is_trained_beside_the_policy_and_a_reward_model_in_a_process_of_its_own():
    critic = ["loss=ppo", "credit=gae", "credit.gae.signals.step.scale=1", "loss.critic.kind=model"]
    assert learner_part(run(*critic), B8, on_gpu=True).bytes_of["critic"] == 32_000 * 4
    parts = memory(run("prm=implicit"), B8, on_gpu=True)
    assert [part.name for part in parts] == ["learner", "engine", "prm"]
    assert parts[2].bytes_of["reference"] == 32_000


def test_a_token_keeps_what_backward_needs_of_each_layer():
    # norms 2 x 4096 x (4 + 2 x 2); attention (2 x 4096 + 2 x 1024) x 2; feed-forward 4 x 12288 x 2
    assert layer_bytes(B8, 2) == 65_536 + 20_480 + 98_304
    assert activation_bytes(B8, 8192, 2, recomputes=False) == 8192 * 36 * 184_320  # 50.6 GiB
    assert activation_bytes(B8, 8192, 2, recomputes=True) == 8192 * (36 * 8192 + 184_320)  # 3.7 GiB


def test_keys_and_values_of_a_token_bound_the_paths_that_an_engine_holds():
    assert cache_bytes(B8, 2) == 2 * 36 * 8 * 128 * 2 == 147_456
    cfg = run("model.dtype=bfloat16", "rollout.max_context_tokens=4096", "rollout.gpu_memory_share=0.5")
    part = engine_part(cfg, replace(B8, parameters=2**33), on_gpu=True, gpu_bytes=80 * 2**30)
    assert part.bytes_of == {"weights": 2**34, "cache": 24 * 2**30}
    assert "42 paths of 4,096 tokens" in part.note  # 24 GiB / 147,456 / 4,096 = 42.7


def test_an_engine_over_two_gpus_holds_half_on_each():
    cfg = run("rollout.tensor_parallel_size=2", "rollout.num_workers=3")
    part = engine_part(cfg, B8, on_gpu=True, gpu_bytes=2**30)
    assert part.num == 6 and part.bytes_of["weights"] == 16_000


def test_a_cpu_engine_has_the_cache_it_is_given():
    assert engine_part(run("rollout.kv_cache_mib=64"), B8, on_gpu=False, gpu_bytes=0).bytes_of["cache"] == 2**26


def test_logits_come_in_chunks_and_never_for_more_rows_than_there_are():
    assert logit_bytes(B8, "cpu", 8192) == (3 * (2**24 // 151_936) + 4096) * 151_936 * 4
    assert logit_bytes(B8, "cpu", 8) == (3 * 8 + 4096) * 151_936 * 4


@pytest.mark.parametrize("kind", [(Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_of_activations_is_what_torch_keeps_of_a_small_model(kind, dtype: torch.dtype):
    config = kind[0](**SMALL)
    model = kind[1](config).to(dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.arange(256)[None] % 100, use_cache=False)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    measured = sum(size for place, size in storages.items() if place not in weights)
    estimated = activation_bytes(sizes_of(config, run()), 256, dtype.itemsize, recomputes=False)
    assert 0.9 < estimated / measured <= 1.0  # positions and scales of the norms are left out


def test_sizes_and_cache_are_those_of_the_model_itself():
    config = Qwen3Config(**SMALL)
    sizes, model = sizes_of(config, run()), Qwen3ForCausalLM(config)
    assert sizes.parameters == sum(each.numel() for each in model.parameters())
    assert sizes.block_parameters == sum(each.numel() for each in model.model.layers[0].parameters())
    cache = DynamicCache()
    model(input_ids=torch.zeros(1, 50, dtype=torch.long), past_key_values=cache)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert stored == 50 * cache_bytes(sizes, 4)


def test_moments_are_those_that_the_optimiser_makes():
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    part = learner_part(run(), sizes_of(model.config, run()), on_gpu=False)
    assert part.bytes_of["optimizer"] == moments


def test_a_mixture_counts_all_its_weights_and_the_experts_a_token_goes_to():
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    sizes = sizes_of(Qwen3MoeConfig(**SMALL, **mixture), run())
    assert sizes.intermediate == 2 * 64
    assert sizes.block_parameters > 8 * 3 * 96 * 64


def test_adapters_are_counted_on_the_layers_that_get_them():
    cfg = run("model.lora.rank=4", "model.lora.targets=[q_proj,v_proj]")
    # q: 96 -> 128 and v: 96 -> 64, in three layers
    assert sizes_of(Qwen3Config(**SMALL), cfg).adapter_parameters == 3 * 4 * ((96 + 128) + (96 + 64))
