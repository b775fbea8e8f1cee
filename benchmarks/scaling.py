"""How the time of a training step grows with positions, vocabulary and bag size: exponents fitted on log-log axes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from models import SMALL, Step
from timing import Figures, Row, Table, in_turn

from superpose import attach

#: Long enough sequences and a large enough vocabulary that each axis shows in the step.
BASE = dataclasses.replace(SMALL, vocabulary=4096, sequences=2)
BAG_SIZE = 4
AXES: dict[str, tuple[int, ...]] = {
    "positions": (128, 256, 512, 1024, 2048),
    "vocabulary": (1024, 4096, 16384, 65536),
    "bag_size": (2, 4, 8, 16),
}


def run(*, quick: bool) -> Figures:
    exponents = Table("exponents of the step's time on each axis, the others fixed")
    tables = [exponents]
    for axis, values in AXES.items():
        chosen = values[:3] if quick else values
        table = Table(f"step time against {axis}, width {BASE.width}, {BASE.layers} layers, {BASE.sequences} sequences")
        for value, (_, row) in zip(
            chosen,
            in_turn(table.title, {str(value): _step(axis, value) for value in chosen}, 2 if quick else 20).items(),
            strict=True,
        ):
            table.rows.append({axis: value, **row})
        exponents.rows.append(_fit(axis, chosen, [row["median s"] for row in table.rows]))
        tables.append(table)
    return Figures(tables)


def _step(axis: str, value: int) -> Callable[[], object]:
    changes: dict[str, Any] = {} if axis == "bag_size" else {axis: value}
    shape = dataclasses.replace(BASE, **changes)
    step, ids = Step(attach(shape.build())), shape.ids(value if axis == "bag_size" else BAG_SIZE)
    return lambda: step(ids)


def _fit(axis: str, values: tuple[int, ...], seconds: list[float]) -> Row:
    """The slope over the whole range, and between the last two points, where constant costs weigh least."""
    x, y = np.log(values), np.log(seconds)
    return {
        "axis": axis,
        "exponent": float(np.polyfit(x, y, 1)[0]),
        "exponent of the last two": float((y[-1] - y[-2]) / (x[-1] - x[-2])),
    }
