import csv
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from superpose import InputError
from superpose.experiment import sweep as module
from superpose.experiment.recipe import load_recipe
from superpose.experiment.sweep import COLUMNS, sweep
from superpose.experiment.train import train


class Killed(Exception):
    pass


def run(recipe, out, said=None, **changes):
    options = {"bag_sizes": [2, 4], "ratios": [0.25, 0.5], "say": (said if said is not None else []).append} | changes
    return sweep(recipe, out, **options)


@pytest.fixture(scope="module")
def swept(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, run(recipe, out)


def test_a_row_for_each_cell_and_one_baseline(swept, recipe):
    out, rows = swept
    assert [(row["bag_size"], row["step_ratio"]) for row in rows] == [(1, 0.0), (2, 0.25), (2, 0.5), (4, 0.25), (4, 0.5)]
    with (out / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [float(row["final_loss"]) for row in table] == [row["final_loss"] for row in rows]
    assert len({row["final_loss"] for row in rows}) == len(rows)
    assert {row["total_steps"] for row in rows} == {recipe.training.steps}


@pytest.mark.parametrize("cell", ["s4-r0.25-uniform", "s4-r0.5-uniform"])
def test_a_cell_is_the_run_of_its_own_recipe(swept, tmp_path, cell):
    out, _ = swept
    directory = out / cell / "seed-0"
    alone = train(load_recipe(directory / "recipe.toml"), tmp_path / "alone")
    branched = json.loads((directory / "summary.json").read_text())
    assert alone["final_loss"] == branched["final_loss"]
    assert alone["data_tokens"] == branched["data_tokens"]
    weights = load_file(tmp_path / "alone" / "model" / "model.safetensors")
    for name, value in load_file(directory / "model" / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_finished_cells_are_not_run_again_and_new_ones_are(swept, recipe, monkeypatch):
    out, rows = swept
    trained = []
    stock = module.train

    def watched(recipe, directory, **options):
        trained.append(directory.parent.name)
        return stock(recipe, directory, **options)

    monkeypatch.setattr(module, "train", watched)
    said = []
    again = run(recipe, out, said, ratios=[0.125, 0.25, 0.5])
    assert trained == ["s2-r0.125-uniform", "s4-r0.125-uniform"]
    assert [row for row in again if row["step_ratio"] != 0.125] == rows
    assert sum("finished already" in line for line in said) == 5
    assert not list(out.glob("*/*/forks/*"))


@pytest.mark.parametrize("step", [4, 10, 20])
def test_a_killed_sweep_continues_with_the_same_result(swept, recipe, tmp_path, monkeypatch, step):
    """Killed in the trunk before and after the checkpoint of the branch, and in the branch."""
    _, rows = swept
    recipe = dataclasses.replace(
        recipe, training=dataclasses.replace(recipe.training, arguments=recipe.training.arguments | {"save_steps": 3})
    )
    from superpose.engines.transformers import ScheduledTrainer

    stock = ScheduledTrainer.training_step

    def dies(self, *args, **kwargs):
        in_branch = "r0.25" in self.args.output_dir
        if "s4" in self.args.output_dir and self.state.global_step == step and in_branch == (step == 20):
            raise Killed
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(ScheduledTrainer, "training_step", dies)
    with pytest.raises(Killed):
        run(recipe, tmp_path / "out", bag_sizes=[4])
    monkeypatch.setattr(ScheduledTrainer, "training_step", stock)
    assert run(recipe, tmp_path / "out", bag_sizes=[4]) == [row for row in rows if row["bag_size"] != 2]


def test_the_command_prints_a_grid_and_writes_a_picture(swept, recipe, tmp_path):
    out, _ = swept
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    command = [sys.executable, "-m", "superpose.cli", "sweep", str(path), "--out", str(out), "--bag-sizes"]
    done = subprocess.run([*command, "2,4", "--ratios", "0.25,0.5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "r = 0.25" in done.stdout
    assert "baseline" in done.stdout
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    done = subprocess.run([*command, "2,many"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--bag-sizes" in done.stderr


def test_refuses_what_makes_no_grid(swept, recipe, tmp_path):
    with pytest.raises(InputError, match="at least 2"):
        run(recipe, tmp_path, bag_sizes=[1, 2])
    with pytest.raises(InputError, match="between 0 and 1"):
        run(recipe, tmp_path, ratios=[0.2, 1.0])
    with pytest.raises(InputError, match="at least 1"):
        run(recipe, tmp_path, seeds=0)
    with pytest.raises(InputError, match="weighting 'flat' is unknown"):
        run(recipe, tmp_path / "out", weightings=["flat"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="another"):
        run(recipe.replace("training", positions=16), swept[0])
