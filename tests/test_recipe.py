from pathlib import Path

import pytest
import torch

from superpose import InputError, Schedule, Stage
from superpose.accounting import count_parameters, flops_per_position
from superpose.experiment.recipe import Recipe, load_recipe
from superpose.experiment.train import build_model, training_arguments

RECIPES = Path(__file__).parent.parent / "recipes"


def refused(values, *overrides):
    with pytest.raises(InputError) as caught:
        Recipe.from_dict(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def values(recipe):
    return recipe.as_dict()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_load_and_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert load_recipe(tmp_path / "again.toml") == recipe
    assert recipe.schedule().steps == recipe.training.steps


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("paper-270m", 270e6, None), ("paper-600m", 600e6, None), ("paper-3b", 3e9, None), ("paper-10b-a1b", 10e9, 1e9)],
)
def test_the_papers_models_have_the_size_it_names(name, total, active):
    recipe = load_recipe(RECIPES / f"{name}.toml")
    with torch.device("meta"):
        model = build_model(recipe.model, 128256)
    counts = count_parameters(model)
    assert counts["total"] == pytest.approx(total, rel=0.12)  # the paper's names are rounded
    assert not model.config.tie_word_embeddings
    if active:
        assert counts["active"] - counts["embedding"] == pytest.approx(active, rel=0.05)
    else:
        assert counts["active"] == counts["total"]


def test_flops_of_the_270m_model():
    with torch.device("meta"):
        model = build_model(load_recipe(RECIPES / "paper-270m.toml").model, 128256)
    products = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) + 128256 * 576  # layers and head; not the input table
    assert flops_per_position(model, 2048) == 6 * products + 12 * 30 * 576 * 2048


def test_the_papers_schedule():
    assert load_recipe(RECIPES / "paper-600m.toml").schedule() == Schedule.tst(20_000, 6, 0.3)
    assert load_recipe(RECIPES / "paper-10b-a1b.toml").schedule().switches == [12_500]


def test_overrides_are_toml_or_text(tmp_path, recipe):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    changed = load_recipe(
        path, ["training.steps=7", "--superposition.weighting=power-law", "model.rope_parameters.rope_theta=5.0", "name=x"]
    )
    assert (changed.training.steps, changed.superposition.weighting, changed.name) == (7, "power-law", "x")
    assert changed.model.shape["rope_parameters"]["rope_theta"] == 5.0
    with pytest.raises(InputError, match=r"section\.field=value"):
        load_recipe(path, ["training.steps"])


def test_explicit_stages(values):
    values["superposition"] = {
        "stages": [{"bag_size": 8, "ratio": 0.125}, {"bag_size": 4, "ratio": 0.25, "weighting": "power-law"}]
    }
    assert Recipe.from_dict(values).schedule() == Schedule.staged([Stage(3, 8), Stage(6, 4, weighting="power-law"), Stage(15)])
    values["superposition"]["stages"][0]["ratio"] = 0.9
    assert "ratios of the stages" in refused(values)
    values["superposition"]["bag_size"] = 2
    assert "stages take the place of bag_size and ratio" in refused(values)
    del values["superposition"]["bag_size"]
    values["superposition"]["stages"][0] = {"bag_sise": 8}
    assert "did you mean bag_size?" in refused(values)


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("superposition", "bagsize", 4, "superposition.bagsize is not a field of [superposition]: did you mean bag_size?"),
        ("training", "learning_rat", 1e-3, "did you mean learning_rate?"),
        ("model", "hiden_size", 4, "did you mean hidden_size?"),
        ("model", "architecture", "lama", "did you mean llama?"),
        ("data", "pth", "x", "did you mean path?"),
        ("superposition", "ratio", 1.5, "superposition: ratio must lie in [0, 1], got 1.5"),
        ("superposition", "ratio", "half", "superposition.ratio must be a float"),
        ("superposition", "bag_size", 0, "superposition: bag_size must be a whole number of at least 1, got 0"),
        ("superposition", "weighting", "linear", "superposition: weighting 'linear' is unknown"),
        ("superposition", "loss", "hinge", "superposition.loss 'hinge' is unknown"),
        ("superposition", "mode", "both", "superposition: mode 'both' is unknown"),
        ("training", "steps", 0, "training.steps must be at least 1"),
        ("training", "max_steps", 10, "training.max_steps is not set in a recipe: give training.steps"),
        ("training", "gradient_accumulation_steps", 2, "it follows from training.sequences_per_step"),
        ("model", "path", "somewhere", "either architecture"),
    ],
)
def test_bad_fields_are_refused_by_name(values, section, field, value, message):
    values[section][field] = value
    assert message in refused(values)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(InputError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(InputError, match="not valid TOML"):
        load_recipe(tmp_path / "bad.toml")
    assert "section is not" in refused({"section": 1})
    assert "must be a table" in refused({"model": 3})


def test_training_arguments_pass_through(recipe, tmp_path):
    given = {**recipe.training.arguments, "weight_decay": 0.3, "optim": "adamw_torch", "lr_scheduler_type": "cosine"}
    arguments = training_arguments(recipe.replace("training", arguments=given), tmp_path)
    assert (arguments.weight_decay, arguments.optim, arguments.lr_scheduler_type) == (0.3, "adamw_torch", "cosine")
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.max_grad_norm) == (0.9, 0.95, 1.0)
    with pytest.raises(InputError, match="training:"):
        training_arguments(recipe.replace("training", arguments={**given, "optim": "sgdd"}), tmp_path)
