"""Is a reward fit for a run? Asked of recorded trees, in the processes and under the deadline that a run would use."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import pickle
import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table

from conf.compose import compose
from conf.errors import ConfigError, DataError
from conf.schema import Level, RewardModelConfig, RewardsConfig, SourceConfig
from conf.subject import Subject
from rewards.arguments import ENGINE, MODEL
from rewards.base import Source
from rewards.service import RewardService, score_counts
from rewards.types import BROKEN, Cost, Score, ScoredTree, ScoreStatus
from rl.credit.forest import forest_of
from rl.health import agreement, outcomes, path_mean, path_sum, within_correlation
from rl.record import RecordedTree, read_trees
from rl.run_folder import RunFolder
from rollout.tree import Tree

SAMPLE = Path(__file__).parents[1] / "rewards" / "samples" / "hop_search.jsonl.gz"
"""Recorded trees of the embedded task, for who has no run yet."""
MAX_TREES = 32
"""Trees that are tried; more would say the same, later."""
MAX_TREES_OF_MODEL = 8
"""The same for a reward that asks a model, whose every request takes time and may cost money."""
HUGE = "word " * 200_000
"""A step of a megabyte: what a policy that never stops leaves behind."""
LONG = "word " * 20_000
"""A step that a judge may be shown as a test without a large bill."""
SLOW_S = 0.01
"""Seconds of a score above which scoring will be felt: a step of training asks for thousands of scores."""
SLOW_MODEL_S = 1.0
"""The same for a reward that asks a model: requests run beside each other and beside the rollouts."""
STRONG = 0.5
"""Correlation that a reader should know of."""
MAX_SHOWN_PARTS = 6
JUDGE = "judge"
"""Name of the model under rewards.models."""
PLAIN = re.compile(r"[A-Za-z0-9_./:@%+-]+")
"""A text that a setting needs no quotes for ..."""
OTHER = re.compile(r"(?i)true|false|null|[+-]?(inf|nan|[0-9_.]+(e[+-]?[0-9_]+)?)")
"""... unless it would be read as something else."""
ABOUT = {
    Subject.step: "scores one step",
    Subject.trajectory: "scores one whole trajectory",
    Subject.step_pair: "compares two steps tried at the same fork, in both orders",
    Subject.trajectory_pair: "compares two trajectories of a prompt, in both orders",
    Subject.steps: "scores all steps of a tree at once",
    Subject.trajectories: "scores all trajectories of a tree at once",
    Subject.tree: "scores a whole tree, for each of its trajectories",
}
"""What one call is about."""


class Verdict(StrEnum):
    """What a finding means for a run."""

    ok = "ok"
    warning = "warning"
    failure = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    what: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, slots=True)
class RewardCheck:
    """All that was found of one reward."""

    findings: list[Finding]
    setting: str
    """The settings that add it to a run, as they are typed."""
    was_tried: bool = True
    """False for one that needs a run to be tried in."""

    @property
    def passed(self) -> bool:
        """Whether a run may use it."""
        return all(finding.verdict is not Verdict.failure for finding in self.findings)


def recorded_trees_of(place: str) -> list[RecordedTree]:
    """Trees of a run's newest record, of one recorded file, or for "" of the sample that ships.

    Raises: DataError when there are none; ConfigError when the place does not exist.
    """
    path = Path(place) if place else SAMPLE
    if path.is_dir():
        files = RunFolder(path).tree_files()
        if not files:
            raise DataError(
                f"{path} holds no recorded trees: nothing to try the reward on. Record some with "
                f"run.record_every_steps=1, or leave --trees away for the sample that ships."
            )
        path = files[-1]
    if not path.is_file():
        raise ConfigError(f'--trees "{place}" is neither the folder of a run nor a recorded file such as trees/*.gz.')
    found = [each for each in read_trees(path) if each.tree.trained_leaves()]
    if not found:
        raise DataError(f"{path} holds no tree with a trajectory that may train. Give another step's record.")
    return found


def model_of(text: str) -> RewardModelConfig:
    """The record of a model from what was typed as YAML, e.g. "{url: http://127.0.0.1:8000/v1, path: judge}".

    Raises: ConfigError as the same text after rewards.models.NAME= would.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    typed = _flow(values) if isinstance(values, Mapping) else text
    return compose([f"rewards.models.{JUDGE}={typed}"]).rewards.models[JUDGE]


