"""What superposition gains over the baseline: a model of measured grids of bag size and step ratio.

Data: ``loss_grid.csv`` holds the grids of the paper's tables 4 to 7 (arXiv 2605.06546, v2: final losses in nats, 270M and 600M
models, 2M positions a step) and, from its table 1, the 3B run at bag size 6 and the 3B baselines of three lengths. A sweep of
one's own has the same columns.

The gain of bag size s and step ratio r over the baseline of the same run, in nats, is a benefit less a cost of recovery,

    A · (1 − e^(−0.8 (s − 1))) · r / (r + 0.1/√s)  −  C · log2 s · ((1 − r)^(−1/2) − 1),

both times (positions / 42B)^(−0.28), the data term of Chinchilla's scaling law. A and C are a Gaussian process: one level for
all runs, and deviations that are smooth in log2 s and in the run (log parameters, log positions, weighting). With a small
smooth remainder and noise this is linear and Gaussian, so predictions, their spread and cross-validation are exact linear
algebra. The constants below are fixed, chosen by looking at the published grids; `docs/planning.md` has how well it does.
"""

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpose.bags import position_weights
from superpose.errors import InputError

Array = NDArray[np.float64]

COLUMNS = ("table", "params", "total_steps", "weighting", "step_ratio", "bag_size", "final_loss")
#: Weightings that the published grids cover.
WEIGHTINGS = ("uniform", "power-law")
#: Positions of an optimizer step in the published grids.
PUBLISHED_POSITIONS_PER_STEP = 2**21
#: Ratios above this are left out: the loss only rises with them, at every bag size.
LARGEST_RATIO = 0.6

#: Prior size of A and C, nats at 42B positions.
BENEFIT, COST = 0.08, 0.025
#: Positions at which the scale of the gain is 1, and its exponent, that of data in Hoffmann et al. (arXiv 2203.15556). Below
#: these positions the scale stays 1: nothing is known there, and the power law would promise much.
SCALE_POSITIONS, SCALE_EXPONENT = 20_000 * 2**21, 0.28
#: Deviation of A and C between bag sizes and runs, relative, and the distances over which it fades.
DEVIATION, BAG_LENGTH, PARAMS_LENGTH, POSITIONS_LENGTH, WEIGHTING_LENGTH = 0.3, 0.7, 1.5, 2.0, 2.0
#: Further deviation, relative, for each factor e by which a run lies outside of the published grids.
OUTSIDE = 0.4
#: The smooth remainder, nats, and its lengths in r and log2 s.
REMAINDER, REMAINDER_LENGTHS = 0.0015, (0.15, 1.0)
#: What is particular to a bag size, nats: all ratios share it, neighbouring bag sizes do not. Without seeds nobody knows
#: whether it would repeat; it is taken to repeat in the same run.
BUMP = 0.0007
#: Noise, nats: of a baseline (shared by its whole table) and of one cell.
BASELINE_NOISE, CELL_NOISE = 0.0015, 0.0007
#: Factors tried for the noise of each sweep of one's own, which is larger for small runs; all as likely beforehand.
NOISE_FACTORS = tuple(2 ** (i / 2) for i in range(11))

#: Standard deviations by which a gain is marked down before settings are compared.
CAUTION = 0.5
#: Relative uncertainty of the baseline's data term: the 3B model's speed-up, measured as 1.8×, comes out as 2.0×.
DATA_TERM_DEVIATION = 0.2
#: Half-width of a 90 % interval in standard deviations.
NINETY = 1.645


@dataclass(frozen=True)
class Row:
    """One run of a grid. ``table``: its grid; ``loss``: final plain loss in nats; baselines have bag size 1."""

    table: str
    params: float
    steps: int
    positions: float
    weighting: str
    ratio: float
    bag_size: int
    loss: float

    @property
    def run(self) -> tuple[str, float, int]:
        """What a cell shares with its baseline."""
        return self.table, self.params, self.steps


