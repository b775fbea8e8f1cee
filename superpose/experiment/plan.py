"""Which bag size and step ratio, what they should gain, and what they need: a plan of a run before it is paid for.

`superpose.experiment.grid_model` predicts the gain; this file turns it into a recommendation with its data, compute, hours and
cost, and says where it is a guess.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from superpose.engines.transformers import PEAK_FLOPS
from superpose.errors import InputError
from superpose.experiment.grid_model import (
    DATA_TERM_DEVIATION,
    LARGEST_RATIO,
    NINETY,
    PUBLISHED_POSITIONS_PER_STEP,
    WEIGHTINGS,
    Array,
    Cells,
    Errors,
    GainModel,
    Grid,
    Row,
    data_factor,
    grids,
    models_of_several_lengths,
    published_rows,
    read_rows,
    recommended,
    speed_up,
)
from superpose.experiment.summary import FLOPS_UNITS, duration, plus_minus, quantity

#: Settings that are compared: bag sizes and ratios within the published grids.
BAG_SIZES = range(2, 17)
RATIOS = tuple(i / 10 for i in range(1, round(10 * LARGEST_RATIO) + 1))
#: Bag sizes of the table, beside the recommended one.
SHOWN = (2, 3, 4, 5, 6, 8, 10, 12, 16)
#: A run is near a measured grid within this factor in parameters, steps and positions.
NEAR = 2.0
#: Output-only superposition at the setting that the paper tried; its gain is not in the grids.
OUTPUT_ONLY = "superposition.mode=output-only superposition.bag_size=4 superposition.ratio=0.5"


@dataclass(frozen=True)
class Run:
    """The run to plan. ``tokens``: data tokens that there are, None for any number."""

    params: float
    steps: int
    tokens: float | None = None
    positions_per_step: float = PUBLISHED_POSITIONS_PER_STEP
    weighting: str = "uniform"

    @property
    def positions(self) -> float:
        """Positions that the run computes, and data tokens that its baseline reads."""
        return self.steps * self.positions_per_step


@dataclass(frozen=True)
class Hardware:
    """``gpus`` of the kind ``gpu`` (a name of `PEAK_FLOPS`) at a model FLOPs utilisation; ``price`` of a GPU-hour."""

    gpu: str = "H100"
    gpus: int = 1
    mfu: float = 0.35
    price: float | None = None

    def __post_init__(self) -> None:
        if self.gpu not in PEAK_FLOPS:
            raise InputError(f"--gpu {self.gpu!r} is unknown: take one of {', '.join(PEAK_FLOPS)}")
        if not 0 < self.mfu <= 1:
            raise InputError(f"--mfu must lie in (0, 1], got {self.mfu}")
        if self.gpus < 1:
            raise InputError(f"--gpus must be at least 1, got {self.gpus}")

    def hours(self, flops: float) -> float:
        """GPU-hours."""
        return flops / (PEAK_FLOPS[self.gpu] * self.mfu) / 3600


@dataclass(frozen=True)
class Plan:
    """What is expected of every setting of a run, and the one to take.

    ``mean`` and ``deviation``: gain in nats of each of ``cells``, as `GainModel.predict` has them. ``best``: index of the
    setting to take, None where none fits the data or none gains; ``unlimited``: the one to take if data were no limit.
    """

    run: Run
    cells: Cells
    mean: Array
    deviation: Array
    best: int | None
    unlimited: int
    #: equal-loss speed-up of the best setting: lower end, expected, upper end of a 90 % interval
    speed_up: tuple[float, float, float] | None
    warnings: tuple[str, ...]

    @property
    def data_tokens(self) -> Array:
        """Data tokens that each setting reads."""
        return self.run.positions * data_factor(self.cells)

    @property
    def fits(self) -> np.ndarray:
        """Which settings read no token twice."""
        return self.data_tokens <= (self.run.tokens or math.inf)


def load_model(sweeps: Sequence[Path], positions_per_step: float) -> tuple[GainModel, list[Row]]:
    """The model of the published grids and of sweeps of one's own, whose steps had ``positions_per_step``; and all rows."""
    published, own = published_rows(), [row for sweep in sweeps for row in read_rows(sweep, positions_per_step)]
    return GainModel([*grids(published), *grids(own, own=True)]), [*published, *own]