def check_reward(
    fn: str,
    recorded: Sequence[RecordedTree],
    *,
    args: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    level: str = "",
    timeout_s: float = SourceConfig().timeout_s,
    model: RewardModelConfig | None = None,
) -> RewardCheck:
    """Try a reward on recorded trees.

    Args:
        fn: as rewards.sources.NAME.fn.
        recorded: at least one tree; of many, the first are tried.
        args: as rewards.sources.NAME.args.
        columns: data columns that the prompts of the trees lack.
        level: as rewards.sources.NAME.level.
        timeout_s: as rewards.sources.NAME.timeout_s.
        model: what a function that asks for `model` gets.
    Raises: ConfigError when it cannot be loaded, or asks for something that nothing can fill.
    """
    name = fn.rpartition(":")[2].rpartition(".")[2]
    cfg = SourceConfig(fn=fn, args=dict(args or {}), level=level, timeout_s=timeout_s, model=JUDGE if model else "")
    models = {JUDGE: model} if model else {}
    tried = recorded[: MAX_TREES_OF_MODEL if model else MAX_TREES]
    trees = [with_columns(each.tree, columns or {}) for each in tried]
    source = _loaded(name, cfg, trees[0])
    findings = [Finding("arguments", Verdict.ok, _about(source, trees))]
    unsent = _unsent(cfg.args, columns or {})
    if unsent:
        return RewardCheck([*findings, Finding("sent", Verdict.failure, unsent)], "")
    if ENGINE in source.services:
        detail = "it goes on from steps with the engines of a run, so it can be tried in a run alone; with weight 0 its"
        findings.append(Finding("engine", Verdict.warning, f"{detail} scores are recorded and train nothing"))
        return RewardCheck(findings, setting_of(name, cfg, models, weight=0), was_tried=False)
    if len(tried) < len(recorded):
        findings.append(Finding("trees", Verdict.ok, f"the first {len(tried)} of {len(recorded)} that are recorded"))

    rewards = RewardsConfig(sources={name: cfg}, models=models, num_processes=1)
    first = _scored(rewards, trees)
    findings += [_sent(source), _statuses(first, name, rewards.max_failed_share, len(trees))]
    check = RewardCheck(findings, setting_of(name, cfg, models))
    if not check.passed:
        return check  # whatever else it says of such a reward would take long and mean little
    again = _scored(rewards, trees)
    odd = odd_trees(trees[0], asks_model=bool(model))
    answers = _scored(rewards, list(odd.values()))
    scores = _scores(first, name)
    findings += [
        *_values(scores),
        *_parts(scores),
        _determinism([_said(each, name) for each in first], [_said(each, name) for each in again]),
        _time(sum(each.costs[name].seconds for each in again), len(scores), asks_model=bool(model)),
        *_cost([each.costs[name] for each in first], len(scores)),
        *_oddities(dict(zip(odd, answers, strict=False)), name),
        *_correlations(first, tried[: len(first)], name, of_steps=source.level is Level.step),
    ]
    return check


def check_table(check: RewardCheck) -> Table:
    """For the terminal."""
    title = "fit for a run" if check.was_tried else "to be tried in a run"
    table = Table("", "checked", "found", title=title if check.passed else "not fit for a run")
    marks = {Verdict.ok: "[green]ok", Verdict.warning: "[yellow]look", Verdict.failure: "[red]fails"}
    for finding in check.findings:
        table.add_row(marks[finding.verdict], finding.what, escape(finding.detail))
    return table


