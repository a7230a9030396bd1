"""A search over what varies, by Optuna: which values to try next, which trial to give up. Only this file imports it.

sweep.json says what members did; the study in optuna.db follows it, so a kill between the two loses at most a draw.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from conf.errors import ConfigError
from conf.schema import Pruner, SweepConfig
from conf.sweep import Member, Sweep, Varied
from rl.curves import Curve, curve_of, is_better_high, value_at
from rl.sweeps.record import MemberRecord, Status, SweepRecord
from rollout.seeds import derive_seed

STUDY = "grove"
SEED = "seed"


def distribution(varied: Varied) -> BaseDistribution:
    """What a search draws the values of one setting from."""
    interval = varied.interval
    if interval is None:
        return CategoricalDistribution(varied.values)
    if interval.is_integer:
        return IntDistribution(int(interval.low), int(interval.high), log=interval.is_log)
    return FloatDistribution(interval.low, interval.high, log=interval.is_log)


@dataclass(slots=True)
class Search:
    """A study and the members of its trials. What varies is searched, but for seeds: each trial trains them all."""

    sweep: Sweep
    record: SweepRecord
    num_steps: int
    """run.num_steps, and below run.max_generated_tokens: how long a member trains."""
    max_tokens: int
    _study: optuna.Study = field(init=False)
    _asked: dict[str, BaseDistribution] = field(init=False)

    def __post_init__(self) -> None:
        """Open or make the study.

        Raises: ConfigError when the metric cannot tell runs apart, or nothing but seeds varies.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        settings = self.sweep.settings
        self._asked = {each.key: distribution(each) for each in self.sweep.varied if each.key != SEED}
        if not self._asked:
            raise ConfigError("only the seed varies, and the best seed is luck: a search needs another setting too.")
        direction = "maximize" if is_better_high(settings.metric) else "minimize"
        self.record.path.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{self.record.path.resolve() / 'optuna.db'}"
        self._study = optuna.create_study(
            study_name=STUDY, storage=storage, load_if_exists=True, direction=direction, pruner=pruner(settings)
        )
        known = {member.trial for member in self.record.members}
        for trial in self._open():
            if trial.number not in known:  # drawn in the moment that the sweep was killed
                self._study.tell(trial.number, state=TrialState.FAIL)

    def ask(self) -> list[Member] | None:
        """The members of another trial, to be recorded as of `trial_of`; None once sweep.num_trials were tried."""
        drawn = [each for each in self._study.get_trials(deepcopy=False) if each.state is not TrialState.FAIL]
        recorded = {each.trial for each in self.record.members if each.trial is not None}
        if len({each.number for each in drawn} | recorded) >= self.sweep.settings.num_trials:
            return None
        number = len(self._study.get_trials(deepcopy=False))
        # A sampler for each draw: what a resumed search draws depends on its trials alone, not on when it was stopped.
        self._study.sampler = optuna.samplers.TPESampler(
            seed=derive_seed("sweep", number) % 2**32,
            n_startup_trials=self.sweep.settings.startup_trials,
            constant_liar=self.sweep.settings.parallel > 1,
        )
        trial = self._study.ask(self._asked)
        assert trial.number == number, "one sweep at a time draws from a study"
        values = {key: _text(value) for key, value in trial.params.items()}
        seeds = next((each.values for each in self.sweep.varied if each.key == SEED), None)
        combinations = [values] if seeds is None else [{**values, SEED: seed} for seed in seeds]
        members = []
        for member in self.sweep.named(combinations):
            seed = f"-seed{member.values[SEED]}" if seeds is not None else ""
            members.append(Member(f"trial{number:03d}{seed}", member.values, member.overrides))
        return members

    def trial_of(self, members: list[Member]) -> int:
        """The trial whose members `ask` gave."""
        return int(members[0].name.removeprefix("trial").partition("-")[0])

    def hopeless(self) -> list[MemberRecord]:
        """Members of trials to give up, by the curves that their first seeds have drawn so far."""
        found = []
        for trial in self._open():
            members = self._members(trial.number)
            if not members or members[0].status is not Status.running:
                continue
            live = optuna.trial.Trial(self._study, trial._trial_id)
            for check, value in enumerate(self.values_at_checks(self._curve(members[0])), start=1):
                if check in trial.intermediate_values:
                    continue
                live.report(value, check)
                if live.should_prune():
                    found += [each for each in members if not each.status.is_over]
                    break
        return found

    def settle(self) -> None:
        """Tell the study what has become of trials whose members are all done."""
        for trial in self._open():
            members = self._members(trial.number)
            if not members or not all(each.status.is_over for each in members):
                continue
            values = [value for each in members if (value := self.objective(each)) is not None]
            if any(each.status is Status.pruned for each in members):
                # the value of a pruned trial is what it was last judged by
                self._study.tell(trial.number, state=TrialState.PRUNED)
            elif values and len(values) == len(members):
                self._study.tell(trial.number, statistics.fmean(values))
            else:
                self._study.tell(trial.number, state=TrialState.FAIL)

    def objective(self, member: MemberRecord) -> float | None:
        """What a finished member came to, at equally many generated tokens; None for any other."""
        if member.status is not Status.finished:
            return None
        curve = self._curve(member)
        if not curve:
            return None
        at_end = value_at(curve, float(self.max_tokens)) if self.max_tokens else None
        return curve[-1][1] if at_end is None else at_end

    def values_at_checks(self, curve: Curve) -> list[float]:
        """The curve at each of sweep.num_checks points that it has passed. The end is none of them."""
        length = self.max_tokens or self.num_steps
        places = [length * check / (self.sweep.settings.num_checks + 1) for check in self._checks()]
        found = [value_at(curve, place) for place in places]
        return [value for value in found if value is not None]

    def best(self) -> tuple[int, float, dict[str, str]] | None:
        """Number, objective and values of the best trial so far."""
        done = [each for each in self._study.get_trials(deepcopy=False) if each.state is TrialState.COMPLETE]
        if not done:
            return None
        best = self._study.best_trial
        assert best.value is not None, "a complete trial has a value"
        return best.number, best.value, {key: _text(value) for key, value in best.params.items()}

    def _checks(self) -> range:
        return range(1, self.sweep.settings.num_checks + 1)

    def _open(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _members(self, number: int) -> list[MemberRecord]:
        return [each for each in self.record.members if each.trial == number]

    def _curve(self, member: MemberRecord) -> Curve:
        file = self.record.folder(member).metrics
        return curve_of(file, self.sweep.settings.metric, by_steps=not self.max_tokens)


def pruner(settings: SweepConfig) -> optuna.pruners.BasePruner:
    """The pruner of the settings."""
    match settings.pruner:
        case Pruner.none:
            return optuna.pruners.NopPruner()
        case Pruner.median:
            return optuna.pruners.MedianPruner(n_startup_trials=settings.startup_trials)
        case Pruner.asha:
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)


def check_search(sweep: Sweep, eval_every_steps: int) -> None:
    """What a search needs of its members.

    Raises: ConfigError.
    """
    is_better_high(sweep.settings.metric)
    if sweep.settings.pruner is not Pruner.none and sweep.settings.metric.startswith("eval/") and not eval_every_steps:
        raise ConfigError(
            f"sweep.pruner={sweep.settings.pruner.value} judges trials by {sweep.settings.metric} while they train, "
            f"but run.eval_every_steps=0 measures it before and after alone: none would ever be given up. Use "
            f"run.eval_every_steps=5, or sweep.pruner=none."
        )


def _text(value: Any) -> str:
    """A drawn value as an override has it: every digit, so that it is read back as the same number."""
    return repr(value) if isinstance(value, float) else str(value)
