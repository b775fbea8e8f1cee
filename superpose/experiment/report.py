"""The report of a comparison: summaries over seeds, a terminal table, plots, and one HTML page that needs nothing else.

Everything here reads ``results``, the dictionary that `superpose.experiment.compare` writes to results.json. Arms are compared
by validation loss alone, which is plain next-token loss in every stage; the training loss of a superposed stage is a bag loss,
another quantity, and is only ever shown, in a panel of its own.
"""

import base64
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from string import Template
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

#: Okabe and Ito's palette, safe for the colour-blind: black for the baseline, and yellow, weak on white, last.
BASELINE_COLOUR = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")

COLUMNS = (
    "arm",
    "seeds",
    "final loss, nats",
    "against baseline",
    "bits per byte",
    "speed-up",
    "data tokens",
    "compute",
    "time",
    "positions/s",
)

COUNT_PREFIXES = ("", "K", "M", "B", "T")
FLOPS_PREFIXES = ("", "K", "M", "G", "T", "P", "E", "Z", "Y")


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds. Means leave diverged runs out; None where nothing is left to average.

    Losses are validation losses in nats per token. Differences are arm minus baseline, paired by seed: negative is better.
    """

    name: str
    #: Name of the arm that this one is measured against; its own name for the baseline.
    baseline: str
    #: Seeds that trained to a finite loss, and those that did not.
    seeds: tuple[int, ...]
    diverged: tuple[int, ...]
    final_loss: float | None
    #: Sample standard deviation over seeds; None below two seeds.
    final_loss_deviation: float | None
    bits_per_byte: float | None
    #: Seeds that both this arm and the baseline finished.
    pairs: int
    difference: float | None
    difference_deviation: float | None
    bits_per_byte_difference: float | None
    data_tokens: float | None
    flops: float | None
    seconds: float | None
    positions_per_second: float | None
    #: Step at which the validation loss first reaches the baseline's final loss, linear between evaluations; None unless
    #: every pair reaches it, because a mean over the lucky seeds alone would flatter the arm.
    steps_to_baseline_loss: float | None
    #: The baseline's steps divided by ``steps_to_baseline_loss``.
    speed_up: float | None


def summarise(results: dict[str, Any]) -> list[ArmSummary]:
    """One summary an arm, in the order of the results. The baseline is the arm of that name, else the first."""
    baseline = _baseline(results)
    references = {run["seed"]: run for run in _finished(baseline)}
    steps = sum(stage["steps"] for stage in baseline["schedule"]["stages"])
    return [_summarise(arm, baseline["name"], references, steps) for arm in results["arms"]]


def _summarise(arm: dict[str, Any], baseline: str, references: dict[int, dict[str, Any]], baseline_steps: int) -> ArmSummary:
    runs = _finished(arm)
    pairs = [(run, references[run["seed"]]) for run in runs if run["seed"] in references]
    differences = [run["final_loss"] - reference["final_loss"] for run, reference in pairs]
    reached = [_step_reaching(run["evaluations"], reference["final_loss"]) for run, reference in pairs]
    steps = _mean(step for step in reached if step is not None) if None not in reached else None
    losses = [run["final_loss"] for run in runs]
    return ArmSummary(
        name=arm["name"],
        baseline=baseline,
        seeds=tuple(run["seed"] for run in runs),
        diverged=tuple(run["seed"] for run in arm["runs"] if _diverged(run)),
        final_loss=_mean(losses),
        final_loss_deviation=_deviation(losses),
        bits_per_byte=_mean(run["bits_per_byte"] for run in runs),
        pairs=len(pairs),
        difference=_mean(differences),
        difference_deviation=_deviation(differences),
        bits_per_byte_difference=_mean(run["bits_per_byte"] - reference["bits_per_byte"] for run, reference in pairs),
        data_tokens=_mean(run["data_tokens"] for run in runs),
        flops=_mean(run["flops"] for run in runs),
        seconds=_mean(run["seconds"] for run in runs),
        positions_per_second=_mean(run["positions"] / run["seconds"] for run in runs if run["seconds"]),
        steps_to_baseline_loss=steps,
        speed_up=baseline_steps / steps if steps else None,
    )


def _baseline(results: dict[str, Any]) -> dict[str, Any]:
    arms = results["arms"]
    return next((arm for arm in arms if arm["name"] == "baseline"), arms[0])


def _diverged(run: dict[str, Any]) -> bool:
    return run.get("diverged", False) or not math.isfinite(_number(run["final_loss"]))


def _finished(arm: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in arm["runs"] if not _diverged(run)]


def _step_reaching(evaluations: Sequence[dict[str, Any]], loss: float) -> float | None:
    before: tuple[float, float] | None = None
    for row in evaluations:
        step, value = row["step"], _number(row["eval_loss"])
        if value <= loss:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value) if math.isfinite(value) else None
    return None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


# Words and tables


def verdict(summaries: Sequence[ArmSummary]) -> str:
    """What the comparison shows, in a few plain sentences, with its uncertainty: the best arm against the baseline."""
    base = next(arm for arm in summaries if arm.name == arm.baseline)
    others = [arm for arm in summaries if arm is not base]
    # An arm that lost a seed is not ranked above one that finished them all.
    compared = [arm for arm in others if arm.difference is not None]
    ranked = sorted(compared, key=lambda arm: (len(arm.diverged), _number(arm.difference)))
    diverged = [f"{arm.name} (seed {', '.join(map(str, arm.diverged))})" for arm in summaries if arm.diverged]
    if ranked:
        sentences = [_outcome(ranked[0], base), _data_used(compared, base)]
    else:
        sentences = ["There is no finished pair of an arm and its baseline to compare."]
    if diverged:
        sentences.append(f"Diverged and left out: {', '.join(diverged)}.")
    return " ".join(sentences)


def _outcome(best: ArmSummary, base: ArmSummary) -> str:
    ahead = _number(best.difference) < 0
    cost = _number(best.flops) / _number(base.flops)
    budget = "at equal FLOPs" if abs(cost - 1) < 0.01 else f"at {cost:.2f}× its FLOPs"
    gap = f"{abs(_number(best.difference)):.4f} nats ({abs(_number(best.bits_per_byte_difference)):.4f} bits per byte) {budget}"
    if ahead:
        outcome = f"{best.name} is ahead of {base.name} by {gap}"
    else:
        outcome = f"No arm beats {base.name}: the closest, {best.name}, is behind by {gap}"
    if best.difference_deviation is None:
        spread = "; with one seed the spread is unknown, so repeat it with --seeds 3."
    else:
        clear = abs(_number(best.difference)) > 2 * best.difference_deviation
        spread = (
            f", which is {'more' if clear else 'not more'} than twice the spread over {best.pairs} seeds "
            f"(standard deviation of the paired differences: {best.difference_deviation:.4f})"
        )
        spread += "." if clear or not ahead else ": this is not a clear gain."
    plain = " At this size and budget superposition does not pay." if not ahead and base.name == "baseline" else ""
    return outcome + spread + plain


def _data_used(arms: Sequence[ArmSummary], base: ArmSummary) -> str:
    baseline = _number(base.data_tokens)
    used = [f"{arm.name} {quantity(arm.data_tokens)} ({_number(arm.data_tokens) / baseline:.2f}×)" for arm in arms]
    return f"Data tokens: {base.name} {quantity(baseline)}, {', '.join(used)}."


def table(summaries: Sequence[ArmSummary]) -> Table:
    """The results for a terminal: an arm a column, so that a few arms fit into 80 characters."""
    result = Table(box=SIMPLE_HEAD, pad_edge=False)
    result.add_column(overflow="fold")
    for arm in summaries:
        result.add_column(Text(arm.name), justify="right", overflow="fold")
    for name, *values in zip(COLUMNS[1:], *(_cells(arm)[1:] for arm in summaries), strict=True):
        result.add_row(*map(Text, [name, *values]))
    return result


def _cells(arm: ArmSummary) -> list[str]:
    is_baseline = arm.name == arm.baseline
    return [
        arm.name,
        str(len(arm.seeds)) + (f" ({len(arm.diverged)} diverged)" if arm.diverged else ""),
        _plus_minus(arm.final_loss, arm.final_loss_deviation) if arm.seeds else "diverged",
        "–" if is_baseline else _plus_minus(arm.difference, arm.difference_deviation, "+"),
        _or_dash(arm.bits_per_byte, lambda value: f"{value:.4f}"),
        _or_dash(None if is_baseline else arm.speed_up, lambda value: f"{value:.2f}×"),
        quantity(arm.data_tokens),
        _or_dash(arm.flops, lambda value: _short(value, FLOPS_PREFIXES, "FLOPs")),
        _or_dash(arm.seconds, duration),
        quantity(arm.positions_per_second),
    ]


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return text(value) if value is not None and math.isfinite(value) else "–"


def _plus_minus(mean: float | None, deviation: float | None, sign: str = "") -> str:
    text = _or_dash(mean, lambda value: f"{value:{sign}.4f}".replace("-", "−"))
    return text if deviation is None else f"{text} ± {deviation:.4f}"


def quantity(value: float | None) -> str:
    """A count in three digits and a prefix: 12300000 is 12.3M; a dash for None."""
    return _or_dash(value, _short)


def _short(value: float, prefixes: Sequence[str] = COUNT_PREFIXES, unit: str = "") -> str:
    scale, prefix = _scale(value, prefixes)
    digits = f"{value / scale:#.3g}".rstrip(".") if scale > 1 else f"{value:.3g}"
    return f"{digits} {prefix}{unit}" if unit else digits + prefix


def _scale(peak: float, prefixes: Sequence[str] = COUNT_PREFIXES) -> tuple[float, str]:
    # 999.5 rounds to four digits: it belongs to the next prefix.
    power = next((i for i in range(len(prefixes)) if peak < 999.5 * 1000.0**i), len(prefixes) - 1)
    return 1000.0**power, prefixes[power]


def duration(seconds: float) -> str:
    """Seconds as people say them: 42.0 s, 12 min 5 s, 3 h 20 min, 4 d 6 h."""
    whole = round(seconds)
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // small} {small_name}"
    return f"{seconds:.1f} s"


# Plots

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "text.parse_math": False,  # arm names are text, whatever they hold
}


def write_plots(results: dict[str, Any], out: Path) -> list[Path]:
    """Write loss.png, final.png and training.png into ``out``, which exists, and return their paths."""
    paths = []
    with mpl.rc_context(STYLE):
        for name, draw in (("loss", _draw_loss), ("final", _draw_final), ("training", _draw_training)):
            paths.append(out / f"{name}.png")
            draw(results).savefig(paths[-1])
    return paths


def _colours(results: dict[str, Any]) -> dict[str, str]:
    baseline = _baseline(results)["name"]
    others = [arm["name"] for arm in results["arms"] if arm["name"] != baseline]
    return {baseline: BASELINE_COLOUR} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}


def _switches(arm: dict[str, Any]) -> list[int]:
    lengths = [stage["steps"] for stage in arm["schedule"]["stages"]]
    return [sum(lengths[:i]) for i in range(1, len(lengths))]


def _curve(runs: Sequence[dict[str, Any]], kind: str, x: str, y: str) -> tuple[list[float], list[float]]:
    """The mean over runs of x and y at the steps that all of them logged; a value that is missing is NaN."""
    tables = [{row["step"]: row for row in run[kind]} for run in runs]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    xs, ys = ([fmean(_number(rows[step].get(name)) for rows in tables) for step in steps] for name in (x, y))
    return xs, ys


def _draw_runs(axes: Axes, arm: dict[str, Any], kind: str, x: str, y: str, scale: float, colour: str) -> None:
    """Each seed a thin line, its mean a thick one; a diverged run ends in a cross."""
    finished = _finished(arm)
    for run in arm["runs"]:
        xs, ys = _curve([run], kind, x, y)
        if len(arm["runs"]) > 1 or _diverged(run):
            axes.plot(np.divide(xs, scale), ys, color=colour, linewidth=0.7, alpha=0.45)
        seen = [i for i, value in enumerate(ys) if math.isfinite(value)]
        if _diverged(run) and seen:
            place = blended_transform_factory(axes.transData, axes.transAxes)
            axes.plot(xs[seen[-1]] / scale, 0.94, marker="x", color=colour, markersize=7, markeredgewidth=1.8, transform=place)
    xs, ys = _curve(finished, kind, x, y)
    axes.plot(np.divide(xs, scale), ys, color=colour, linewidth=1.9)


def _legend(figure: Figure, results: dict[str, Any], *extra: Line2D) -> None:
    handles = [Line2D([], [], color=colour, linewidth=2.2) for colour in _colours(results).values()]
    names = [*_colours(results), *(str(line.get_label()) for line in extra)]
    figure.legend([*handles, *extra], names, loc="outside upper center", ncols=min(5, len(names)), columnspacing=1.6)


def _loss_range(results: dict[str, Any]) -> tuple[float, float] | None:
    """Validation losses worth showing: from the lowest to the baseline's after 15 % of its steps, every final loss included."""
    runs = [run for arm in results["arms"] for run in _finished(arm)]
    steps, losses = _curve(_finished(_baseline(results)), "evaluations", "step", "eval_loss")
    if not runs:
        return None
    finals = [run["final_loss"] for run in runs]
    lowest = min(_number(row["eval_loss"]) for run in runs for row in run["evaluations"] if row["eval_loss"] is not None)
    early = float(np.interp(0.15 * steps[-1], steps, losses)) if steps else math.nan
    highest = max(value for value in [*finals, early] if math.isfinite(value))
    margin = 0.05 * (highest - lowest) or 0.05
    return lowest - margin, highest + margin


