"""The loss of baselines over their length, and the length at which a baseline reaches the loss of another run.

Each baseline is a whole run with its own decay of the learning rate. Their final losses are fitted by
L(n) = floor + scale · n^(−exponent), n in optimizer steps; inverted, the curve says how long a baseline must be for the loss
that an arm of a comparison ended with. The arm's equal-loss speed-up is the FLOPs of that baseline over the arm's own: the
ratio of their steps, but for patch-level training, whose steps cost less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpose.experiment.interval import half_interval

Array = NDArray[np.float64]

#: Exponents that are searched, values tried at once, and how often the search narrows to the neighbours of the best.
EXPONENTS, TRIED, ROUNDS = (0.001, 2.0), 101, 5
#: Lengths that a curve of three parameters needs.
LEAST_LENGTHS = 3


@dataclass(frozen=True)
class LossCurve:
    """Final loss in nats of a baseline of n steps: ``floor + scale · n^(−exponent)``."""

    floor: float
    scale: float
    exponent: float

    def loss(self, steps: Any) -> Any:
        """Nats at a number of steps, or at an array of them."""
        return self.floor + self.scale * np.asarray(steps, float) ** -self.exponent

    def steps(self, loss: float) -> float:
        """Steps of a baseline that ends with ``loss``; infinite where no length would do."""
        if loss <= self.floor:
            return math.inf
        power = math.log(self.scale / (loss - self.floor)) / self.exponent
        return math.exp(power) if power < math.log(1e300) else math.inf


def fit_curve(steps: Sequence[float], losses: Sequence[float]) -> LossCurve | None:
    """The curve of least squares with floor ≥ 0, scale > 0 and 0 < exponent ≤ 2; None where the loss does not fall.

    Given the exponent the other two are linear, so it alone is searched.
    """
    middle = float(np.exp(np.log(steps).mean()))
    n, y = np.asarray(steps, float) / middle, np.asarray(losses, float)
    low, high = EXPONENTS
    for _ in range(ROUNDS):
        tried = np.linspace(low, high, TRIED)
        found = [_linear(n**-exponent, y) for exponent in tried]
        best = min(range(TRIED), key=lambda i: found[i][2])
        low, high = tried[max(0, best - 1)], tried[min(TRIED - 1, best + 1)]
    (floor, scale, _), exponent = found[best], float(tried[best])
    return LossCurve(floor, scale * middle**exponent, exponent) if scale > 0 else None


def _linear(x: Array, y: Array) -> tuple[float, float, float]:
    """Least squares of y = floor + scale · x with neither below zero: floor, scale, and the sum of squares that is left."""
    centred = x - x.mean()
    scale = max(0.0, float(centred @ y / (centred @ centred)))
    floor = float(y.mean() - scale * x.mean())
    if floor < 0:
        floor, scale = 0.0, float(x @ y / (x @ x))
    return floor, scale, float(np.square(floor + scale * x - y).sum())


@dataclass(frozen=True)
class EqualLoss:
    """An arm, and the baseline that would end with its loss. Losses in nats, costs as means over the seeds.

    A baseline's step count is None where no length would do; its costs are then None as well.
    """

    name: str
    seeds: int
    final_loss: float
    #: sample standard deviation over seeds; None with one
    final_loss_deviation: float | None
    steps: int
    #: steps of a baseline that costs as many FLOPs: ``steps``, but for patch-level training
    equal_steps: float
    baseline_steps: float | None
    #: baseline_flops / flops
    speed_up: float | None
    #: 90 % interval of the speed-up from the seeds, None with one; an end is None where no length would do
    interval: tuple[float | None, float | None] | None
    #: nats by which the arm is below the curve at its own FLOPs
    gain: float
    #: whether baseline_steps lie outside of the measured lengths
    extrapolated: bool
    data_tokens: float
    baseline_data_tokens: float | None
    flops: float
    baseline_flops: float | None
    seconds: float
    baseline_seconds: float | None


@dataclass(frozen=True)
class EqualLossResults:
    """The curve of the baselines, None where their loss does not fall with their length, and every other arm against it."""

    curve: LossCurve | None
    #: scatter of the baselines around the curve once each seed has a level of its own, nats; None with no run to spare
    residual: float | None
    #: steps of the shortest and of the longest baseline
    measured: tuple[int, int]
    arms: tuple[EqualLoss, ...]


def equal_loss(rows: Sequence[dict[str, Any]]) -> EqualLossResults:
    """Fit the baselines among ``rows``, those of equal-loss.csv, and hold every other arm against them.

    Diverged runs are left out. The seeds share the curve's shape. A seed's level is the mean distance of its baselines from
    the curve, and its arms are corrected by it: a pairing by seed that does not fit three parameters to the few baselines of
    one seed. The interval is that of the mean of the corrected losses, read off the curve.
    """
    rows = [row for row in rows if row["final_loss"] is not None]
    baselines = [row for row in rows if row["arm"] == "baseline"]
    lengths = {row["steps"] for row in baselines}
    measured = (min(lengths, default=0), max(lengths, default=0))
    curve = None
    if len(lengths) >= LEAST_LENGTHS:
        curve = fit_curve([row["steps"] for row in baselines], [row["final_loss"] for row in baselines])
    if curve is None:
        return EqualLossResults(None, None, measured, ())
    distances: dict[int, list[float]] = {}
    for row in baselines:
        distances.setdefault(row["seed"], []).append(row["final_loss"] - float(curve.loss(row["steps"])))
    levels = {seed: fmean(values) for seed, values in distances.items()}
    spare = len(baselines) - LEAST_LENGTHS - (len(levels) - 1)
    squares = sum((distance - levels[seed]) ** 2 for seed, values in distances.items() for distance in values)
    names = dict.fromkeys(row["arm"] for row in rows if row["arm"] != "baseline")
    arms = ([row for row in rows if row["arm"] == name and row["seed"] in levels] for name in names)
    return EqualLossResults(
        curve,
        math.sqrt(squares / spare) if spare > 0 else None,
        measured,
        tuple(_against(curve, levels, measured, baselines, runs) for runs in arms if runs),
    )


def _against(
    curve: LossCurve,
    levels: dict[int, float],
    measured: tuple[int, int],
    baselines: Sequence[dict[str, Any]],
    runs: Sequence[dict[str, Any]],
) -> EqualLoss:
    losses = [run["final_loss"] for run in runs]
    corrected = [run["final_loss"] - levels[run["seed"]] for run in runs]
    level = fmean(corrected)
    reached = _finite(curve.steps(level))
    flops = fmean(run["flops"] for run in runs)
    own = flops / _per_step(baselines, "flops")
    interval = None
    if len(runs) > 1:
        half = half_interval(stdev(corrected), len(runs))
        low, high = _finite(curve.steps(level + half)), _finite(curve.steps(level - half))
        interval = (low and low / own, high and high / own)

    def cost(name: str) -> float | None:
        return reached and reached * _per_step(baselines, name)

    return EqualLoss(
        name=runs[0]["arm"],
        seeds=len(runs),
        final_loss=fmean(losses),
        final_loss_deviation=stdev(losses) if len(losses) > 1 else None,
        steps=runs[0]["steps"],
        equal_steps=own,
        baseline_steps=reached,
        speed_up=reached and reached / own,
        interval=interval,
        gain=float(curve.loss(own)) - level,
        extrapolated=reached is None or not measured[0] <= reached <= measured[1],
        data_tokens=fmean(run["data_tokens"] for run in runs),
        baseline_data_tokens=cost("data_tokens"),
        flops=flops,
        baseline_flops=cost("flops"),
        seconds=fmean(run["seconds"] for run in runs),
        baseline_seconds=cost("seconds"),
    )


def _per_step(runs: Sequence[dict[str, Any]], name: str) -> float:
    return sum(run[name] for run in runs) / sum(run["steps"] for run in runs)


def _finite(steps: float) -> float | None:
    return steps if math.isfinite(steps) else None
