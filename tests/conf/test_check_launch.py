"""Rules about launching."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.check_launch import rules
from conf.compose import compose


def problems(*overrides: str) -> list[tuple[str, bool]]:
    cfg = compose([*overrides])
    return [(problem.text, problem.fatal) for rule in rules() for problem in rule(cfg)]


def test_the_defaults_have_none():
    for where in ("local", "ray", "slurm"):
        assert problems(f"launch={where}") == []


def test_a_variable_that_is_not_set_cannot_be_passed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    [(text, fatal)] = problems("launch=ray", "launch.environment=[MY_KEY]")
    assert "MY_KEY, which is not set here" in text and fatal
    monkeypatch.setenv("MY_KEY", "1")
    assert problems("launch=ray", "launch.environment=[MY_KEY]") == []


def test_a_value_is_no_name():
    [(text, _)] = problems("launch=local", "launch.environment=['MY_KEY=abc']")
    assert "Give names alone" in text


def test_a_key_that_a_judge_will_want_is_missed_elsewhere_and_not_here():
    judge = "rewards.models.judge={url: 'https://judge.example/v1', path: m, api_key_env: JUDGE_API_KEY}"
    assert problems("launch=local", judge) == []
    [(text, fatal)] = problems("launch=ray", judge)
    assert "rewards.models.judge.api_key_env will want JUDGE_API_KEY" in text and not fatal
    assert "launch.environment=[JUDGE_API_KEY]" in text


def test_pods_need_an_image_and_a_volume_and_a_secret_for_keys():
    texts = [text for text, _ in problems("launch=kuberay", "launch.environment=[A_KEY]")]
    assert [text.partition("=")[0] for text in texts] == [
        "launch.kuberay.image",
        "launch.kuberay.volume_claim",
        "launch.environment",
    ]
    made = ["launch.kuberay.image=i", "launch.kuberay.volume_claim=v", "launch.kuberay.secret_name=s"]
    assert problems("launch=kuberay", "launch.environment=[A_KEY]", *made) == []


def test_a_template_of_ones_own_must_exist(tmp_path: Path):
    path = tmp_path / "mine.sh"
    [(text, _)] = problems("launch=slurm", f"launch.slurm.template={path}")
    assert "does not exist" in text
    path.touch()
    assert problems("launch=slurm", f"launch.slurm.template={path}") == []
