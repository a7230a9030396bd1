"""A run for people: the curve, a one-page report, and one tree with every step's scores and credit.

Reads the run folder and nothing else, so that a report can be made again on any machine, long after the run.
"""

from __future__ import annotations

import base64
import json
import logging
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml
from rich.text import Text
from rich.tree import Tree as TextTree

from conf.errors import DataError
from rewards.types import Score, ScoreStatus
from rl.metrics import read_metrics
from rl.plan import LIMITS, PARTS
from rl.record import RecordedTree, read_trees
from rl.run_folder import RunFolder
from rl.view_time import duration_text, time_section
from rollout.tree import ROOT, Node
from rollout.types import StopReason

logger = logging.getLogger(__name__)

HELD_OUT, TRAINING, TOKENS = "eval/success_share", "rollout/success_share", "rollout/total_generated_tokens"
SMOOTH_STEPS = 5
"""Steps in the running mean of training success; one step's batch is small and noisy."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Run:
    """What a report is made of."""

    folder: RunFolder
    rows: list[Row]
    config: dict[str, Any]
    versions: dict[str, str]
    summary: dict[str, Any]

    def setting(self, key: str, default: Any = "") -> Any:
        """A setting by its dotted name."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part, {}) if isinstance(value, dict) else {}
        return default if value == {} else value

    def series(self, name: str) -> list[float]:
        """A metric's values, steps without it left out."""
        return [row[name] for row in self.rows if row.get(name) is not None]


def write_report(run_dir: Path) -> Path:
    """Write curve.png and report.html into a run folder, from what lies there.

    Returns: the report.
    Raises: DataError when the folder holds no run.
    """
    folder = RunFolder(run_dir)
    if not folder.metrics.exists():
        raise DataError(
            f"{run_dir} holds no run (there is no {folder.metrics.name}): nothing can be drawn. Give the folder that "
            f"run.dir named, e.g. runs/hop_search-seed0."
        )
    run = _Run(
        folder=folder,
        rows=read_metrics(folder.metrics),
        config=yaml.safe_load(folder.config.read_text(encoding="utf-8")) if folder.config.exists() else {},
        versions=json.loads(folder.versions.read_text(encoding="utf-8")) if folder.versions.exists() else {},
        summary=folder.read_summary(),
    )
    draw_curve(run.rows, folder.curve)
    # a model may write half a character; the page shows a question mark there
    folder.report.write_text(_page(run), encoding="utf-8", errors="replace")
    return folder.report


