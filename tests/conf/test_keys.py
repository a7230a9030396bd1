"""What can be configured, as the schema's source says it."""

from typing import Any

import pytest

from conf import schema
from conf.keys import all_keys, did_you_mean, group_choices, kind_of, nearest_keys, type_name
from conf.schema import ExpanderKind, SourceConfig

KEYS = {key.name: key for key in all_keys()}


def test_a_key_carries_type_default_and_the_docstring_that_follows_it():
    key = KEYS["rollout.num_leaves"]
    assert (key.kind, key.default) == (int, str(schema.RolloutConfig().num_leaves))
    assert key.doc == "Trajectories of one prompt: n of chains, beam_forks and beam; as many end best_first's search."


def test_keys_without_a_docstring_have_none():
    assert KEYS["task.system_prompt"].doc == ""


def test_defaults_are_written_as_on_the_command_line():
    assert KEYS["run.resume"].default == "false"
    assert KEYS["rollout.expander"].default == "beam_forks"
    assert KEYS["learner.betas"].default == "[0.9, 0.95]"
    assert KEYS["model.path"].default == '""'


def test_names_that_the_user_chooses_are_marked():
    assert KEYS["rewards.sources.<name>.weight"].default == "1.0"
    assert "credit.terms.<name>.signals.<name>.scale" in KEYS


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("seed", int),
        ("rollout.expander", ExpanderKind),
        ("rewards.sources.any_name", SourceConfig),
        ("rewards.sources.any_name.weight", float),
        ("rewards.sources.any_name.args.deep.inside", Any),
        ("seed.more", None),
        ("nothing", None),
    ],
)
def test_kind_of_a_dotted_key(key: str, kind: Any):
    assert kind_of(key) is kind


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (int, "int"),
        (list[float], "list[float]"),
        (Any, "any"),
        (ExpanderKind, "|".join(kind.value for kind in ExpanderKind)),
    ],
)
def test_types_are_named_as_one_writes_them(kind: Any, name: str):
    assert type_name(kind) == name


def test_nearest_key_of_a_bare_word_is_the_whole_key():
    assert nearest_keys("max_turn_token") == ["rollout.max_turn_tokens"]


def test_a_word_of_several_keys_finds_each():
    assert set(nearest_keys("max_rows")) == {"task.train.max_rows", "task.eval.max_rows"}


def test_nothing_is_near_a_word_like_no_other():
    assert nearest_keys("zzz") == []


def test_beginning_of_a_word_is_near_it():
    assert did_you_mean("beam", ["chains", "beam_forks"]) == ' Did you mean "beam_forks"?'
    assert did_you_mean("", ["chains"]) == ""


def test_groups_list_their_files_and_those_of_a_users_folder(tmp_path):
    (tmp_path / "rollout/deep").mkdir(parents=True)
    (tmp_path / "rollout/deep/wide.yaml").touch()
    assert {"chains", "tree", "tree_grpo"} <= set(group_choices()["rollout"])
    assert "deep/wide" in group_choices(str(tmp_path))["rollout"]