def _draw_loss(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 6.6))
    grid = figure.subplots(2, 2, sharey=True)
    colours, limits = _colours(results), _loss_range(results)
    rows = [row for arm in results["arms"] for run in arm["runs"] for row in run["evaluations"]]
    panels = (("step", "steps"), ("flops", "FLOPs"), ("data_tokens", "data tokens"), ("seconds", "time"))
    for axes, (x, words) in zip(grid.flat, panels, strict=True):
        scale, unit = _axis(x, max((row[x] for row in rows), default=0))
        for arm in results["arms"]:
            _draw_runs(axes, arm, "evaluations", x, "eval_loss", scale, colours[arm["name"]])
            _mark_switches(axes, arm, x, scale, colours[arm["name"]])
        axes.set_title(f"against {words}")
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
    if limits:
        grid[0, 0].set_ylim(*limits)
        _note_curves_above(grid[0, 0], results, limits[1], colours)
    for axes in grid[:, 0]:
        axes.set_ylabel("validation loss (nats per token)")
    extra = []
    if any(_switches(arm) for arm in results["arms"]):
        extra.append(Line2D([], [], color="#666666", linestyle=":", marker="v", markersize=6, label="switch of stage"))
    if any(_diverged(run) for arm in results["arms"] for run in arm["runs"]):
        extra.append(Line2D([], [], color="#666666", linestyle="", marker="x", label="a run diverged here"))
    _legend(figure, results, *extra)
    return figure


