"""What Tab offers."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conf.schema import ExpanderKind
from rl import completion
from rl.cli import grove_parser, main


def candidates(words: list[str]) -> list[str]:
    return completion.candidates(words, grove_parser())


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tr"], ["train"]),
        (["completion", ""], ["bash", "zsh"]),
        (["config", "--k"], ["--keys"]),
        (["train", "rollout.max_t"], ["rollout.max_tree_tokens=", "rollout.max_turn_tokens="]),
        (["train", "seed=1", "rollout.exp"], ["rollout.expander=", "rollout.expand_nodes=", "rollout.expand_rounds="]),
        (
            ["train", "rollout.expander="],
            [f"rollout.expander={it.value}" for it in ExpanderKind],
        ),
        (["train", "run.resume="], ["run.resume=true", "run.resume=false"]),
        (["train", "rollout=ch"], ["rollout=chains"]),
        (["train", "experiment=hop_search_g"], ["experiment=hop_search_grpo"]),
        (["train", "rewards.so"], ["rewards.sources."]),
        (["train", "rewards.sources.mine.w"], ["rewards.sources.mine.weight="]),
        (["train", "credit.terms.mine.scope=si"], ["credit.terms.mine.scope=siblings"]),
        (["train", "credit.terms.mine.si"], ["credit.terms.mine.signals.", "credit.terms.mine.singleton="]),
        (["train", "run.name="], []),
        (["train", "--config-dir", ""], []),
        (["eval", ""], []),
        (["eval", "runs/x", "rollout="], []),
        (["eval", "runs/x", "rollout.num_le"], ["rollout.num_leaves="]),
        (["report", "x"], []),
        (["replay", ""], []),
        (["replay", "runs/x", "--s"], ["--steps"]),
        (["replay", "runs/x", "--steps", ""], []),
        (["replay", "runs/x", "credit=tree_g"], ["credit=tree_grpo"]),
        (["new", ""], ["reward"]),
        (["check-reward", "--c"], ["--column"]),
        (["check-reward", "mine.py:fine", "--level", ""], ["step", "trajectory", "pair", "tree"]),
        (["check-reward", "mine.py:fine", "--model", ""], []),
        (["new", "reward", "brevity", "--level", "t"], ["trajectory", "tree"]),
        (["new", "reward", "brevity", "--"], ["--level", "--model", "--help"]),
        (["rollout", "out", "--format", ""], ["jsonl", "parquet"]),
        (["rollout", "out", "--prompts", "4", "credit=grpo_"], ["credit=grpo_process"]),
    ],
)
def test_words_that_may_follow(words: list[str], found: list[str]):
    assert candidates(words) == found


def test_every_command_is_offered_in_the_order_of_the_help():
    offered = candidates([])
    help_text = grove_parser().format_help()
    places = [re.search(rf"\n    {command}\s", help_text).start() for command in offered]
    assert offered[0] == "train" and places == sorted(places)


@pytest.mark.parametrize("option", [["--config-dir", "{}"], ["--config-dir={}"]])
def test_choices_of_a_users_folder_are_offered(option: list[str], tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").touch()
    words = [word.format(tmp_path) for word in option]
    assert candidates(["train", *words, "experiment=m"]) == ["experiment=mine"]


def test_a_bare_model_is_evaluated_on_any_task(tmp_path: Path):
    (tmp_path / "config.json").touch()
    assert candidates(["eval", str(tmp_path), "task=gs"]) == ["task=gsm8k"]


def test_hidden_command_prints_one_a_line(capsys: pytest.CaptureFixture[str]):
    assert main(["__complete", "train", "rollout=tree_r"]) == 0
    assert capsys.readouterr().out == "rollout=tree_rl\nrollout=tree_rpo\n"


def test_completion_loads_neither_torch_nor_hydra():
    code = (
        "import sys; from rl.cli import main; main(['__complete', 'train', 'seed']);"
        "print({'torch', 'ray', 'hydra', 'omegaconf', 'rich'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "seed=\nset()\n"


def offered(shell: str, script: str, tmp_path: Path) -> str:
    """What a shell prints after sourcing our script, with a `grove` that is this interpreter's."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    grove = tmp_path / "grove"
    grove.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rl.cli "$@"\n')
    grove.chmod(0o755)
    (tmp_path / "completion").write_text(completion.script(shell))
    done = subprocess.run(
        [shell, "-c", script],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "HERE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_bash_replies_with_what_follows_the_equals_sign(tmp_path: Path):
    script = """source $HERE/completion
    COMP_LINE="grove train seed=1 rollout=tree_r"; COMP_POINT=${#COMP_LINE}; _grove
    echo "${COMPREPLY[@]}" """
    assert offered("bash", script, tmp_path) == "tree_rl tree_rpo"


def test_zsh_offers_whole_words_and_no_space_after_an_unfinished_one(tmp_path: Path):
    script = """compdef() { : }
    compadd() { local -a all; all=(${(P)@[-1]}); (( ${#all} )) && print -- "$1 $all"; return 0 }
    source $HERE/completion
    words=(grove train rollout=tree_r); CURRENT=3; _grove
    words=(grove train rollout.max_tu); CURRENT=3; _grove"""
    assert offered("zsh", script, tmp_path) == "-a rollout=tree_rl rollout=tree_rpo\n-S rollout.max_turn_tokens="
