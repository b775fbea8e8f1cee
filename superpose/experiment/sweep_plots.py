"""The picture and the table of a sweep: the final loss over step ratio and bag size, and a map of the gain."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from superpose.experiment.plots import BASELINE_COLOUR, COLOURS, STYLE
from superpose.experiment.summary import plus_minus

Rows = Sequence[dict[str, Any]]


def gains(rows: Rows, weighting: str) -> dict[tuple[int, float], list[float]]:
    """``(bag size, ratio)`` to what each seed is below its baseline, nats; diverged runs are left out."""
    baselines = {row["seed"]: row["final_loss"] for row in rows if row["bag_size"] == 1}
    found: dict[tuple[int, float], list[float]] = {}
    for row in rows:
        if row["bag_size"] > 1 and row["weighting"] == weighting:
            cell = found.setdefault((row["bag_size"], row["step_ratio"]), [])
            if row["final_loss"] != "" and baselines[row["seed"]] != "":
                cell.append(baselines[row["seed"]] - row["final_loss"])
    return found


def weightings(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["weighting"] for row in rows if row["bag_size"] > 1))


def sweep_table(rows: Rows, weighting: str) -> Table:
    """Gain in nats over the baseline, positive where superposition is ahead: bag sizes down, ratios across."""
    found = gains(rows, weighting)
    ratios = sorted({ratio for _, ratio in found})
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"nats below the baseline, {weighting}", title_justify="left")
    table.add_column("bag size", justify="right")
    for ratio in ratios:
        table.add_column(f"r = {ratio:g}", justify="right")
    for bag_size in sorted({bag_size for bag_size, _ in found}):
        cells = (found[bag_size, ratio] for ratio in ratios)
        table.add_row(
            f"{bag_size}",
            *(plus_minus(fmean(cell), stdev(cell) if len(cell) > 1 else None, "+") if cell else "diverged" for cell in cells),
        )
    return table


def verdict(rows: Rows) -> str:
    """The best cell of the sweep in a sentence."""
    means = {
        (weighting, *cell): (fmean(values), values)
        for weighting in weightings(rows)
        for cell, values in gains(rows, weighting).items()
        if values
    }
    if not means:
        return "Every superposed run diverged, or the baseline did."
    (weighting, bag_size, ratio), (gain, values) = max(means.items(), key=lambda item: item[1][0])
    where = f"bag size {bag_size}, ratio {ratio:g}, {weighting}"
    if gain <= 0:
        return f"No cell beats the baseline: the closest, {where}, is behind by {-gain:.4f} nats."
    spread = f"± {stdev(values):.4f} over {len(values)} seeds" if len(values) > 1 else "one seed: the spread is unknown"
    return f"The best cell is {where}: {gain:.4f} nats below the baseline ({spread})."


def write_sweep_plot(rows: Rows, out: Path) -> Path:
    """Write ``out/sweep.png``: a row of three panels for each weighting."""
    names = weightings(rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.2 * len(names)))
        panels = figure.subplots(len(names), 3, squeeze=False)
        for row, name in zip(panels, names, strict=True):
            _draw(rows, name, row)
        figure.savefig(out / "sweep.png")
    return out / "sweep.png"


def _draw(rows: Rows, weighting: str, panels: Sequence[Axes]) -> None:
    over_ratio, over_bag, heat = panels
    found = {cell: fmean(values) if values else math.nan for cell, values in gains(rows, weighting).items()}
    baselines = [row["final_loss"] for row in rows if row["bag_size"] == 1 and row["final_loss"] != ""]
    baseline = fmean(baselines) if baselines else math.nan
    bag_sizes, ratios = sorted({bag_size for bag_size, _ in found}), sorted({ratio for _, ratio in found})
    for bag_size, colour in zip(bag_sizes, _colours(len(bag_sizes)), strict=True):
        losses = [baseline - found[bag_size, ratio] for ratio in ratios]
        over_ratio.plot([0, *ratios], [baseline, *losses], "o-", color=colour, markersize=4, label=f"s = {bag_size}")
    for ratio, colour in zip(ratios, _colours(len(ratios)), strict=True):
        losses = [baseline - found[bag_size, ratio] for bag_size in bag_sizes]
        over_bag.plot([1, *bag_sizes], [baseline, *losses], "o-", color=colour, markersize=4, label=f"r = {ratio:g}")
    over_bag.set_xscale("log", base=2)
    over_bag.set_xticks([1, *bag_sizes], ["1", *map(str, bag_sizes)])
    over_bag.minorticks_off()
    for axes, label in ((over_ratio, "step ratio"), (over_bag, "bag size")):
        axes.axhline(baseline, color=BASELINE_COLOUR, linewidth=1, linestyle="--")
        axes.set_xlabel(label)
        axes.set_ylabel("final validation loss, nats")
        axes.legend(fontsize=8.5)
    over_ratio.set_title(f"over the step ratio, {weighting} (dashed: baseline)")
    over_bag.set_title("over the bag size")
    grid = np.array([[found[bag_size, ratio] for bag_size in bag_sizes] for ratio in ratios])
    edge = float(np.nanmax(np.abs(grid))) if np.isfinite(grid).any() else 1.0
    heat.imshow(grid, origin="lower", aspect="auto", cmap="PuOr_r", vmin=-edge, vmax=edge)
    for (i, j), value in np.ndenumerate(grid):
        colour = "white" if abs(value) > 0.6 * edge else "black"
        heat.text(j, i, f"{value:+.3f}".replace("-", "−"), ha="center", va="center", fontsize=8.5, color=colour)
    heat.set_xticks(range(len(bag_sizes)), [str(bag_size) for bag_size in bag_sizes])
    heat.set_yticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    heat.grid(visible=False)
    heat.set_xlabel("bag size")
    heat.set_ylabel("step ratio")
    heat.set_title("nats below the baseline")


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