def _axis(x: str, peak: float) -> tuple[float, str]:
    """What to divide the values by, and the axis label with the unit that is left."""
    if x == "flops":
        scale, prefix = _scale(peak, FLOPS_PREFIXES)
        return scale, f"training {prefix}FLOPs"
    if x == "data_tokens":
        scale, prefix = _scale(peak)
        words = {"": "", "K": " (thousands)", "M": " (millions)", "B": " (billions)", "T": " (trillions)"}
        return scale, f"data tokens{words[prefix]}"
    if x == "seconds":
        scale, name = (3600.0, "hours") if peak >= 10800 else (60.0, "minutes") if peak >= 180 else (1.0, "seconds")
        return scale, f"training time ({name})"
    return 1.0, "optimizer steps"


def _mark_switches(axes: Axes, arm: dict[str, Any], x: str, scale: float, colour: str) -> None:
    """Dotted lines against steps; against anything else a triangle on the upper edge."""
    steps, xs = _curve(_finished(arm), "evaluations", "step", x)
    for switch in _switches(arm):
        if x == "step":
            axes.axvline(switch, color=colour, linestyle=":", linewidth=1.3)
        elif steps:
            at = float(np.interp(switch, steps, xs)) / scale
            place = blended_transform_factory(axes.transData, axes.transAxes)
            axes.plot(at, 1.0, marker="v", color=colour, markersize=7, transform=place, clip_on=False, linestyle="")


