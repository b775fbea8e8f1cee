"""A grid of bag sizes, step ratios and position weights at equal FLOPs, against one baseline.

The superposition phase at ratio 0.2 is the beginning of that at 0.4: ratios of one bag size share a trunk. The largest ratio
is trained as a run of its own and keeps a checkpoint where each smaller one leaves it. To read the same tokens in the same
order the phase is written as stages that end at each ratio, so every cell is also a recipe that `superpose train` trains
alone, with the same result.

An output directory holds ``baseline/seed-N``, one directory a cell such as ``s4-r0.2-uniform/seed-N``, and ``sweep.csv``.
"""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superpose.errors import InputError
from superpose.experiment.recipe import Recipe, SuperpositionSection, load_recipe
from superpose.experiment.train import branch, check_same, fork_path, is_main_process, train

#: The columns of the published grids, and the seed.
COLUMNS = ("table", "params", "total_steps", "weighting", "step_ratio", "bag_size", "final_loss", "seed")


@dataclass(frozen=True)
class Cell:
    """One setting of the grid; a bag size of 1 is the baseline."""

    bag_size: int
    ratio: float
    weighting: str

    @property
    def name(self) -> str:
        return "baseline" if self.bag_size == 1 else f"s{self.bag_size}-r{self.ratio:g}-{self.weighting}"


BASELINE = Cell(1, 0.0, "uniform")


