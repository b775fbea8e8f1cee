"""A comparison at equal loss: beside the arms, baselines of several lengths, each with the whole decay of its learning rate.

At a constant learning rate a short run is the beginning of a long one. The baselines of one seed are a chain: each leaves the
one before it where that begins to decay, so together they cost one run of the longest length and the decays of the others.
The order of the windows is a permutation within a stage, so every run is cut into stages where another leaves it; it stays a
recipe that `superpose train` trains alone, with the same result. Warm-up has the steps that it has in the recipe, at every
length.

An output directory holds what `superpose.experiment.compare` writes, ``equal-loss/length-N/seed-N``, and ``equal-loss.csv``.
Each baseline keeps the checkpoint at which it begins to decay, where lengths that are asked for later leave it.
"""

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from superpose.errors import InputError
from superpose.experiment.compare import compare
from superpose.experiment.loss_curve import LEAST_LENGTHS, equal_loss
from superpose.experiment.recipe import Recipe, SuperpositionSection, TrainingSection, load_recipe
from superpose.experiment.summary import is_diverged
from superpose.experiment.train import (
    branch,
    check_same,
    decay_steps,
    fork_path,
    is_main_process,
    train,
    training_arguments,
)

#: Lengths of the baselines as multiples of the recipe's steps.
LENGTHS = (0.5, 1.0, 1.5, 2.0)

#: ``run``: its directory; ``length``: multiple of the recipe's steps; ``final_loss``: nats, empty where the run diverged.
COLUMNS = ("run", "arm", "length", "steps", "seed", "final_loss", "positions", "data_tokens", "flops", "seconds")


