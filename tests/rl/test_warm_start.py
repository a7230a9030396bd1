from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError
from conf.schema import Config, HopSearchConfig, ModelConfig, TaskConfig, TinyModelConfig, WarmStartConfig
from rl.tiny import tiny_tokenizer
from rl.warm_start import IGNORED, batch_order, demonstrations, warm_started_model
from rollout.envs.hop_search import HopSearchTeacher


def small_config(cache_dir: Path, **settings: int) -> Config:
    warm_start = WarmStartConfig(num_demonstrations=40, batch_size=8, num_threads=1, cache_dir=str(cache_dir))
    warm_start.num_steps = settings.get("num_steps", 6)
    tiny = TinyModelConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=64)
    model = ModelConfig(tiny=tiny, warm_start=warm_start)
    return Config(seed=settings.get("seed", 0), model=model, task=TaskConfig(generator="hop_search"))


def test_only_the_policys_own_turns_are_trained():
    tokenizer = tiny_tokenizer()
    for row in demonstrations(HopSearchTeacher(HopSearchConfig()), WarmStartConfig(num_demonstrations=20), seed=0):
        trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
        words = tokenizer.decode(trained).split()
        assert words.count("<answer>") == words.count("</answer>") == 1
        assert not {"<result>", "error", "who", "?"} & set(words)
        num_calls = words.count("<call>")
        assert len(words) == 6 * num_calls + 4
        assert tokenizer.decode(row["input_ids"]).split().count("<result>") == num_calls


def test_a_demonstration_is_encoded_as_the_whole_conversation_would_be():
    tokenizer = tiny_tokenizer()
    row = demonstrations(HopSearchTeacher(HopSearchConfig()), WarmStartConfig(num_demonstrations=1), seed=0)[0]
    text = tokenizer.decode(row["input_ids"])
    assert tokenizer(text)["input_ids"] == row["input_ids"]


def test_chains_of_one_to_five_hops_are_shown_whatever_the_run_trains_on():
    rows = demonstrations(HopSearchTeacher(HopSearchConfig(hops=[3])), WarmStartConfig(num_demonstrations=60), seed=0)
    hops = {tiny_tokenizer().decode(row["input_ids"]).split().count("'s") for row in rows}
    assert hops == {1, 2, 3, 4, 5}


@given(st.integers(1, 60), st.integers(1, 16), st.integers(1, 30))
def test_batch_order_fills_every_batch_with_known_rows(num_rows: int, batch_size: int, num_steps: int):
    order = batch_order([index % 7 for index in range(num_rows)], batch_size, num_steps, seed=0)
    assert len(order) == num_steps * batch_size
    assert set(order) <= set(range(num_rows))


def test_batches_hold_rows_of_like_length():
    lengths = [index % 100 for index in range(1000)]
    order = batch_order(lengths, 10, 80, seed=0)
    spreads = [
        max(batch) - min(batch)
        for start in range(0, len(order), 10)
        for batch in [[lengths[row] for row in order[start : start + 10]]]
    ]
    assert sum(spreads) / len(spreads) < 20  # random batches of 10 would spread over about 82


@pytest.mark.slow
def test_a_warm_start_is_trained_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("socket.socket.connect", forbidden)
    reports: list[tuple[int, int, float]] = []
    folder = warm_started_model(small_config(tmp_path), lambda *report: reports.append(report))
    assert [step for step, _, _ in reports] == [1, 2, 3, 4, 5, 6]
    assert all(total == 6 and 0 < loss < 10 for _, total, loss in reports)
    assert reports[-1][2] < reports[0][2]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, ".locks"}  # no scratch left behind
    reports.clear()
    assert warm_started_model(small_config(tmp_path), lambda *report: reports.append(report)) == folder
    assert reports == []
    assert warm_started_model(small_config(tmp_path, seed=1)) != folder


def forbidden(*args: object) -> None:
    raise AssertionError(f"the warm start called home: {args[1:]}")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(tmp_path: Path):
    first = warm_started_model(small_config(tmp_path / "a")) / "model.safetensors"
    again = warm_started_model(small_config(tmp_path / "b")) / "model.safetensors"
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.slow
def test_an_interrupted_warm_start_leaves_no_model(tmp_path: Path):
    def stop(step: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_started_model(small_config(tmp_path), stop)
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def without_generator(config: Config) -> None:
    config.task.generator = ""


def without_steps(config: Config) -> None:
    config.model.warm_start.num_steps = 0


def with_impossible_chance(config: Config) -> None:
    config.model.warm_start.first_try_share = 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_generator, 'model.path is empty but task.generator="" makes no demonstrations'),
        (without_steps, "model.warm_start.num_steps=0"),
        (with_impossible_chance, "first_try_share=1.5 is a chance"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(tmp_path: Path, change: Callable[[Config], None], message: str):
    config = small_config(tmp_path)
    change(config)
    with pytest.raises(ConfigError, match=message):
        warm_started_model(config)


@pytest.mark.slow
def test_importing_the_module_imports_neither_trl_nor_datasets():
    code = "import sys, rl.warm_start; assert not {'trl', 'datasets', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