def setting_of(
    name: str, source: SourceConfig, models: Mapping[str, RewardModelConfig] | None = None, *, weight: float = 0.2
) -> str:
    """What to type after `grove train`, quoted for a shell: the models that it asks, and the source."""
    settings = {f"rewards.models.{key}": _changed(model) for key, model in (models or {}).items()}
    settings[f"rewards.sources.{name}"] = {**_changed(replace(source, weight=weight)), "weight": weight}
    return " ".join(shlex.quote(f"{key}={_flow(values)}") for key, values in settings.items())


def _changed(record: Any) -> dict[str, Any]:
    """Fields of a record that differ from their default."""
    values = {each.name: getattr(record, each.name) for each in dataclasses.fields(record)}
    usual = type(record)()
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in values.items()
        if value != getattr(usual, name)
    }


def _flow(value: Any) -> str:
    """A plain value as a setting is typed."""
    match value:
        case Mapping():
            return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
        case list() | tuple():
            return f"[{', '.join(map(_flow, value))}]"
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case int() | float():
            return str(value)
    text = str(value)
    if PLAIN.fullmatch(text) and not OTHER.fullmatch(text):
        return text
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + (r"\"" if found[2] else ""), text)
    return f'"{escaped}"'


def with_columns(tree: Tree, columns: Mapping[str, Any]) -> Tree:
    """The tree with more columns beside its prompt's own."""
    if not columns:
        return tree
    return replace(tree, prompt=replace(tree.prompt, data={**tree.prompt.data, **columns}))


def odd_trees(tree: Tree, *, asks_model: bool = False) -> dict[str, Tree]:
    """What a policy sooner or later does: a tree with steps that say nothing, and one with steps that never end.

    Args:
        asks_model: one long step is enough then, for every letter of it may be paid for.
    """

    def with_text(text: str) -> Tree:
        nodes = [replace(node, action_text=text, observation_text=text) for node in tree.nodes]
        return replace(tree, nodes=nodes)

    if not asks_model:
        return {"empty steps": with_text(""), "steps of a megabyte": with_text(HUGE)}
    nodes, last = list(tree.nodes), tree.trained_leaves()[-1]
    nodes[last] = replace(nodes[last], action_text=LONG)
    return {"empty steps": with_text(""), f"a step of {len(LONG) // 1000} kB": replace(tree, nodes=nodes)}


def _loaded(name: str, cfg: SourceConfig, tree: Tree) -> Source:
    try:
        return Source(name, cfg, tree.prompt.data.keys())
    except ConfigError as error:
        hints = {
            "nothing can fill": "To try it here, give what is missing with --column NAME=VALUE, or --arg NAME=VALUE.",
            "no model is named": "To try it here, add --model '{url: http://127.0.0.1:8000/v1, path: the-model}'.",
            "is never asked": "To try it here, leave --model away.",
        }
        hint = "".join(f" {hint}" for part, hint in hints.items() if part in str(error))
        raise ConfigError(f"{error}{hint}") from error


def _about(source: Source, trees: Sequence[Tree]) -> str:
    calls = sum(len(source.calls(tree)) for tree in trees) / len(trees)
    asks = f"; asks a model ({source.cfg.model})" if MODEL in source.services else ""
    return f"{ABOUT[source.subject]}; {calls:.3g} {'call' if calls == 1 else 'calls'} a tree{asks}"


def _unsent(args: Mapping[str, Any], columns: Mapping[str, Any]) -> str:
    """Why arguments or columns do not get into a reward's process, or into a configuration."""
    for what, values in (("arguments", args), ("columns", columns)):
        try:
            pickle.dumps(values)
            yaml.safe_dump(dict(values))
        except Exception as error:  # pickle raises whatever an object's own class raises
            told = " ".join(str(error).split())
            return (
                f"its {what} cannot be sent to the process it runs in: {type(error).__name__}: {told}. Give plain "
                f"values, as YAML has them, and make the rest of them in the constructor of a class"
            )
    return ""


