from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_cases
import torch
from policy_trees import tiny
from published import arrived, of_ranks
from rank_cases import forest, gradients, packs_of, policy, stepped, store, take, train_on, wide_policy
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from conf.schema import Layout, LearnerConfig, LoraConfig, OptimizerKind
from rl.policy.lora import base_causal_lm
from rl.policy.model import TreePolicy
from rl.policy.optimizer import build_optimizer
from rl.policy.pack import pack
from rl.policy.rank_files import Shards
from rl.policy.ranks import Ranks
from rl.policy.sharding import clip_gradients, full_weights, shard
from rl.policy.shards import groups_of
from rl.policy.stored import plain_weights
from rollout.shards import Rows

HAS_8BIT = importlib.util.find_spec("torchao") is not None
CASES = [
    rank_cases.tied_gradients,
    rank_cases.untied_gradients,
    rank_cases.checkpointed_gradients,
    rank_cases.value_head_gradients,
    rank_cases.adapter_gradients,
    rank_cases.critic_gradients,
    rank_cases.head_alone,
    rank_cases.clipped,
    rank_cases.statistics,
    rank_cases.unseen_update,
    rank_cases.trained,
    rank_cases.took_over,
    rank_cases.bfloat16_compute,
    rank_cases.wrong_weights,
    rank_cases.published,
    rank_cases.published_adapters,
    rank_cases.published_experts,
    *([rank_cases.trained_8bit] if HAS_8BIT else []),
]
pytestmark = pytest.mark.timeout(600)  # the first test starts two processes, which a busy machine makes wait
ALONE = Ranks.alone(torch.device("cpu"))


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two processes found, by case and rank; they start once for all tests here."""
    folder = tmp_path_factory.mktemp("ranks")
    module, optimizer = rank_cases.wide_learner(ALONE, OptimizerKind.adamw)
    stepped(module, optimizer, ALONE, 2)
    store(module, optimizer, folder / rank_cases.ONE_PROCESS, ALONE)
    found = rank_cases.run_ranks(CASES, folder)
    stepped(module, optimizer, ALONE, 1)
    return found | {"folder": [folder], "one_process": [full_weights(module)]}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], share: float = 1e-6) -> None:
    """Equal up to a share of each tensor's largest value."""
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=share * max(1e-9, values.abs().max().item()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "module"),
    [
        ("tied_gradients", policy),
        ("untied_gradients", partial(policy, tied=False)),
        ("checkpointed_gradients", partial(policy, checkpointed=True)),
        ("value_head_gradients", partial(policy, has_value_head=True)),
        ("adapter_gradients", rank_cases.adapted_policy),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_two_ranks_with_different_trees_and_a_dummy_sum_to_the_gradients_of_one_process(
    of_two_ranks: dict[str, list[Any]], case: str, module: Callable[[], TreePolicy]
):
    alone = module()
    train_on(alone, packs_of(forest()))
    wanted = gradients(alone)
    assert all(values.any() for values in wanted.values())
    for found in of_two_ranks[case]:
        assert_close(found, wanted)


@pytest.mark.slow
def test_two_ranks_sum_the_gradients_of_a_critic(of_two_ranks: dict[str, list[Any]]):
    module = rank_cases.critic()
    for trees in packs_of(forest())[:2]:
        (module(pack(trees), Layout.segments) - 1.0).square().sum().backward()
    for found in of_two_ranks["critic_gradients"]:
        assert_close(found, gradients(module))


@pytest.mark.slow
def test_a_value_head_can_warm_up_alone(of_two_ranks: dict[str, list[Any]]):
    everything = sorted(name for name, _ in policy(has_value_head=True).named_parameters())
    assert of_two_ranks["head_alone"] == [[["value_head.bias", "value_head.weight"], everything]] * 2


@pytest.mark.slow
def test_gradients_are_clipped_by_the_norm_over_all_ranks(of_two_ranks: dict[str, list[Any]]):
    module = policy()
    train_on(module, packs_of(forest()))
    norm = clip_gradients(module.parameters(), 0.5)
    assert norm > 0.5, "there was something to clip"
    for found_norm, found in of_two_ranks["clipped"]:
        assert found_norm == pytest.approx(norm, rel=1e-6)
        assert_close(found, gradients(module))


@pytest.mark.slow
def test_ranks_sum_and_maximise_numbers_that_only_some_have(of_two_ranks: dict[str, list[Any]]):
    sums, maxima = {"tokens": pytest.approx(1.2), "alone": 2.0}, {"tokens": 1.1, "alone": 2.0}
    gathered = [{"from": 0}, {"from": 1}]
    assert of_two_ranks["statistics"] == [[sums, maxima, gathered], [sums, maxima, None]]


@pytest.mark.slow
def test_a_pass_without_gradients_does_not_hide_the_next_update(of_two_ranks: dict[str, list[Any]]):
    for after_a_pass, without_one in of_two_ranks["unseen_update"]:
        assert after_a_pass == without_one


@pytest.mark.slow
def test_each_rank_keeps_its_share_of_the_moments(of_two_ranks: dict[str, list[Any]]):
    total = sum(weight.numel() for weight in wide_policy().parameters())
    first, second = (found["own"] for found in of_two_ranks["trained"])
    assert first + second == total
    assert abs(first - second) <= 64 + 1, "only the value head, of one row and one bias, is not halved"


@pytest.mark.slow
def test_two_ranks_resume_to_the_same_bits(of_two_ranks: dict[str, list[Any]]):
    first, second = of_two_ranks["trained"]
    assert second["after"] == {}, "rank 0 alone holds what is whole"
    assert all(torch.equal(first["resumed"][name], weight) for name, weight in first["after"].items())


@pytest.mark.slow
def test_each_rank_writes_its_own_rows(of_two_ranks: dict[str, list[Any]]):
    (folder,) = of_two_ranks["folder"]
    assert sorted(file.name for file in (folder / "adamw").iterdir()) == ["rank0.safetensors", "rank1.safetensors"]
    name = "weights/model.model.embed_tokens.weight"
    rows = [load_file(folder / "adamw" / f"rank{rank}.safetensors")[name] for rank in (0, 1)]
    assert [len(part) for part in rows] == [20, 20]
    assert torch.equal(torch.cat(rows), Shards(folder / "adamw").whole([name])[name])


@pytest.mark.slow
def test_one_process_goes_on_where_two_ranks_stopped(of_two_ranks: dict[str, list[Any]]):
    (folder,), found = of_two_ranks["folder"], of_two_ranks["trained"][0]
    module, optimizer = rank_cases.wide_learner(ALONE, OptimizerKind.adamw)
    take(module, optimizer, folder / "adamw", ALONE)
    stepped(module, optimizer, ALONE, 1)
    assert_close(full_weights(module), found["after"], share=1e-5)
    stepped(module, optimizer, ALONE, 1)
    moved = (full_weights(module)[name] - weight for name, weight in found["after"].items())
    assert max(each.abs().max().item() for each in moved) > 1e-3


@pytest.mark.slow
def test_two_ranks_go_on_where_one_process_stopped(of_two_ranks: dict[str, list[Any]]):
    assert_close(of_two_ranks["took_over"][0], of_two_ranks["one_process"][0], share=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_8BIT, reason="needs torchao")
def test_moments_in_8_bits_resume_to_the_same_bits_on_two_ranks(of_two_ranks: dict[str, list[Any]]):
    (folder,), found = of_two_ranks["folder"], of_two_ranks["trained_8bit"][0]
    parts = {name.rpartition("/")[2] for name in Shards(folder / "adamw_8bit").shapes if "/exp_avg/" in name}
    assert parts == {"codes", "scale", "qmap", "plain"}, "large parts in 8 bits, small ones as they are"
    assert all(torch.equal(found["resumed"][name], weight) for name, weight in found["after"].items())


@pytest.mark.slow
@pytest.mark.skipif(not HAS_8BIT, reason="needs torchao")
def test_one_process_takes_moments_in_8_bits_of_two_ranks_or_of_a_wide_optimiser(of_two_ranks: dict[str, list[Any]]):
    (folder,), found = of_two_ranks["folder"], of_two_ranks["trained_8bit"][0]
    for kind in OptimizerKind:
        module, optimizer = rank_cases.wide_learner(ALONE, OptimizerKind.adamw_8bit)
        take(module, optimizer, folder / kind.value, ALONE)
        stepped(module, optimizer, ALONE, 1)
        assert_close(full_weights(module), found["after"], share=0.2)


@pytest.mark.slow
def test_gathered_weights_load_in_transformers(of_two_ranks: dict[str, list[Any]], tmp_path: Path):
    gathered = of_two_ranks["trained"][0]["after"]
    model = tiny("qwen3", hidden_size=64, intermediate_size=128)
    model.config.save_pretrained(tmp_path)
    weights = {name.removeprefix("model."): weight for name, weight in gathered.items() if name.startswith("model.")}
    assert "lm_head.weight" not in weights, "it is the input embedding"
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    parameters = dict(loaded.named_parameters())
    assert parameters.keys() == weights.keys()
    assert all(torch.equal(parameters[name], weight) for name, weight in weights.items())


@pytest.mark.slow
def test_bfloat16_computes_and_float32_learns(of_two_ranks: dict[str, list[Any]]):
    wanted_E = policy()(pack(forest(1)), Layout.segments).logprob_E
    for found in of_two_ranks["bfloat16_compute"]:
        assert found["types"] == ["torch.float32"] * 3
        torch.testing.assert_close(found["logprobs"], wanted_E, rtol=0, atol=0.1)
        assert not torch.equal(found["logprobs"], wanted_E)
    found = of_two_ranks["bfloat16_compute"][0]
    name = "model.model.layers.0.mlp.up_proj.weight"
    before, after = found["before"][name], found["after"][name]
    assert before.dtype == after.dtype == torch.float32 and (before != after).all()
    assert (before.bfloat16() == after.bfloat16()).float().mean() > 0.9, "weights in bfloat16 would have stood still"


@pytest.mark.slow
def test_every_rank_refuses_weights_of_another_model(of_two_ranks: dict[str, list[Any]]):
    for message in of_two_ranks["wrong_weights"]:
        assert message.startswith("the checkpoint does not fit this model: 1 weights it does not have, 24 it trains")


def test_one_process_computes_in_bfloat16_and_keeps_float32_weights():
    module = policy(has_value_head=True)
    plain = full_weights(module)
    shard(module, ALONE, torch.bfloat16, offload=False)
    batch = pack(forest(1))
    outputs = module(batch, Layout.segments)
    assert {outputs.logprob_E.dtype, outputs.entropy_E.dtype, outputs.value_E.dtype} == {torch.float32}
    assert batch.old_logprob_E.dtype == torch.float64, "the pack went in as it was"
    rank_cases.loss_of(outputs, batch).backward()
    assert {weight.grad.dtype for weight in module.parameters()} == {torch.float32}
    gathered = full_weights(module)
    assert all(torch.equal(gathered[name], weight) for name, weight in plain.items())


def test_gathered_weights_are_a_copy():
    module = policy()
    weights = full_weights(module)
    with torch.no_grad():
        module.get_parameter("model.model.norm.weight").zero_()
    assert weights["model.model.norm.weight"].abs().sum() > 0


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    module = policy()
    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight)
    module.get_parameter("model.model.norm.weight").grad[3] = torch.inf
    assert clip_gradients(module.parameters(), 1.0) == torch.inf


