"""A recorded run with other weights: what its credit would have been. Needs no engine, no learner and no model."""

from __future__ import annotations

import logging
import math
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from conf import check_select
from conf.check_credit import functions_can_be_loaded
from conf.checks import term_numbers
from conf.compose import compose, from_yaml, numbered, to_yaml
from conf.errors import ConfigError, DataError
from conf.keys import group_choices
from conf.schema import Config, Normalizer, SourceConfig
from rewards.blend import blend
from rewards.types import ScoredTree
from rl.credit.forest import Forest, forest_of
from rl.credit.measured import measurements_needed
from rl.credit.normalize import Moments
from rl.credited import credited
from rl.health import agreement, outcomes, path_mean
from rl.record import TOTAL, RecordedTree, read_trees
from rl.run_folder import RunFolder
from rl.shares import recorded_trees, shares_of

logger = logging.getLogger(__name__)

REPLAYED = ("rewards", "select", "credit")
"""Sections that a record can be scored again by; all others made the record."""

Numbers = dict[str, float]
"""What is measured -> the number."""


@dataclass(kw_only=True, slots=True)
class StepReplay:
    """One training step as it was and as it would have been."""

    step: int
    num_trees: int
    before: Numbers
    """See `credit_numbers`."""
    after: Numbers
    agreement: Numbers
    """See `agreement_numbers`."""
    advantages: list[tuple[float, float]] = field(default_factory=list)
    """Of each step trained in both: as it was and as it would have been."""


@dataclass(kw_only=True, slots=True)
class Replay:
    """A run, or some of its steps, replayed."""

    path: Path
    changes: list[str]
    steps: list[StepReplay]

    def mean(self, numbers: Callable[[StepReplay], Numbers]) -> Numbers:
        """Each number's mean over the steps that have it, in the order of their first sight."""
        series: dict[str, list[float]] = {}
        for step in self.steps:
            for name, value in numbers(step).items():
                series.setdefault(name, []).append(value)
        return {name: statistics.fmean(values) for name, values in series.items()}


def replay_run(
    path: Path,
    overrides: list[str],
    steps: str = "",
    warn: Callable[[str], None] = logger.warning,
    config_dir: str = "",
) -> Replay:
    """Select and give credit to a run's recorded trees once more, and compare with what the record says.

    Args:
        path: the run's folder.
        overrides: changes to the run's own rewards, select and credit, e.g. "credit=grpo" or
            "credit.terms.fork.weight=0.3".
        steps: "12" for one step, "10:20" for a range with both its ends, "" for all that were recorded.
        warn: told what is odd about the configuration.
        config_dir: a folder of the user's own groups, as `compose` has it.
    Raises: ConfigError when the record cannot answer the question; DataError when there is no record, or it is damaged.
    """
    files = _files(RunFolder(path), steps)
    cfg = replayed_config(path, overrides, warn, config_dir)
    if list(files) != list(range(1, len(files) + 1)):
        _warn_of_running(cfg, min(files), warn)
    replay, history = Replay(path=path, changes=overrides, steps=[]), None
    for step, file in files.items():
        recorded = read_trees(file)
        after, history = replayed_trees(recorded, cfg, history)
        replay.steps.append(compare(step, recorded, after))
    return replay


def replayed_config(
    path: Path, overrides: list[str], warn: Callable[[str], None] = logger.warning, config_dir: str = ""
) -> Config:
    """A run's own settings with changes on top; a chosen group file takes the place of the whole section.

    Raises: ConfigError for a change of what was recorded, or one that needs more than was recorded.
    """
    file = RunFolder(path).config
    if not file.is_file():
        raise DataError(
            f"{path} holds no run (there is no {file.name}): nothing says how its trees were scored. Give the folder "
            f"that run.dir named, e.g. runs/hop_search-seed0."
        )
    _check_sections(overrides)
    own = from_yaml(file)
    groups = group_choices(config_dir)
    choices = [text for text in overrides if _is_choice(text, groups)]
    cfg = own
    if choices:
        chosen = compose(choices, config_dir)
        cfg = replace(own, **{section: getattr(chosen, section) for section in _sections(choices)})
    values = [text for text in overrides if text not in choices]
    if values:
        cfg = _with_values(cfg, values)
    _check_rules(cfg, warn)
    _check_sources(cfg.rewards.sources, own.rewards.sources)
    _check_measured(cfg)
    return cfg


def replayed_trees(
    recorded: Sequence[RecordedTree], cfg: Config, history: Mapping[str, Moments] | None = None
) -> tuple[list[RecordedTree], Mapping[str, Moments]]:
    """The trees of one step as `cfg` would have had them recorded, and what running normalisers know after it.

    Args:
        history: what they knew before it.
    Raises: ConfigError when `cfg` weighs a source that never scored these trees, or a term reads a signal they lack.
    """
    _check_recorded(recorded, cfg)
    scored = [blend(each.scored, cfg.rewards) for each in recorded]
    found = credited(scored, cfg, history=history)
    return recorded_trees(scored, found, shares_of(found, cfg)), found.credit.history


