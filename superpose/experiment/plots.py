"""The plots of a comparison: validation loss against cost, final losses, and the course of training.

A bag loss and a plain loss are different quantities: bag losses are only ever shown in the training panel, dashed.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from superpose.experiment.summary import (
    FLOPS_UNITS,
    find_baseline,
    finished,
    is_diverged,
    number,
    plus_minus,
    scale_of,
    summarise,
    summarise_switches,
)

#: Okabe and Ito's palette, safe for the colour-blind: black for the baseline, and yellow, weak on white, last.
BASELINE_COLOUR = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
GREY = "#666666"
DASHED: Any = (0, (3, 1.5))

STYLE: Any = {
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "text.parse_math": False,  # arm names are text, whatever they hold
}


def write_plots(results: dict[str, Any], out: Path) -> list[Path]:
    """Write loss.png, final.png and training.png into ``out``, which exists, and return their paths."""
    paths = []
    with mpl.rc_context(STYLE):
        for name, draw in (("loss", draw_loss), ("final", draw_final), ("training", draw_training)):
            paths.append(out / f"{name}.png")
            draw(results).savefig(paths[-1])
    return paths


def draw_loss(results: dict[str, Any]) -> Figure:
    """Validation loss in nats per token against steps, FLOPs, data tokens and time."""
    figure = Figure(figsize=(9, 6.6))
    grid = figure.subplots(2, 2, sharey=True)
    colours, limits = _colours(results), _loss_range(results)
    rows = [row for arm in results["arms"] for run in arm["runs"] for row in run["evaluations"]]
    panels = (("step", "steps"), ("flops", "FLOPs"), ("data_tokens", "data tokens"), ("seconds", "time"))
    for axes, (x, words) in zip(grid.flat, panels, strict=True):
        scale, label = _axis(x, max((row[x] for row in rows), default=0))
        for arm in results["arms"]:
            _draw_runs(axes, arm, x, scale, colours[arm["name"]])
            _mark_switches(axes, arm, x, scale, colours[arm["name"]])
        axes.set_title(f"against {words}")
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    if limits:
        grid[0, 0].set_ylim(*limits)
        _note_curves_above(grid[0, 0], results, limits[1])
    for axes in grid[:, 0]:
        axes.set_ylabel("validation loss (nats per token)")
    extra = []
    if any(len(arm["schedule"]["stages"]) > 1 for arm in results["arms"]):
        extra.append(Line2D([], [], color=GREY, linestyle=":", marker="v", markersize=6, label="switch of stage"))
    if any(is_diverged(run) for arm in results["arms"] for run in arm["runs"]):
        extra.append(Line2D([], [], color=GREY, linestyle="", marker="x", label="a run diverged here"))
    _legend(figure, colours, *extra)
    return figure


def draw_final(results: dict[str, Any]) -> Figure:
    """Final validation losses in nats per token: an arm a row."""
    summaries, colours = summarise(results), _colours(results)
    figure = Figure(figsize=(9, 1.5 + 0.55 * len(summaries)))
    axes = figure.subplots()
    base = next(arm for arm in summaries if arm.name == arm.baseline)
    if base.final_loss is not None:
        axes.axvline(base.final_loss, color=BASELINE_COLOUR, linewidth=1, linestyle="--")
    for row, (arm, summary) in enumerate(zip(results["arms"], summaries, strict=True)):
        colour, losses = colours[summary.name], [run["final_loss"] for run in finished(arm)]
        if summary.final_loss is not None and summary.final_loss_deviation is not None:
            bar: dict[str, Any] = {"marker": "|", "markersize": 20, "markeredgewidth": 2.2, "linewidth": 1.6}
            axes.errorbar(summary.final_loss, row, xerr=summary.final_loss_deviation, color=colour, **bar)
        axes.plot(losses, [row] * len(losses), "o", markersize=7, color=colour, markeredgecolor="white", zorder=3)
        label = plus_minus(summary.final_loss, summary.final_loss_deviation) if losses else "diverged"
        if summary is not base and summary.difference is not None:
            label += f"   ({plus_minus(summary.difference, sign='+')})"
        axes.text(1.01, row, label, transform=axes.get_yaxis_transform(), va="center", color=colour)
    axes.set_yticks(range(len(summaries)), [arm.name for arm in summaries])
    axes.set_ylim(len(summaries) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("nats per token, lower is better")
    axes.set_title(f"final validation loss (in brackets: against {base.name})")
    return figure


def draw_training(results: dict[str, Any]) -> Figure:
    """Training loss in nats per target token, learning rate and positions per second against steps."""
    figure, colours = Figure(figsize=(9, 7.4)), _colours(results)
    loss, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.1, 1.1))
    shown, spikes = [], []
    for arm in results["arms"]:
        colour, runs = colours[arm["name"]], finished(arm)
        _draw_training_loss(loss, arm, colour)
        rate.plot(*_curve(runs, "training", "step", "learning_rate"), color=colour, linewidth=1.4)
        speed.plot(*_curve(runs, "training", "step", "positions_per_second"), color=colour, linewidth=1.4)
        for axes in (loss, rate, speed):
            _mark_switches(axes, arm, "step", 1, colour)
        for switch in summarise_switches(arm):
            if switch["height"] is not None:
                bag_sizes = f"bag size {switch['from_bag_size']} → {switch['to_bag_size']}"
                height = plus_minus(switch["height"], sign="+")
                spikes.append((f"{arm['name']}, step {switch['step']}: {bag_sizes}, loss {height}", colour))
        shown += [row["loss"] for run in runs for row in run["training"] if math.isfinite(number(row["loss"]))]
    _write_lines(loss, spikes)
    if shown:
        margin = 0.04 * (max(shown) - min(shown)) or 0.05
        loss.set_ylim(min(shown) - margin, max(shown) + margin)
    loss.set_title("training loss: dashed lines are bag losses, not comparable with the plain loss (solid)")
    loss.set_ylabel("nats per target token")
    rate.set_title("learning rate")
    rate.yaxis.set_major_formatter("{x:g}")
    rate.set_ylim(bottom=0)
    speed.set_title("positions per second")
    speed.yaxis.set_major_formatter(lambda value, _: f"{value / scale_of(value)[0]:g}{scale_of(value)[1]}")
    speed.set_ylim(bottom=0)
    speed.set_xlabel("optimizer steps")
    speed.set_xlim(left=0)
    bag_loss = Line2D([], [], color=GREY, linestyle=DASHED, linewidth=1.6, label="bag loss")
    _legend(figure, colours, bag_loss, Line2D([], [], color=GREY, linestyle=":", label="switch of stage"))
    return figure


def _colours(results: dict[str, Any]) -> dict[str, str]:
    baseline = find_baseline(results)["name"]
    others = [arm["name"] for arm in results["arms"] if arm["name"] != baseline]
    return {baseline: BASELINE_COLOUR} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}


def _curve(runs: Sequence[dict[str, Any]], kind: str, x: str, y: str) -> NDArray[np.float64]:
    """The means over runs of x and y, ``[2, n]``, at the n steps that all of them logged; a value that is missing is NaN."""
    tables = [{row["step"]: row for row in run[kind]} for run in runs]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    return np.array([[fmean(number(rows[step].get(name)) for rows in tables) for step in steps] for name in (x, y)])


def _draw_runs(axes: Axes, arm: dict[str, Any], x: str, scale: float, colour: str) -> None:
    """Each seed a thin line, its mean a thick one; a diverged run ends in a cross."""
    for run in arm["runs"]:
        xs, ys = _curve([run], "evaluations", x, "eval_loss")
        if len(arm["runs"]) > 1 or is_diverged(run):
            axes.plot(xs / scale, ys, color=colour, linewidth=0.7, alpha=0.45)
        seen = xs[np.isfinite(ys)]
        if is_diverged(run) and seen.size:
            cross: dict[str, Any] = {"marker": "x", "markersize": 7, "markeredgewidth": 1.8}
            axes.plot(seen[-1] / scale, 0.94, color=colour, transform=axes.get_xaxis_transform(), **cross)
    xs, ys = _curve(finished(arm), "evaluations", x, "eval_loss")
    axes.plot(xs / scale, ys, color=colour, linewidth=1.9)


def _draw_training_loss(axes: Axes, arm: dict[str, Any], colour: str) -> None:
    lines = [(finished(arm), 1.6, 1.0)]
    if len(arm["runs"]) > 1:
        lines += [([run], 0.6, 0.35) for run in arm["runs"]]
    # A bag loss and a plain one are not the same quantity: no line joins them.
    for bag_size in {stage["bag_size"] for stage in arm["schedule"]["stages"]}:
        for runs, width, alpha in lines:
            steps, losses = _curve(runs, "training", "step", "loss")
            _, bag_sizes = _curve(runs, "training", "step", "bag_size")
            losses = np.where(bag_sizes == bag_size, losses, math.nan)
            style = DASHED if bag_size > 1 else "-"
            axes.plot(steps, losses, color=colour, linestyle=style, linewidth=width, alpha=alpha)


def _mark_switches(axes: Axes, arm: dict[str, Any], x: str, scale: float, colour: str) -> None:
    """Dotted lines against steps; against anything else a triangle on the upper edge."""
    steps, xs = _curve(finished(arm), "evaluations", "step", x)
    for switch in np.cumsum([stage["steps"] for stage in arm["schedule"]["stages"]])[:-1]:
        if x == "step":
            axes.axvline(switch, color=colour, linestyle=":", linewidth=1.2)
        elif steps.size:
            at, place = np.interp(switch, steps, xs) / scale, axes.get_xaxis_transform()
            axes.plot(at, 1.0, marker="v", color=colour, markersize=7, transform=place, clip_on=False)


def _legend(figure: Figure, colours: dict[str, str], *extra: Line2D) -> None:
    handles = [*(Line2D([], [], color=colour, linewidth=2.2, label=name) for name, colour in colours.items()), *extra]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)), columnspacing=1.6)


def _loss_range(results: dict[str, Any]) -> tuple[float, float] | None:
    """Validation losses worth showing: from the lowest to the baseline's after 15 % of its steps, every final loss included."""
    runs = [run for arm in results["arms"] for run in finished(arm)]
    if not runs:
        return None
    steps, losses = _curve(finished(find_baseline(results)), "evaluations", "step", "eval_loss")
    early = [float(np.interp(0.15 * steps[-1], steps, losses))] if steps.size else []
    highest = max(value for value in [*(run["final_loss"] for run in runs), *early] if math.isfinite(value))
    lowest = min(row["eval_loss"] for run in runs for row in run["evaluations"] if row["eval_loss"] is not None)
    margin = 0.05 * (highest - lowest) or 0.05
    return lowest - margin, highest + margin


