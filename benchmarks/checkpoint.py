"""How long training stands still for a checkpoint, written beside it and written while it waits.

    python -m benchmarks.checkpoint [--sizes tiny 52M] [--threads 2] [--folder DIR]

A learner with AdamW on one process, in float32, on the same trees in every row. It is begun after the second step.

- `stands_still_s`: between two steps, for the checkpoint; `files_s`: until its files are there, without checksums.
- `step_s`: median of steps that meet no checkpoint; `slowed`: by how much longer steps took while files were written.
- `size_mib`: of the files; `peak_mib`: of the process; `more_mib`: how much of it came with the checkpoint.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks import policies
from benchmarks.forests import TOOL, random_forest
from benchmarks.tables import Row, report
from conf.schema import Config, LearnerConfig, ModelConfig
from rl.policy.learner import Learner
from rl.policy.pack import TreeCredit
from rl.policy.ranks import Ranks

SIZES = {size.name: size for size in (policies.TINY, policies.SMALL, policies.MEDIUM)}
WARM_UP, ALONE = 2, 3
"""Steps before the checkpoint, and steps of these that count as undisturbed after it."""


def main() -> None:
    """Measure, print, write benchmarks/out/checkpoint.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "52M"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    asked = parser.parse_args()
    rows = [
        apart(size, background, asked.threads, asked.folder) for size in asked.sizes for background in (False, True)
    ]
    report("checkpoint", "a checkpoint of a learner on one process", rows, own_memory=False)


def apart(size: str, background: bool, threads: int, folder: Path | None) -> Row:
    """A row, measured in a process of its own, whose peak memory is nobody else's."""
    ours, theirs = multiprocessing.Pipe()
    arguments = (theirs, size, background, threads, folder)
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=arguments)
    process.start()
    theirs.close()
    row = ours.recv()
    process.join()
    return row


def _measure(pipe: Connection, size: str, background: bool, threads: int, folder: Path | None) -> None:
    place = Path(tempfile.mkdtemp(prefix="grove-checkpoint-", dir=folder))
    try:
        start = place / "start"
        _write_start(SIZES[size], start)
        cfg = Config(model=ModelConfig(dtype="float32"), learner=LearnerConfig(num_threads=threads, warmup_steps=0))
        learner = Learner(cfg, str(start), Ranks.alone(torch.device("cpu")))
        trees = _trees(SIZES[size].vocabulary)

        def step(number: int) -> float:
            started = time.monotonic()
            learner.update(trees, number)
            return time.monotonic() - started

        for number in range(WARM_UP):
            step(number)
        before_mib = _peak_mib()
        begun = time.monotonic()
        learner.begin_save(place / "saved")
        if not background:
            _await(learner)
        stood_still_s = time.monotonic() - begun
        beside = []
        while not learner.saved().done:
            beside.append(step(WARM_UP + len(beside)))
        files_s = time.monotonic() - begun
        assert learner.saved().error == "", learner.saved().error
        alone = [step(100 + number) for number in range(ALONE)]
        row: Row = {"name": f"{size}, {'beside training' if background else 'training waits'}"}
        row |= {"stands_still_s": stood_still_s, "files_s": files_s, "step_s": statistics.median(alone)}
        if beside:
            row["slowed"] = statistics.fmean(beside) / statistics.median(alone)
        size_bytes = sum(path.stat().st_size for path in (place / "saved").rglob("*") if path.is_file())
        row |= {"size_mib": size_bytes / 2**20, "peak_mib": _peak_mib(), "more_mib": _peak_mib() - before_mib}
        pipe.send(row)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _await(learner: Learner) -> None:
    while not learner.saved().done:
        time.sleep(0.002)


def _write_start(size: policies.Size, folder: Path) -> None:
    """Random weights, and a tokenizer of as many words."""
    AutoModelForCausalLM.from_config(size.config()).save_pretrained(folder)
    words = {f"w{number}": number for number in range(size.vocabulary)}
    model = models.WordLevel(words, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)


def _trees(vocabulary: int) -> list[TreeCredit]:
    """A tree of steps with tools, 256 tokens."""
    shape = TOOL.resized(256)
    credits = random_forest(shape, vocabulary).credits
    return [replace(credit, denominator=credit.total_weight()) for credit in credits]


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