def draw_curve(rows: list[Row], path: Path) -> None:
    """Draw held-out and training success against generated tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens, shares = _points(rows, TRAINING)
    axes.plot(tokens, shares, color="#d97a2b", alpha=0.3, linewidth=1)
    axes.plot(
        tokens, running_mean(shares), color="#d97a2b", linewidth=1.8, label=f"training, mean of {SMOOTH_STEPS} steps"
    )
    tokens, shares = _points(rows, HELD_OUT)
    axes.plot(tokens, shares, color="#2563a8", linewidth=2.2, marker="o", markersize=5, label="held-out")
    for place in {0, len(shares) - 1} if shares else ():
        axes.annotate(
            f"{shares[place]:.1%}", (tokens[place], shares[place]), (0, 9), textcoords="offset points", ha="center"
        )
    axes.set(xlabel="generated tokens", ylabel="success", ylim=(0, 1.06))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=160)


def _points(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    found = [(row.get(TOKENS) or 0, row[name]) for row in rows if row.get(name) is not None]
    return [tokens for tokens, _ in found], [value for _, value in found]


def running_mean(values: list[float], window: int = SMOOTH_STEPS) -> list[float]:
    """Mean of each value and those before it, `window` at most."""
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def choose_tree(recorded: list[RecordedTree]) -> RecordedTree | None:
    """The tree that shows most: successes beside failures, then the most different advantages, then their spread."""
    return max((each for each in recorded if each.tree.nodes), key=_interest, default=None)


def _interest(recorded: RecordedTree) -> tuple[bool, int, float]:
    outcomes = {succeeded(recorded, leaf) for leaf in recorded.tree.leaves()} - {None}
    totals = [total for row in recorded.advantages if (total := recorded.total(row)) is not None]
    return len(outcomes) > 1, len({round(total, 3) for total in totals}), statistics.pstdev(totals) if totals else 0.0


def succeeded(recorded: RecordedTree, leaf: int) -> bool | None:
    """Whether a trajectory succeeded by the first trajectory source of the config; None when it was not scored."""
    first = next(iter(recorded.scored.leaf_scores.values()), {})
    score = first.get(leaf)
    return score.value > 0.5 if score is not None and score.is_scored else None


def _newest_tree(folder: RunFolder) -> tuple[str, RecordedTree] | None:
    """The tree to show, of the newest record that can be read, with the name of its step."""
    for file in reversed(folder.tree_files()):
        try:
            chosen = choose_tree(read_trees(file))
        except DataError as error:
            logger.warning("%s", error)
            continue
        if chosen is not None:
            return file.name.split(".")[0].removeprefix("step_").lstrip("0") or "0", chosen
    return None


def scores_of(recorded: RecordedTree, row: int) -> dict[str, Score]:
    """What every source said of a step, and of the trajectory when the step ended one."""
    tables = recorded.scored.step_scores | recorded.scored.leaf_scores
    return {name: by_row[row] for name, by_row in tables.items() if row in by_row}


def draw_tree_text(recorded: RecordedTree) -> TextTree:
    """A recorded tree for the terminal (`rich.print`)."""
    prompt = recorded.tree.prompt
    root = TextTree(Text(prompt.question, style="bold").append(f"   reference: {prompt.answer}", style="not bold dim"))
    drawn = {ROOT: root}
    for row, node in enumerate(recorded.tree.nodes):  # parents come first
        drawn[row] = drawn[node.parent].add(_step_text(recorded, row, node))
    return root


def _step_text(recorded: RecordedTree, row: int, node: Node) -> Text:
    total = recorded.total(row)
    text = Text(f"{total:+.3f} " if total is not None else "   -   ", style=_text_style(total))
    text.append(_one_line(node.action_text), style="default" if node.kept else "dim strike")
    if node.observation_text:
        text.append(f"  → {_one_line(node.observation_text)}", style="dim")
    for name, score in scores_of(recorded, row).items():
        text.append(f"  {name} {score_text(score)}", style="cyan" if score.is_scored else "magenta")
    if node.stop is not StopReason.continues:
        text.append(f"  [{node.stop}]", style="dim")
    return text


def _text_style(total: float | None) -> str:
    if not total:
        return "dim"
    return "bold blue" if total > 0 else "bold red"


def _one_line(text: str, limit: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def score_text(score: Score) -> str:
    """A score in a few characters; what has no number never looks like one."""
    match score.status:
        case ScoreStatus.scored:
            return f"{score.value:.3g}"
        case ScoreStatus.failed:
            return "✕ failed"
        case ScoreStatus.timed_out:
            return "✕ timed out"
        case ScoreStatus.not_applicable:
            return "n/a"


def _page(run: _Run) -> str:
    title = escape(str(run.setting("run.name", run.folder.path.name)))
    sections = (
        _headline(run),
        _curve(run),
        _settings(run),
        time_section(run.series),
        _cost(run),
        _rewards(run),
        _tree_section(run),
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body><header><p class=eyebrow>Grove run</p><h1>{title}</h1></header>\n{''.join(sections)}</body></html>\n"
    )


def _headline(run: _Run) -> str:
    shares = run.series(HELD_OUT)
    tokens = int(max(run.series(TOKENS), default=0))
    steps = run.rows[-1]["step"] if run.rows else 0
    seconds = run.summary.get("seconds") or sum(run.series("time/step_seconds"))
    facts = f"{steps:,} steps · {tokens:,} generated tokens · {duration_text(seconds)}"
    if not shares:
        return f"<section class=headline><p class=big>no held-out evaluation</p><p>{facts}</p></section>"
    error = run.summary.get("success_standard_error")
    error_text = f" <small>± {100 * error:.1f}</small>" if error is not None else ""
    gain = 100 * (shares[-1] - shares[0])
    return (
        f"<section class=headline><p class=label>Held-out success</p>"
        f"<p class=big>{shares[0]:.1%} <span class=arrow>→</span> <b>{shares[-1]:.1%}</b>{error_text}</p>"
        f"<p>{gain:+.1f} points · {facts}</p></section>"
    )


def _curve(run: _Run) -> str:
    picture = base64.b64encode(run.folder.curve.read_bytes()).decode("ascii")
    return (
        f'<section><img class=curve alt="Held-out and training success against generated tokens" '
        f'src="data:image/png;base64,{picture}"></section>'
    )


def _settings(run: _Run) -> str:
    rollout = f"{run.setting('rollout.expander')}, {run.setting('rollout.num_leaves')} trajectories per prompt"
    rows = {
        "model": run.setting("model.path") or "tiny Qwen3, warm-started on demonstrations",
        "task": run.setting("task.name"),
        "credit": run.setting("credit.name") or ", ".join(run.setting("credit.terms", {})),
        "expander": rollout,
        "prompts per step": run.setting("rollout.prompts_per_step"),
        "learning rate": run.setting("learner.learning_rate"),
        "engine": run.setting("rollout.engine"),
        "seed": run.setting("seed", 0),
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
    }
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<section><h2>Settings</h2><table>{cells}</table></section>"


def _cost(run: _Run) -> str:
    """What a tree was foreseen to cost and what it did, side by side."""
    plan = run.folder.read_plan()
    lines = {LIMITS: plan[LIMITS]} if LIMITS in plan else {}
    lines |= run.summary.get("cost_per_tree", {})
    if not lines:
        return ""
    head = "".join(f"<th>{part}</th>" for part in ("", *PARTS))
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{parts[part]:,.1f}</td>' for part in PARTS)}</tr>"
        for name, parts in lines.items()
    )
    return f"<section><h2>Cost of a tree</h2><table class=numbers><tr>{head}</tr>{rows}</table></section>"


def _rewards(run: _Run) -> str:
    names = sorted({name for row in run.rows for name in row if name.startswith("reward/") and name.endswith("_mean")})
    if not names:
        return ""
    rows = "".join(_reward_row(run, name.removeprefix("reward/").removesuffix("_mean")) for name in names)
    columns = ("", "first", "last", "over the run", "failed", "timed out", "seconds a tree")
    head = f"<tr>{''.join(f'<th>{column}</th>' for column in columns)}</tr>"
    return f"<section><h2>Rewards</h2><table class=numbers>{head}{rows}</table></section>"


def _reward_row(run: _Run, name: str) -> str:
    values = run.series(f"reward/{name}_mean")
    if not values:
        return ""
    lost = "".join(
        f"<td>{_share(run.series(f'reward/{name}_{status}_share'))}</td>" for status in ("failed", "timed_out")
    )
    return (
        f"<tr><th>{escape(name)}</th><td>{values[0]:.3f}</td><td>{values[-1]:.3f}</td>"
        f"<td>{_spark_svg(values)}</td>{lost}<td>{_seconds(run.series(f'reward/{name}_seconds'))}</td></tr>"
    )


def _seconds(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f}" if values else "-"


def _share(values: list[float]) -> str:
    """A mean share; a dash for a signal, which is summed from sources and cannot fail by itself."""
    return f"{statistics.fmean(values):.1%}" if values else "-"


def _spark_svg(values: list[float], width: int = 160, height: int = 26) -> str:
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    step = width / max(len(values) - 1, 1)
    points = " ".join(
        f"{place * step:.1f},{height - 3 - (value - low) / spread * (height - 6):.1f}"
        for place, value in enumerate(values)
    )
    return f'<svg width={width} height={height}><polyline points="{points}"/></svg>'


def _tree_section(run: _Run) -> str:
    found = _newest_tree(run.folder)
    if found is None:
        return ""
    step, recorded = found
    return (
        f"<section class=wide><h2>One tree of step {step}</h2>"
        f"<p class=legend>Each card is one step: what the policy wrote, what came back, what each source said, and its "
        f"advantage. <span class='chip up'>better than its peers</span> <span class='chip down'>worse</span> "
        f"<span class='score'>a score</span> <span class='score failed'>✕ no score: the source failed</span> "
        f"<span class='score none'>n/a: nothing to say</span></p>"
        f"<div class=scroll>{tree_html(recorded)}</div></section>"
    )


def tree_html(recorded: RecordedTree) -> str:
    """A recorded tree as nested HTML, growing from left to right."""
    prompt = recorded.tree.prompt
    totals = [abs(total) for row in recorded.advantages if (total := recorded.total(row)) is not None]
    largest = max(totals, default=0.0) or 1.0
    reference = f"<p class=seen>reference: {escape(prompt.answer)}</p>" if prompt.answer else ""
    children: dict[int, list[str]] = {row: [] for row in range(ROOT, len(recorded.tree.nodes))}
    for row in reversed(range(len(recorded.tree.nodes))):  # a step's children come after it, so they are drawn by now
        card = _card(recorded, row, largest)
        children[recorded.tree.nodes[row].parent].insert(0, _with_children(card, children[row]))
    return _with_children(f"<div class='card prompt'><p>{escape(prompt.question)}</p>{reference}</div>", children[ROOT])


def _with_children(card: str, children: Iterable[str]) -> str:
    below = "".join(children)
    return f"<div class=node>{card}{f'<div class=children>{below}</div>' if below else ''}</div>"


def _card(recorded: RecordedTree, row: int, largest: float) -> str:
    node, total = recorded.tree.nodes[row], recorded.total(row)
    seen = f"<p class=seen>→ {escape(node.observation_text)}</p>" if node.observation_text else ""
    pruned = "" if node.kept else " pruned"
    return (
        f"<div class='card {_sign(total)}{pruned}' style='--size:{abs(total or 0.0) / largest:.2f}'>"
        f"<p class=said>{escape(node.action_text)}</p>{seen}<div class=scores>{_scores_html(recorded, row)}</div>"
        f"<div class=foot><b title='{_terms(recorded, row)}'>"
        f"{'untrained' if total is None else f'{total:+.3f}'}</b>{_ending(recorded, row)}</div></div>"
    )


def _sign(total: float | None) -> str:
    if not total:
        return "flat"
    return "up" if total > 0 else "down"


def _terms(recorded: RecordedTree, row: int) -> str:
    """What the advantage is the sum of, and for each term what became of its raw value."""
    parts = []
    for name, value in recorded.advantages.get(row, {}).items():
        raw, compared = (table.get(row, {}).get(name) for table in (recorded.raw, recorded.compared))
        made_of = f" (raw {raw:.3g}, compared {compared:+.3f})" if raw is not None and compared is not None else ""
        parts.append(f"{name} {value:+.3f}{made_of}")
    return escape("advantage: " + ", ".join(parts))


def _scores_html(recorded: RecordedTree, row: int) -> str:
    looks = {
        ScoreStatus.scored: "",
        ScoreStatus.failed: "failed",
        ScoreStatus.timed_out: "failed",
        ScoreStatus.not_applicable: "none",
    }
    return "".join(
        f"<span class='score {looks[score.status]}' title='{escape(score.reason)}'>"
        f"{escape(name)} {score_text(score)}</span>"
        for name, score in scores_of(recorded, row).items()
    )


def _ending(recorded: RecordedTree, row: int) -> str:
    node = recorded.tree.nodes[row]
    if not node.kept:
        return "<span class=end>pruned</span>"
    if node.stop is StopReason.continues:
        return ""
    mark = {True: "✓ ", False: "✗ ", None: ""}[succeeded(recorded, row)]
    left_out = f", left out: {recorded.left_out[row]}" if row in recorded.left_out else ""
    return f"<span class=end>{mark}{escape(node.stop.value.replace('_', ' ') + left_out)}</span>"


STYLE = """
:root{color-scheme:light;--ink:#1d2530;--dim:#667085;--line:#d5dae1;--up:37,99,168;--down:200,78,20}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1000px;padding:40px 28px 60px;background:#fff;color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{margin:0;font-size:28px;letter-spacing:-.01em}h2{margin:0 0 12px;font-size:17px}
p{margin:0}section{margin-top:36px}.eyebrow,.label{color:var(--dim);font-size:13px}
.headline{padding:22px 26px;border-radius:10px;background:#f4f6f9}
.headline p:last-child{color:var(--dim)}.big{font-size:40px;line-height:1.25;letter-spacing:-.02em;color:var(--dim)}
.big b{color:var(--ink)}.big small{font-size:18px}.arrow{color:#b3bac4}
.curve{display:block;width:100%;max-width:860px}
table{border-collapse:collapse;width:100%}th{text-align:left;font-weight:500;color:var(--dim);white-space:nowrap}
th,td{padding:6px 18px 6px 0;border-bottom:1px solid #edf0f3;vertical-align:middle}
td{overflow-wrap:anywhere}.numbers td{font-variant-numeric:tabular-nums}
svg polyline{fill:none;stroke:#2563a8;stroke-width:1.6;stroke-linejoin:round}svg{display:block}
.bar{display:flex;height:26px;border-radius:6px;overflow:hidden}.bar i{min-width:2px}
.key{display:flex;flex-wrap:wrap;gap:4px 22px;margin:12px 0 0;padding:0;list-style:none;color:var(--dim)}
.key b{color:var(--ink);font-weight:500}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px}
.parts{display:grid;grid-template-columns:max-content 1fr max-content;gap:6px 14px;align-items:center;margin-top:22px}
.parts .bar{height:14px;background:#edf0f3}.parts span{color:var(--dim);font-variant-numeric:tabular-nums}
.wide{width:calc(100vw - 56px);margin-left:calc(50% - 50vw + 28px)}
.wide h2,.legend{max-width:944px;margin-left:auto;margin-right:auto}.legend{color:var(--dim);margin-bottom:14px}
.scroll{overflow-x:auto;padding:14px 0 24px}.scroll>.node{width:max-content;margin:0 auto}
.node{display:flex;align-items:center}
.children{position:relative;margin-left:16px;display:flex;flex-direction:column}
.children::before{content:"";position:absolute;left:-16px;top:50%;width:16px;border-top:2px solid var(--line)}
.children>.node{position:relative;padding:5px 0 5px 18px}
.children>.node::before{content:"";position:absolute;left:0;top:50%;width:18px;border-top:2px solid var(--line)}
.children>.node::after{content:"";position:absolute;left:0;top:0;bottom:0;border-left:2px solid var(--line)}
.children>.node:first-child::after{top:50%}.children>.node:last-child::after{bottom:calc(50% - 2px)}
.children>.node:only-child::after{display:none}
.card{flex:none;width:208px;padding:8px 10px;border:1px solid var(--line);border-left-width:5px;border-radius:7px;
 background:#fff;font-size:12px;line-height:1.4}
.card.prompt{width:230px;background:#f4f6f9;font-size:13px}
.said{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:11.5px}
.said,.seen,.prompt p{max-height:9em;overflow:auto;overflow-wrap:anywhere;white-space:pre-wrap}
.seen{color:var(--dim);margin-top:3px}
.scores{display:flex;flex-wrap:wrap;gap:3px;margin-top:5px}
.score{padding:0 6px;border-radius:9px;background:#eceff3;font-size:11px;white-space:nowrap}
.score.failed{background:repeating-linear-gradient(135deg,#fde3e3 0 5px,#fff 5px 10px);outline:1px solid #d64545;
 outline-offset:-1px;color:#a61b1b}
.score.none{background:none;outline:1px dashed #b3bac4;outline-offset:-1px;color:var(--dim)}
.foot{display:flex;justify-content:space-between;margin-top:6px;font-variant-numeric:tabular-nums}
.end{color:var(--dim)}
.up{border-left-color:rgb(var(--up));background:rgba(var(--up),calc(.04 + .2*var(--size,1)))}
.up .foot b{color:rgb(var(--up))}
.down{border-left-color:rgb(var(--down));background:rgba(var(--down),calc(.04 + .2*var(--size,1)))}
.down .foot b{color:rgb(var(--down))}.flat .foot b{color:var(--dim)}
.chip{white-space:nowrap;padding:0 8px;border-left:4px solid;border-radius:4px;color:var(--ink)}
.chip.up{border-left-color:rgb(var(--up))}.chip.down{border-left-color:rgb(var(--down))}
.pruned{opacity:.55;border-style:dashed}
@media print{.wide{width:auto;margin-left:0}.scroll{overflow:visible}}
"""
"""The page's whole look; nothing is fetched from anywhere."""