def _note_curves_above(axes: Axes, results: dict[str, Any], top: float, colours: dict[str, str]) -> None:
    """Say which superposed arms lie above the visible range, and how far."""
    highest = {}
    for arm in results["arms"]:
        superposed = sum(stage["steps"] for stage in arm["schedule"]["stages"] if stage["bag_size"] > 1)
        steps, losses = _curve(_finished(arm), "evaluations", "step", "eval_loss")
        above = [loss for step, loss in zip(steps, losses, strict=True) if 0 < step <= superposed and loss > top]
        if above:
            highest[arm["name"]] = max(above)
    if len(highest) > 2:
        _write_lines(axes, [(f"↑ superposed arms: up to {max(highest.values()):.1f}", "#444444")])
    else:
        _write_lines(axes, [(f"↑ {name}: up to {loss:.1f} while superposed", colours[name]) for name, loss in highest.items()])


def _write_lines(axes: Axes, lines: Iterable[tuple[str, str]]) -> None:
    """Text and colour of each line, from the upper right corner down, where a falling curve leaves room."""
    for i, (text, colour) in enumerate(lines):
        axes.annotate(
            text,
            (0.985, 0.975),
            xycoords="axes fraction",
            xytext=(0, -13 * i),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8.5,
            color=colour,
        )


