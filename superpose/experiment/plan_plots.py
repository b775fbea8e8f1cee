"""The plots of a plan: what every setting should gain, and how well the model meets the grids it was made from."""

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from superpose.experiment.grid_model import NINETY, GainModel, bag_left_out
from superpose.experiment.plan import Plan
from superpose.experiment.plots import COLOURS, GREY, STYLE
from superpose.experiment.summary import quantity


def write_plan_plots(plan: Plan, model: GainModel, out: Path) -> list[Path]:
    """Write plan.png and model.png into ``out``, made if need be, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "plan.png", out / "model.png"]
    with mpl.rc_context(STYLE):
        for path, figure in zip(paths, (draw_plan(plan), draw_model(model)), strict=True):
            figure.savefig(path)
    return paths


def draw_plan(plan: Plan) -> Figure:
    """Expected gain in nats: a map over bag size and ratio, and against bag size with its interval."""
    figure = Figure(figsize=(11, 4.4))
    heat, lines = figure.subplots(1, 2)
    bag_sizes, ratios = np.unique(plan.cells.bag_size), np.unique(plan.cells.ratio)
    shape = (len(bag_sizes), len(ratios))
    gain, fits = plan.mean.reshape(shape), plan.fits.reshape(shape)
    edge = max(abs(gain).max(), 1e-6)
    image = heat.imshow(gain.T, origin="lower", aspect="auto", cmap="PuOr_r", vmin=-edge, vmax=edge)
    for (i, j), value in np.ndenumerate(gain):
        text = f"{1000 * value:.0f}" if fits[i, j] else "×"
        heat.text(i, j, text, ha="center", va="center", fontsize=7.5, color="white" if value > 0.6 * edge else "black")
    if plan.best is not None:
        i, j = np.unravel_index(plan.best, shape)
        heat.plot(i, j, "s", markersize=17, markerfacecolor="none", markeredgecolor=COLOURS[2], markeredgewidth=2.5)
    heat.set_xticks(range(len(bag_sizes)), [f"{bag_size:g}" for bag_size in bag_sizes])
    heat.set_yticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    heat.grid(visible=False)
    heat.set_xlabel("bag size")
    heat.set_ylabel("step ratio")
    heat.set_title("expected gain, thousandths of a nat" + ("" if fits.all() else " (×: repeats data)"))
    figure.colorbar(image, ax=heat, format=lambda value, _: f"{value:.2g}", label="nats below the baseline")
    for ratio, colour in zip(ratios, COLOURS, strict=False):
        here = plan.cells.ratio == ratio
        chosen = plan.best is not None and ratio == plan.cells.ratio[plan.best]
        lines.plot(bag_sizes, plan.mean[here], color=colour, linewidth=2.4 if chosen else 1.2, label=f"ratio {ratio:g}")
        if chosen:
            half = NINETY * plan.deviation[here]
            lines.fill_between(bag_sizes, plan.mean[here] - half, plan.mean[here] + half, color=colour, alpha=0.15, linewidth=0)
    lines.axhline(0, color="black", linewidth=1)
    lines.set_xlabel("bag size")
    lines.set_ylabel("nats below the baseline")
    lines.set_title("expected gain (shaded: 90 % for one run)")
    lines.legend(fontsize=8, ncols=3, loc="lower center", frameon=True, framealpha=1, edgecolor="none")
    run = plan.run
    title = f"{quantity(run.params)} parameters, {run.steps:,} steps, {quantity(run.positions)} positions"
    figure.suptitle(title + (" — EXTRAPOLATED" if plan.warnings else ""), color="#B00000" if plan.warnings else "black")
    return figure


def draw_model(model: GainModel) -> Figure:
    """Each grid's measured gains (dots) and what the model says of each bag size when that is left out (lines)."""
    shown = [(index, grid) for index, grid in enumerate(model.grids) if len(np.unique(grid.cells.bag_size)) > 2]
    columns = 2
    figure = Figure(figsize=(11, 4 * math.ceil(len(shown) / columns)))
    panels = figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, (index, grid) in zip(panels.flat, shown, strict=False):
        here, bag_sizes = model.cells.grid == index, np.unique(grid.cells.bag_size)
        left_out = np.concatenate([bag_left_out(model, here, bag_size) for bag_size in bag_sizes])
        cells = grid.cells
        order = np.concatenate([np.flatnonzero(cells.bag_size == bag_size) for bag_size in bag_sizes])
        for ratio, colour in zip(np.unique(cells.ratio), COLOURS, strict=False):
            chosen = cells.ratio[order] == ratio
            x = cells.bag_size[order][chosen]
            axes.plot(x, grid.gain[order][chosen], "o", color=colour, markersize=4)
            axes.plot(x, left_out[chosen], color=colour, linewidth=1.3, label=f"ratio {ratio:g}")
        axes.set_title(f"{grid.name}: {quantity(grid.params)}, {quantity(grid.steps)} steps, {grid.weighting}")
        axes.set_xlabel("bag size")
        axes.set_ylabel("nats below the baseline")
    handles, _ = panels[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", markersize=4, label="measured"))
    handles.append(Line2D([], [], color=GREY, label="predicted, this bag size left out"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8.5)
    return figure