@dataclass(frozen=True)
class Cells:
    """Settings of superposed runs, one an entry of each array ``[n]``. ``grid``: index of the grid, −1 for one to come."""

    grid: NDArray[np.int64]
    params: Array
    positions: Array
    power_law: Array
    bag_size: Array
    ratio: Array
    #: factor on the noise
    noise: Array

    def __len__(self) -> int:
        return len(self.grid)

    def __getitem__(self, which: NDArray[Any]) -> "Cells":
        return Cells(*(getattr(self, field.name)[which] for field in fields(self)))

    @classmethod
    def of(
        cls, params: float, positions: float, weighting: str, settings: Sequence[tuple[int, float]], grid: int = -1
    ) -> "Cells":
        """One run at each ``(bag size, ratio)`` of ``settings``."""
        size = len(settings)
        bag_sizes, ratios = (np.array(column, np.float64) for column in zip(*settings, strict=True))
        return cls(
            grid=np.full(size, grid),
            params=np.full(size, params),
            positions=np.full(size, positions),
            power_law=np.full(size, float(weighting == "power-law")),
            bag_size=bag_sizes,
            ratio=ratios,
            noise=np.ones(size),
        )


@dataclass(frozen=True)
class Grid:
    """One table of gains. ``name`` is for people; ``own``: not published; ``cells`` and ``gain`` go together."""

    name: str
    params: float
    steps: int
    positions: float
    weighting: str
    own: bool
    cells: Cells
    #: nats by which each cell is below its baseline
    gain: Array
    #: runs of each cell that were averaged (seeds)
    runs: Array
    #: squared deviations of repeated runs, baselines too, from their means, summed (nats²), and their degrees of freedom
    scatter: float
    repeats: int


def published_rows() -> list[Row]:
    return read_rows(files("superpose.experiment").joinpath("loss_grid.csv"), PUBLISHED_POSITIONS_PER_STEP)


def read_rows(file: Path | Traversable, positions_per_step: float) -> list[Row]:
    """The rows of a CSV with at least `COLUMNS`. Raises InputError that names the file, and the line or the column."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{file}: no such sweep") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    reader = csv.DictReader(text.splitlines())
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise InputError(f"{file} has no column {missing[0]}: a sweep has the columns {', '.join(COLUMNS)}")
    return [_row(values, f"{file}, line {reader.line_num}", positions_per_step) for values in reader]


def _row(values: dict[str, str], where: str, positions_per_step: float) -> Row:
    try:
        steps = int(values["total_steps"])
        row = Row(
            table=values["table"],
            params=parse_count(values["params"]),
            steps=steps,
            positions=steps * positions_per_step,
            weighting=values["weighting"].replace("_", "-"),
            ratio=float(values["step_ratio"]),
            bag_size=int(values["bag_size"]),
            loss=float(values["final_loss"] or "nan"),  # empty: the run diverged
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{where} is not a run of a sweep ({error}): mend it or remove the line") from None
    if row.steps < 1 or row.params <= 0 or row.bag_size < 1 or not 0 <= row.ratio <= 1:
        raise InputError(f"{where} is not a run of a sweep: steps, params and bag_size are positive, step_ratio is in [0, 1]")
    return row


def parse_count(text: str) -> float:
    """``600M`` or ``2.1B`` or ``20000`` as a number; ValueError otherwise."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    scale = units.get(text.strip()[-1:].upper(), 1.0)
    value = float(text.strip()[:-1] if scale > 1 else text) * scale
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{text!r} is not a positive number")
    return value


