import pytest

from superpose import InputError, Schedule, Stage
from superpose.accounting import flops_per_position
from superpose.experiment.arms import ARMS, arm_recipe
from superpose.experiment.recipe import Recipe, load_recipe
from superpose.experiment.train import build_model, train


def flops(recipe):
    schedule, model = recipe.schedule(), build_model(recipe.model, 257)
    return schedule.flops(recipe.training.positions, 4, lambda positions: flops_per_position(model, positions))


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_a_recipe_of_its_own(recipe, tmp_path, arm):
    changed = arm_recipe(arm, recipe)
    (tmp_path / "recipe.toml").write_text(changed.to_toml())
    assert load_recipe(tmp_path / "recipe.toml") == changed
    if arm != "patch-level":
        assert flops(changed) == flops(recipe)
    # uniform weights are the default, and a fit to so little text may be anything
    assert (changed == recipe) == (arm in ("tst", "uniform"))


def test_what_the_arms_change(recipe):
    def schedule(arm):
        return arm_recipe(arm, recipe).schedule()

    assert schedule("baseline") == Schedule.baseline(24)
    assert schedule("staged") == Schedule.staged([Stage(4, 4), Stage(4, 2), Stage(16)])
    assert schedule("gradual") == Schedule.staged([Stage(8, 4, final_weighting="first"), Stage(16)])
    assert schedule("patch-level") == Schedule.patch_level(24, 4, 1 / 3)
    assert len(schedule("fitted").stages[0].weighting) == 3
    assert arm_recipe("sum-to-one", recipe).superposition.loss == "sum-to-one"
    for arm, reset in (("optimizer-reset", "reset-optimizer"), ("reinitialised", "reinitialise")):
        assert arm_recipe(arm, recipe).superposition.at_switch == (reset,)
        assert schedule(arm) == schedule("tst")


def test_patch_level_reads_the_data_of_the_baseline_for_less(recipe):
    patched, plain = arm_recipe("patch-level", recipe), arm_recipe("baseline", recipe)
    assert patched.schedule().data_tokens(32, 4) == plain.schedule().data_tokens(32, 4)
    assert flops(patched) < 0.8 * flops(plain)


@pytest.mark.parametrize("arm", ["patch-level", "gradual", "staged", "reinitialised", "optimizer-reset"])
def test_an_arm_trains_and_resumes_at_its_switch(recipe, tmp_path, arm):
    arguments = {**recipe.training.arguments, "save_steps": 8}
    changed = arm_recipe(arm, recipe.replace("training", arguments=arguments))
    whole = train(changed, tmp_path / "run")
    assert 3 < whole["final_loss"] < 5.6
    (tmp_path / "run" / "summary.json").unlink()
    for step in (16, 24):
        (tmp_path / "run" / f"checkpoint-{step}").rename(tmp_path / f"{step}")
    assert train(changed, tmp_path / "run", resume=True)["final_loss"] == whole["final_loss"]


def test_refuses_what_an_arm_cannot_change(recipe):
    with pytest.raises(InputError, match="'tts' is unknown"):
        arm_recipe("tts", recipe)
    with pytest.raises(InputError, match="at least 4"):
        arm_recipe("staged", recipe.replace("superposition", bag_size=2))
    stages = recipe.replace("superposition", stages=({"bag_size": 4, "ratio": 0.5},))
    for arm in ("staged", "patch-level"):
        with pytest.raises(InputError, match=r"superposition\.stages"):
            arm_recipe(arm, stages)


def test_resets_are_named_in_a_recipe(recipe):
    values = recipe.as_dict()
    values["superposition"]["at_switch"] = ["reset-optimiser"]
    with pytest.raises(InputError, match="'reset-optimiser' is unknown"):
        Recipe.from_dict(values)
    values["superposition"] = {"bag_size": 4, "ratio": 0.5, "divide_positions": True, "mode": "input-only"}
    with pytest.raises(InputError, match="divide_positions takes bag_size and ratio alone"):
        Recipe.from_dict(values)