def _axis(x: str, peak: float) -> tuple[float, str]:
    """What to divide the values by, and the axis label with the unit that is left."""
    if x == "flops":
        scale, unit = scale_of(peak, FLOPS_UNITS)
        return scale, f"training{unit}"
    if x == "data_tokens":
        scale, unit = scale_of(peak, ("", " (thousands)", " (millions)", " (billions)", " (trillions)"))
        return scale, f"data tokens{unit}"
    if x == "seconds":
        scale, unit = (3600, "hours") if peak >= 10800 else (60, "minutes") if peak >= 180 else (1, "seconds")
        return scale, f"training time ({unit})"
    return 1, "optimizer steps"


def _note_curves_above(axes: Axes, results: dict[str, Any], top: float) -> None:
    """Say how far above the visible range the superposed arms lie."""
    above: list[float] = []
    for arm in results["arms"]:
        superposed = sum(stage["steps"] for stage in arm["schedule"]["stages"] if stage["bag_size"] > 1)
        steps, losses = _curve(finished(arm), "evaluations", "step", "eval_loss")
        above += losses[(steps > 0) & (steps <= superposed) & (losses > top)].tolist()
    if above:
        _write_lines(axes, [(f"↑ up to {max(above):.1f} while superposed", GREY)])


def _write_lines(axes: Axes, lines: Iterable[tuple[str, str]]) -> None:
    """Text and colour of each line, from the upper right corner down, where a falling curve leaves room."""
    for i, (text, colour) in enumerate(lines):
        offset: Any = {"xytext": (0, -13 * i), "textcoords": "offset points", "ha": "right", "va": "top"}
        axes.annotate(text, (0.985, 0.975), xycoords="axes fraction", fontsize=8.5, color=colour, **offset)