def grids(rows: Iterable[Row], *, own: bool = False) -> list[Grid]:
    """A grid of gains for each table, run and weighting; cells measured more than once (seeds) are averaged.

    Raises InputError for a run without its baseline. Other weightings, ratios above `LARGEST_RATIO` and diverged runs are left
    out.
    """
    baselines: dict[Any, list[float]] = {}
    losses: dict[Any, dict[tuple[int, float], list[float]]] = {}
    positions: dict[Any, float] = {}
    for row in rows:
        positions[row.run] = row.positions
        if not math.isfinite(row.loss):
            continue
        if row.bag_size == 1 or row.ratio == 0:
            baselines.setdefault(row.run, []).append(row.loss)
        elif row.weighting in WEIGHTINGS and row.ratio <= LARGEST_RATIO:
            losses.setdefault((row.run, row.weighting), {}).setdefault((row.bag_size, row.ratio), []).append(row.loss)
    result = []
    for (run, weighting), measured in losses.items():
        table, params, steps = run
        if run not in baselines:
            raise InputError(
                f"table {table} has no baseline of {params:g} parameters and {steps} steps: add its row, bag_size 1"
            )
        repeated = [baselines[run], *measured.values()]
        result.append(
            Grid(
                name=f"{'sweep' if own else 'table'} {table}",
                params=params,
                steps=steps,
                positions=positions[run],
                weighting=weighting,
                own=own,
                cells=Cells.of(params, positions[run], weighting, list(measured)),
                gain=np.array([fmean(baselines[run]) - fmean(losses) for losses in measured.values()]),
                runs=np.array([min(len(baselines[run]), len(losses)) for losses in measured.values()], np.float64),
                scatter=sum(len(losses) * pvariance(losses) for losses in repeated),
                repeats=sum(len(losses) - 1 for losses in repeated),
            )
        )
    return result


class GainModel:
    """The posterior over gains, given grids. ``noise``: factor on the noise of each grid's runs, 1 for those published."""

    def __init__(self, grids: Sequence[Grid]) -> None:
        self.grids = tuple(grids)
        self.noise = [_fitted_noise(grid) if grid.own else 1.0 for grid in grids]
        cells = [_with_noise(grid, noise) for grid, noise in zip(grids, self.noise, strict=True)]
        self.cells = _join([_numbered(part, index) for index, part in enumerate(cells)])
        self.gain = np.concatenate([grid.gain for grid in grids])

    def predict(self, cells: Cells, given: NDArray[np.bool_] | None = None) -> tuple[Array, Array]:
        """Mean gain ``[n]`` of runs to come, nats, and the standard deviation of a single one, noise of both arms included.

        ``given``: which of the model's own cells to learn from, all by default; cross-validation leaves some out.
        """
        given = np.ones(len(self.cells), bool) if given is None else given
        known = self.cells[given]
        cross = _covariance(cells, known) + _noise(cells, known)
        solved = np.linalg.solve(_covariance(known, known) + _noise(known, known), np.column_stack([self.gain[given], cross.T]))
        prior = np.diagonal(_covariance(cells, cells)) + cells.noise**2 * (BASELINE_NOISE**2 + CELL_NOISE**2)
        variance = prior - (cross * solved[:, 1:].T).sum(1)
        return cross @ solved[:, 0], np.sqrt(np.maximum(variance, 0))


def _fitted_noise(grid: Grid) -> float:
    """The root mean square of the factors, by their likelihood for a grid's gains and for the scatter of its seeds.

    A few cells that agree tell little of the noise, and the likeliest factor alone would be far too small.
    """

    def likelihood(factor: float) -> float:
        cells = _with_noise(grid, factor)
        root = np.linalg.cholesky(_covariance(cells, cells) + _noise(cells, cells))
        scatter = 0.5 * grid.scatter / (factor * BASELINE_NOISE) ** 2 + grid.repeats * math.log(factor)
        return float(-0.5 * np.square(np.linalg.solve(root, grid.gain)).sum() - np.log(np.diagonal(root)).sum() - scatter)

    likelihoods = np.array([likelihood(factor) for factor in NOISE_FACTORS])
    weights = np.exp(likelihoods - likelihoods.max())
    return float(np.sqrt(np.average(np.square(NOISE_FACTORS), weights=weights)))


def _with_noise(grid: Grid, factor: float) -> Cells:
    """The grid's cells, each the mean of its runs, whose noise is ``factor`` times that of the published."""
    return replace(grid.cells, noise=factor / np.sqrt(grid.runs))


def recommended(mean: Array, deviation: Array) -> int:
    """Index of the setting to take: the largest gain less `CAUTION` standard deviations.

    Near the measured grids, where all settings are known about equally well, this is the largest gain. Far from them the spread
    grows with the gain that is hoped for, and small bags and ratios are taken, which cannot lose much.
    """
    return int((mean - CAUTION * deviation).argmax())