def sweep(
    recipe: Recipe,
    out: str | Path,
    *,
    bag_sizes: Sequence[int],
    ratios: Sequence[float],
    weightings: Sequence[str] = ("uniform",),
    seeds: int = 1,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train the grid under ``out`` and return the rows of ``out/sweep.csv``, the baseline's first.

    Cells that are finished are not run again, whatever the grid they were part of; an interrupted cell continues. Mode and loss
    are those of the recipe. Raises InputError for a bag size below 2, a ratio outside of (0, 1), and where ``out`` holds
    runs of another recipe.
    """
    out = Path(out)
    _check(bag_sizes, ratios, seeds)
    if recipe.superposition.final_weighting is not None:
        raise InputError("superposition.final_weighting moves over a whole phase, and ratios share theirs: leave it out")
    ratios = sorted(set(ratios))
    trunks = [(bag_size, weighting) for weighting in weightings for bag_size in bag_sizes]
    cells = [BASELINE, *(Cell(bag_size, ratio, weighting) for bag_size, weighting in trunks for ratio in ratios)]
    for cell in cells:
        cell_recipe(recipe, cell).schedule()  # refuses an unknown weighting before anything is trained
    done = 0
    for seed in range(recipe.seed, recipe.seed + seeds):
        seeded = dataclasses.replace(recipe, seed=seed)

        def tell(cell: Cell, what: str, seed: int = seed) -> None:
            nonlocal done
            done += 1
            say(f"cell {done} of {len(cells) * seeds}: {cell.name}, seed {seed}: {what}")

        _train_apart(seeded, BASELINE, out, tell)
        for bag_size, weighting in trunks:
            _train_trunk(seeded, [Cell(bag_size, ratio, weighting) for ratio in ratios], out, tell)
    if not is_main_process():
        return []
    rows = [_row(recipe, cell, seed, out) for cell in cells for seed in range(recipe.seed, recipe.seed + seeds)]
    with (out / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _check(bag_sizes: Sequence[int], ratios: Sequence[float], seeds: int) -> None:
    if not bag_sizes or any(bag_size < 2 for bag_size in bag_sizes):
        raise InputError(f"bag sizes must be at least 2, got {list(bag_sizes)}: the baseline is always part of a sweep")
    if not ratios or any(not 0 < ratio < 1 for ratio in ratios):
        raise InputError(f"ratios must lie between 0 and 1, got {list(ratios)}")
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")


def cell_recipe(recipe: Recipe, cell: Cell, ends: Sequence[float] = ()) -> Recipe:
    """The recipe of a cell, with a stage that ends at each of ``ends`` below its ratio."""
    if cell.bag_size == 1:
        return dataclasses.replace(recipe, superposition=SuperpositionSection())
    ends = [*(end for end in ends if end < cell.ratio), cell.ratio]
    starts = [0.0, *ends[:-1]]
    stages = [{"bag_size": cell.bag_size, "ratio": round(end - start, 9)} for start, end in zip(starts, ends, strict=True)]
    return recipe.replace("superposition", bag_size=1, ratio=0.0, weighting=cell.weighting, stages=tuple(stages))


def _train_apart(recipe: Recipe, cell: Cell, out: Path, tell: Callable[[Cell, str], None]) -> None:
    directory = _directory(out, cell, recipe.seed)
    own = cell_recipe(recipe, cell)
    if _finished(directory, own):
        tell(cell, "finished already")
        return
    tell(cell, "trains")
    train(own, directory, resume=(directory / "recipe.toml").exists())


def _train_trunk(recipe: Recipe, cells: Sequence[Cell], out: Path, tell: Callable[[Cell, str], None]) -> None:
    """The cells of one bag size and weighting, in order of their ratios: the last is the trunk of the others."""
    pending = [cell for cell in cells if not _finished(_directory(out, cell, recipe.seed), cell_recipe(recipe, cell))]
    for cell in cells:
        if cell not in pending:
            tell(cell, "finished already")
    for cell in [cell for cell in pending if _trunk_of(recipe, cell, cells, out) is not None]:
        pending.remove(cell)
        _branch_off(recipe, cell, cells, out, tell)
    if not pending:
        return
    trunk = pending[-1]
    ends = [cell.ratio for cell in pending]
    own, directory = cell_recipe(recipe, trunk, ends), _directory(out, trunk, recipe.seed)
    tell(trunk, "trains" if len(pending) == 1 else f"trains, trunk of {len(pending) - 1} more")
    begun = (directory / "recipe.toml").exists()
    train(own, directory, resume=begun, forks=own.schedule().switches[:-1])
    for cell in pending[:-1]:
        _branch_off(recipe, cell, cells, out, tell)


def _branch_off(recipe: Recipe, cell: Cell, cells: Sequence[Cell], out: Path, tell: Callable[[Cell, str], None]) -> None:
    trunk = _trunk_of(recipe, cell, cells, out)
    assert trunk is not None
    directory, own, step = trunk
    tell(cell, f"branches off at step {step}")
    branch(directory, step, own, _directory(out, cell, recipe.seed))
    if is_main_process():
        shutil.rmtree(fork_path(directory, step))


def _trunk_of(recipe: Recipe, cell: Cell, cells: Sequence[Cell], out: Path) -> tuple[Path, Recipe, int] | None:
    """A finished run that kept a checkpoint where ``cell`` leaves it: its directory, the cell's recipe, and the step."""
    for other in cells:
        directory = _directory(out, other, recipe.seed)
        if other.ratio <= cell.ratio or not (directory / "summary.json").exists():
            continue
        kept, end = [], 0.0
        for stage in load_recipe(directory / "recipe.toml").superposition.stages:
            end = round(end + stage["ratio"], 9)
            kept.append(end)
        own = cell_recipe(recipe, cell, kept)
        step = own.schedule().switches[-1]
        if cell.ratio in kept and fork_path(directory, step).exists():
            return directory, own, step
    return None


def _directory(out: Path, cell: Cell, seed: int) -> Path:
    return out / cell.name / f"seed-{seed}"


def _finished(directory: Path, recipe: Recipe) -> bool:
    """Whether ``directory`` holds the cell, trained to its end; its phase may have been cut at other ratios."""
    if not (directory / "summary.json").exists():
        return False
    path = directory / "recipe.toml"
    check_same(_uncut(load_recipe(path)), _uncut(recipe), path)
    return True


def _uncut(recipe: Recipe) -> Recipe:
    """The recipe with its superposition phase as one stage."""
    stages: Iterable[dict[str, Any]] = recipe.superposition.stages
    whole = [{**stage, "ratio": round(sum(other["ratio"] for other in stages), 9)} for stage in stages][:1]
    return recipe.replace("superposition", stages=tuple(whole))


def _row(recipe: Recipe, cell: Cell, seed: int, out: Path) -> dict[str, Any]:
    summary = json.loads((_directory(out, cell, seed) / "summary.json").read_text())
    values = (
        recipe.name,
        summary["parameters"],
        recipe.training.steps,
        cell.weighting,
        cell.ratio,
        cell.bag_size,
        "" if summary["diverged"] else round(summary["final_loss"], 6),
        seed,
    )
    return dict(zip(COLUMNS, values, strict=True))