def make_plan(run: Run, model: GainModel, rows: Sequence[Row]) -> Plan:
    """Predict every setting and choose. Raises InputError for an unknown weighting."""
    if run.weighting not in WEIGHTINGS:
        raise InputError(f"--weighting {run.weighting!r} is not in the grids: take {' or '.join(WEIGHTINGS)}")
    cells = Cells.of(run.params, run.positions, run.weighting, _settings(run, model.grids))
    cells.noise[:] = max((noise for grid, noise in zip(model.grids, model.noise, strict=True) if _near(run, grid)), default=1.0)
    mean, deviation = model.predict(cells)
    unlimited = recommended(mean, deviation)
    fitting = np.flatnonzero(run.positions * data_factor(cells) <= (run.tokens or math.inf))
    best = None
    if fitting.size:
        best = int(fitting[recommended(mean[fitting], deviation[fitting])])
        best = best if mean[best] > 0 else None
    return Plan(
        run=run,
        cells=cells,
        mean=mean,
        deviation=deviation,
        best=best,
        unlimited=unlimited,
        speed_up=None if best is None else _speed_ups(mean[best], deviation[best], run, rows),
        warnings=tuple(_slope(run, rows) if _near_own(run, model.grids) else _extrapolation(run, model.grids)),
    )


def _settings(run: Run, grids: Sequence[Grid]) -> list[tuple[int, float]]:
    """Bag sizes and ratios to compare: all, or near a sweep of one's own those within what it measured."""
    near = [grid.cells for grid in _near_own(run, grids)]
    if not near:
        return [(bag_size, ratio) for bag_size in BAG_SIZES for ratio in RATIOS]
    bag_sizes, ratios = (np.concatenate([getattr(cells, name) for cells in near]) for name in ("bag_size", "ratio"))
    between = [ratio for ratio in RATIOS if ratios.min() < ratio < ratios.max()]
    return [
        (bag_size, ratio)
        for bag_size in range(int(bag_sizes.min()), int(bag_sizes.max()) + 1)
        for ratio in sorted({*between, *ratios.tolist()})
    ]


def _near_own(run: Run, grids: Sequence[Grid]) -> list[Grid]:
    """The grids of one's own, of more than one cell, that the run is near."""
    return [grid for grid in grids if len(grid.cells) > 1 and _near(run, grid)]


def _near(run: Run, grid: Grid) -> bool:
    """Whether ``grid`` is one's own and within a factor of `NEAR` of the run in all that counts."""
    return grid.own and all(
        _factor(getattr(run, name), getattr(grid, name)) <= NEAR for name in ("params", "steps", "positions")
    )


def _factor(a: float, b: float) -> float:
    """By how much the larger exceeds the smaller."""
    return max(a / b, b / a)


def _speed_ups(gain: float, deviation: float, run: Run, rows: Sequence[Row]) -> tuple[float, float, float]:
    """The baseline's curve is uncertain too, which counts like a further error of the gain."""
    half = NINETY * math.hypot(deviation, DATA_TERM_DEVIATION * gain)
    low, middle, high = (speed_up(value, run.params, run.positions, rows) for value in (gain - half, gain, gain + half))
    return low, middle, high


def _slope(run: Run, rows: Sequence[Row]) -> list[str]:
    """That the speed-up rests on baselines of much larger or smaller models, if it does."""
    params = min(models_of_several_lengths(rows), key=lambda params: _factor(params, run.params))
    if _factor(params, run.params) <= NEAR:
        return []
    return [
        f"the speed-up takes the slope of baselines of {quantity(params)} parameters, which may be far off: train this model's "
        "baseline at another length too and add it to the sweep (a row with bag_size 1)"
    ]