def compare(step: int, before: Sequence[RecordedTree], after: Sequence[RecordedTree]) -> StepReplay:
    """One step's records against another credit of the same trees."""
    return StepReplay(
        step=step,
        num_trees=len(before),
        before=credit_numbers(before),
        after=credit_numbers(after),
        agreement=agreement_numbers(before, after),
        advantages=[pair for pairs in _shared_advantages(before, after) for pair in pairs],
    )


def credit_numbers(recorded: Sequence[RecordedTree]) -> Numbers:
    """What credit came to in one step's trees; what has no number is left out.

    - "steps without credit": share of the steps that may train with no advantage other than 0;
    - "mean |advantage|": over trained steps;
    - "advantage agrees with outcome", "<signal> agrees with outcome": of a prompt's trajectories, see
      `rl.health.agreement`, by the mean over their steps;
    - "<term>, share of credit": its absolute contributions among those of all terms;
    - "left out: <reason>": share of the trajectories that may train.
    """
    scored = [each.scored for each in recorded]
    forest = forest_of(scored)
    total_N = _totals(recorded, forest)
    trained_N = total_N[~total_N.isnan()]
    outcome_L = outcomes(scored, forest)
    compared = {"advantage": total_N, **forest.step_signals}
    num_leaves = len(forest.leaf_node_L)
    left_out = Counter(reason for each in recorded for reason in each.left_out.values())
    numbers = {
        "steps without credit": 1 - int((trained_N != 0).sum()) / len(total_N) if len(total_N) else math.nan,
        "mean |advantage|": float(trained_N.abs().mean()),
        **{
            f"{name} agrees with outcome": agreement(path_mean(forest, value_N), outcome_L, forest.prompt_L)
            for name, value_N in compared.items()
        },
        **{f"{name}, share of credit": share for name, share in _term_shares(recorded).items()},
        **{f"left out: {reason}": count / num_leaves for reason, count in sorted(left_out.items())},
    }
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def agreement_numbers(before: Sequence[RecordedTree], after: Sequence[RecordedTree]) -> Numbers:
    """How far two credits of the same trees agree; what has no number is left out.

    - "rank agreement (Spearman)", "(Kendall)": over the steps of a prompt that both train, in the mean over prompts in
      which both tell steps apart;
    - "sign flips": share of the steps that both train whose advantage turns from good to bad or back.
    """
    prompts = _shared_advantages(before, after)
    flips = [first * second < 0 for pairs in prompts for first, second in pairs]
    varied = [
        torch.tensor(pairs, dtype=torch.float64).T
        for pairs in prompts
        if all(len(set(values)) > 1 for values in zip(*pairs, strict=True)) and pairs
    ]
    numbers = {
        "rank agreement (Spearman)": _mean(spearman(first_X, second_X) for first_X, second_X in varied),
        "rank agreement (Kendall)": _mean(kendall(first_X, second_X) for first_X, second_X in varied),
        "sign flips": _mean(flips),
    }
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def spearman(first_X: Tensor, second_X: Tensor) -> float:
    """Spearman's rank correlation of two values [X] that each vary: Pearson's, of ranks; equal values share theirs."""

    def centred_ranks(value_X: Tensor) -> Tensor:
        # the number of values below less the number above is twice the rank, from its middle
        return (value_X[:, None] - value_X).sign().sum(1)

    first_X, second_X = centred_ranks(first_X), centred_ranks(second_X)
    return float(first_X @ second_X / (first_X.norm() * second_X.norm()))


def kendall(first_X: Tensor, second_X: Tensor) -> float:
    """Kendall's tau-b of two values [X] that each vary: pairs in the same order less pairs in the opposite one.

    tau_b = (same - opposite) / sqrt((pairs - ties of the first) (pairs - ties of the second))
    """
    first_XX, second_XX = ((value_X[:, None] - value_X).sign() for value_X in (first_X, second_X))
    return float((first_XX * second_XX).sum() / (first_XX.norm() * second_XX.norm()))


def _shared_advantages(
    before: Sequence[RecordedTree], after: Sequence[RecordedTree]
) -> list[list[tuple[float, float]]]:
    """Per prompt: of each step trained in both, its advantage before and after."""
    return [
        [(table[TOTAL], new.advantages[row][TOTAL]) for row, table in old.advantages.items() if row in new.advantages]
        for old, new in zip(before, after, strict=True)
    ]


def _totals(recorded: Sequence[RecordedTree], forest: Forest) -> Tensor:
    """The advantage of each step of the forest, float64 [N]; NaN where it was not trained."""
    places = zip(forest.prompt_N.tolist(), forest.row_N.tolist(), strict=True)
    totals = [recorded[tree].total(row) for tree, row in places]
    return torch.tensor([math.nan if total is None else total for total in totals], dtype=torch.float64)