def _scored(cfg: RewardsConfig, trees: Sequence[Tree]) -> list[ScoredTree]:
    """By a service of their own, so that asking again meets another process, with another seed of `hash`, and no cache.

    A reward that hangs is given up on: after the first tree, or where more hang than may fail.
    """
    (name,) = cfg.sources

    async def score(service: RewardService) -> list[ScoredTree]:
        scored: list[ScoredTree] = []
        for tree in trees:
            scored.append(await service.score(tree))
            late = sum(_is_late(each, name) for each in scored)
            if late and (len(scored) == 1 or late > cfg.max_failed_share * len(trees)):
                break
        return scored

    assert not cfg.cache_path, "scores that outlive a service would be the same again"
    service = RewardService(cfg, trees[0].prompt.data.keys())
    try:
        return asyncio.run(score(service))
    finally:
        service.close()


def _said(scored: ScoredTree, name: str) -> dict[int, Score]:
    return {**scored.step_scores, **scored.leaf_scores}[name]


def _scores(scored: Sequence[ScoredTree], name: str) -> list[Score]:
    return [score for each in scored for score in _said(each, name).values()]


def _is_late(scored: ScoredTree, name: str) -> bool:
    """Whether nothing of a tree was answered in time."""
    found = {score.status for score in _said(scored, name).values()}
    return ScoreStatus.timed_out in found and ScoreStatus.scored not in found


def _sent(source: Source) -> Finding:
    """Its arguments were pickled and written as YAML before the first pass; scores come back as plain numbers."""
    way = "is asked in the run's own process" if source.runs_here else "its arguments reach the process it runs in"
    return Finding("sent", Verdict.ok, way)


def _statuses(scored: Sequence[ScoredTree], name: str, max_failed_share: float, num_trees: int) -> Finding:
    counts = score_counts(scored)[name]
    text = ", ".join(f"{counts[status]} {status.value.replace('_', ' ')}" for status in ScoreStatus if counts[status])
    broken = [score for score in _scores(scored, name) if score.status in BROKEN]
    if not broken:
        if counts[ScoreStatus.scored]:
            return Finding("scores", Verdict.ok, text)
        return Finding("scores", Verdict.failure, f"{text}: it has nothing to say of any of these trees")
    share = len(broken) / (len(broken) + counts[ScoreStatus.scored])
    verdict = Verdict.failure if share > max_failed_share else Verdict.warning
    left = f"; the other {num_trees - len(scored)} trees were not tried" if len(scored) < num_trees else ""
    return Finding("scores", verdict, f"{text}; first error: {broken[0].reason}{left}")


def _values(scores: Sequence[Score]) -> Iterator[Finding]:
    values = [score.value for score in scores if score.is_scored]
    if not values:
        return
    low, high, mean = min(values), max(values), statistics.fmean(values)
    text = f"from {low:.3g} to {high:.3g}, mean {mean:.3g}, {len(set(values))} different"
    if low == high:
        yield Finding("values", Verdict.warning, f"always {low:.3g}: nothing is told apart, so nothing is learned")
    elif max(abs(low), abs(high)) > 10:
        yield Finding("values", Verdict.warning, f"{text}: far from [-1, 1], so choose its weight with care")
    else:
        yield Finding("values", Verdict.ok, text)


def _parts(scores: Sequence[Score]) -> Iterator[Finding]:
    values: dict[str, list[float]] = {}
    for score in scores:
        for part, value in score.parts.items():
            values.setdefault(part, []).append(value)
    if not values:
        return
    ends = {part: (min(each), max(each)) for part, each in values.items()}
    shown = [
        f"{part} always {low:.3g}" if low == high else f"{part} from {low:.3g} to {high:.3g}"
        for part, (low, high) in ends.items()
    ]
    more = f" and {len(shown) - MAX_SHOWN_PARTS} more" if len(shown) > MAX_SHOWN_PARTS else ""
    text = f"{len(shown)} named: {', '.join(shown[:MAX_SHOWN_PARTS])}{more}"
    if any(low == high for low, high in ends.values()):
        yield Finding("parts", Verdict.warning, f"{text}; a part that is always the same teaches nothing")
    else:
        yield Finding("parts", Verdict.ok, text)