def _extrapolation(run: Run, grids: Sequence[Grid]) -> list[str]:
    """How the run lies to the published grids; nothing where it is inside of them."""
    published = [grid for grid in grids if len(grid.cells) > 1 and not grid.own]
    outside, factor = [], 1.0
    for words, name in {"parameters": "params", "steps": "steps", "positions": "positions"}.items():
        values = [getattr(grid, name) for grid in published]
        low, high, value = min(values), max(values), getattr(run, name)
        if not low <= value <= high:
            text = "{:,}".format if words == "steps" else quantity
            outside.append(f"{text(value)} {words} (published: {text(low)} to {text(high)})")
            factor = max(factor, low / value, value / high)
    if not outside:
        return []
    lines = [f"this EXTRAPOLATES: {', '.join(outside)}"]
    if factor > 10:
        lines.append(
            f"the run is {factor:,.0f}× away from anything measured: bag size, ratio and gain are guesses. Small or short "
            "runs were often behind with bags above 2 (docs/log.md); measure a few settings and give them with --sweep"
        )
    return lines


def sentences(plan: Plan) -> list[str]:
    """The recommendation in words."""
    run, unlimited = plan.run, plan.cells[np.array([plan.unlimited])]
    wish = f"bag size {unlimited.bag_size[0]:g}, ratio {unlimited.ratio[0]:g} reads {quantity(_at(plan, plan.unlimited))}"
    lines = []
    short = run.tokens is not None and _at(plan, plan.unlimited) > run.tokens
    if short and run.tokens is not None:
        lines.append(f"Data is short: {wish} tokens, and there are {quantity(run.tokens)}.")
        if run.tokens < run.positions:
            lines.append(f"The baseline alone would go round them {run.positions / run.tokens:.2f} times.")
    if plan.best is not None:
        without = " without repeating data" if short else ""
        bag_size, ratio = plan.cells.bag_size[plan.best], plan.cells.ratio[plan.best]
        lines.append(f"Take bag size {bag_size:g} and ratio {ratio:g}{without}:")
        lines.append(f"  superposition.bag_size={bag_size:g} superposition.ratio={ratio:g}" + _weighting(run))
    elif not plan.fits.any():
        lines.append(
            "No setting in the grids reads so little. Superpose the targets alone, which reads no more than the baseline:"
        )
        lines.append(f"  {OUTPUT_ONLY}")
        lines.append(
            "(the paper's setting, which beat the baseline by less than full superposition did; its gain is not in this model)"
        )
    else:
        lines.append("No setting is expected to beat the baseline: train without superposition.")
    return lines


def _weighting(run: Run) -> str:
    return "" if run.weighting == "uniform" else f" superposition.weighting={run.weighting}"


def _at(plan: Plan, index: int) -> float:
    return float(plan.data_tokens[index])


def interval(mean: float, deviation: float) -> str:
    """``0.0747 (0.0710 to 0.0783)``: nats, and the 90 % interval."""
    low, high = mean - NINETY * deviation, mean + NINETY * deviation
    return f"{plus_minus(mean)} ({plus_minus(low)} to {plus_minus(high)})"