def _term_shares(recorded: Sequence[RecordedTree]) -> Numbers:
    sizes: Counter[str] = Counter()
    for each in recorded:
        for terms in each.advantages.values():
            sizes.update({name: abs(value) for name, value in terms.items() if name != TOTAL})
    whole = sum(sizes.values())
    return {name: size / whole for name, size in sizes.items()} if whole else {}


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return statistics.fmean(known) if known else math.nan


def _files(folder: RunFolder, steps: str) -> dict[int, Path]:
    """step -> its recorded trees, oldest first, only the steps asked for."""
    files = {int(file.name.split(".")[0].removeprefix("step_")): file for file in folder.tree_files()}
    if not files:
        raise DataError(
            f"{folder.path} holds no recorded trees (there is nothing in {folder.trees.name}/): no credit can be given "
            f"again. Trees are recorded by run.record_every_steps=1; 0 records none."
        )
    first, last = _range(steps) if steps else (min(files), max(files))
    found = {step: file for step, file in files.items() if first <= step <= last}
    if not found:
        raise ConfigError(
            f"--steps {steps} holds no recorded step: {folder.path} has {len(files)}, from {min(files)} to "
            f"{max(files)}. Use e.g. --steps {max(files)}."
        )
    return found


def _range(steps: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", steps)
    if found is None:
        raise ConfigError(
            f'--steps "{steps}" is neither a step nor a range. Write --steps 12 for one step, or --steps 10:20 for '
            f"step 10 to step 20."
        )
    return int(found[1]), int(found[2] or found[1])


def _is_choice(text: str, groups: dict[str, list[str]]) -> bool:
    key, equals, value = text.partition("=")
    return bool(equals) and key in groups and not value.lstrip().startswith("{")


def _with_values(cfg: Config, values: list[str]) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        composed = Path(folder) / "config.yaml"
        composed.write_text(to_yaml(cfg), encoding="utf-8")
        return from_yaml(composed, values)


def _sections(overrides: Iterable[str]) -> list[str]:
    return [re.split(r"[.=]", text.lstrip("+~"), maxsplit=1)[0] for text in overrides]


def _check_sections(overrides: Sequence[str]) -> None:
    for text, section in zip(overrides, _sections(overrides), strict=True):
        if section not in REPLAYED:
            raise ConfigError(
                f'"{text}" cannot be replayed: the trees are grown, and only {", ".join(REPLAYED)} can be changed once '
                f"they are. Train another run with it."
            )


def _check_rules(cfg: Config, warn: Callable[[str], None]) -> None:
    found = [
        problem for rule in (term_numbers, functions_can_be_loaded, *check_select.rules()) for problem in rule(cfg)
    ]
    for problem in found:
        if not problem.fatal:
            warn(problem.text)
    if fatal := [problem.text for problem in found if problem.fatal]:
        raise ConfigError(numbered(fatal))


def _warn_of_running(cfg: Config, first: int, warn: Callable[[str], None]) -> None:
    for name, term in cfg.credit.terms.items():
        if term.normalizer is Normalizer.running:
            warn(
                f"credit.terms.{name}.normalizer=running knows all earlier values of the run, and a replay those alone "
                f"that it goes through, here from step {first}. Replay all of a run with run.record_every_steps=1."
            )


def _check_sources(wanted: dict[str, SourceConfig], own: dict[str, SourceConfig]) -> None:
    """A source under the name of another would be read from the other's scores."""

    def identity(source: SourceConfig) -> tuple[object, ...]:
        return source.fn or source.target, source.level, source.args

    for name, source in wanted.items():
        if name in own and identity(source) != identity(own[name]):
            raise ConfigError(
                f"rewards.sources.{name} has another function, level or argument than the run scored its trees with, "
                f"and a replay asks no source: it would show the old scores as those of the new one. Only weight and "
                f"signal can be changed."
            )


def _check_measured(cfg: Config) -> None:
    needs = measurements_needed(cfg.credit)
    for is_needed, what, way_out in (
        (needs.value, "the values of a critic", "Use another credit, e.g. credit=grpo, or credit.gae.level=off"),
        (needs.kl, "the KL to the first weights (signals kl and path_kl)", "Take these signals out of its terms"),
    ):
        if is_needed:
            raise ConfigError(
                f"credit={cfg.credit.name or 'custom'} needs {what}, which the learner measured and the record lacks: "
                f"this credit cannot be replayed. {way_out}."
            )


def _check_recorded(recorded: Sequence[RecordedTree], cfg: Config) -> None:
    known = {name for each in recorded for name in _sources(each.scored)}
    missing = [name for name, source in cfg.rewards.sources.items() if source.weight != 0 and name not in known]
    if missing and any(each.tree.trained_leaves() for each in recorded):
        raise ConfigError(
            f"rewards.sources.{missing[0]} is not in the record, and a replay asks no source. Recorded are: "
            f"{', '.join(sorted(known)) or 'none'}. Set rewards.sources.{missing[0]}.weight=0, or take it away with "
            f"~rewards.sources.{missing[0]}."
        )


def _sources(scored: ScoredTree) -> set[str]:
    return {*scored.step_scores, *scored.leaf_scores}
