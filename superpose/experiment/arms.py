"""Arms of a comparison by name: what each changes in a recipe. ``tst`` is the recipe itself.

Every arm is a recipe that `superpose train` trains alone. All but patch-level spend the FLOPs of the baseline.
"""

import dataclasses
from collections.abc import Callable

from superpose.errors import InputError
from superpose.experiment.recipe import Recipe, SuperpositionSection


def arm_recipe(name: str, recipe: Recipe) -> Recipe:
    """The recipe of an arm. Raises InputError for an unknown one, and where the recipe does not allow it."""
    if name not in ARMS:
        raise InputError(f"arm {name!r} is unknown: take some of {', '.join(ARMS)}")
    return ARMS[name](recipe)


def _with(**changes: object) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.replace("superposition", **changes)


def _reset(*names: str) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.replace("superposition", at_switch=(*recipe.superposition.at_switch, *names))


def _baseline(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, superposition=SuperpositionSection())


def _fitted(recipe: Recipe) -> Recipe:
    """Position weights that follow the mutual information between the tokens of the recipe's own data."""
    from superpose.experiment.analyse import analyse

    return recipe.replace("superposition", weighting=analyse(recipe.data.path).fit)


def _staged(recipe: Recipe) -> Recipe:
    """Bags of s, s/2, … 2 for equal shares of the superposition phase."""
    _one_phase("staged", recipe)
    sizes = []
    size = recipe.superposition.bag_size
    while size > 1:
        sizes.append(size)
        size //= 2
    if len(sizes) < 2:
        raise InputError(f"arm staged halves the bag size: superposition.bag_size must be at least 4, got {sizes[0]}")
    share = recipe.superposition.ratio / len(sizes)
    stages = tuple({"bag_size": size, "ratio": share} for size in sizes)
    return recipe.replace("superposition", bag_size=1, ratio=0.0, stages=stages)


def _patch_level(recipe: Recipe) -> Recipe:
    """Patch-level training (arXiv 2407.12665): fixed data, fewer positions, and two runs of a cosine schedule each."""
    _one_phase("patch-level", recipe)
    arguments = {**recipe.training.arguments, "lr_scheduler_type": "cosine"}
    section = SuperpositionSection(
        bag_size=recipe.superposition.bag_size,
        ratio=recipe.superposition.ratio,
        divide_positions=True,
        at_switch=("reset-optimizer", "restart-schedule"),
    )
    return dataclasses.replace(recipe.replace("training", arguments=arguments), superposition=section)


def _one_phase(arm: str, recipe: Recipe) -> None:
    if recipe.superposition.stages:
        raise InputError(f"arm {arm} takes superposition.bag_size and ratio, and the recipe has superposition.stages")


ARMS: dict[str, Callable[[Recipe], Recipe]] = {
    "baseline": _baseline,
    "tst": lambda recipe: recipe,
    "input-only": _with(mode="input-only"),
    "output-only": _with(mode="output-only"),
    "uniform": _with(weighting="uniform"),
    "power-law": _with(weighting="power-law"),
    "exponential": _with(weighting="exponential"),
    "first": _with(weighting="first"),
    "fitted": _fitted,
    "gradual": _with(final_weighting="first"),
    "sum-to-one": _with(loss="sum-to-one"),
    "staged": _staged,
    "optimizer-reset": _reset("reset-optimizer"),
    "reinitialised": _reset("reinitialise"),
    "patch-level": _patch_level,
}
