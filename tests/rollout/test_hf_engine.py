from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from published import in_groups
from transformers import Qwen3Config, Qwen3ForCausalLM

from conf.schema import Config
from rollout.hf_engine import TransformersEngine, draw
from rollout.types import Sampled, Sampling

CONTEXT = [3, 1, 4, 1, 5]


def tiny(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"vocab_size": 11, "head_dim": 8, "intermediate_size": 32}
    return Qwen3ForCausalLM(Qwen3Config(initializer_range=0.5, **sizes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny(0).save_pretrained(folder)
    return folder


def sample_all(engine: TransformersEngine, requests: list[tuple[list[int], Sampling]]) -> list[Sampled]:
    async def together() -> list[Sampled]:
        return await asyncio.gather(*(engine.sample(*request) for request in requests))

    return asyncio.run(together())


def logprobs(model: Qwen3ForCausalLM, sampled: Sampled) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([sampled.context_ids + sampled.token_ids])).logits[0]
    start = len(sampled.context_ids) - 1
    return logits[start:-1].log_softmax(-1).gather(1, torch.tensor(sampled.token_ids)[:, None])[:, 0]


def test_recorded_logprobs_are_those_of_a_plain_forward(folder: Path):
    engine = TransformersEngine(Config(), str(folder))
    requests = [(CONTEXT[: 1 + i], Sampling(max_tokens=6, seed=i)) for i in range(5)]
    for sampled in sample_all(engine, requests):
        expected = logprobs(tiny(0).eval(), sampled)
        torch.testing.assert_close(torch.tensor(sampled.logprobs), expected, rtol=1e-4, atol=1e-5)


def test_tokens_do_not_depend_on_the_batch_a_request_was_in(folder: Path):
    engine = TransformersEngine(Config(), str(folder))
    requests = [(CONTEXT[: 1 + i], Sampling(max_tokens=6, seed=i)) for i in range(5)]
    together = sample_all(engine, requests)
    alone = [sample_all(engine, [request])[0] for request in requests]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]


def test_a_request_that_nobody_waits_for_any_more_is_not_sampled_on(folder: Path):
    engine = TransformersEngine(Config(), str(folder))

    async def cut_short() -> Sampled:
        endless = asyncio.create_task(engine.sample(CONTEXT, Sampling(max_tokens=100_000, seed=0)))
        await asyncio.sleep(0.2)
        endless.cancel()
        return await engine.sample(CONTEXT, Sampling(max_tokens=2, seed=1))

    sampled = asyncio.run(asyncio.wait_for(cut_short(), 30))  # 100,000 tokens take minutes
    assert len(sampled.token_ids) == 2


def test_the_stop_token_ends_a_step_and_is_kept(folder: Path):
    engine = TransformersEngine(Config(), str(folder))
    (free,) = sample_all(engine, [(CONTEXT, Sampling(max_tokens=6, seed=1))])
    (cut,) = sample_all(engine, [(CONTEXT, Sampling(max_tokens=6, seed=1, stop_token_ids=(free.token_ids[2],)))])
    first = free.token_ids.index(free.token_ids[2])
    assert cut.stopped and cut.token_ids == free.token_ids[: first + 1]
    assert not free.stopped and len(free.token_ids) == 6


def test_new_weights_take_effect_and_are_numbered(folder: Path):
    engine = TransformersEngine(Config(), str(folder))
    new = {name: value.detach() for name, value in tiny(1).named_parameters()}
    body, head = ({name: new[name] for name in new if ("lm_head" in name) == is_head} for is_head in (False, True))

    async def turn() -> None:
        await engine.sleep()
        await engine.load_weights(in_groups(body, head), 4)

    asyncio.run(turn())
    (sampled,) = sample_all(engine, [(CONTEXT, Sampling(max_tokens=6, seed=0))])
    assert sampled.version == 4
    torch.testing.assert_close(torch.tensor(sampled.logprobs), logprobs(tiny(1).eval(), sampled), rtol=1e-4, atol=1e-5)


def test_top_p_draws_from_the_smallest_set_with_that_mass():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    drawn = {draw(logits, Sampling(max_tokens=1, top_p=0.7), torch.Generator().manual_seed(i)) for i in range(50)}
    # 0.5 alone is not 0.7, so {0.5, 0.3} it is: renormalised to 5/8 and 3/8
    assert {token for token, _ in drawn} == {0, 1}
    assert {round(logprob, 4) for _, logprob in drawn} == {-0.47, -0.9808}


def test_temperature_zero_takes_the_likeliest_token():
    assert draw(torch.tensor([0.1, 2.0, 0.3]), Sampling(max_tokens=1, temperature=0), None)[0] == 1
