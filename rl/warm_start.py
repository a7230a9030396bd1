"""Supervised warm start of the tiny policy: TRL's SFTTrainer on demonstrations that the task makes itself.

The only file that imports trl, and it does so inside the functions: importing this module costs and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conf.errors import ConfigError
from conf.schema import Config, WarmStartConfig
from rl.locks import locked
from rl.tiny import save_tiny_model, tiny_model, tiny_tokenizer
from rollout.seeds import derive_seed
from rollout.teaching import Message, Teacher, teacher_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, TrainerCallback

logger = logging.getLogger(__name__)

Report = Callable[[int, int, float], None]
"""Called as report(step, total_steps, loss) a few dozen times in a warm start."""

LOCK_LIMIT_S = 1800.0
WAITING = "waiting for another process that trains the warm start %s"

RECIPE = 1
"""Raised whenever the recipe below changes, so that checkpoints of an older one are not reused."""
WARMUP_STEPS = 30
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
BUCKET_BATCHES = 8
"""Batches cut from one sorted bucket: rows of like length together, which halves the padding."""
IGNORED = -100
"""Label of a token that is not trained."""


def warm_started_model(cfg: Config, report: Report | None = None) -> Path:
    """Folder of the warm-started tiny policy for these settings and this seed, trained on the first call only.

    Training takes about a minute on two cores. The folder appears whole or not at all, so an interrupted warm start
    leaves nothing that a later run would mistake for a model.

    Args:
        cfg: `model.tiny`, `model.warm_start`, the settings of the task's generator and `seed` are read.
        report: progress, as report(step, total_steps, loss).
    Raises: ConfigError when the task makes no demonstrations or a setting cannot work.
    """
    _check(cfg)
    folder = Path(cfg.model.warm_start.cache_dir) / _cache_key(cfg)
    if folder.is_dir():
        return folder
    # Members of a sweep share their warm start: the first one trains it, and after the limit each its own.
    lock = locked(folder.parent / ".locks" / folder.name, LOCK_LIMIT_S, lambda: logger.info(WAITING, folder))
    with lock or nullcontext(), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".training-") as scratch:
        if folder.is_dir():
            return folder
        model = _trained_model(cfg, scratch, report or _no_report)
        finished = save_tiny_model(Path(scratch) / "model", model, teacher_of(cfg.task).wording)
        with suppress(OSError):  # another run finished the same model first: its folder is as good as ours
            finished.rename(folder)
    assert folder.is_dir(), "the rename can only lose to a finished folder"
    return folder


def _no_report(step: int, total: int, loss: float) -> None:
    del step, total, loss


def _check(cfg: Config) -> None:
    teacher_of(cfg.task)
    settings = cfg.model.warm_start
    for name in ("num_steps", "batch_size", "num_demonstrations", "num_threads"):
        if getattr(settings, name) < 1:
            raise ConfigError(
                f"model.warm_start.{name}={getattr(settings, name)}: there would be nothing to train. Give 1 or more."
            )
    if not 0.0 <= settings.first_try_share <= 1.0:
        raise ConfigError(
            f"model.warm_start.first_try_share={settings.first_try_share} is a chance: give a number from 0 to 1."
        )


def _cache_key(cfg: Config) -> str:
    settings = asdict(cfg.model.warm_start)
    del settings["cache_dir"], settings["num_threads"]  # where and how fast, not what
    read = {
        "recipe": RECIPE,
        "seed": cfg.seed,
        "tiny": asdict(cfg.model.tiny),
        "warm_start": settings,
        "task": teacher_of(cfg.task).settings(),
    }
    return hashlib.blake2b(json.dumps(read, sort_keys=True).encode(), digest_size=8).hexdigest()


def demonstrations(teacher: Teacher, settings: WarmStartConfig, seed: int) -> list[dict[str, list[int]]]:
    """Encoded demonstrations of mixed quality; only the policy's own turns carry labels.

    Returns: one dict per demonstration, `input_ids` int [T] and `labels` int [T], -100 at the question's and the
        replies' tokens.
    """
    tokenizer = tiny_tokenizer(teacher.wording)
    told = teacher.demonstrations(settings.num_demonstrations, settings.first_try_share, seed)
    return [_labelled(messages, tokenizer) for messages in told]


def _labelled(messages: list[Message], tokenizer: Any) -> dict[str, list[int]]:
    input_ids: list[int] = []
    labels: list[int] = []
    for role, content in messages:
        # Every message renders to its own words, so encoding message by message is encoding the whole conversation.
        text = tokenizer.apply_chat_template([{"role": role, "content": content}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        input_ids += ids
        labels += ids if role == "assistant" else [IGNORED] * len(ids)
    return {"input_ids": input_ids, "labels": labels}


def batch_order(lengths: list[int], batch_size: int, num_steps: int, seed: int) -> list[int]:
    """Rows in training order: batches of like length, in random order.

    Sorting a whole epoch would show the policy all long chains first and all short ones last; buckets of a few
    batches, shuffled, keep the padding low and the mixture even.

    Args:
        lengths: tokens of each row.
    Returns: num_steps * batch_size row numbers.
    """
    rng = random.Random(derive_seed("batch order", seed))
    bucket_size = min(len(lengths), batch_size * BUCKET_BATCHES)
    order: list[int] = []
    while len(order) < num_steps * batch_size:
        bucket = sorted(rng.sample(range(len(lengths)), bucket_size), key=lengths.__getitem__)
        batches = [bucket[start : start + batch_size] for start in range(0, bucket_size, batch_size)]
        full = [batch for batch in batches if len(batch) == batch_size] or [(bucket * batch_size)[:batch_size]]
        rng.shuffle(full)
        order += [row for batch in full for row in batch]
    return order[: num_steps * batch_size]


def _trained_model(cfg: Config, scratch: str, report: Report) -> Qwen3ForCausalLM:
    settings, teacher = cfg.model.warm_start, teacher_of(cfg.task)
    model = tiny_model(cfg.model.tiny, cfg.seed, teacher.wording)
    with _threads(settings.num_threads), _no_telemetry():
        words = tiny_tokenizer(teacher.wording)
        trainer = _trainer(model, words, _dataset(cfg, teacher), settings, cfg.seed, scratch, report)
        trainer.train()
    return model


def _dataset(cfg: Config, teacher: Teacher) -> Dataset:
    from datasets import Dataset

    settings = cfg.model.warm_start
    rows = demonstrations(teacher, settings, cfg.seed)
    lengths = [len(row["input_ids"]) for row in rows]
    order = batch_order(lengths, settings.batch_size, settings.num_steps, cfg.seed)
    return Dataset.from_list(rows).select(order)


def _trainer(
    model: Qwen3ForCausalLM,
    words: PreTrainedTokenizerFast,
    dataset: Dataset,
    settings: WarmStartConfig,
    seed: int,
    scratch: str,
    report: Report,
) -> Any:
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    args = SFTConfig(
        output_dir=scratch,
        max_steps=settings.num_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=min(WARMUP_STEPS, settings.num_steps // 2),
        lr_scheduler_type="linear",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=1.0,
        optim="adamw_torch",
        seed=derive_seed("warm start", seed) % 2**32,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=max(1, settings.num_steps // 50),
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=words,
        callbacks=[_progress_callback(report)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _progress_callback(report: Report) -> TrainerCallback:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """Forwards the logged loss."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            """Report a step's loss; the summary that ends training carries none."""
            if logs and "loss" in logs:
                report(state.global_step, state.max_steps, float(logs["loss"]))

    return Progress()


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_telemetry() -> Iterator[None]:
    # The trainer reports its use to the hub when it is made; the switch is a constant read at that moment.
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before
