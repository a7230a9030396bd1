from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from conf.compose import compose, to_yaml
from conf.errors import CheckpointError, ConfigError
from conf.schema import Config, ExpanderKind
from rl.evaluate import (
    Evaluated,
    evaluate_run,
    evaluation_json,
    evaluation_metrics,
    evaluation_rollout,
    evaluation_sources,
    evaluation_under,
)
from rl.evaluate_table import evaluation_table
from rl.metrics import declared
from rl.outcomes import PromptOutcome, Sample


def test_held_out_prompts_get_independent_trajectories_at_their_own_temperature():
    cfg = Config()
    cfg.rollout.expander, cfg.run.eval_temperature, cfg.run.eval_samples = ExpanderKind.beam_forks, 0.0, 3
    rollout = evaluation_rollout(cfg)
    assert (rollout.expander, rollout.num_leaves, rollout.temperature) == (ExpanderKind.chains, 3, 0.0)
    assert cfg.rollout.expander is ExpanderKind.beam_forks


def test_the_source_that_best_of_k_goes_by_is_asked_where_there_is_a_choice():
    judged = ["rewards.sources.judge={fn: 'rewards.sources.judge:Ternary', model: m}"]
    judged += ["rewards.models.m={url: http://127.0.0.1:1/v1, path: m}"]
    asked = {
        samples: evaluation_sources(
            compose(["experiment=hop_search", *judged, "run.eval_score=judge", f"run.eval_samples={samples}"])
        )
        for samples in (1, 4)
    }
    assert "judge" in asked[4] and "judge" not in asked[1]


def test_numbers_are_the_same_answer_however_they_are_written_where_success_says_so():
    cfg = compose(["task=gsm8k", "rewards=gsm8k", "run.eval_samples=3"])
    answers = [("it is 18", True), ("#### 18", True), ("20", False)]
    rows = [PromptOutcome(prompt="eval/0", reference="18", samples=[Sample(success=s, answer=a) for a, s in answers])]
    assert evaluation_under(cfg, rows).estimates["majority"].value == 1.0
    assert evaluation_under(compose(["run.eval_samples=3"]), rows).estimates["majority"].value == pytest.approx(2 / 3)


def evaluated(**run) -> Evaluated:
    cfg = compose(["experiment=hop_search", *(f"run.{name}={value}" for name, value in run.items())])
    rows = [
        PromptOutcome(
            prompt=f"eval/{number}",
            reference="a",
            samples=[
                Sample(
                    success=None if number == 0 and at == 0 else (number + at) % 3 == 0,
                    unknown="failed: boom" if number == 0 and at == 0 else "",
                    answer="a" if (number + at) % 3 == 0 else "b",
                    step_scores={"progress": [0.5, 0.1 * at]},
                    tokens=12,
                )
                for at in range(cfg.run.eval_samples)
            ],
        )
        for number in range(6)
    ]
    found = evaluation_under(cfg, rows)
    return Evaluated(model="models/mine", cfg=cfg, found=found, outcomes=Path("eval/alone_000060.jsonl"), seconds=1.5)


def test_the_table_says_shares_intervals_unknown_outcomes_and_power():
    done = evaluated(eval_samples=4, eval_score="progress")
    console = Console(file=io.StringIO(), width=110)
    console.print(evaluation_table(done))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("success, pass@1", "pass@4", "pass^2", "majority of 4", "best of 4 by progress", "95% interval"):
        assert part in text, text
    assert "1 of 24 samples have no known outcome and count neither as success nor as failure: failed: boom (1)" in text
    assert (
        "samples of a prompt correlate by" in text and "16 samples each" in text and "eval/alone_000060.jsonl" in text
    )


def test_all_numbers_come_as_json_too():
    found = json.loads(json.dumps(evaluation_json(evaluated(eval_samples=4, eval_k="[1,3]")), allow_nan=False))
    assert found["estimates"].keys() == {"success", "pass_at_3", "pass_all_3", "majority"}
    assert found["estimates"]["success"]["low"] < found["success_share"] < found["estimates"]["success"]["high"]
    assert (found["prompts"], found["samples"], found["unknown"]) == (6, 24, {"failed: boom": 1})
    assert {name: value for name, value in found["prompts_needed"][0].items() if name != "prompts"} == {
        "difference": 0.01,
        "samples": 1,
    }


def test_every_metric_of_an_evaluation_is_declared():
    metrics = evaluation_metrics(evaluated(eval_samples=4, eval_score="progress").found)
    assert {"eval/success_share", "eval/pass_at_4_share", "eval/best_of_2_share"} <= metrics.keys()
    assert all(declared(name) for name in metrics)


def test_a_folder_that_is_neither_run_nor_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"neither a run folder .* nor a model folder"):
        evaluate_run(str(tmp_path), [])


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(to_yaml(compose(["experiment=hop_search"])))
    with pytest.raises(CheckpointError, match="holds no intact checkpoint"):
        evaluate_run(str(tmp_path), [])


def test_an_evaluation_of_no_prompts_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="evaluates nothing: give --prompts"):
        evaluate_run(str(tmp_path), ["run.eval_prompts=0"])
