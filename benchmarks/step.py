"""A whole training step, superposed against plain, and plain against the same model with nothing attached."""

from collections.abc import Callable

from models import MEDIUM, SMALL, Shape, Step
from timing import Figures, Table, Target, in_turn, peak_of_tensors, peak_resident

from superpose import attach

BAG_SIZES = (2, 4, 8, 16)
PLAIN, STOCK = "plain", "plain, nothing attached"
#: A superposed step over a plain one, in time and in peak memory.
BOUND = 1.03


def run(*, quick: bool) -> Figures:
    figures = Figures([])
    for shape, seconds in ((SMALL, 5),) if quick else ((SMALL, 150), (MEDIUM, 180)):
        table = Table(f"training step, Llama of {shape.name}, {shape.sequences} × {shape.positions} positions, float32")
        attached, stock = Step(attach(shape.build())), Step(shape.build())
        candidates = {PLAIN: _call(attached, shape, 1)}
        candidates |= {f"superposed, s = {bag_size}": _call(attached, shape, bag_size) for bag_size in BAG_SIZES}
        candidates[STOCK] = _call(stock, shape, 1)
        bags = [1, *BAG_SIZES, 1]
        for bag_size, (name, row) in zip(bags, in_turn(table.title, candidates, seconds).items(), strict=True):
            tensors = peak_of_tensors(candidates[name])
            resident = peak_resident(prepare, shape, bag_size, name != STOCK)
            table.rows.append({"step": name, **row, "tensors bytes": tensors, "resident bytes": resident})
        figures.tables.append(table)
        base = table.rows[0]
        for row in table.rows[1:-1]:
            for quantity, ratio in (("time", row["× first"]), ("peak memory", row["tensors bytes"] / base["tensors bytes"])):
                figures.targets.append(Target(f"{shape.name}, {row['step']}: {quantity} over the plain step's", ratio, BOUND))
    return figures


def prepare(shape: Shape, bag_size: int, attached: bool) -> Callable[[], object]:
    """A training step of a new model whose optimizer has its state; it has run once on a few positions."""
    model = shape.build()
    step = Step(attach(model) if attached else model)
    step(shape.ids(bag_size)[:1, :8])
    return _call(step, shape, bag_size)


def _call(step: Step, shape: Shape, bag_size: int) -> Callable[[], object]:
    ids = shape.ids(bag_size)
    return lambda: step(ids)