def costs_table(plan: Plan, hardware: Hardware) -> Table:
    """Baseline, the recommended run, and the baseline that reaches its loss: data, compute, hours, cost."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(overflow="fold")
    columns = {"baseline": _costs(plan.run.steps, plan.run, hardware)}
    if plan.best is not None and plan.speed_up is not None:
        columns["tst"] = _costs(plan.run.steps, plan.run, hardware) | {
            "data tokens": _data(_at(plan, plan.best), plan.run),
            "gain, nats": interval(plan.mean[plan.best], plan.deviation[plan.best]),
            "speed-up": "{1:.2f}× ({0:.2f} to {2:.2f})".format(*plan.speed_up),
        }
        if math.isfinite(plan.speed_up[1]):
            columns["baseline, same loss"] = _costs(round(plan.run.steps * plan.speed_up[1]), plan.run, hardware)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for name in columns.get("tst", columns["baseline"]):
        table.add_row(name, *(column.get(name, "–") for column in columns.values()))
    return table


def _costs(steps: int, run: Run, hardware: Hardware) -> dict[str, str]:
    """6 FLOPs a parameter and position: attention is left out, input embeddings are not."""
    positions = steps * run.positions_per_step
    flops = 6 * run.params * positions
    hours = hardware.hours(flops)
    cells = {
        "steps": f"{steps:,}",
        "positions": quantity(positions),
        "data tokens": _data(positions, run),
        "FLOPs": quantity(flops, FLOPS_UNITS),
        f"{hardware.gpu}-hours": f"{hours:,.0f}" if hours >= 10 else f"{hours:.2f}",
        f"time on {hardware.gpus}": duration(hours * 3600 / hardware.gpus),
    }
    return cells if hardware.price is None else cells | {"cost": f"{hours * hardware.price:,.2f}"}


def _data(tokens: float, run: Run) -> str:
    epochs = tokens / (run.tokens or math.inf)
    return quantity(tokens) + (f" ({epochs:.2f} epochs)" if epochs > 1 else "")


def settings_table(plan: Plan) -> Table:
    """The best ratio at each bag size: its gain and data; a bag size that data is too short for is dimmed."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("bag size", "best ratio", "gain, nats (90 %)", "data tokens"):
        table.add_column(name, justify="right", overflow="fold")
    chosen = [] if plan.best is None else [int(plan.cells.bag_size[plan.best])]
    for bag_size in sorted({*SHOWN, *chosen} & {*plan.cells.bag_size.astype(int).tolist()}):
        here = plan.cells.bag_size == bag_size
        fitting = np.flatnonzero(here & plan.fits)
        among = fitting if fitting.size else np.flatnonzero(here)
        index = int(among[plan.mean[among].argmax()])
        tokens = _data(_at(plan, index), plan.run)
        cells = (f"{bag_size}", f"{plan.cells.ratio[index]:g}", interval(plan.mean[index], plan.deviation[index]), tokens)
        table.add_row(*cells, style=None if fitting.size else "dim")
    return table


def error_sentence(errors: Sequence[Errors]) -> str:
    """The model's cross-validated errors in one line: the largest over the grids."""
    errors = [error for error in errors if len(error.grid.cells) > 1]
    bags = [error.bag_left_out for error in errors if error.bag_left_out is not None]
    return (
        f"Cross-validated on {len(errors)} grids, root mean square, the worst of them: {max(bags):.4f} nats at a bag size left "
        f"out, {max(error.grid_left_out for error in errors):.4f} with the whole grid left out."
    )


def errors_table(errors: Sequence[Errors]) -> Table:
    """Every grid's errors in nats: a bag size left out; the whole grid left out (root mean square, bias, share of cells in
    their 90 % interval); what the recommended setting loses to the grid's best, the grid known and left out."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("grid", overflow="fold")
    for name in ("bag size\nout", "grid\nout", "its\nbias", "in\n90 %", "regret", "regret,\ngrid out"):
        table.add_column(name, justify="right", no_wrap=True)
    for error in errors:
        table.add_row(
            f"{error.grid.name}: {quantity(error.grid.params)}, {error.grid.steps:,}, {error.grid.weighting}",
            "–" if error.bag_left_out is None else f"{error.bag_left_out:.4f}",
            f"{error.grid_left_out:.4f}",
            plus_minus(error.grid_bias, sign="+"),
            f"{error.covered:.0%}",
            f"{error.regret:.4f}",
            f"{error.regret_left_out:.4f}",
        )
    return table
