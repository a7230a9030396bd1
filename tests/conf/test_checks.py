"""Each rule refuses what cannot run, says why and what to do, and lets the shipped experiments pass."""

import copy
import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from conf.check_machine import num_cores, num_gpus
from conf.checks import ABOVE_ZERO, AT_LEAST_ONE, NOT_NEGATIVE, SHARES, problems, require_runnable
from conf.compose import compose
from conf.errors import ConfigError
from conf.keys import CONFIG_DIR, all_keys, group_choices
from conf.schema import (
    Aggregation,
    Config,
    Correction,
    CreditConfig,
    CriticKind,
    EngineKind,
    ExpanderKind,
    GaeLevel,
    LossConfig,
    LossKind,
    Normalizer,
    OldLogprobs,
    Scope,
    SignalUse,
    SourceConfig,
    TermConfig,
    TrackerMode,
    WeightPath,
)

Change = Callable[..., Config]


@pytest.fixture(scope="module")
def composed() -> Config:
    # One worker, so that the rules about cores pass on the smallest machine.
    return compose(["experiment=hop_search", "rollout.num_workers=1"])


@pytest.fixture
def demo(composed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Change:
    """The demo's configuration with some keys changed, in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def changed(values: dict[str, Any] | None = None) -> Config:
        cfg = copy.deepcopy(composed)
        for key, value in (values or {}).items():
            *parents, last = key.split(".")
            record: Any = cfg
            for part in parents:
                record = record[part] if isinstance(record, dict) else getattr(record, part)
            if isinstance(record, dict):
                record[last] = value
            else:
                setattr(record, last, value)
        return cfg

    return changed


def texts(cfg: Config, *, fatal: bool = True) -> list[str]:
    return [problem.text for problem in problems(cfg) if problem.fatal is fatal]


def only(cfg: Config, *, fatal: bool = True) -> str:
    found = texts(cfg, fatal=fatal)
    assert len(found) == 1, found
    return found[0]


# Together


SHIPPED = ["hop_search", "hop_search_grpo", "hop_search_long", "hop_search_long_steps", "hop_search_long_grpo"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiments_have_no_problem_and_no_warning(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert problems(compose([f"experiment={name}", "rollout.num_workers=1"])) == []


def test_gsm8k_only_misses_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").touch()
    overrides = ["experiment=gsm8k", "rollout.num_workers=1"]
    assert [text.partition(" ")[0] for text in texts(compose(overrides))] == ["task.train.path", "task.eval.path"]
    assert problems(compose([*overrides, "task.train.path=train.jsonl", "task.eval.path=test.jsonl"])) == []


def test_fatal_problems_are_raised_together_and_numbered(demo: Change):
    with pytest.raises(ConfigError) as caught:
        require_runnable(demo({"rollout.top_p": 0.9, "learner.mini_batches": 99, "model.dtype": "float8"}))
    text = str(caught.value)
    assert text.startswith("3 settings cannot be used:\n  1. ")
    assert "learner.mini_batches=99" in text and "rollout.top_p=0.9" in text and 'model.dtype="float8"' in text


def test_warnings_are_logged_and_stop_nothing(demo: Change, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        require_runnable(demo({"run.resume": True}))
    assert caplog.messages == [
        "run.resume=true, but runs/hop_search-seed0 holds no checkpoint: the run starts from the beginning. "
        "Check run.name, run.dir and seed if you meant to continue another one."
    ]


def test_warnings_go_where_the_caller_wants_them(demo: Change):
    told: list[str] = []
    require_runnable(demo({"run.resume": True}), warn=told.append)
    assert len(told) == 1


# Numbers


def test_every_number_with_a_range_is_a_setting():
    names = {key.name for key in all_keys()}
    assert {*AT_LEAST_ONE, *ABOVE_ZERO, *NOT_NEGATIVE, *SHARES} <= names


@pytest.mark.parametrize("key", AT_LEAST_ONE)
def test_counts_are_at_least_one(demo: Change, key: str):
    assert f"{key}=0 cannot be: it must be 1 or more." in texts(demo({key: 0}))


@pytest.mark.parametrize("key", ["learner.learning_rate", "rollout.temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_rates_are_above_zero(demo: Change, key: str, value: float):
    assert f"{key}={value} cannot be: it must be above 0." in texts(demo({key: value}))


def test_share_above_one_is_refused(demo: Change):
    assert only(demo({"rewards.max_failed_share": 1.5})) == (
        "rewards.max_failed_share=1.5 cannot be: it must be a share of at most 1."
    )


def test_source_needs_time(demo: Change):
    assert "leaves no time to score" in only(demo({"rewards.sources.answer.timeout_s": -1.0}))


def test_empty_run_folder_is_refused(demo: Change):
    assert "Use e.g. run.dir=runs/mine." in only(demo({"run.dir": ""}))


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("credit.terms.fork.ddof", 2, "ddof=2 must be 1 (unbiased) or 0"),
        ("credit.terms.fork.gamma", 1.5, "gamma=1.5 must lie in [0, 1]"),
        ("credit.terms.fork.eps", -0.1, "eps=-0.1 must be 0 or more"),
        ("learner.betas", [0.9], "learner.betas=[0.9] must be two numbers in [0, 1)"),
        ("learner.betas", [0.9, 1.0], "learner.betas=[0.9, 1.0] must be two numbers in [0, 1)"),
        ("loss.clip_low", 1.0, "loss.clip_low=1.0 puts the lower bound of the ratio"),
        ("loss.dual_clip", 1.2, "loss.dual_clip=1.2 must lie above the usual clip 1 + loss.clip_high=1.28"),
        ("rollout.temperature", 10.0, "rollout.temperature=10.0 is above 5.0"),
        ("model.tiny.num_heads", 5, "Use model.tiny.num_heads=4."),
    ],
)
def test_impossible_number_is_named(demo: Change, key: str, value: Any, part: str):
    assert part in only(demo({key: value}))


# Trees and batches


def test_more_leaves_kept_than_grown(demo: Change):
    # One round of two expansions: 1 + 1 * 2 = 3 trajectories a tree.
    cfg = demo({"rollout.expander": ExpanderKind.random_expand, "rollout.keep_leaves": 4})
    assert "rollout.keep_leaves=4, but a tree grows 3 trajectories only" in only(cfg)


def test_all_leaves_may_be_kept(demo: Change):
    assert texts(demo({"rollout.expander": ExpanderKind.random_expand, "rollout.keep_leaves": 3})) == []


@pytest.mark.parametrize(
    ("forks", "part"), [(1, "these are chains"), (9, "more continuations than the rollout.num_leaves=8")]
)
def test_forks_that_cannot_be_are_warned_of(demo: Change, forks: int, part: str):
    assert part in only(demo({"rollout.max_forks": forks}), fatal=False)


def test_mini_batches_need_a_prompt_each(demo: Change):
    text = only(demo({"rollout.prompts_per_step": 3, "learner.mini_batches": 4}))
    assert "Use learner.mini_batches=3 or fewer." in text


def test_nucleus_sampling_is_refused_with_the_reason(demo: Change):
    assert "its log-probs would not match those the learner computes" in only(demo({"rollout.top_p": 0.95}))


def test_context_holds_a_prompt_beside_a_turn(demo: Change):
    text = only(demo({"rollout.max_turn_tokens": 512}))
    assert text.startswith("rollout.max_context_tokens=512 leaves no room for a prompt beside one turn")


def test_context_beyond_the_models_positions(demo: Change):
    text = only(demo({"rollout.max_context_tokens": 600}))
    assert "more than the 512 positions of the model" in text
    assert "model.tiny.max_position_embeddings=600" in text


def test_hops_that_cannot_be_walked(demo: Change):
    assert "such a question can never be answered" in only(demo({"rollout.max_steps": 3}))


def test_spare_calls_that_cannot_be_used(demo: Change):
    # 3 hops + 2 spare calls + the answer = 6 steps.
    text = only(demo({"rollout.max_steps": 5}), fatal=False)
    assert "are 6 steps: some of the 2 spare calls cannot be used. Use rollout.max_steps=7." in text


def test_hops_must_be_positive(demo: Change):
    assert "task.hop_search.hops=[] must name chain lengths" in only(demo({"task.hop_search.hops": []}))


def test_tools_of_the_embedded_task_must_all_be_there(demo: Change):
    assert "task.tools names 1 tools, but task.hop_search.num_tools=4" in only(demo({"task.tools": ["a.py:b"]}))


# The machine


def test_more_workers_than_cores(demo: Change):
    cores = num_cores()
    text = only(demo({"rollout.num_workers": cores + 1}))
    assert text.startswith(f"rollout.num_workers={cores + 1}, but {cores} core")
    assert text.endswith(f"Use rollout.num_workers={cores}.")


def test_cores_are_those_offered_to_ray(demo: Change):
    assert "but 1 core is there" in only(demo({"rollout.num_workers": 2, "cluster.num_cpus": 1}))


def test_cores_that_are_not_there_cannot_be_offered(demo: Change):
    assert "offers Ray more cores than the" in only(demo({"cluster.num_cpus": num_cores() + 1}))


def test_changes_alone_are_sent_by_broadcast_and_by_nothing_else(demo: Change):
    text = only(demo({"cluster.weights_delta": True}))
    assert "cluster.weights_delta=true with cluster.weights=object_store: changes alone are sent by broadcast" in text
    assert texts(demo({"cluster.weights_delta": True, "cluster.weights": WeightPath.broadcast})) == []


def test_a_running_cluster_is_not_judged_by_this_machine(demo: Change):
    assert texts(demo({"rollout.num_workers": 10_000, "cluster.address": "auto"})) == []


def test_tensor_parallel_engines_need_gpus_of_their_own(demo: Change, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert num_gpus() == 0
    text = only(demo({"rollout.tensor_parallel_size": 2}))
    assert "need 3 GPUs, and there are 0" in text


def test_missing_vllm_names_both_ways_out(demo: Change, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    text = only(demo())
    assert "make install" in text and "rollout.engine=transformers" in text
    assert texts(demo({"rollout.engine": EngineKind.transformers})) == []


def test_cache_too_small_for_one_path(demo: Change, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # 2 (keys, values) * 60 layers * 2 heads * 32 * 4 bytes = 30720 bytes a token; 512 tokens * 1.5 = 22.5 MiB.
    text = only(demo({"model.tiny.num_layers": 60, "rollout.kv_cache_mib": 20}))
    assert "(30720 bytes a token)" in text and "Use rollout.kv_cache_mib=23 or more" in text


# Model, data, tracker


def checkpoint(folder: Path, **config: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_model_folder_without_config(demo: Change, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert "is a folder without config.json" in only(demo({"model.path": str(tmp_path / "empty")}))


def test_model_folder_with_config_is_taken_and_its_positions_count(demo: Change, tmp_path: Path):
    path = checkpoint(tmp_path / "model", max_position_embeddings=256)
    assert "more than the 256 positions of the model" in only(demo({"model.path": path}))
    assert texts(demo({"model.path": path, "rollout.max_context_tokens": 256})) == []


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "../model", "~/model", "a/b/c"])
def test_model_path_that_is_nowhere(demo: Change, path: str):
    assert only(demo({"model.path": path})).startswith(f'model.path="{path}" does not exist, and it is no hub name')


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B"])
def test_hub_names_are_left_to_the_hub(demo: Change, name: str):
    assert texts(demo({"model.path": name})) == []


def test_unknown_dtype_names_those_there_are(demo: Change):
    assert only(demo({"model.dtype": "bfloat"})) == (
        'model.dtype="bfloat" is none of float32, bfloat16, float16. Did you mean "bfloat16"?'
    )


def test_tiny_model_speaks_no_other_task(demo: Change, tmp_path: Path):
    (tmp_path / "q.jsonl").touch()
    cfg = demo({"task.generator": "", "task.name": "mine", "task.train.path": "q.jsonl", "task.eval.path": "q.jsonl"})
    assert 'the task is "mine"' in only(cfg)


def with_data(path: str, split: str = "") -> dict[str, Any]:
    return {
        "model.path": "gpt2",
        "task.generator": "",
        "task.train.path": path,
        "task.train.split": split,
        "task.eval.path": "openai/gsm8k:main",
        "task.eval.split": "test",
    }


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("", "task.train.path is empty, and the task makes no questions of its own"),
        ("missing.jsonl", 'task.train.path="missing.jsonl": there is no such file'),
        ("table.csv", "is neither a .jsonl, .json, .parquet file nor the name of a data set"),
        ("openai/gsm8k", "Set task.train.split=train."),
    ],
)
def test_data_that_cannot_be_read(demo: Change, tmp_path: Path, path: str, part: str):
    (tmp_path / "table.csv").touch()
    assert part in only(demo(with_data(path)))


def test_data_set_with_a_configuration_and_a_split_is_taken(demo: Change):
    assert texts(demo(with_data("openai/gsm8k:main", "train"))) == []


def test_unknown_generator_is_named(demo: Change):
    assert 'Did you mean "hop_search"?' in "".join(texts(demo({"task.generator": "hop_serch"})))


@pytest.fixture
def no_wandb_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_online_tracking_without_a_key(demo: Change, no_wandb_key: Path):
    text = only(demo({"tracker.mode": TrackerMode.online}))
    assert "WANDB_API_KEY" in text and "`wandb login`" in text


def test_online_tracking_with_a_key_in_netrc(demo: Change, no_wandb_key: Path):
    no_wandb_key.write_text("machine api.wandb.ai login user password key\n")
    no_wandb_key.chmod(0o600)
    assert texts(demo({"tracker.mode": TrackerMode.online})) == []


def test_online_tracking_with_a_key_in_the_environment(
    demo: Change, no_wandb_key: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert texts(demo({"tracker.mode": TrackerMode.online})) == []


# The run folder


def test_folder_that_holds_a_run_is_not_taken_again(demo: Change):
    folder = Path("runs/hop_search-seed0")
    folder.mkdir(parents=True)
    assert texts(demo()) == []
    (folder / "metrics.jsonl").touch()
    assert "Use run.resume=true to continue it, or another run.name" in only(demo())


def test_resuming_a_run_with_a_checkpoint_is_quiet(demo: Change):
    Path("runs/hop_search-seed0/checkpoints/step_000020").mkdir(parents=True)
    assert problems(demo({"run.resume": True})) == []


def test_run_folder_that_is_a_file(demo: Change):
    Path("taken").touch()
    assert "run.dir=taken is a file" in only(demo({"run.dir": "taken"}))


# Rewards and credit


def test_term_of_a_signal_that_no_source_feeds_names_the_nearest(demo: Change):
    term = demo().credit.terms["fork"]
    cfg = demo({"credit.terms.fork.signals": {"outcom": term.signals["outcome"]}})
    text = only(cfg)
    assert text.startswith('credit.terms.fork.signals names "outcom", which no source feeds')
    assert text.endswith('Fed are: outcome, step. Did you mean "outcome"?')


def test_signal_whose_only_source_has_weight_zero(demo: Change):
    text = texts(demo({"rewards.sources.progress.weight": 0.0}))[0]
    assert "Only progress, tool_success could feed it, with weight 0: set rewards.sources.progress.weight=1." in text


def test_source_without_a_term_names_both_ways_out(demo: Change):
    source = SourceConfig(fn="rewards.sources.hop_search:progress", signal="other")
    text = only(demo({"rewards.sources.mine": source}), fatal=False)
    assert text.startswith('rewards.sources.mine feeds "other", which no term of credit=tree_step reads')
    assert "set rewards.sources.mine.weight=0" in text


def test_level_of_a_users_function_is_read_from_its_arguments(demo: Change, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "def of_step(step): return 1.0\n\n\nclass OfFork:\n    def __call__(self, siblings): return 1.0\n\n\n"
        "def of_trajectory(trajectory): return 1.0\n"
    )
    terms = {"only": TermConfig(signals={"outcome": demo().credit.terms["fork"].signals["outcome"]})}
    warned = {}
    for name in ("of_step", "OfFork", "of_trajectory"):
        cfg = demo(
            {
                "credit.terms": terms,
                "rewards.sources.progress.weight": 0.0,
                "rewards.sources.mine": SourceConfig(fn=f"{tmp_path}/mine.py:{name}"),
            }
        )
        assert texts(cfg) == []
        warned[name] = [text for text in texts(cfg, fatal=False) if 'feeds "step"' in text]
    assert [len(found) for found in warned.values()] == [1, 1, 0]


def test_source_that_cannot_be_loaded_is_named_by_its_key(demo: Change):
    assert only(demo({"rewards.sources.mine": SourceConfig(fn="missing.py:f")})).startswith(
        "rewards.sources.mine.fn: there is no file"
    )


@pytest.mark.parametrize(
    ("source", "part"), [(SourceConfig(), "neither fn nor"), (SourceConfig(fn="a:b", target="a.b"), "both")]
)
def test_source_names_exactly_one_function(demo: Change, source: SourceConfig, part: str):
    assert part in only(demo({"rewards.sources.mine": source}))


def test_unknown_level_of_a_source(demo: Change):
    assert 'level="stepp" is no level' in texts(demo({"rewards.sources.progress.level": "stepp"}))[0]


def test_secret_in_a_sources_arguments(demo: Change):
    cfg = demo({"rewards.sources.answer.args": {"api_key": "sk-1", "max_tokens": 5}})
    text = only(cfg)
    assert text.startswith("rewards.sources.answer.args.api_key looks like a secret")
    assert "sk-1" not in text


def test_success_needs_a_source_of_trajectories(demo: Change):
    cfg = demo()
    del cfg.rewards.sources["answer"]
    assert any("held-out success would be unknown" in text for text in texts(cfg))


def test_no_source_at_all(demo: Change):
    assert texts(demo({"rewards.sources": {}}))[0].startswith("rewards.sources is empty")


def test_no_term_of_any_weight(demo: Change):
    assert "every advantage would be 0" in only(demo({"credit.terms": {}}))


def test_term_without_signals(demo: Change):
    assert "credit.terms.step.signals is empty" in only(demo({"credit.terms.step.signals": {}}))


def test_trajectory_term_of_a_step_signal(demo: Change):
    step = demo().credit.terms["step"].signals["step"]
    text = only(demo({"credit.terms.trajectory.signals": {"step": step}}))
    assert 'names "step", which scores steps (progress), but credit.terms.trajectory.level=trajectory' in text


def test_sibling_term_on_chains_compares_first_steps_only(demo: Change):
    text = only(demo({"rollout.expander": ExpanderKind.chains}), fatal=False)
    assert "the term compares first steps and no others" in text


def test_tree_scope_needs_several_trees(demo: Change):
    text = only(demo({"credit.terms.trajectory.scope": Scope.tree}), fatal=False)
    assert "a prompt has one tree, so the scope is the same as prompt" in text


def test_zscore_of_two_siblings_forgets_the_size(demo: Change):
    # Of two values x and -x the unbiased deviation is x * sqrt(2), so each z-score is +-1 / sqrt(2) = +-0.71.
    text = only(demo({"credit.terms.fork.normalizer": Normalizer.zscore}), fatal=False)
    assert "+-0.71" in text and "credit.terms.fork.normalizer=center" in text


def test_tool_success_paid_alone_is_warned_of(demo: Change):
    cfg = demo({"rewards.sources.progress.weight": 0.0, "rewards.sources.tool_success.weight": 1.0})
    assert "was hacked within 40k tokens" in only(cfg, fatal=False)


def test_one_trajectory_has_nothing_to_be_compared_with(demo: Change):
    cfg = demo({"rollout.num_leaves": 1})
    assert texts(cfg) == []  # the term "step" still compares the steps of that one trajectory
    del cfg.credit.terms["step"]
    assert only(cfg).startswith("rollout.num_leaves=1 gives each prompt one trajectory")


# A critic, and the parts of a loss


def with_gae(**values: Any) -> dict[str, Any]:
    """GAE with a critic, both as their groups set them."""
    signals = {"outcome": SignalUse(), "step": SignalUse()}
    gae = {"credit.gae.level": GaeLevel.token, "credit.gae.signals": signals, "credit.terms": {}}
    return {**gae, "loss.critic.kind": CriticKind.value_head, "loss.clip_high": 0.2, **values}


def test_gae_with_a_critic_needs_no_terms(demo: Change):
    assert problems(demo(with_gae())) == []
    assert texts(demo(with_gae(**{"rollout.num_leaves": 1, "rollout.expander": ExpanderKind.chains}))) == []


def test_gae_without_a_critic(demo: Change):
    text = only(demo(with_gae(**{"loss.critic.kind": CriticKind.none})))
    assert text.startswith("credit.gae.level=token with loss.critic.kind=none: there are no values")
    assert "Use loss=ppo" in text


def test_critic_that_no_credit_uses(demo: Change):
    text = only(demo({"loss.critic.kind": CriticKind.model}))
    assert text.startswith("loss.critic.kind=model with credit.gae.level=off: a critic would be trained and no credit")
    assert "Use credit=gae, or loss.critic.kind=none." in text


def test_gae_without_signals(demo: Change):
    sources = {name: replace(source, weight=0.0) for name, source in demo().rewards.sources.items()}
    text = only(demo(with_gae(**{"credit.gae.signals": {}, "rewards.sources": sources})))
    assert text.startswith("credit.gae.signals is empty with credit.gae.level=token: nothing would ever be earned")


def test_signal_of_gae_that_no_source_feeds(demo: Change):
    text = texts(demo(with_gae(**{"credit.gae.signals": {"outcom": SignalUse()}})))[0]
    assert text.startswith('credit.gae.signals names "outcom", which no source feeds')
    assert text.endswith('Did you mean "outcome"?')


def test_term_with_the_name_of_the_critics_part(demo: Change):
    term = demo().credit.terms["trajectory"]
    assert "credit.terms.gae has the name under which records show" in only(
        demo(with_gae(**{"credit.terms": {"gae": term}}))
    )


def test_signals_that_the_learner_measures_need_no_source(demo: Change):
    kl = SignalUse(scale=-0.05)
    assert texts(demo({"credit.terms.trajectory.signals": {"outcome": SignalUse(), "path_kl": kl}})) == []
    assert texts(demo({"credit.terms.step.signals": {"step": SignalUse(), "kl": kl}})) == []


def test_kl_of_a_step_is_no_value_of_a_trajectory(demo: Change):
    text = only(demo({"credit.terms.trajectory.signals": {"outcome": SignalUse(), "kl": SignalUse()}}))
    assert text.startswith('credit.terms.trajectory.signals names "kl", which scores steps (measured by the learner)')
    assert "Use path_kl, its sum over the trajectory" in text


@pytest.mark.parametrize("signal", ["kl", "path_kl"])
def test_source_that_takes_the_name_of_what_is_measured(demo: Change, signal: str):
    text = only(demo({"rewards.sources.tool_success.signal": signal}))
    assert text.startswith(f'rewards.sources.tool_success.signal="{signal}" is the name of what the learner measures')


def test_one_trajectory_can_be_compared_with_other_prompts(demo: Change):
    cfg = demo({"rollout.num_leaves": 1, "credit.terms.trajectory.scope": Scope.batch})
    del cfg.credit.terms["step"]
    assert texts(cfg) == []


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (
            {"loss.kind": LossKind.gspo, "loss.clip_low": 3e-4, "loss.clip_high": 4e-4},
            "loss.aggregation=token_mean with loss.kind=gspo: a trajectory's one ratio would count once for each",
        ),
        ({"loss.kind": LossKind.custom}, "loss.kind=custom, and loss.fn names no function to compute it."),
        ({"loss.fn": "my_loss.py:loss"}, 'loss.fn="my_loss.py:loss" with loss.kind=ppo_clip is never called.'),
        (
            {"loss.correction": Correction.token_mask},
            "loss.correction=token_mask with loss.old_logprobs=engine: the ratio of the loss is taken against the",
        ),
        (
            {
                "loss.correction": Correction.token_truncate,
                "loss.old_logprobs": OldLogprobs.recompute,
                "loss.correction_max": 0.5,
            },
            "loss.correction_min=0.0 and loss.correction_max=0.5 leave out 1, the weight of a token on which engine",
        ),
    ],
)
def test_parts_of_a_loss_that_do_not_fit(demo: Change, values: dict[str, Any], part: str):
    assert only(demo(values)).startswith(part)


def test_correction_against_the_learners_own_logprobs_is_taken(demo: Change):
    values = {"loss.correction": Correction.sequence_mask, "loss.old_logprobs": OldLogprobs.recompute}
    assert problems(demo(values)) == []


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (
            {"loss.kind": LossKind.reinforce, "loss.dual_clip": 3.0},
            "loss.dual_clip=3.0 changes nothing: loss.kind=rein",
        ),
        (
            {"loss.horizon_tokens": 64},
            "loss.horizon_tokens=64 changes nothing: loss.aggregation=token_mean divides by no",
        ),
        ({"loss.critic.path": "gpt2"}, 'loss.critic.path="gpt2" changes nothing: loss.critic.kind=none loads no model'),
        (
            {"credit.gae.signals": {"outcome": None}},
            "credit.gae.signals={outcome} changes nothing: credit.gae.level=off",
        ),
        (with_gae(**{"credit.whiten": True}), "credit.whiten=true changes nothing: credit.terms is empty"),
    ],
)
def test_setting_that_another_one_turns_off_is_warned_of(demo: Change, values: dict[str, Any], part: str):
    assert only(demo(values), fatal=False).startswith(part)


def test_clip_of_tokens_is_far_too_wide_for_a_trajectorys_ratio(demo: Change):
    values = {"loss.kind": LossKind.gspo, "loss.aggregation": Aggregation.seq_mean_token_mean}
    text = only(demo(values), fatal=False)
    assert text.startswith("loss.clip_low=0.2 and loss.clip_high=0.28 with loss.kind=gspo")
    assert "Use loss=gspo" in text


def shipped(group: str, name: str, record: type) -> Any:
    """A choice of a group on top of the schema's defaults."""
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(record), OmegaConf.load(CONFIG_DIR / f"{group}/{name}.yaml"))
    )


