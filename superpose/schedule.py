"""The schedule: a step decides the stage and the data-token offset, by arithmetic alone.

There is no state to save and none to restore: a run resumed at a step, a prefetched batch and a rank of many read the same
stage and the same tokens as an uninterrupted run on one process.
"""

import json
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from superpose.bags import Weighting, position_weights

MODES = ("full", "input-only", "output-only")


@dataclass(frozen=True)
class Stage:
    """A run of optimizer steps of one kind. The defaults are ordinary next-token training."""

    steps: int
    #: s: tokens in a bag
    bag_size: int = 1
    #: full: bags in, the next bag out; input-only: bags in, one next token out; output-only: tokens in, the next s out
    mode: str = "full"
    #: weights of the targets in a bag: a name of `superpose.bags.WEIGHTINGS`, or C0, a, k of a fitted C0 + a·d^k
    weighting: Weighting = "uniform"
    #: weights that those move to, linearly over the steps of the stage
    final_weighting: Weighting | None = None
    #: positions are the run's positions divided by this (patch-level training divides by the bag size)
    position_divisor: int = 1

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("bag_size", 1), ("position_divisor", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is unknown: take one of {', '.join(MODES)}")
        for name in ("weighting", "final_weighting"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
            if getattr(self, name) is not None:
                position_weights(getattr(self, name), self.bag_size)

    @property
    def input_bag(self) -> int:
        """Tokens averaged into one position: s, or 1 when the input is plain."""
        return 1 if self.mode == "output-only" else self.bag_size

    @property
    def target_bag(self) -> int:
        """Targets of one position: s, or 1 when the output is plain."""
        return 1 if self.mode == "input-only" else self.bag_size

    @property
    def superposed(self) -> bool:
        return self.bag_size > 1

    def position_weights(self, step: int) -> Tensor | None:
        """Weights ``[target_bag]`` of the targets in a bag at ``step`` of the stage, from 0; None where they are equal."""
        if self.target_bag == 1 or (self.weighting == "uniform" and self.final_weighting is None):
            return None
        weights = position_weights(self.weighting, self.target_bag)
        if self.final_weighting is None:
            return weights
        return weights.lerp(position_weights(self.final_weighting, self.target_bag), step / max(1, self.steps - 1))

    def positions(self, positions: int) -> int:
        """Positions of one sequence in this stage, where a plain one has ``positions``."""
        if positions % self.position_divisor:
            raise ValueError(f"positions {positions} must be a multiple of position_divisor {self.position_divisor}")
        return positions // self.position_divisor

    def window(self, positions: int) -> int:
        """Contiguous data tokens that one sequence of this stage reads."""
        return self.positions(positions) * self.input_bag


@dataclass(frozen=True)
class Schedule:
    """Stages in order. Steps count from 0: step i is the (i+1)-th optimizer step."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(stage for stage in self.stages if stage.steps))
        if not self.stages:
            raise ValueError("steps must be at least 1: the schedule is empty")

    @classmethod
    def baseline(cls, steps: int) -> "Schedule":
        """Ordinary training."""
        return cls((Stage(steps),))

    @classmethod
    def tst(
        cls,
        steps: int,
        bag_size: int,
        ratio: float,
        *,
        mode: str = "full",
        weighting: Weighting = "uniform",
        final_weighting: Weighting | None = None,
    ) -> "Schedule":
        """Token-superposition training: the first ``ratio`` of the steps in bags, the rest plain (paper, method)."""
        superposed = _share(steps, ratio)
        return cls((Stage(superposed, bag_size, mode, weighting, final_weighting), Stage(steps - superposed)))

    @classmethod
    def patch_level(cls, steps: int, bag_size: int, ratio: float) -> "Schedule":
        """Patch-level training (arXiv 2407.12665): the first ``ratio`` of the data in patches of ``bag_size`` tokens.

        A step's data tokens stay what they are in plain training and its positions fall to 1/``bag_size``, so ``steps``
        steps read the data of ``steps`` plain ones. The original restarts optimizer and learning rate at the switch, which is
        the engine's part (`superpose.engines.switch`).
        """
        patched = _share(steps, ratio)
        return cls((Stage(patched, bag_size, position_divisor=bag_size), Stage(steps - patched)))

    @classmethod
    def staged(cls, stages: Iterable[Stage]) -> "Schedule":
        """Any stages in order, for example bags of 8, 4, 2, 1."""
        return cls(tuple(stages))

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def starts(self) -> list[int]:
        """The first step of each stage."""
        return list(accumulate((stage.steps for stage in self.stages[:-1]), initial=0))

    @property
    def switches(self) -> list[int]:
        """The first step of each stage but the first."""
        return self.starts[1:]

    @property
    def changes(self) -> list[int]:
        """The switches at which training changes; the others only cut a stage, so that another run can share its beginning."""
        pairs = zip(self.switches, pairwise(self.stages), strict=True)
        return [step for step, (before, after) in pairs if replace(before, steps=after.steps) != after]

    def stage_index(self, step: int) -> int:
        """Index of the stage that ``step`` belongs to."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} lies outside of the schedule's {self.steps} steps")
        return sum(step >= switch for switch in self.switches)

    def stage_at(self, step: int) -> Stage:
        return self.stages[self.stage_index(step)]

    def position_weights_at(self, step: int) -> Tensor | None:
        """Weights of the targets in a bag at ``step``, None where they are equal."""
        number = self.stage_index(step)
        return self.stages[number].position_weights(step - self.starts[number])

    def token_offset(self, step: int, positions: int, sequences_per_step: int) -> int:
        """Data tokens read before ``step``; ``step = steps`` gives those of the whole run."""
        return self._sum_before(step, lambda stage: stage.window(positions) * sequences_per_step)

    def position_offset(self, step: int, positions: int, sequences_per_step: int) -> int:
        """Positions computed before ``step``; ``step = steps`` gives those of the whole run."""
        return self._sum_before(step, lambda stage: stage.positions(positions) * sequences_per_step)

    def flops_before(
        self, step: int, positions: int, sequences_per_step: int, flops_per_position: Callable[[int], float]
    ) -> float:
        """Training FLOPs before ``step``; ``flops_per_position(positions of a sequence)`` is the model's."""

        def flops(stage: Stage) -> float:
            length = stage.positions(positions)
            return length * sequences_per_step * flops_per_position(length)

        return self._sum_before(step, flops)

    def data_tokens(self, positions: int, sequences_per_step: int) -> int:
        """Data tokens of the whole run: (1 + r·(s − 1)) × the baseline's for `tst`."""
        return self.token_offset(self.steps, positions, sequences_per_step)

    def positions(self, positions: int, sequences_per_step: int) -> int:
        """Positions of the whole run."""
        return self.position_offset(self.steps, positions, sequences_per_step)

    def flops(self, positions: int, sequences_per_step: int, flops_per_position: Callable[[int], float]) -> float:
        """Training FLOPs of the whole run."""
        return self.flops_before(self.steps, positions, sequences_per_step, flops_per_position)

    def _sum_before(self, step: int, per_step: Callable[[Stage], Any]) -> Any:
        if not 0 <= step <= self.steps:
            raise IndexError(f"step {step} lies outside of the schedule's {self.steps} steps")
        total, left = 0, step
        for stage in self.stages:
            total += min(left, stage.steps) * per_step(stage)
            left = max(0, left - stage.steps)
        return total

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as TOML and JSON hold them."""
        return {"stages": [asdict(stage) for stage in self.stages]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Schedule":
        return cls(tuple(Stage(**stage) for stage in values["stages"]))

    def to_toml(self) -> str:
        """One ``[[stages]]`` table a stage."""
        tables = (
            "\n".join(["[[stages]]", *(f"{name} = {json.dumps(value)}" for name, value in stage.items() if value is not None)])
            for stage in self.as_dict()["stages"]
        )
        return "\n\n".join(tables) + "\n"

    @classmethod
    def from_toml(cls, text: str) -> "Schedule":
        return cls.from_dict(tomllib.loads(text))


def _share(steps: int, ratio: float) -> int:
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    return int(ratio * steps + 0.5)