@pytest.mark.gpu
def test_a_gpu_computes_with_weights_and_moments_that_wait_in_the_hosts_memory(tmp_path: Path):
    gpu, found = Ranks.alone(torch.device("cuda")), []
    batch = pack(packs_of(forest())[0]).to(gpu.device)
    for offload in (False, True):
        module = policy(has_value_head=True).to(gpu.device)
        shard(module, gpu, torch.bfloat16, offload=offload)
        optimizer = build_optimizer(module, LearnerConfig(), 1e-2, 1e-2)
        for _ in range(2):
            rank_cases.loss_of(module(batch, Layout.segments), batch).backward()
            clip_gradients(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        places = {weight.to_local().device.type for weight in module.parameters()}
        assert places == {"cpu" if offload else "cuda"}
        store(module, optimizer, tmp_path / str(offload), gpu)
        take(module, optimizer, tmp_path / str(offload), gpu)
        found.append(full_weights(module))
    assert_close(found[1], found[0], share=0.1)


def engine_weights(of_rank: list[Any], of: str = "pieces") -> dict[str, Tensor]:
    """What engines make of the pieces of these ranks."""
    parts = [
        [
            ([Rows(name, dtype, tuple(shape), start) for name, dtype, shape, start, _ in group],
             [array for *_, array in group])
            for group in found[of]
        ]
        for found in of_rank
    ]  # fmt: skip
    assert len(parts[0]) > 3, "there are several groups"
    return arrived(of_ranks(parts))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "module", "lora"),
    [
        ("published", policy, LoraConfig()),
        ("published_adapters", rank_cases.adapted_policy, LoraConfig(rank=4)),
        ("published_experts", lambda: TreePolicy(tiny("qwen3_moe"), 1.0), LoraConfig()),
    ],
    ids=["tied", "adapters", "experts"],
)
def test_the_pieces_of_two_ranks_make_the_weights_of_one_process(
    of_two_ranks: dict[str, list[Any]], case: str, module: Callable[[], TreePolicy], lora: LoraConfig
):
    alone = module()
    whole = plain_weights({name: each.detach() for name, each in alone.named_parameters()}, lora)
    wanted = revert_weight_conversion(base_causal_lm(alone.model), whole)
    of_all = engine_weights(of_two_ranks[case])
    of_one = [engine_weights([each], "whole") for each in of_two_ranks[case]]  # for engines that hear one rank alone
    for found in (of_all, *of_one):
        assert found.keys() == wanted.keys() and "lm_head.weight" not in found
        for name, weight in wanted.items():
            assert torch.equal(found[name], weight.to(torch.bfloat16)), name


@pytest.mark.slow
def test_no_rank_gives_more_than_its_share(of_two_ranks: dict[str, list[Any]]):
    for case in ("published", "published_experts"):
        sizes = [sum(len(row[-1]) for group in found["pieces"] for row in group) for found in of_two_ranks[case]]
        assert max(sizes) < 0.75 * sum(sizes), "experts are made whole a layer at a time, in turn"


def test_groups_keep_an_adapter_with_its_layer_and_hold_what_fits():
    layer = "model.base_model.model.model.layers.0.q_proj"
    adapted = [f"{layer}.base_layer.weight", f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"]
    sizes = {"embed": 50, **dict.fromkeys(adapted, 10), "norm": 1, "head": 200}
    assert groups_of(sizes, 85) == [[["embed"], adapted, ["norm"]], [["head"]]]