def _draw_final(results: dict[str, Any]) -> Figure:
    summaries, colours = summarise(results), _colours(results)
    figure = Figure(figsize=(9, 1.5 + 0.55 * len(summaries)))
    axes = figure.subplots()
    base = next(arm for arm in summaries if arm.name == arm.baseline)
    if base.final_loss is not None:
        axes.axvline(base.final_loss, color=BASELINE_COLOUR, linewidth=1, linestyle="--")
    for row, (arm, summary) in enumerate(zip(results["arms"], summaries, strict=True)):
        colour, losses = colours[arm["name"]], [run["final_loss"] for run in _finished(arm)]
        if summary.final_loss is not None and summary.final_loss_deviation is not None:
            bar: dict[str, Any] = {"marker": "|", "markersize": 20, "markeredgewidth": 2.2, "capsize": 0, "linewidth": 1.6}
            axes.errorbar(summary.final_loss, row, xerr=summary.final_loss_deviation, color=colour, **bar)
        axes.plot(losses, [row] * len(losses), "o", markersize=7, color=colour, markeredgecolor="white", zorder=3)
        label = _plus_minus(summary.final_loss, summary.final_loss_deviation) if losses else "diverged"
        if summary is not base and summary.difference is not None:
            label += f"   ({_plus_minus(summary.difference, None, '+')})"
        axes.text(1.01, row, label, transform=axes.get_yaxis_transform(), va="center", color=colour)
    axes.set_yticks(range(len(summaries)), [arm.name for arm in summaries])
    axes.set_ylim(len(summaries) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("nats per token, lower is better")
    axes.set_title(f"final validation loss (in brackets: against {base.name})")
    return figure


def _draw_training(results: dict[str, Any]) -> Figure:
    figure, colours = Figure(figsize=(9, 7.4)), _colours(results)
    loss, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.1, 1.1))
    for arm in results["arms"]:
        colour = colours[arm["name"]]
        _draw_training_loss(loss, arm, colour)
        for axes, name in ((rate, "learning_rate"), (speed, "positions_per_second")):
            xs, ys = _curve(_finished(arm), "training", "step", name)
            axes.plot(xs, ys, color=colour, linewidth=1.4)
        for axes in (loss, rate, speed):
            for switch in _switches(arm):
                axes.axvline(switch, color=colour, linestyle=":", linewidth=1.1)
    spikes = [
        (
            f"{arm['name']}, step {row.step}: bag size {row.bags}, loss {_plus_minus(row.height, None, '+')}",
            colours[arm["name"]],
        )
        for arm in results["arms"]
        for row in _switch_means(arm)
        if row.height is not None
    ]
    _write_lines(loss, spikes)
    shown = [y for arm in results["arms"] for run in _finished(arm) for y in _curve([run], "training", "step", "loss")[1]]
    shown = [y for y in shown if math.isfinite(y)]
    if shown:
        margin = 0.04 * (max(shown) - min(shown)) or 0.05
        loss.set_ylim(min(shown) - margin, max(shown) + margin)
    loss.set_title("training loss: dashed lines are bag losses, not comparable with the plain loss (solid)")
    loss.set_ylabel("nats per target token")
    rate.set_title("learning rate")
    rate.yaxis.set_major_formatter("{x:g}")
    speed.set_title("positions per second")
    speed.yaxis.set_major_formatter(lambda value, _: "{:g}{}".format(value / _scale(value)[0], _scale(value)[1]))
    for axes in (rate, speed):
        axes.set_ylim(bottom=0)
    speed.set_xlabel("optimizer steps")
    speed.set_xlim(left=0)
    _legend(
        figure,
        results,
        Line2D([], [], color="#666666", linestyle=(0, (3, 1.5)), linewidth=1.6, label="bag loss"),
        Line2D([], [], color="#666666", linestyle=":", label="switch of stage"),
    )
    return figure