def compare_at_equal_loss(
    recipe: Recipe,
    out: str | Path,
    *,
    arms: Sequence[str] = ("baseline", "tst"),
    seeds: int = 1,
    lengths: Sequence[float] = LENGTHS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """`compare`, then train the baselines; the results have the entry ``equal_loss``: rows, curve and speed-ups.

    Finished runs are not run again and interrupted ones continue. Raises InputError for what `compare` does, for fewer than
    three lengths, and for a recipe whose learning rate is not constant and then decays.
    """
    out, lengths = Path(out), sorted(set(lengths))
    _check(recipe, lengths)
    results = compare(recipe, out, arms=arms, seeds=seeds, say=say)
    for seed in range(recipe.seed, recipe.seed + seeds):
        _train_baselines(dataclasses.replace(recipe, seed=seed), lengths, out, say)
    if not is_main_process():
        return {}
    rows = _baseline_rows(recipe, lengths, seeds, out) + _arm_rows(results)
    with (out / "equal-loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    results["equal_loss"] = {"rows": rows, **dataclasses.asdict(equal_loss(rows))}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return json.loads((out / "results.json").read_text())


def _check(recipe: Recipe, lengths: Sequence[float]) -> None:
    training = recipe.training
    if not all(math.isfinite(length) and round(length * training.steps) > 0 for length in lengths):
        raise InputError(f"--lengths must be positive multiples of the recipe's steps, got {_listed(lengths)}")
    if len(lengths) < LEAST_LENGTHS:
        raise InputError(f"--lengths needs at least {LEAST_LENGTHS} different lengths to fit a curve, got {_listed(lengths)}")
    schedule = training.arguments.get("lr_scheduler_type", "warmup_stable_decay")
    if schedule != "warmup_stable_decay":
        raise InputError(
            f"training.lr_scheduler_type is {schedule!r}, which is another curve at every length: --equal-loss needs "
            "'warmup_stable_decay', whose stable part baselines of all lengths share"
        )
    if "lr_scheduler_kwargs" in training.arguments:
        raise InputError("training.lr_scheduler_kwargs sets the decay by itself: with --equal-loss give training.decay_ratio")
    if not 0 < training.decay_ratio < 1:
        raise InputError(
            f"training.decay_ratio is {training.decay_ratio}: --equal-loss needs a stable part and a decay, such as 0.2"
        )
    shortest = baseline_recipe(recipe, lengths[0]).training
    warmup = shortest.arguments["warmup_steps"]
    if not decay_steps(shortest) or _decay_start(shortest) < warmup:
        raise InputError(
            f"--lengths {lengths[0]:g} makes {shortest.steps} steps, of which {warmup} are warm-up and the last "
            f"{decay_steps(shortest)} decay: leave it out or take a larger one"
        )


def _listed(lengths: Sequence[float]) -> str:
    return ",".join(f"{length:g}" for length in lengths)


def baseline_recipe(recipe: Recipe, length: float, cuts: Sequence[int] = ()) -> Recipe:
    """The baseline of ``length`` times the recipe's steps, cut into stages after ``cuts`` steps and where its decay begins."""
    own = training_arguments(recipe, Path())
    fixed = {
        "warmup_steps": own.get_warmup_steps(recipe.training.steps),
        "eval_steps": own.eval_steps,
        "save_steps": own.save_steps,
    }
    steps = round(length * recipe.training.steps)
    training = dataclasses.replace(recipe.training, steps=steps, arguments=recipe.training.arguments | fixed)
    ends = [*cuts, _decay_start(training)]
    starts = [0, *ends[:-1]]
    stages = tuple({"bag_size": 1, "ratio": (end - start) / steps} for start, end in zip(starts, ends, strict=True))
    return dataclasses.replace(recipe, training=training, superposition=SuperpositionSection(stages=stages))


def _decay_start(training: TrainingSection) -> int:
    return training.steps - decay_steps(training)


def _train_baselines(recipe: Recipe, lengths: Sequence[float], out: Path, say: Callable[[str], None]) -> None:
    """The baselines of one seed, the shortest first."""
    directories = [_directory(out, length, recipe.seed) for length in lengths]
    for i, (length, directory) in enumerate(zip(lengths, directories, strict=True)):
        trunk, cuts = _trunk(directories[:i])
        own, saved = baseline_recipe(recipe, length, cuts), directory / "recipe.toml"
        begun = saved.exists()
        if begun:  # with the cuts of then; other lengths may have been asked for
            own = dataclasses.replace(own, superposition=load_recipe(saved).superposition)
            check_same(load_recipe(saved), own, saved)
        forks = [_decay_start(own.training)]
        name = f"baseline of {own.training.steps:,} steps, seed {recipe.seed}"
        if (directory / "summary.json").exists():
            say(f"{name}: finished already, {directory}")
        elif begun or trunk is None:
            say(f"{name}: {'continues' if begun else 'starts'}, {directory}")
            train(own, directory, resume=begun, forks=forks)
        else:
            say(f"{name}: branches off the one before at step {cuts[-1]:,}, {directory}")
            branch(trunk, cuts[-1], own, directory, forks=forks)


def _trunk(shorter: Sequence[Path]) -> tuple[Path | None, list[int]]:
    """The longest of the runs that kept the checkpoint at which it begins to decay, and its cuts, of which that is the last."""
    for directory in reversed(shorter):
        cuts = load_recipe(directory / "recipe.toml").schedule().switches
        if fork_path(directory, cuts[-1]).exists():
            return directory, cuts
    return None, []


def _directory(out: Path, length: float, seed: int) -> Path:
    return out / "equal-loss" / f"length-{length:g}" / f"seed-{seed}"


def _baseline_rows(recipe: Recipe, lengths: Sequence[float], seeds: int, out: Path) -> list[dict[str, Any]]:
    rows = []
    for length in lengths:
        for seed in range(recipe.seed, recipe.seed + seeds):
            directory = _directory(out, length, seed)
            run = json.loads((directory / "summary.json").read_text())
            steps = round(length * recipe.training.steps)
            rows.append(_row(directory.relative_to(out).as_posix(), "baseline", length, steps, run))
    return rows


def _arm_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        _row(f"{arm['name']}/seed-{run['seed']}", arm["name"], 1.0, results["steps"], run)
        for arm in results["arms"]
        for run in arm["runs"]
    ]


def _row(directory: str, arm: str, length: float, steps: int, run: dict[str, Any]) -> dict[str, Any]:
    final_loss = None if is_diverged(run) else run["final_loss"]
    accounts = {name: run[name] for name in ("positions", "data_tokens", "flops", "seconds")}
    own = {"run": directory, "arm": arm, "length": length, "steps": steps, "seed": run["seed"], "final_loss": final_loss}
    return own | accounts