def _determinism(first: list[dict[int, Score]], again: list[dict[int, Score]]) -> Finding:
    pairs = [(one[row], other[row]) for one, other in zip(first, again, strict=False) for row in one]
    differing = sum(
        one.status is not other.status or (one.is_scored and (one.value, one.parts) != (other.value, other.parts))
        for one, other in pairs
    )
    if differing:
        text = f"{differing} of {len(pairs)} scores differ when another process is asked: no run can be repeated"
        return Finding("determinism", Verdict.warning, text)
    return Finding("determinism", Verdict.ok, "the same when another process is asked")


def _time(seconds: float, num_scores: int, *, asks_model: bool) -> Finding:
    each_s = seconds / max(1, num_scores)
    if asks_model:
        text = f"{each_s * 1e3:,.3g} milliseconds a score, the requests of a tree beside each other"
    else:
        text = f"{each_s * 1e6:,.0f} microseconds a score, the process and its pipe included"
    if each_s > (SLOW_MODEL_S if asks_model else SLOW_S):
        return Finding("time", Verdict.warning, f"{text}: a step of training asks for thousands")
    return Finding("time", Verdict.ok, text)


def _cost(costs: Sequence[Cost], num_scores: int) -> Iterator[Finding]:
    """What its model took; nothing of a reward that asks none."""
    requests, usd = sum(each.requests for each in costs), sum(each.usd for each in costs)
    if not requests:
        return
    prompt, reply = sum(each.prompt_tokens for each in costs), sum(each.reply_tokens for each in costs)
    repeated = sum(each.tries for each in costs) - requests
    calls, cached = sum(each.calls for each in costs), sum(each.cached_calls for each in costs)
    text = f"{requests / num_scores:.3g} requests a score"
    if prompt or reply:
        text += f", each of {prompt / requests:,.0f} prompt and {reply / requests:,.0f} reply tokens"
    if usd:
        text += f"; {usd / num_scores:.2g} dollars a score"
    if cached:
        text += f"; {cached} of {calls} calls were equal to another and not asked again"
    if repeated > 0:
        yield Finding("cost", Verdict.warning, f"{text}; {repeated} requests had to be repeated")
    else:
        yield Finding("cost", Verdict.ok, text)


def _oddities(odd: Mapping[str, ScoredTree], name: str) -> Iterator[Finding]:
    for what, scored in odd.items():
        broken = [score for score in _scores([scored], name) if score.status in BROKEN]
        if broken:
            yield Finding(what, Verdict.warning, f"{len(broken)} scores break: {broken[0].reason}")
        else:
            yield Finding(what, Verdict.ok, "answered")


def _correlations(
    scored: Sequence[ScoredTree], recorded: Sequence[RecordedTree], name: str, *, of_steps: bool
) -> Iterator[Finding]:
    forest = forest_of([replace(each, step_signals=each.step_scores, leaf_signals=each.leaf_scores) for each in scored])
    tokens_N = forest.num_actions_N.double()
    if of_steps:
        value_N = forest.step_signals[name]
        value_L = path_mean(forest, value_N)
        length = within_correlation(value_N, tokens_N, forest.prompt_N)
    else:
        value_L = forest.leaf_signals[name]
        length = within_correlation(value_L, path_sum(forest, tokens_N), forest.prompt_L)
    if math.isfinite(length):
        detail = f"correlation {length:+.2f} within prompts"
        if abs(length) > STRONG:
            way = "long" if length > 0 else "short"
            yield Finding("length", Verdict.warning, f"{detail}: the policy may learn to be {way} instead of good")
        else:
            yield Finding("length", Verdict.ok, detail)
    outcome_L = outcomes([each.scored for each in recorded], forest)
    agrees = agreement(value_L, outcome_L, forest.prompt_L)
    if math.isfinite(agrees):
        detail = f"puts {agrees:.0%} of the pairs with different outcomes in the right order; 50% is chance"
        verdict = Verdict.warning if agrees < STRONG else Verdict.ok
        yield Finding("outcome", verdict, detail if agrees >= STRONG else f"{detail}: it pays for what leads nowhere")
