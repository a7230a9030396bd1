"""The parts of a dry run that start nothing: smaller settings, a stand-in, made-up arguments, the plan."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from chatml import chatml_tokenizer, encode
from transformers import AutoConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from conf.checks import problems
from conf.compose import compose
from conf.errors import ConfigError
from conf.keys import group_choices
from conf.schema import Config, EngineKind, Level, ToolFormat
from rl.dry_run.check import last_words, longest_turn
from rl.dry_run.found import DryRun
from rl.dry_run.machines import Machines
from rl.dry_run.memory import Part
from rl.dry_run.plan import as_json, memory_lines, shown_bytes, tokens_of_step
from rl.dry_run.scores import step_score
from rl.dry_run.settings import reduced, replaced_settings, unexercised
from rl.dry_run.stand_in import Shown, call_text, made_up_arguments, small_config, teach, write_stand_in
from rl.placement import plan
from rollout.tools import load_tools
from rollout.turns import parse_turn

CONFIGS = {
    "qwen3": Qwen3Config(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8),
    "llama": LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
    "mixture": Qwen3MoeConfig(num_hidden_layers=48, num_experts=128, num_experts_per_tok=8),
}


def dry(cfg: Config, **others) -> Config:
    settings = {"model": "stand_in", "turn_tokens": 48, "engine": EngineKind.transformers, "stands_in": {}} | others
    return reduced(cfg, Path("/scratch"), **settings)


@pytest.mark.parametrize("choice", group_choices()["rollout"])
def test_the_smaller_trees_of_every_expander_can_be_grown(choice: str):
    cfg = compose(["experiment=hop_search", f"rollout={choice}", "rollout.judge=progress"])
    its = dry(cfg).rollout
    assert its.expander is cfg.rollout.expander and its.num_leaves <= 4 and its.prompts_per_step <= 4
    wrong = [each.text for each in problems(dry(cfg)) if each.fatal and "rollout." in each.text]
    assert [text for text in wrong if "max_steps" not in text] == []


def test_the_dry_run_stays_off_the_cluster_the_tracker_and_the_users_folders():
    cfg = compose(["experiment=hop_search", "cluster.address=ray://far:1", "tracker=online", "run.dir=mine"])
    its = dry(cfg)
    assert its.cluster.address == "" and its.tracker.mode.value == "disabled" and its.run.dir == "/scratch/run"
    assert its.task.corpus.cache_dir.startswith("/scratch") and its.task.textworld.cache_dir.startswith("/scratch")


def test_what_is_smaller_is_told_by_key_with_both_values():
    cfg = compose(["experiment=hop_search", "rollout.num_leaves=16"])
    found = replaced_settings(cfg, dry(cfg))
    assert found["rollout.num_leaves"] == ("16", "4") and found["run.num_steps"] == ("500", "2")
    assert "run.dir" not in found and "seed" not in found


def test_sources_that_ask_a_model_get_made_up_scores_and_their_settings_are_not_expected_to_be_read():
    judge = "rewards.sources.judge={fn: rewards.sources.judge:Principles, model: m, weight: 0.5, signal: step}"
    cfg = compose(["experiment=hop_search", judge, "rewards.models.m={path: m, url: 'http://127.0.0.1:1/v1'}"])
    its = dry(cfg, stands_in={"judge": Level.step})
    source = its.rewards.sources["judge"]
    assert source.fn == "rl.dry_run.scores:step_score" and (source.weight, source.signal) == (0.5, "step")
    assert source.model == "" and its.rewards.sources["answer"] == cfg.rewards.sources["answer"]
    left_out = unexercised(cfg, its, {"judge": Level.step}, {})
    assert "rewards.sources.judge." in left_out and "rewards.models.m." in left_out
    assert "rewards.models.m." not in unexercised(cfg, its, {}, {"m": True})


def test_made_up_scores_hang_on_the_text_alone():
    class Step:
        action_text = "search"

    assert step_score(Step()) == step_score(Step()) and 0 <= step_score(Step()) <= 1
    assert set(step_score(Step(), ["a", "b"])) == {"a", "b"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stand_in_is_of_the_same_kind_with_the_same_vocabulary(name: str, tmp_path: Path):
    config, tokenizer = CONFIGS[name], chatml_tokenizer()
    config.vocab_size = len(tokenizer)
    config.save_pretrained(tmp_path / "real")
    tokenizer.save_pretrained(tmp_path / "real")
    model = write_stand_in(tmp_path / "real", tmp_path / "small", seed=0)
    written = AutoConfig.from_pretrained(tmp_path / "small")
    assert type(written) is type(config) and written.vocab_size == config.vocab_size
    assert written.num_hidden_layers == 2 and config.num_hidden_layers > 2  # what was given is as it was
    assert sum(each.numel() for each in model.parameters()) < 1_000_000
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()


def test_grouped_heads_stay_grouped_and_single_ones_single():
    assert small_config(LlamaConfig(num_attention_heads=32, num_key_value_heads=8)).num_key_value_heads == 1
    assert small_config(LlamaConfig(num_attention_heads=32, num_key_value_heads=32)).num_key_value_heads == 2


def test_a_folder_without_a_known_model_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ConfigError, match="no tiny stand-in can be made"):
        write_stand_in(tmp_path, tmp_path / "small", seed=0)


def test_teaching_makes_the_stand_in_say_what_it_was_shown(tmp_path: Path):
    tokenizer = chatml_tokenizer()
    config = Qwen3Config(vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2)
    config.save_pretrained(tmp_path / "real")
    tokenizer.save_pretrained(tmp_path / "real")
    model = write_stand_in(tmp_path / "real", tmp_path / "small", seed=0)
    said = encode(tokenizer, "yes")
    shown = [Shown([*encode(tokenizer, text), *said], [False] * len(text) + [True] * 3) for text in ("a?", "b?")]
    assert teach(model, shown, seed=0) < 0.3
    out = model.generate(torch.tensor([encode(tokenizer, "a?")]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out[0, 2:].tolist() == said
    assert longest_turn(shown) == 3


TOOL = '''
def look(place: str, depth: int, wide: bool = False, kinds: list[str] = []) -> str:
    """Look somewhere.

    Args:
        place: Where.
        depth: How deep.
        wide: All around.
        kinds: Of what.
    """
    return f"{place} {depth + 1}"
'''


@pytest.mark.parametrize("tool_format", ToolFormat)
def test_made_up_calls_are_read_and_answered(tool_format: ToolFormat, tmp_path: Path):
    (tmp_path / "my_tool.py").write_text(TOOL)
    tools = load_tools([f"{tmp_path / 'my_tool.py'}:look"], compose([]).task)
    arguments = made_up_arguments(tools["look"], "Where is it?")
    assert arguments["depth"] == 1 and arguments["place"] == "Where is it?"
    if tool_format is not ToolFormat.words:  # where an argument is one word
        (call,) = parse_turn(call_text(tools["look"], arguments, tool_format), tool_format, tools).calls
        assert call.arguments == arguments
    assert asyncio.run(tools["look"].call(arguments, {}, 10.0)).text == "Where is it? 2"


def test_the_run_is_planned_for_the_machines_that_are_named():
    cfg = compose(["experiment=hop_search", "learner.num_processes=2", "rollout.num_workers=6"])
    rows = plan(cfg, Machines(num=2, gpus=4, cores=8).nodes()).table().splitlines()
    assert [row for row in rows if row.startswith("learner")] and all(
        "machine 1 (here)" in row for row in rows if row.startswith("learner")
    )
    assert sum("machine 2" in row for row in rows if row.startswith("rollout worker")) >= 3  # 2 of 4 GPUs are left on 1


def test_tokens_of_a_step_are_those_of_its_longest_trajectories():
    cfg = compose(["rollout=chains", "rollout.num_leaves=3", "rollout.max_steps=2", "rollout.prompts_per_step=5"])
    found = tokens_of_step(cfg.rollout, prompt_tokens=100, observation_tokens=7)
    turn = cfg.rollout.max_turn_tokens
    assert found["trajectories"] == 15 and found["generated"] == found["trained"] == 5 * 3 * 2 * turn
    assert found["prefilled"] == 5 * (100 + 3 * 7)  # the prompt once, and the observation between the two steps
    mcts = compose(["rollout=mcts", "rollout.judge=progress", "rollout.search_simulations=10", "rollout.max_forks=3"])
    assert tokens_of_step(mcts.rollout, 100, 7) == {"generated": 16 * 10 * 3 * turn}


def test_sizes_are_shown_in_units_that_can_be_read():
    assert [shown_bytes(size) for size in (12, 2048, 3 * 2**20, 1.5 * 2**30)] == ["12 B", "2 KiB", "3 MiB", "1.5 GiB"]
    line = memory_lines([Part("engine", 2, {"weights": 2**30, "cache": 2**30, "critic": 0}, "so many fit")])[0]
    assert line == "engine x 2: 2 GiB each (weights 1 GiB, cache 1 GiB); so many fit"


def test_an_error_fails_the_check_and_a_warning_does_not():
    found = DryRun()
    found.warn("look at this")
    assert found.passed and as_json(found)["passed"]
    found.fail("no", is_setting=True)
    assert not found.passed and found.is_refused
    assert [each["weight"] for each in as_json(found)["findings"]] == ["warning", "error"]


def test_the_last_error_of_a_log_is_told_before_the_log_is_removed(tmp_path: Path):
    (tmp_path / "learner.log").write_text("started\nValueError: first\nRuntimeError: out of memory\nbye\n")
    (tmp_path / "rollout_worker_0.log").write_text("all well\n")
    assert last_words(tmp_path) == ["learner.log ends with: RuntimeError: out of memory"]