def _draw_training_loss(axes: Axes, arm: dict[str, Any], colour: str) -> None:
    finished = _finished(arm)
    # A bag loss and a plain one are not the same quantity: no line joins them.
    for bag_size in {stage["bag_size"] for stage in arm["schedule"]["stages"]}:
        style: Any = (0, (3, 1.5)) if bag_size > 1 else "-"
        for run in [*arm["runs"], None] if len(arm["runs"]) > 1 else [None]:
            runs = finished if run is None else [run]
            xs, ys = _curve(runs, "training", "step", "loss")
            _, bags = _curve(runs, "training", "step", "bag_size")
            ys = [y if bag == bag_size else math.nan for y, bag in zip(ys, bags, strict=True)]
            width, alpha = (1.6, 1.0) if run is None else (0.6, 0.35)
            axes.plot(xs, ys, color=colour, linestyle=style, linewidth=width, alpha=alpha)


@dataclass(frozen=True)
class _SwitchMeans:
    step: int
    bags: str
    before: float | None
    after: float | None
    height: float | None
    recovery: float | None


def _switch_means(arm: dict[str, Any]) -> list[_SwitchMeans]:
    """Each switch of an arm, averaged over the seeds that finished; recovery only where every one of them recovered."""
    rows = []
    for switches in zip(*(run["switches"] for run in _finished(arm)), strict=True):
        columns = [
            [switch[name] for switch in switches] for name in ("loss_before", "loss_after", "height", "steps_to_recover")
        ]
        means = [None if None in values else fmean(values) for values in columns]
        bags = f"{switches[0]['from_bag_size']} → {switches[0]['to_bag_size']}"
        rows.append(_SwitchMeans(switches[0]["step"], bags, *means))
    return rows


# The page

