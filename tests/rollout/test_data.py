from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from chatml import chatml_tokenizer

from conf.errors import ConfigError, DataError
from conf.schema import ColumnsConfig, Config, DataConfig, HopSearchConfig, RunConfig, TaskConfig, ToolFormat
from rl.tiny import tiny_tokenizer
from rollout.data import PromptSource, build_prompt_source, read_rows, reference_answer

ROWS = [{"question": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(10)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(tmp_path: Path, rows: list[dict[str, Any]] = ROWS, seed: int = 0, **task: Any) -> PromptSource:
    path = write_lines(tmp_path / "rows.jsonl", rows)
    config = TaskConfig(train=DataConfig(path=path), eval=DataConfig(path=path), **task)
    return build_prompt_source(Config(seed=seed, task=config), chatml_tokenizer())


# --- batches ----------------------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order(tmp_path: Path):
    prompts = source(tmp_path)
    seen = [prompt.id for step in range(5) for prompt in prompts.draw(4 * step, 4)]  # 20 prompts are two epochs of 10
    assert sorted(seen[:10]) == [f"train/{row}" for row in range(10)]
    assert sorted(seen[10:]) == [f"train/{row}#2" for row in range(10)]
    assert [each.removesuffix("#2") for each in seen[10:]] != seen[:10]


def test_a_batch_follows_from_seed_and_step_alone(tmp_path: Path):
    assert source(tmp_path).draw(28, 4) == source(tmp_path).draw(28, 4)
    assert source(tmp_path, seed=0).draw(28, 4) != source(tmp_path, seed=1).draw(28, 4)


def test_ids_are_unique_even_in_a_batch_larger_than_the_data(tmp_path: Path):
    ids = Counter(prompt.id for prompt in source(tmp_path).draw(0, 25))
    assert set(ids.values()) == {1}


def test_held_out_prompts_are_the_same_for_every_seed(tmp_path: Path):
    assert source(tmp_path, seed=0).held_out(4) == source(tmp_path, seed=1).held_out(4)
    assert sorted(prompt.id for prompt in source(tmp_path).held_out(99)) == [f"eval/{row}" for row in range(10)]
    assert source(tmp_path).held_out(0) == []


def test_a_prompt_is_the_template_of_system_prompt_tools_and_question(tmp_path: Path):
    rows = [{"question": "Who?", "answer": "me", "note": [1, 2]}]
    prompts = source(tmp_path, rows, system_prompt="Be brief.", tools=["rollout.envs.gsm8k:calculator"])
    (prompt,) = prompts.draw(0, 1)
    text = chatml_tokenizer().decode(prompt.token_ids)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert '"name": "calculator"' in text
    assert text.endswith("<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
    assert (prompt.question, prompt.answer, prompt.data) == ("Who?", "me", rows[0])


def test_columns_may_have_other_names(tmp_path: Path):
    rows = [{"problem": "2 + 2?", "solution": 4}]
    (prompt,) = source(tmp_path, rows, columns=ColumnsConfig(question="problem", answer="solution")).draw(0, 1)
    assert (prompt.question, prompt.answer) == ("2 + 2?", "4")
    (prompt,) = source(tmp_path, rows, columns=ColumnsConfig(question="problem", answer="")).draw(0, 1)
    assert prompt.answer == ""


def test_max_rows_uses_the_first_rows(tmp_path: Path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    assert read_rows(DataConfig(path=path, max_rows=3), "task.train").num_rows == 3
    assert read_rows(DataConfig(path=path, max_rows=30), "task.train").num_rows == 10


# --- files ------------------------------------------------------------------------------------------------------------


def test_json_lines_json_and_parquet_hold_the_same_rows(tmp_path: Path):
    lines = write_lines(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for path in (lines, str(tmp_path / "rows.json"), str(tmp_path / "rows.parquet")):
        rows = read_rows(DataConfig(path=path), "task.train")
        assert [rows.row(index) for index in range(10)] == ROWS


def test_a_broken_line_is_named_with_its_text(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n\n{"question": "a", answer}\n')
    with pytest.raises(DataError, match=r"rows.jsonl line 3 is not JSON .*'\{\"question\": \"a\", answer\}'"):
        read_rows(DataConfig(path=str(tmp_path / "rows.jsonl")), "task.train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"[1, 2]\n", r"a.jsonl line 1 is '\[1, 2\]' and not a JSON object"),
        ("a.jsonl", b'{"question": "x"}\n\xff\n', "a.jsonl line 2 is not UTF-8"),
        ("a.jsonl", b"\n", "holds no rows"),
        ("a.json", b'{"question"', "a.json is not JSON"),
        ("a.json", b'{"question": "x"}', "must be a JSON list of objects"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
    ],
)
def test_files_that_hold_no_rows_say_why(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(DataConfig(path=str(tmp_path / name)), "task.train")


def test_a_missing_file_names_the_nearest_one(tmp_path: Path):
    write_lines(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(
        DataError, match=r'task.train.path: there is no file ".*trian.jsonl". Did you mean ".*/train.jsonl"'
    ):
        read_rows(DataConfig(path=str(tmp_path / "trian.jsonl")), "task.train")


def test_a_named_dataset_needs_its_split():
    with pytest.raises(
        ConfigError, match=r'task.eval.path="openai/gsm8k" does not end in .jsonl.*Give task.eval.split'
    ):
        read_rows(DataConfig(path="openai/gsm8k"), "task.eval")


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        (
            {"quetsion": "x", "answer": "y"},
            {},
            r'rows.jsonl line 2: there is no column "question".*task.columns.question=quetsion',
        ),
        ({"question": "x"}, {}, 'line 2: there is no column "answer" to take the answer from; the row has question'),
        ({"question": " ", "answer": "y"}, {}, 'line 2: column "question" is "\' \'", not a question'),
        ({"question": "x", "answer": ["y"]}, {}, "line 2: the answer is .*neither text nor a number"),
        (
            {"question": "x", "answer": "y"},
            {"answer_pattern": "(Q)"},
            r'line 1: task.answer_pattern="\(Q\)" does not occur',
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_line(tmp_path: Path, row: Any, task: Any, message: str):
    with pytest.raises(DataError, match=message):
        source(tmp_path, [ROWS[0], row], **task)


def test_prompts_that_fill_the_context_are_counted_and_refused(tmp_path: Path):
    rows = [*ROWS, {"question": "x" * 600, "answer": "y"}, {"question": "x" * 700, "answer": "y"}]
    with pytest.raises(
        DataError, match=r"2 of 12 prompts have rollout.max_context_tokens=512 .*rows.jsonl line 12, has 7\d\d"
    ):
        source(tmp_path, rows)


def test_a_column_that_a_tool_needs_is_missed_before_the_run(tmp_path: Path):
    with pytest.raises(ConfigError, match='The tool office has the keyword-only parameter "world"'):
        source(tmp_path, tools=["rollout.envs.hop_search:office"])


@pytest.mark.parametrize(
    ("value", "pattern", "answer"),
    [
        (" 18 ", "", "18"),
        (18, "", "18"),
        ("1 #### 2\nso #### 1,234,567", r"####\s*(.+)$", "1234567"),
        ("yes, no", "", "yes, no"),
        ("#### Paris, Texas", r"####\s*(.+)$", "Paris, Texas"),
    ],
)
def test_the_answer_is_the_last_match_without_the_commas_that_group_digits(value: Any, pattern: str, answer: str):
    assert reference_answer(value, pattern) == answer


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskConfig(), "task.train.path is empty"),
        (TaskConfig(train=DataConfig(path="a.jsonl")), "task.eval.path is empty but run.eval_prompts=256"),
        (TaskConfig(generator="hopsearch"), 'task.generator="hopsearch" is no task that makes its own questions'),
        (TaskConfig(generator="hop_search"), "num_tools=4 but task.tools lacks rollout.envs.hop_search:office"),
        (TaskConfig(answer_pattern="#(", train=DataConfig(path="a")), "is not a regular expression"),
        (TaskConfig(answer_pattern="####", train=DataConfig(path="a")), "has no group"),
    ],
)
def test_settings_that_name_no_data_say_what_to_give(task: TaskConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        build_prompt_source(Config(task=task), chatml_tokenizer())


def test_a_run_without_evaluation_needs_no_held_out_data(tmp_path: Path):
    task = TaskConfig(train=DataConfig(path=write_lines(tmp_path / "rows.jsonl", ROWS)))
    prompts = build_prompt_source(Config(task=task, run=RunConfig(eval_prompts=0)), chatml_tokenizer())
    assert prompts.held_out(4) == []


def test_a_task_that_makes_its_own_questions_never_runs_out():
    tools = [f"rollout.envs.hop_search:{name}" for name in ("office", "school", "family", "clinic")]
    task = TaskConfig(
        generator="hop_search",
        tools=tools,
        tool_format=ToolFormat.words,
        columns=ColumnsConfig(max_calls="max_calls"),
        hop_search=HopSearchConfig(hops=[2]),
    )
    prompts = build_prompt_source(Config(task=task), tiny_tokenizer())
    (prompt,) = prompts.draw(1000, 1)
    assert prompt.id == "train/1000"
    assert tiny_tokenizer().decode(prompt.token_ids) == prompt.question
    assert len(prompt.token_ids) == 9  # who is First Last 's r 's r ?
    assert (prompt.data["max_calls"], prompts.held_out(2)[1].id) == (4, "eval/1")