@pytest.mark.parametrize("name", [name for name in group_choices()["loss"] if name != "ppo"])
def test_shipped_losses_have_no_problem_and_no_warning(demo: Change, name: str):
    assert problems(demo({"loss": shipped("loss", name, LossConfig)})) == []


@pytest.mark.parametrize(
    ("credit", "loss"),
    [
        ("grpo", "grpo"),
        ("dr_grpo", "dr_grpo"),
        ("rloo", "rloo"),
        ("reinforce_pp", "reinforce_pp"),
        ("reinforce_pp_baseline", "reinforce_pp_baseline"),
        ("gae", "ppo"),
        ("gdpo", "dapo"),
    ],
)
def test_shipped_algorithms_of_the_outcome_have_no_problem_and_no_warning(demo: Change, credit: str, loss: str):
    values = {"credit": shipped("credit", credit, CreditConfig), "loss": shipped("loss", loss, LossConfig)}
    values |= {"rollout.expander": ExpanderKind.chains, "rewards.sources.progress.weight": 0.0}
    if credit == "gdpo":
        values["rewards.sources.short"] = SourceConfig(fn="rewards.sources.length:soft_overlong", signal="length")
    assert problems(demo(values)) == []


def test_metrics_for_prometheus_have_a_port_and_a_file_that_somebody_reads(demo: Change):
    assert texts(demo({"tracker.metrics_port": 9400, "tracker.metrics_file": "grove.prom"})) == []
    assert "is no port" in only(demo({"tracker.metrics_port": 70000}))
    assert "does not end in .prom" in only(demo({"tracker.metrics_file": "grove.txt"}))


def test_traced_steps_are_steps_of_the_run(demo: Change):
    assert texts(demo({"run.profile_steps": [1, 60]})) == []
    assert "run.profile_steps holds 0, and the run has steps 1 to 500" in only(demo({"run.profile_steps": [0]}))
