"""The ``tst`` section of a TorchTitan configuration, which stands for a `superpose.schedule.Schedule`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from superpose.bags import Weighting
from superpose.errors import InputError
from superpose.schedule import Schedule, Stage

#: What happens at the end of a document while bags are read.
Documents = Literal["packed", "separate"]


@dataclass(kw_only=True, slots=True)
class Superposition:
    bag_size: int = 1
    """s: tokens in a bag. 1 is ordinary training."""

    ratio: float = 0.0
    """r: share of training.steps that are superposed; the rest is plain."""

    mode: Literal["full", "input-only", "output-only"] = "full"
    """full: bags in, the next bag out. input-only: bags in, one next token out. output-only: tokens in, the next s out."""

    weighting: Weighting = "uniform"
    """Weights of the targets in a bag: uniform, power-law, exponential, first, or C0 a k of a fitted C0 + a·d^k."""

    loss: Literal["mean", "sum-to-one"] = "mean"
    """Form of the multi-hot cross-entropy."""

    documents: Documents = "packed"
    """In superposed steps: packed (the paper's) cuts bags from the packed stream, under plain causal attention; separate keeps
    bags inside a document and lets attention and positions start anew with it."""

    stages: Annotated[tuple[Stage, ...], tyro.conf.Suppress] = ()
    """Explicit stages, set in Python; they must add up to training.steps, and the fields of a single one do not count then."""

    @classmethod
    def of(cls, schedule: Schedule, *, sum_to_one: bool = False, documents: Documents = "packed") -> "Superposition":
        """The section of a schedule: bag size and ratio where those say it, so that the command line can change them."""
        first, steps = schedule.stages[0], schedule.steps
        section = cls(loss="sum-to-one" if sum_to_one else "mean", documents=documents)
        if first.superposed:
            section.bag_size, section.ratio = first.bag_size, first.steps / steps
            section.mode, section.weighting = first.mode, first.weighting  # type: ignore[assignment]
        if section.schedule(steps) != schedule:
            section.stages = schedule.stages
        return section

    def schedule(self, steps: int) -> Schedule:
        """The schedule over ``steps``. Raises InputError that names the field."""
        try:
            if not self.stages:
                return Schedule.tst(steps, self.bag_size, self.ratio, mode=self.mode, weighting=self.weighting)
            schedule = Schedule.staged(self.stages)
        except ValueError as error:
            raise InputError(f"tst: {error}") from None
        if schedule.steps != steps:
            raise InputError(f"tst.stages have {schedule.steps} steps and training.steps is {steps}: they must agree")
        return schedule