def data_factor(cells: Cells) -> Array:
    """Data tokens of each run divided by the baseline's."""
    return 1 + cells.ratio * (cells.bag_size - 1)


def _join(parts: Sequence[Cells]) -> Cells:
    return Cells(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Cells)))


def _numbered(cells: Cells, grid: int) -> Cells:
    return Cells(np.full(len(cells), grid), *(getattr(cells, field.name) for field in fields(cells)[1:]))


def _covariance(a: Cells, b: Cells) -> Array:
    """Prior covariance ``[len(a), len(b)]`` of the noise-free gains."""

    def outer(values: Callable[[Cells], Array]) -> Array:
        return values(a)[:, None] * values(b)[None, :]

    def fade(values: Callable[[Cells], Array], length: float) -> Array:
        return np.exp(-0.5 * ((values(a)[:, None] - values(b)[None, :]) / length) ** 2)

    def log_bag(cells: Cells) -> Array:
        return np.log2(_effective_bag(cells))

    near = fade(log_bag, BAG_LENGTH)
    same_run = (
        fade(lambda cells: np.log(cells.params), PARAMS_LENGTH)
        * fade(lambda cells: np.log(cells.positions), POSITIONS_LENGTH)
        * fade(lambda cells: cells.power_law, WEIGHTING_LENGTH)
    )
    outside = sum(outer(values) for values in _distances_outside())
    relative = 1 + DEVIATION**2 * same_run * near + OUTSIDE**2 * outside * (1 + near) / 2
    ratio_length, bag_length = REMAINDER_LENGTHS
    remainder = REMAINDER**2 * fade(lambda cells: cells.ratio, ratio_length) * fade(log_bag, bag_length)
    return (
        (BENEFIT**2 * outer(_benefit) + COST**2 * outer(_cost)) * relative
        + remainder
        + BUMP**2 * same_run * (a.bag_size[:, None] == b.bag_size)
    )


def _noise(a: Cells, b: Cells) -> Array:
    """Covariance of the noise; a grid to come (−1) shares none with those measured."""
    same = (a.grid[:, None] == b.grid) * (a.noise[:, None] * b.noise)
    same_cell = same * (a.bag_size[:, None] == b.bag_size) * (a.ratio[:, None] == b.ratio)
    return BASELINE_NOISE**2 * same + CELL_NOISE**2 * same_cell


def _benefit(cells: Cells) -> Array:
    bag = _effective_bag(cells)
    return _scale(cells) * (1 - np.exp(-0.8 * (bag - 1))) * cells.ratio / (cells.ratio + 0.1 / np.sqrt(bag))


def _cost(cells: Cells) -> Array:
    return _scale(cells) * np.log2(_effective_bag(cells)) * ((1 - cells.ratio) ** -0.5 - 1)


def _scale(cells: Cells) -> Array:
    return (np.maximum(cells.positions, SCALE_POSITIONS) / SCALE_POSITIONS) ** -SCALE_EXPONENT


def _effective_bag(cells: Cells) -> Array:
    """Targets of equal weight that count as much as the weighted ones of a bag: 1 / Σ w². The bag size where uniform."""
    bags = zip(cells.bag_size, cells.power_law, strict=True)
    return np.array([_targets(int(bag_size), WEIGHTINGS[int(power_law)]) for bag_size, power_law in bags])


@cache
def _targets(bag_size: int, weighting: str) -> float:
    return 1 / float(position_weights(weighting, bag_size).double().square().sum())


def _distances_outside() -> list[Callable[[Cells], Array]]:
    """Four distances, in factors of e, of a run below and above the published grids in parameters and in positions."""
    (low_params, high_params), (low_positions, high_positions) = published_range()
    return [
        lambda cells: np.maximum(0, np.log(low_params / cells.params)),
        lambda cells: np.maximum(0, np.log(cells.params / high_params)),
        lambda cells: np.maximum(0, np.log(low_positions / cells.positions)),
        lambda cells: np.maximum(0, np.log(cells.positions / high_positions)),
    ]


