"""A run: its parts, its counters and its folder. Each method is one arrow of the loop."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from conf.errors import CheckpointError
from conf.schema import Config, PrmOrder
from rewards.base import build_sources
from rewards.types import ScoredTree
from rl.ahead import Ahead, Grown
from rl.batch_metrics import reward_metrics, rollout_metrics, staleness_metrics
from rl.credit.measured import Measured, measurements_needed
from rl.credit.normalize import Moments
from rl.credited import Credited, credited
from rl.disk import once_there_is_room
from rl.evaluate import evaluate, evaluation_metrics, evaluation_under
from rl.health import health_metrics
from rl.idle import IdleMeter, Span, write_stage_trace
from rl.in_flight import Kept
from rl.interrupts import end_as_interrupt, uninterrupted
from rl.launch import Parts, launched, write_ray_timeline
from rl.metrics import MetricsLog
from rl.model import resolve_model
from rl.outcomes import successes_of, write_outcomes
from rl.plan import cost_table, write_plan
from rl.policy.actor import Calls, LearnerGroup
from rl.policy.prm_actor import PrmHandle
from rl.policy.tree_credits import tree_credits
from rl.prm import outcomes_of, prm_scored, prm_source
from rl.progress import Progress
from rl.record import write_records
from rl.run_folder import RunFolder, installed_versions, open_run_folder, route_logs, settings
from rl.saving import Saver
from rl.shares import Shares, recorded_trees, shares_of
from rl.tracker import Tracker
from rl.view import write_report
from rollout.data import PromptSource, build_prompt_source
from rollout.health import check_tool_crashes
from rollout.patience import waited_seconds
from rollout.seeds import derive_seed
from rollout.tree import Tree
from rollout.types import Prompt

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

BATCH_LIMIT_S = 24 * 3600.0
"""Of a batch that grows ahead; its trees have limits of their own, which come first."""


@dataclass(kw_only=True, slots=True)
class RunState:
    """What a resumed run must know beside weights and optimiser. Random draws need no state: seeds name their place."""

    step: int = 0
    """Steps finished; also the version of the weights."""
    drawn_prompts: int = 0
    """Training prompts drawn so far: where the next step goes on in the data."""
    generated_tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    success_before: float | None = None
    success_after: float | None = None
    success_standard_error: float | None = None
    evaluated_step: int | None = None
    history: dict[str, Moments] = field(default_factory=dict)
    """What running normalisers have seen."""


@contextlib.contextmanager
def opened_run(cfg: Config) -> Iterator[Run]:
    """A run ready to train: folder, data, model and every part started; all closed on the way out.

    An interrupt or a lost part leaves a checkpoint of the last finished step behind.
    """
    build_sources(cfg.rewards)  # a reward that cannot load is told before anything is started or written
    folder = open_run_folder(Path(cfg.run.dir), settings(cfg), resume=cfg.run.resume)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(cfg))
        stack.callback(route_logs(folder.logs))
        stack.enter_context(end_as_interrupt())
        with progress.stage("model"):
            model_path = resolve_model(cfg, progress.warm_start)
        source = _prompt_source(cfg, model_path)
        prompts = source.draw(0, cfg.rollout.prompts_per_step)
        build_sources(cfg.rewards, prompts[0].data.keys())  # now that the columns are known, by name
        progress.note(write_plan(cfg.rollout, prompts, folder))
        tracker = Tracker(cfg.tracker, folder.path, cfg.run.name, settings(cfg))
        stack.callback(tracker.finish)
        with progress.stage("start"):
            parts = stack.enter_context(launched(cfg, model_path, folder.logs))
        route_logs(folder.logs)  # vllm and ray have put handlers of their own in place meanwhile
        run = Run(cfg, folder, source, parts, progress, tracker)
        run.restore()
        stack.callback(run.stop_growing)
        try:
            yield run
        except BaseException as error:
            run.rescue(error)
            raise


def _prompt_source(cfg: Config, model_path: str) -> PromptSource:
    from transformers import AutoTokenizer

    return build_prompt_source(cfg, AutoTokenizer.from_pretrained(model_path))


class Run:
    """The state of the loop and the parts it drives."""

    def __init__(
        self, cfg: Config, folder: RunFolder, source: PromptSource, parts: Parts, progress: Progress, tracker: Tracker
    ) -> None:
        self.cfg, self.folder, self.state = cfg, folder, RunState()
        self._source, self._parts, self._progress, self._tracker = source, parts, progress, tracker
        self._metrics: dict[str, float] = {}
        self._scored: list[ScoredTree] = []
        self._drawn = self._refills = 0
        self._grow_seconds = 0.0
        self._started = self._step_started = time.monotonic()
        self._checkpointed_step = 0
        self._idle = IdleMeter(parts.busy_seconds, waited_seconds)
        self._spans: list[Span] = []
        self._log: MetricsLog | None = None
        self._shares: Shares | None = None
        self._ahead: Ahead | None = None
        self._grown: Grown | None = None
        """The batch that grew ahead for this step."""
        self._drawn_ahead = 0
        self._kept: dict[int, Kept] = {}
        """Trees of batches that grew ahead before the run was resumed, by the step they are trained at."""
        self._saver = Saver(cfg, folder, parts)
        self._stood_still: dict[str, float] = {}
        """Metrics of the checkpoint before this step."""

    def restore(self) -> None:
        """Continue from the newest intact checkpoint when run.resume asks for it."""
        found = self._saver.restore() if self.cfg.run.resume else None
        if found is not None:
            history = {name: Moments(**seen) for name, seen in found.run["history"].items()}
            self.state = RunState(**{**found.run, "history": history})
            self._checkpointed_step = self.state.step
            self._kept = {batch.step: batch for batch in found.kept}
            assert self._parts.publisher is not None, "a training run publishes weights"
            self._parts.publisher.publish(self.state.step, [])
            self._progress.note(f"resumed {found.checkpoint.path} at step {self.state.step}")
        self.folder.drop_records_after(self.state.step)
        self._log = MetricsLog(self.folder.metrics, resume_step=self.state.step)
        self._started = time.monotonic() - self.state.seconds

    def goes_on(self) -> bool:
        """False once the steps or the tokens of the config are used up."""
        limit = self.cfg.run.max_generated_tokens
        return self.state.step < self.cfg.run.num_steps and not 0 < limit <= self.state.generated_tokens

    def next_prompts(self) -> list[Prompt]:
        """The first prompts of this step: a function of the seed and of what steps before it drew."""
        self._idle.start()
        self._metrics, self._stood_still = self._stood_still, {}
        self._scored, self._spans, self._step_started = [], [], time.monotonic()
        self._drawn = self._refills = 0
        self._grow_seconds = 0.0
        if not self.cfg.rollout.max_staleness:
            return self._draw(self.cfg.rollout.prompts_per_step)
        if self._ahead is None:
            self._drawn_ahead = self.state.drawn_prompts
            self._ahead = Ahead(self._grow_ahead, self.state.step, self.cfg.rollout.max_staleness)
        with self._stage("grow"):
            self._grown = self._ahead.next(BATCH_LIMIT_S)
        self._drawn = len(self._grown.prompts)
        return self._grown.prompts

    def refill(self, found: Credited) -> list[Prompt]:
        """As many more prompts as selection left nothing of, until the batch is full or select.max_refills is used up;
        DAPO's dynamic sampling (arXiv 2503.14476)."""
        missing = found.selection.num_missing_prompts() - (self._drawn - self.cfg.rollout.prompts_per_step)
        if missing <= 0 or self._refills == self.cfg.select.max_refills:
            return []
        self._refills += 1
        return self._draw(missing)

    def _draw(self, num: int) -> list[Prompt]:
        prompts = self._source.draw(self.state.drawn_prompts + self._drawn, num)
        self._drawn += num
        return prompts

    def grow(self, prompts: list[Prompt]) -> Iterator[tuple[int, Tree]] | Grown:
        """Trees as they finish, with the index of their prompt; or a batch that grew ahead."""
        if self._grown is not None:
            return self._grown
        refill = [self._refills] if self._refills else []
        return self._parts.pool.grow(prompts, derive_seed(self.cfg.seed, "train", self.state.step, *refill))

    def score(self, trees: Iterator[tuple[int, Tree]] | Grown) -> list[ScoredTree]:
        """Grow and score at once; all trees of the step come back, in the order of their prompts."""
        if not isinstance(trees, Grown):
            with self._stage("grow"):
                started = time.monotonic()
                calls = self._parts.scoring.submit(trees)
            trees = Grown(step=self.state.step, calls=calls, seconds=time.monotonic() - started)
        with self._stage("score"):
            self._scored = self._scored + self._parts.scoring.collect(trees.calls)
        self._grow_seconds += trees.seconds
        if self._parts.prm is not None:
            with self._stage("prm"):
                self._scored = self._prm_scored(self._parts.prm, self._scored)
        scored = self._scored
        trees_grown = [each.tree for each in scored]
        check_tool_crashes(trees_grown, self.cfg.task)
        self._metrics |= rollout_metrics(trees_grown, self._grow_seconds)
        if self.cfg.rollout.max_staleness:
            self._metrics |= staleness_metrics(trees_grown, self.state.step)
        self._metrics |= reward_metrics(scored)
        successes = [success for each in scored for success in successes_of(each)]
        if successes:
            self._metrics["rollout/success_share"] = sum(successes) / len(successes)
        return scored

    def _prm_scored(self, prm: PrmHandle, scored: list[ScoredTree]) -> list[ScoredTree]:
        if self.cfg.prm.order is PrmOrder.update_then_score:
            self._teach_prm(prm, [each for each in scored if prm_source(self.cfg) not in each.step_scores])
        return prm_scored(prm, scored, self.cfg, updates=self.state.step)

    def _teach_prm(self, prm: PrmHandle, scored: list[ScoredTree]) -> None:
        call = prm.update(*outcomes_of(scored), self.state.step)
        self._metrics |= prm.answer(call, "the process reward model to learn")

    def _grow_ahead(self, batch: Grown) -> None:
        """Grow a batch, from its prompts to the last tree; called on the thread that grows ahead."""
        batch.prompts = self._source.draw(self._drawn_ahead, self.cfg.rollout.prompts_per_step)
        self._drawn_ahead += len(batch.prompts)
        started = time.monotonic()
        scoring, seed = self._parts.scoring, derive_seed(self.cfg.seed, "train", batch.step)
        if batch.step in self._kept:
            kept = self._kept.pop(batch.step).fitting(batch.prompts, self.cfg.rollout.max_staleness)
            batch.trees |= kept.trees | {index: each.tree for index, each in kept.scored.items()}
            batch.calls |= {index: scoring.answered(each) for index, each in kept.scored.items()}
            batch.calls |= scoring.submit(kept.trees.items())
        for index, tree in self._parts.pool.grow(batch.prompts, seed, grown=set(batch.trees)):
            batch.trees[index] = tree
            batch.calls |= scoring.submit([(index, tree)])
        batch.seconds = time.monotonic() - started

    def stop_growing(self) -> None:
        """Begin no further batch ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def assign(self, scored: list[ScoredTree]) -> Credited:
        """What of the trees trains, and an advantage for every step and trajectory of it."""
        measure = self._measure if measurements_needed(self.cfg.credit) else None
        with self._stage("credit"):
            found = credited(scored, self.cfg, measure, self.state.history)
            self._shares = shares_of(found, self.cfg)
            self._metrics |= health_metrics(scored, found, self._shares, self.cfg.credit)
        selection, credit = found.selection, found.credit
        self._metrics |= {f"select/{reason}_share": share for reason, share in selection.shares().items()}
        wanted = self.cfg.rollout.prompts_per_step
        self._metrics["select/missing_prompts"] = max(0, wanted - self._drawn + selection.num_missing_prompts())
        self._metrics["select/refills"] = self._refills
        trained_N = credit.w0_N > 0
        num_trained = max(1, int(trained_N.sum()))
        for name, part_P in credit.parts.items():
            self._metrics[f"credit/{name}_abs_mean"] = float(part_P.abs().mean()) if len(part_P) else 0.0
        zero_N = trained_N & (credit.w_pos_N == 0) & (credit.w_neg_N == 0)
        self._metrics["credit/zero_advantage_share"] = int(zero_N.sum()) / num_trained
        return found

    def _measure(self, trees: list[Tree]) -> list[Measured]:
        calls = self._learner.measure(trees, measurements_needed(self.cfg.credit))
        return self._ask(calls, "the learner to measure KL and values")

    def update(self, scored: list[ScoredTree], found: Credited) -> None:
        """Train on the trees and bring the new weights to the engines."""
        assert self._parts.publisher is not None, "a training run publishes weights"
        grown = [each.tree for each in scored]
        kept = [each.tree for each in found.selection.trees]
        trees = tree_credits(kept, found.forest, found.credit, self.cfg.loss, self.cfg.rollout.max_context_tokens)
        prm, order = self._parts.prm, self.cfg.prm.order
        if prm is not None and order is PrmOrder.score_then_update:
            with self._stage("prm"):
                self._teach_prm(prm, found.selection.trees)
        with self._stage("update"):
            self._parts.publisher.make_room()
            calls = self._learner.update(trees, self.state.step)
            self._metrics |= self._ask(calls, f"update {self.state.step}")
        self.state.step += 1
        self.state.drawn_prompts += self._drawn
        self.state.history = dict(found.credit.history)
        self.state.generated_tokens += int(self._metrics["rollout/generated_tokens"])
        self.state.generated_tokens += sum(cost.generated_tokens for each in scored for cost in each.costs.values())
        self.state.trained_tokens += int(self._metrics["learner/trained_tokens"])
        with self._stage("publish"):
            self._metrics |= self._parts.publisher.publish(self.state.step, grown)
        if self._ahead is not None:
            self._ahead.advance()

    def finish_step(self, scored: list[ScoredTree], found: Credited) -> None:
        """Write the step's metrics and trees."""
        assert self._log is not None and self._shares is not None, "the run was restored before it stepped"
        step = self.state.step
        if self.cfg.run.record_every_steps and step % self.cfg.run.record_every_steps == 0:
            records, shares = self.folder.tree_file(step), self._shares
            self._write("the step's trees", lambda: write_records(records, recorded_trees(scored, found, shares)))
        self._metrics["rollout/total_generated_tokens"] = float(self.state.generated_tokens)
        self._metrics |= {f"time/{part}_idle_share": share for part, share in self._idle.shares().items()}
        self._metrics["time/step_seconds"] = time.monotonic() - self._step_started
        if step in self.cfg.run.profile_steps:
            write_stage_trace(self.folder.profiles / f"driver_step_{step:06d}.json", self._spans, step)
            write_ray_timeline(self.folder.profiles / f"ray_until_step_{step:06d}.json")
        self._emit()

    def evaluate_if_due(self) -> None:
        """Held-out success before the first step, each run.eval_every_steps, and after the last."""
        every = self.cfg.run.eval_every_steps
        step = self.state.step
        due = step == 0 or not self.goes_on() or (every and step % every == 0)
        if not due or self.state.evaluated_step == step or not self.cfg.run.eval_prompts:
            return
        self._metrics = {}
        with self._stage("eval"), self._ahead.paused(BATCH_LIMIT_S) if self._ahead else contextlib.nullcontext():
            outcomes = evaluate(self.cfg, self._parts, self._source, step)
            found = evaluation_under(self.cfg, outcomes)
        self._write("the evaluation", lambda: write_outcomes(self.folder.evaluation_file(step), outcomes))
        error = found.standard_error
        self.state.success_after = found.success_share
        self.state.success_standard_error = error if math.isfinite(error) else None
        self.state.evaluated_step = step
        if step == 0:
            self.state.success_before = found.success_share
        self._metrics |= evaluation_metrics(found)
        self._metrics["rollout/total_generated_tokens"] = float(self.state.generated_tokens)
        self._emit()

    def checkpoint_if_due(self) -> None:
        """Begin a checkpoint each run.checkpoint_every_steps, and tell of one that could not be written."""
        self._saver.check()
        every = self.cfg.run.checkpoint_every_steps
        if every and self.state.step % every == 0 and self._checkpointed_step != self.state.step:
            self.checkpoint()

    def checkpoint(self, patient: bool = True) -> None:
        """Save model, optimiser, counters and trees in flight; training stands still until they are copied."""
        self._metrics = {}
        self.state.seconds = time.monotonic() - self._started
        state = self.state
        success = state.success_after if state.evaluated_step == state.step else None
        ahead = self._ahead.in_flight() if self._ahead else []
        with self._stage("checkpoint"):
            self._saver.begin(state.step, asdict(state), ahead, success, patient)
        self._stood_still = self._metrics
        self._checkpointed_step = state.step

    def finish(self) -> dict[str, Any]:
        """The last checkpoint, summary.json, the curve and the report."""
        if self._checkpointed_step != self.state.step or self.state.step == 0:
            self.checkpoint()
        with self._stage("checkpoint"):
            self._saver.finish()
        summary = self._summary()
        self._write("summary.json", lambda: self.folder.write_summary(summary))
        self._tracker.summarize(summary)
        report = self._write("the report", lambda: write_report(self.folder.path))
        self._progress.note(f"report: {report}")
        return summary

    def rescue(self, error: BaseException) -> None:
        """After an interrupt or an error: save what the last finished step left, if the learner still answers."""
        with uninterrupted():
            try:
                self._saver.wait()
                if isinstance(error, CheckpointError) or not self.state.step:
                    return
                if self.state.step != self._checkpointed_step or self._saver.left_out:
                    self.checkpoint(patient=False)  # whoever interrupts does not wait
                    self._saver.wait()
            except Exception as lost:
                logger.error("the last finished step could not be saved: %s", lost)
                return
        self._progress.note(f"saved step {self.state.step}; continue with run.resume=true run.dir={self.folder.path}")

    @property
    def _learner(self) -> LearnerGroup:
        assert self._parts.learner is not None, "a training run has a learner"
        return self._parts.learner

    def _ask(self, calls: Calls, what: str, limit_s: float | None = None) -> Any:
        return self._learner.answer(calls, limit_s=limit_s or self.cfg.learner.update_timeout_s, what=what)

    def _write(self, what: str, write: Callable[[], Result]) -> Result:
        return once_there_is_room(write, what=f"{what} in {self.folder.path}", limit_s=self.cfg.run.disk_wait_s)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        with self._progress.stage(name):
            yield
        seconds = time.monotonic() - started
        self._spans.append(Span(name, started, seconds))
        self._metrics[f"time/{name}_seconds"] = self._metrics.get(f"time/{name}_seconds", 0.0) + seconds
        self.state.stage_seconds[name] = self.state.stage_seconds.get(name, 0.0) + seconds

    def _emit(self) -> None:
        assert self._log is not None, "the run was restored before it wrote metrics"
        log = self._log
        self._write("metrics", lambda: log.append(self.state.step, self._metrics))
        self._tracker.log(self._metrics, self.state.step)
        self._progress.update(self.state.step, self._metrics)

    def _summary(self) -> dict[str, Any]:
        assert self._log is not None, "the run was restored before it ended"
        return {
            "success_before": self.state.success_before,
            "success_after": self.state.success_after,
            "success_standard_error": self.state.success_standard_error,
            "steps": self.state.step,
            "generated_tokens": self.state.generated_tokens,
            "trained_tokens": self.state.trained_tokens,
            "cost_per_tree": cost_table(self.cfg.rollout, self._log.rows),
            "seconds": self.state.seconds,
            "stage_seconds": self.state.stage_seconds,
            "worker_restarts": self._parts.pool.num_restarts,
            "restarts": len(self.folder.read_restarts()),
            "versions": installed_versions(),
        }