CAPTIONS = {
    "loss": "Validation loss, which is plain next-token loss throughout, against four measures of cost. Thin lines are seeds, "
    "thick ones their mean. The range is cropped: while a model is superposed it has not yet been asked for single next tokens "
    "and does badly on them.",
    "final": "Final validation loss. Dots are seeds, the bar is their mean ± the sample standard deviation, the dashed line is "
    "the baseline’s mean; in brackets, the difference to the baseline.",
    "training": "Training loss, learning rate and throughput, as means over the seeds that finished (thin lines are seeds). At "
    "the upper right, the jump of the loss at each switch.",
}

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$name – superpose comparison</title>
<style>
:root { color-scheme: light dark; --text: #1d2329; --soft: #5b6670; --page: #fafbfc; --card: #ffffff;
  --line: #dfe4e8; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --soft: #9aa5b0; --page: #14181c; --card: #1c2227; --line: #333c44; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem 1.2rem 4rem; max-width: 62rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .6rem 0; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.verdict { margin: 1.4rem 0; padding: 1rem 1.2rem; background: var(--card); border: 1px solid var(--line);
  border-left: .3rem solid var(--accent); border-radius: .4rem; font-size: 1.08rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
figure { margin: 1.2rem 0 1.8rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; padding: .6rem;
  border: 1px solid var(--line); border-radius: .4rem; }
figcaption { margin-top: .5rem; }
.columns { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .9rem 1.1rem; min-width: 0; }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .84rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45; }
pre.block { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .8rem 1rem; margin: .6rem 0; }
.card pre { max-height: 24rem; overflow: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .9rem; margin: 0; font-size: .88rem; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); }
@media print {
  :root { color-scheme: light; --text: #000; --soft: #444; --page: #fff; --card: #fff; --line: #bbb; --accent: #0072b2; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, .card { break-inside: avoid; }
  h2 { break-after: avoid; }
  .card pre { max-height: none; }
}
</style>
</head>
<body>
<header>
<h1>$name</h1>
<div class="soft">$subtitle</div>
</header>
<main>
<p class="verdict">$verdict</p>
<h2>Results</h2>
<div class="scroll">$results</div>
<p class="soft">± is the sample standard deviation over seeds. “Against baseline” is the mean of the differences between
runs of the same seed: negative is better. “Speed-up” is the baseline’s number of steps divided by the step at which the arm
first reaches the baseline’s final loss; a dash means that it does not get there with every seed.</p>
$figures
$switches
<h2>How to read it</h2>
<div class="columns">
<div class="card"><h3>Positions, data tokens and FLOPs</h3>
<p>A position is one place in a sequence that the model computes. In a superposed stage the mean embedding of a bag of tokens
fills one position, so a position costs the same and reads more data. $equal_flops Time is measured, without evaluation and
saving, and depends on the machine.</p></div>
<div class="card"><h3>Bag loss is not validation loss</h3>
<p>In a superposed stage the training loss is the mean cross-entropy of all tokens in the next bag, predicted at once. That is
another question than the next token, so its level cannot be held against the baseline’s. Arms are compared by validation loss
only, which asks for single next tokens in every stage and is therefore high until the switch to plain training.</p></div>
<div class="card"><h3>What the speed-up leaves out</h3>
<p>It is read off one curve, interpolated between evaluations, of a run whose learning rate was planned for its full length. It
counts steps, not data: where text is scarce, compare the arms against data tokens.</p></div>
</div>
$samples
<h2>Runs</h2>
<div class="scroll">$runs</div>
<h2>Set-up</h2>
<div class="columns">$facts</div>
<h2>To reproduce</h2>
<pre class="block">$command</pre>
<details><summary>The resolved recipe</summary><pre class="block">$recipe</pre></details>
</main>
</body>
</html>
""")


def write_report(results: dict[str, Any], out: Path) -> Path:
    """Write the plots and report.html into the directory ``out``, made if need be; return the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    return write_html(results, write_plots(results, out), out)


def write_html(results: dict[str, Any], plots: Sequence[Path], out: Path) -> Path:
    """Write ``out/report.html``, one file that holds its style and the plots and asks for nothing else; return its path."""
    summaries = summarise(results)
    path = out / "report.html"
    page = PAGE.substitute(
        name=escape(results["name"]),
        subtitle=escape(_subtitle(results)),
        verdict=escape(verdict(summaries)),
        results=_html_table(COLUMNS, map(_cells, summaries)),
        figures="".join(map(_html_figure, plots)),
        switches=_html_switches(results),
        equal_flops=escape(_equal_flops(summaries)),
        samples=_html_samples(results),
        runs=_html_runs(results),
        facts=_html_facts(results),
        command=escape(results["command"]),
        recipe=escape(results["recipe"]),
    )
    path.write_text(page, encoding="utf-8")
    return path


def _subtitle(results: dict[str, Any]) -> str:
    model = results["model"]
    return (
        f"{quantity(model['parameters'])} parameters ({model['architecture']}) · {results['steps']:,} steps of "
        f"{results['sequences_per_step']:,} × {results['positions']:,} positions · {results['created']}"
    )


def _equal_flops(summaries: Sequence[ArmSummary]) -> str:
    costs = [arm.flops for arm in summaries if arm.flops]
    if costs and max(costs) < 1.01 * min(costs):
        return (
            "Equal FLOPs means that every arm here spent the same compute, counted from the model’s shape; their data differ."
        )
    return "The arms here did not spend equal FLOPs, counted from the model’s shape: compare them against FLOPs, not steps."


def _html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_figure(plot: Path) -> str:
    data = base64.b64encode(plot.read_bytes()).decode()
    caption = escape(CAPTIONS[plot.stem])
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _html_switches(results: dict[str, Any]) -> str:
    rows = [
        [
            arm["name"],
            f"{row.step:,}",
            row.bags,
            *(_plus_minus(loss, None) for loss in (row.before, row.after)),
            _plus_minus(row.height, None, "+"),
            _or_dash(row.recovery, lambda steps: f"{steps:,.0f}"),
        ]
        for arm in results["arms"]
        for row in _switch_means(arm)
    ]
    if not rows:
        return ""
    columns = ("arm", "step", "bag size", "loss before", "loss after", "height, nats", "steps to recover")
    note = (
        "Training loss, mean over seeds: the last value before the switch and the highest just after it. Where the bag size "
        "changes these are different losses, so the height tells how rough the switch is, not what was lost. “Steps to "
        "recover” is the time until the loss is as low as before; a dash means that it is not, with some seed."
    )
    return f'<h2>Switches</h2><div class="scroll">{_html_table(columns, rows)}</div><p class="soft">{note}</p>'


def _html_samples(results: dict[str, Any]) -> str:
    cards = [
        f'<div class="card"><h3>{escape(arm["name"])}, seed {run["seed"]}</h3><pre>{escape(run["sample"])}</pre></div>'
        for arm in results["arms"]
        for run in arm["runs"][:1]
        if run["sample"]
    ]
    return f'<h2>Samples</h2><div class="columns">{"".join(cards)}</div>' if cards else ""


def _html_runs(results: dict[str, Any]) -> str:
    columns = (
        "arm",
        "seed",
        "final loss, nats",
        "bits per byte",
        "perplexity",
        "epochs",
        "positions",
        "time",
        "peak memory",
    )
    rows = [
        [
            arm["name"],
            str(run["seed"]),
            "diverged" if _diverged(run) else f"{run['final_loss']:.4f}",
            *(_or_dash(None if _diverged(run) else run[name], "{:.4f}".format) for name in ("bits_per_byte", "perplexity")),
            _or_dash(run["epochs"], "{:.2f}".format),
            quantity(run["positions"]),
            _or_dash(run["seconds"], duration),
            _or_dash(run["peak_memory_bytes"], lambda size: f"{size / 2**30:.2f} GiB"),
        ]
        for arm in results["arms"]
        for run in arm["runs"]
    ]
    return _html_table(columns, rows)


def _html_facts(results: dict[str, Any]) -> str:
    numbers = ("parameters", "non_embedding_parameters", "tokens")
    cards = []
    for title, facts in (("Model", results["model"]), ("Data", results["data"]), ("Environment", results["environment"])):
        items = "".join(
            f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_fact(value, name in numbers))}</dd>"
            for name, value in facts.items()
            if name != "command"
        )
        cards.append(f'<div class="card"><h3>{title}</h3><dl>{items}</dl></div>')
    schedules = "".join(f"<dt>{escape(arm['name'])}</dt><dd>{escape(_schedule(arm))}</dd>" for arm in results["arms"])
    return "".join(cards) + f'<div class="card"><h3>Schedules</h3><dl>{schedules}</dl></div>'


def _fact(value: Any, is_large: bool) -> str:
    if value is None:
        return "–"
    if is_large:
        return f"{quantity(value)} ({value:,})"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _schedule(arm: dict[str, Any]) -> str:
    return ", then ".join(
        f"{stage['steps']:,} steps "
        + (f"in bags of {stage['bag_size']} ({stage['mode']}, {stage['weighting']})" if stage["bag_size"] > 1 else "plain")
        for stage in arm["schedule"]["stages"]
    )
