"""How files and overrides become one configuration, and what is said of those that cannot."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.compose import compose, from_yaml, to_yaml
from conf.errors import ConfigError
from conf.keys import field_kinds, group_choices
from conf.schema import Config, ExpanderKind, Level, RolloutConfig, RunConfig


def complaint(overrides: list[str], config_dir: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, config_dir)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def demo() -> Config:
    return compose(["experiment=hop_search"])


# What the shipped files say


def test_demo_has_the_settings_it_was_measured_with(demo: Config):
    assert demo.task.hop_search.hops == [3]
    assert (demo.rollout.expander, demo.rollout.num_leaves, demo.rollout.max_forks) == (ExpanderKind.beam_forks, 8, 2)
    assert (demo.rollout.prompts_per_step, demo.learner.mini_batches) == (16, 2)
    assert (demo.learner.learning_rate, demo.learner.betas, demo.learner.warmup_steps) == (5e-4, [0.9, 0.95], 10)
    assert (demo.loss.clip_low, demo.loss.clip_high, demo.loss.kl_coef) == (0.2, 0.28, 0.0)
    assert (demo.run.max_generated_tokens, demo.run.eval_prompts, demo.run.eval_temperature) == (250_000, 256, 1.0)


def test_grpo_differs_from_the_demo_only_in_what_makes_it_grpo(demo: Config):
    grpo = compose(["experiment=hop_search_grpo"])
    assert grpo.rollout.expander is ExpanderKind.chains
    assert list(grpo.credit.terms) == ["trajectory"]
    assert grpo.rewards.sources["progress"].weight == 0
    assert (grpo.run.max_generated_tokens, grpo.run.num_steps) == (demo.run.max_generated_tokens, demo.run.num_steps)
    assert (grpo.learner, grpo.loss, grpo.task, grpo.model) == (demo.learner, demo.loss, demo.task, demo.model)


@pytest.mark.parametrize("name", ["hop_search_long", "hop_search_long_steps", "hop_search_long_grpo"])
def test_long_variant_has_room_for_five_hops(name: str):
    cfg = compose([f"experiment={name}"])
    assert cfg.task.hop_search.hops == [5]
    assert cfg.rollout.max_steps == 5 + cfg.task.hop_search.spare_calls + 1 + 1
    assert (cfg.learner.learning_rate, cfg.run.max_generated_tokens) == (3e-4, 300_000)


@pytest.mark.slow
@pytest.mark.parametrize("group", sorted(group_choices()))
def test_every_shipped_choice_composes(group: str):
    for choice in group_choices()[group]:
        assert isinstance(compose([f"{group}={choice}"]), Config)


def test_an_experiment_wins_over_its_groups_and_an_override_over_both():
    cfg = compose(["learner.learning_rate=1e-5", "experiment=hop_search_long", "learner=adamw_large"])
    assert cfg.learner.learning_rate == 1e-5
    assert compose(["experiment=hop_search_long"]).learner.learning_rate == 3e-4


def test_run_folder_is_named_after_run_and_seed():
    assert compose(["run.name=mine", "seed=3"]).run.dir == "runs/mine-seed3"


# Entries of dict-valued keys


def test_new_source_needs_no_plus():
    cfg = compose(["rewards.sources.mine={fn: my.py:f, weight: 0.2}", "rewards.sources.other.fn=my.py:g"])
    assert (cfg.rewards.sources["mine"].fn, cfg.rewards.sources["mine"].weight) == ("my.py:f", 0.2)
    assert cfg.rewards.sources["other"].timeout_s == 0.0
    assert "answer" in cfg.rewards.sources


def test_leading_plus_is_accepted_too():
    assert compose(["+rewards.sources.mine.fn=my.py:f", "++seed=3"]).rewards.sources["mine"].fn == "my.py:f"


@pytest.mark.parametrize(
    "override", ["rewards.sources.mine._target_=pkg.mod.f", "rewards.sources.mine={_target_: pkg.mod.f}"]
)
def test_target_is_another_word_for_the_function(override: str):
    assert compose([override]).rewards.sources["mine"].target == "pkg.mod.f"


def test_target_is_understood_in_a_file(tmp_path: Path):
    write(tmp_path / "rewards/mine.yaml", "sources:\n  polite:\n    _target_: pkg.polite\n    args: {_target_: kept}\n")
    source = compose(["rewards=mine"], str(tmp_path)).rewards.sources["polite"]
    assert source.target == "pkg.polite"
    assert source.args == {"_target_": "kept"}


def test_new_term_and_free_arguments():
    cfg = compose(
        [
            "credit.terms.mine={level: step, signals: {step: {scale: 2}}}",
            "credit.terms.fork.signals.step.shift=-1",
            "rewards.sources.answer.args.depth.max=3",
        ]
    )
    assert cfg.credit.terms["mine"].level is Level.step
    assert cfg.credit.terms["mine"].signals["step"].scale == 2.0
    assert cfg.credit.terms["fork"].signals["step"].shift == -1.0
    assert cfg.rewards.sources["answer"].args == {"depth": {"max": 3}}


def test_tilde_takes_an_entry_away():
    assert "tool_success" not in compose(["~rewards.sources.tool_success"]).rewards.sources


def test_tilde_on_what_is_not_there_names_what_is():
    text = complaint(["~rewards.sources.zzz"])
    assert 'there is no "zzz" in rewards.sources to take away; there are: answer, progress, tool_success.' in text


def test_tilde_on_a_fixed_setting_is_refused():
    assert "run.name is a fixed setting" in complaint(["~run.name"])


def test_empty_override_that_would_clear_nothing_is_refused():
    assert '"credit.terms={}" would change nothing' in complaint(["credit.terms={}"])


# What is wrong, and where


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("rollout.num_leafs", "rollout.num_leaves"),
        ("num_leaves", "rollout.num_leaves"),
        ("lerner.learning_rate", "learner.learning_rate"),
        ("rewards.sources.mine.wieght", "rewards.sources.mine.weight"),
        ("credit.terms.fork.signals.step.scael", "credit.terms.fork.signals.step.scale"),
    ],
)
def test_unknown_key_names_the_nearest_right_one(wrong: str, right: str):
    assert complaint([f"{wrong}=1"]) == (
        f'{wrong} (override "{wrong}=1") is no setting: it would change nothing. Did you mean {right}?'
    )


def test_unknown_key_like_no_other_points_to_the_list():
    assert "List all settings with: grove config --keys" in complaint(["foo=1"])


def test_mistyped_group_is_recognised():
    assert 'Did you mean "experiment"?' in complaint(["experimnt=hop_search"])


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path):
    file = write(tmp_path / "experiment/mine.yaml", "# @package _global_\nrollout:\n  num_leafs: 4\n")
    text = complaint(["experiment=mine"], str(tmp_path))
    assert text.startswith(f"rollout.num_leafs ({file}) is no setting")
    assert text.endswith("Did you mean rollout.num_leaves?")


def test_wrong_type_in_a_file_names_the_file(tmp_path: Path):
    file = write(tmp_path / "rollout/mine.yaml", "num_leaves: many\n")
    assert complaint(["rollout=mine"], str(tmp_path)) == f'rollout.num_leaves="many" ({file}): expected an integer.'


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.num_steps=abc", "an integer."),
        ("run.num_steps=5.5", "an integer."),
        ("learner.learning_rate=fast", "a number."),
        ("run.resume=maybe", "true or false."),
        ("learner.betas=[0.9,x]", "a list of numbers, e.g. [0.9,0.95]."),
        ("learner.betas=0.9", "a list of numbers, e.g. [0.9,0.95]."),
        ("rollout.survivors=score", 'one of uniform, scored. Did you mean "scored"?'),
        ("run=3", f"settings by name ({', '.join(field_kinds(RunConfig))})."),
        ("rewards.sources=3", "settings by name."),
        ("run.name=null", 'a text. There is no null; an empty text is "".'),
    ],
)
def test_wrong_value_names_key_value_and_what_was_expected(override: str, expected: str):
    text = complaint([override])
    assert text.startswith(override.partition("=")[0] + "=")
    assert text.endswith(f'(override "{override}"): expected {expected}')


def test_null_for_an_entry_says_how_to_take_it_away():
    assert "To take an entry away write ~key." in complaint(["rewards.sources.answer=null"])


def test_unknown_choice_names_the_choices():
    choices = ", ".join(group_choices()["credit"])
    assert (
        complaint(["credit=gpro"]) == f'credit="gpro" is no choice of credit: there are {choices}. Did you mean "grpo"?'
    )


def test_unknown_choice_inside_a_users_file_names_the_choices(tmp_path: Path):
    write(tmp_path / "experiment/mine.yaml", "# @package _global_\ndefaults:\n  - override /credit: nope\n")
    text = complaint(["experiment=mine"], str(tmp_path))
    assert "Could not find 'credit/nope'" in text and "tree_step" in text
    assert "search path" not in text


def test_several_mistakes_are_reported_together():
    text = complaint(["rollout.num_leafs=4", "run.num_steps=abc", "credit=gpro", "run.name=a#b", "seed=1,2"])
    assert text.startswith("5 settings cannot be used:\n  1. ")
    for part in (
        "rollout.num_leafs",
        'run.num_steps="abc"',
        'credit="gpro"',
        '"run.name=a#b" cannot be read',
        "seed=1,2",
    ):
        assert part in text


def test_comma_is_a_list_of_runs_elsewhere_and_refused_here():
    text = complaint(["seed=1,2"])
    assert '"seed=1,2" lists several values, but one run has one configuration' in text


def test_interpolation_of_a_missing_key_names_the_setting():
    assert complaint(["run.name=${nope}"]) == "run.name: Interpolation key 'nope' not found. Check its ${...}."


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "x-${oc.decode:${oc.env:HOME}}", "${ oc.env:HOME}"])
def test_environment_stays_outside(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", "/secret")
    write(tmp_path / "experiment/mine.yaml", f"# @package _global_\nrun:\n  name: '{value}'\n")
    text = complaint(["experiment=mine"], str(tmp_path))
    assert "asks a resolver" in text and "/secret" not in text


# A folder of the user's own


def test_own_folder_adds_groups_and_experiments(tmp_path: Path):
    write(
        tmp_path / "experiment/mine.yaml",
        "# @package _global_\ndefaults:\n  - hop_search\n  - override /rollout: wide\n  - _self_\nrun: {name: mine}\n",
    )
    write(tmp_path / "rollout/wide.yaml", "defaults: [tree]\nnum_leaves: 32\n")
    cfg = compose(["experiment=mine"], str(tmp_path))
    assert (cfg.run.name, cfg.rollout.num_leaves, cfg.rollout.expander) == ("mine", 32, ExpanderKind.beam_forks)
    assert cfg.run.max_generated_tokens == 250_000


def test_relative_folder_with_a_space_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "my conf/task/mine.yaml", "name: mine\ntrain:\n  # path: later\n")
    monkeypatch.chdir(tmp_path)
    assert compose(["task=mine"], "my conf").task.name == "mine"


def test_own_file_may_not_take_the_name_of_a_shipped_one(tmp_path: Path):
    write(tmp_path / "credit/grpo.yaml", "name: mine\n")
    assert "has the name of a file of Grove's own (credit/grpo.yaml)" in complaint([], str(tmp_path))


def test_missing_folder_is_named():
    assert complaint([], "no/such/folder").startswith('there is no folder "no/such/folder"')


def test_broken_yaml_names_the_file(tmp_path: Path):
    file = write(tmp_path / "task/mine.yaml", "name: [unfinished\n")
    assert f'"{file}", line 2' in complaint(["task=mine"], str(tmp_path))


# Writing and reading again


def test_resolved_config_reads_back_equal(demo: Config, tmp_path: Path):
    text = to_yaml(demo)
    assert "dir: runs/hop_search-seed0" in text
    assert from_yaml(write(tmp_path / "config.yaml", text)) == demo


@settings(max_examples=10, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["${x}", "\\${x}", "a${b:c}", "$1 {"]))
def test_any_text_reads_back_equal(text: str, tmp_path_factory: pytest.TempPathFactory):
    cfg = Config()
    cfg.run.dir = "runs/x"
    cfg.task.system_prompt = text
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(to_yaml(cfg), encoding="utf-8")
    assert from_yaml(file) == cfg


def test_reading_takes_overrides_of_values_but_not_of_groups(demo: Config, tmp_path: Path):
    file = write(tmp_path / "config.yaml", to_yaml(demo))
    assert from_yaml(file, ["seed=7", "rollout.num_leaves=2"]).rollout == RolloutConfig(num_leaves=2)
    with pytest.raises(ConfigError, match=re.escape('"credit=grpo" chooses a file for a whole group')):
        from_yaml(file, ["credit=grpo"])


def test_reading_a_missing_file_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        from_yaml(tmp_path / "config.yaml")


def test_reading_a_file_of_an_unknown_setting_names_it(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"rollout.num_leafs \(.*config.yaml\) is no setting"):
        from_yaml(write(tmp_path / "config.yaml", "rollout: {num_leafs: 4}\n"))