@cache
def published_range() -> tuple[tuple[float, float], tuple[float, float]]:
    """Parameters and positions that the published grids (tables of more than one cell) span."""
    whole = [grid for grid in grids(published_rows()) if len(grid.cells) > 1]
    params, positions = [grid.params for grid in whole], [grid.positions for grid in whole]
    return (min(params), max(params)), (min(positions), max(positions))


def speed_up(gain: float, params: float, positions: float, rows: Sequence[Row]) -> float:
    """Steps of the baseline that reaches the same loss, divided by the run's own; infinite where no length would do.

    A baseline's loss falls with its positions as b · (positions / 42B)^(−0.28); b is fitted to the baselines of several lengths
    among ``rows`` and interpolated in log parameters (held constant outside of them).
    """
    models = models_of_several_lengths(rows)
    terms = [_data_term(_baselines(rows, params)) for params in models]
    term = math.exp(np.interp(math.log(params), np.log(models), np.log(terms)))
    left = 1 - gain / (term * (positions / SCALE_POSITIONS) ** -SCALE_EXPONENT)
    return left ** (-1 / SCALE_EXPONENT) if left > 0 else math.inf


def models_of_several_lengths(rows: Sequence[Row]) -> list[float]:
    """Parameters of the models whose baselines were trained for several numbers of positions, ascending."""
    return sorted({row.params for row in rows if len({other.positions for other in _baselines(rows, row.params)}) > 1})


def _baselines(rows: Sequence[Row], params: float) -> list[Row]:
    return [row for row in rows if row.bag_size == 1 and row.params == params and math.isfinite(row.loss)]


def _data_term(baselines: Sequence[Row]) -> float:
    scale = np.array([(row.positions / SCALE_POSITIONS) ** -SCALE_EXPONENT for row in baselines])
    return float(max(np.polyfit(scale, [row.loss for row in baselines], 1)[0], 1e-6))


@dataclass(frozen=True)
class Errors:
    """Cross-validated errors of one grid, in nats. None where the grid is too small for them."""

    grid: Grid
    #: root-mean-square error at interior bag sizes, each left out of every grid
    bag_left_out: float | None
    #: of the gains of the whole grid, left out; their mean error; share of cells inside their 90 % interval
    grid_left_out: float
    grid_bias: float
    covered: float
    #: loss at the recommended cell less the grid's best, and the same with the grid left out
    regret: float
    regret_left_out: float


def cross_validate(model: GainModel) -> list[Errors]:
    """The errors of every grid."""
    result = []
    for index, grid in enumerate(model.grids):
        here = model.cells.grid == index
        mean, deviation = model.predict(model.cells[here], ~here)
        fitted = model.predict(grid.cells)
        error = mean - grid.gain
        result.append(
            Errors(
                grid=grid,
                bag_left_out=_bag_left_out(model, here),
                grid_left_out=_rms(error),
                grid_bias=float(error.mean()),
                covered=float((np.abs(error) <= NINETY * deviation).mean()),
                regret=float(grid.gain.max() - grid.gain[recommended(*fitted)]),
                regret_left_out=float(grid.gain.max() - grid.gain[recommended(mean, deviation)]),
            )
        )
    return result


def bag_left_out(model: GainModel, here: NDArray[np.bool_], bag_size: float) -> Array:
    """Predicted gains of one bag size of the grid ``here`` from all cells, of any grid, of other bag sizes."""
    chosen = here & (model.cells.bag_size == bag_size)
    return model.predict(model.cells[chosen], model.cells.bag_size != bag_size)[0]


def _bag_left_out(model: GainModel, here: NDArray[np.bool_]) -> float | None:
    interior = np.unique(model.cells.bag_size[here])[1:-1]
    errors = [bag_left_out(model, here, bag) - model.gain[here & (model.cells.bag_size == bag)] for bag in interior]
    return _rms(np.concatenate(errors)) if errors else None


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))
