"""The picture, the table and the sentences of a comparison at equal loss."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from superpose.experiment.loss_curve import EqualLoss, EqualLossResults, LossCurve, equal_loss
from superpose.experiment.plots import BASELINE_COLOUR, COLOURS, DASHED, STYLE
from superpose.experiment.summary import FLOPS_UNITS, duration, or_dash, plus_minus, quantity

Rows = Sequence[dict[str, Any]]

#: The picture goes up to this multiple of the longest run's steps; a curve that reaches a loss further out leaves it.
FURTHEST = 2.0


def equal_loss_tables(rows: Rows) -> list[Table]:
    """A table for each arm: the arm, and the baseline that would end with its loss."""
    tables = []
    for arm in equal_loss(rows).arms:
        columns = _pair(arm)
        tables.append(Table(box=SIMPLE_HEAD, pad_edge=False))
        tables[-1].add_column(overflow="fold")
        for column in columns:
            tables[-1].add_column(Text(column.pop("run")), justify="right", overflow="fold")
        for name in columns[0]:
            tables[-1].add_row(name, *(column[name] for column in columns))
    return tables


def equal_loss_cells(rows: Rows) -> list[dict[str, str]]:
    """What a table says about every length of the baseline, then about each arm and the baseline of its loss."""
    lengths: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["steps"]):
        if row["arm"] == "baseline" and row["final_loss"] is not None:
            lengths.setdefault(row["steps"], []).append(row)
    measured = [
        {
            "run": f"baseline, {runs[0]['length']:g} × the steps",
            "steps": f"{steps:,}",
            "final loss, nats": plus_minus(*_mean([run["final_loss"] for run in runs])),
            **_costs(*(fmean(run[name] for run in runs) for name in ("data_tokens", "flops", "seconds"))),
            "equal-loss speed-up": "–",
            "90 % interval": "–",
        }
        for steps, runs in lengths.items()
    ]
    return measured + [cells for arm in equal_loss(rows).arms for cells in _pair(arm)]


def _pair(arm: EqualLoss) -> list[dict[str, str]]:
    reached = "beyond any length" if arm.baseline_steps is None else f"{arm.baseline_steps:,.0f}"
    mark = " (extrapolated)" if arm.extrapolated and arm.baseline_steps is not None else ""
    own = {
        "run": arm.name,
        "steps": f"{arm.steps:,}",
        "final loss, nats": plus_minus(arm.final_loss, arm.final_loss_deviation),
        **_costs(arm.data_tokens, arm.flops, arm.seconds),
        "equal-loss speed-up": or_dash(arm.speed_up, "{:.2f}×".format) + mark,
        "90 % interval": "unknown" if arm.interval is None else _interval(arm.interval),
    }
    baseline = {
        "run": "baseline, same loss",
        "steps": reached,
        "final loss, nats": plus_minus(arm.final_loss),
        **_costs(arm.baseline_data_tokens, arm.baseline_flops, arm.baseline_seconds),
        "equal-loss speed-up": "–",
        "90 % interval": "–",
    }
    return [own, baseline]


def _costs(data_tokens: float | None, flops: float | None, seconds: float | None) -> dict[str, str]:
    return {"data tokens": quantity(data_tokens), "compute": quantity(flops, FLOPS_UNITS), "time": or_dash(seconds, duration)}


def _mean(losses: Sequence[float]) -> tuple[float, float | None]:
    return fmean(losses), stdev(losses) if len(losses) > 1 else None


def _interval(ends: tuple[float | None, float | None]) -> str:
    low, high = ends
    if low is None:
        return "beyond any length"
    return f"{low:.2f}× to {high:.2f}×" if high is not None else f"at least {low:.2f}×"


def equal_loss_sentences(rows: Rows) -> list[str]:
    """The speed-up of each arm in words, with its uncertainty; and the curve."""
    results = equal_loss(rows)
    if results.curve is None:
        return [
            "The baselines' losses do not fall with their length, or too few of them finished: no speed-up can be read off."
        ]
    curve, (shortest, longest) = results.curve, results.measured
    return [
        *(_sentence(arm, results) for arm in results.arms),
        f"Baselines of {shortest:,} to {longest:,} steps, each fully decayed, end at about {curve.floor:.4f} + "
        f"{curve.scale:.4g} · steps^−{curve.exponent:.4f} nats"
        + (f" (residual {results.residual:.4f})." if results.residual is not None else " (three lengths leave no residual)."),
    ]


def _sentence(arm: EqualLoss, results: EqualLossResults) -> str:
    loss = f"{arm.final_loss:.4f} nats"
    if arm.baseline_steps is None:
        said = f"{arm.name}: by the fitted curve no baseline reaches its loss of {loss}, however long"
    else:
        said = (
            f"{arm.name}: a baseline reaches its loss of {loss} after {arm.baseline_steps:,.0f} steps instead of {arm.steps:,}"
        )
        said += f", an equal-loss speed-up of {arm.speed_up:.2f}×"
    if arm.interval is None:
        said += "; with one seed the spread is unknown, so repeat it with --seeds 3."
    else:
        said += f" (90 % interval from {arm.seeds} seeds: {_interval(arm.interval)})."
    if arm.extrapolated:
        shortest, longest = results.measured
        remedy = "give a shorter one" if (arm.baseline_steps or longest) < shortest else "give a longer one"
        said += f" This is EXTRAPOLATED: {shortest:,} to {longest:,} steps were measured; {remedy} with --lengths."
    if results.residual is not None and abs(arm.gain) < 2 * results.residual:
        said += (
            f" At equal steps it is {plus_minus(-arm.gain, sign='+')} nats from the curve, less than twice the residual of the "
            f"fit ({results.residual:.4f}): within the noise of single runs."
        )
    return said


def write_equal_loss_plot(rows: Rows, out: Path) -> Path:
    """Write ``out/equal-loss.png`` and return its path."""
    with mpl.rc_context(STYLE):
        draw_equal_loss(rows).savefig(out / "equal-loss.png")
    return out / "equal-loss.png"


def draw_equal_loss(rows: Rows) -> Figure:
    """Final loss in nats against steps: the baselines with their curve, an arrow from each arm to the baseline of its loss."""
    figure, results = Figure(figsize=(9, 5.2)), equal_loss(rows)
    axes = figure.subplots()
    baselines = [row for row in rows if row["arm"] == "baseline" and row["final_loss"] is not None]
    _draw_baselines(axes, baselines)
    steps = [row["steps"] for row in rows]
    low, high = min(steps) / 1.25, max(steps) * 1.25
    for arm in results.arms:
        if arm.baseline_steps is not None:
            low, high = min(low, arm.baseline_steps / 1.25), max(high, arm.baseline_steps * 1.25)
    low, high = max(low, min(steps) / FURTHEST), min(high, max(steps) * FURTHEST)
    if results.curve is not None:
        _draw_curve(axes, results.curve, results.measured, (low, high))
        for i, arm in enumerate(results.arms):
            _draw_arm(axes, arm, rows, (low, high), COLOURS[i % len(COLOURS)])
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(sorted({*steps}), [f"{step:,}" for step in sorted({*steps})])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.12)
    axes.set_xlabel("optimizer steps of the run (log scale)")
    axes.set_ylabel("final validation loss (nats per token)")
    axes.set_title("equal-loss speed-up: how long a fully decayed baseline must be for an arm's loss")
    words = "in brackets and as a band: 90 % interval" if any(arm.interval for arm in results.arms) else None
    axes.legend(loc="upper right", title=words, alignment="left", title_fontsize=8.5)
    return figure


def _draw_baselines(axes: Axes, baselines: Rows) -> None:
    """Every run a dot, and the mean of a length ± the sample standard deviation over its runs."""
    dots: dict[str, Any] = {"linestyle": "", "color": BASELINE_COLOUR}
    losses: dict[int, list[float]] = {}
    for row in baselines:
        losses.setdefault(row["steps"], []).append(row["final_loss"])
    axes.plot(
        [row["steps"] for row in baselines],
        [row["final_loss"] for row in baselines],
        marker=".",
        markersize=5,
        alpha=0.4,
        **dots,
    )
    means = [_mean(same) for same in losses.values()]
    spread = [deviation or 0 for _, deviation in means]
    axes.errorbar(
        list(losses), [mean for mean, _ in means], yerr=spread, marker="o", markersize=6, capsize=3, label="baselines", **dots
    )


def _draw_curve(axes: Axes, curve: LossCurve, measured: tuple[int, int], limits: tuple[float, float]) -> None:
    """Solid over the measured lengths and dashed outside of them."""
    words = f"fit: {curve.floor:.3f} + {curve.scale:.3g} · steps^−{curve.exponent:.3f}"
    for low, high, style in ((*measured, "-"), (limits[0], measured[0], DASHED), (measured[1], limits[1], DASHED)):
        steps = np.geomspace(low, high, 100)
        label = words if style == "-" else None
        axes.plot(steps, curve.loss(steps), color=BASELINE_COLOUR, linestyle=style, linewidth=1.3, label=label)


def _draw_arm(axes: Axes, arm: EqualLoss, rows: Rows, limits: tuple[float, float], colour: str) -> None:
    """The arm's runs and mean where a baseline costs as much, an arrow to the curve, and on it the interval as a band."""
    if arm.baseline_steps is None:
        words = f"{arm.name}: no baseline reaches it"
    else:
        interval = "" if arm.interval is None else f" ({_interval(arm.interval)})"
        words = f"{arm.name}: {arm.speed_up:.2f}×{interval}" + (", extrapolated" if arm.extrapolated else "")
    losses = [row["final_loss"] for row in rows if row["arm"] == arm.name and row["final_loss"] is not None]
    axes.plot([arm.equal_steps] * len(losses), losses, ".", markersize=5, color=colour, alpha=0.5)
    style: dict[str, Any] = {"marker": "D", "markersize": 7, "capsize": 3, "linestyle": "", "color": colour, "zorder": 4}
    axes.errorbar(arm.equal_steps, arm.final_loss, yerr=arm.final_loss_deviation or 0, label=words, **style)
    end = min(max(arm.baseline_steps or limits[1], limits[0]), limits[1])
    arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.6}
    axes.annotate("", (end, arm.final_loss), (arm.equal_steps, arm.final_loss), arrowprops=arrow)
    if arm.interval is not None and arm.interval[0] is not None:
        low, high = arm.interval[0] * arm.equal_steps, (arm.interval[1] or math.inf) * arm.equal_steps
        axes.hlines(arm.final_loss, max(low, limits[0]), min(high, limits[1]), color=colour, linewidth=7, alpha=0.25)
