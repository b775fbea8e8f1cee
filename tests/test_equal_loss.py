import csv
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from superpose import InputError
from superpose.cli import main
from superpose.engines.transformers import ScheduledTrainer
from superpose.experiment.equal_loss import COLUMNS, baseline_recipe, compare_at_equal_loss
from superpose.experiment.equal_loss_plots import (
    equal_loss_cells,
    equal_loss_sentences,
    equal_loss_tables,
    write_equal_loss_plot,
)
from superpose.experiment.loss_curve import LossCurve, equal_loss, fit_curve
from superpose.experiment.recipe import load_recipe
from superpose.experiment.train import fork_path, train

STEPS, LENGTHS = 1000, (0.5, 1.0, 1.5, 2.0)
CURVE = LossCurve(floor=1.2, scale=6.0, exponent=0.4)


def make_rows(losses, levels=(0.0,), lengths=LENGTHS, noise=0.0):
    """Baselines on `CURVE`, each seed at its own level, and arms with the loss of each seed."""
    random = np.random.default_rng(0)

    def row(arm, length, seed, loss, bag=1):
        steps = round(length * STEPS)
        accounts = {"positions": 64 * steps, "data_tokens": 64 * bag * steps, "flops": 1e6 * steps, "seconds": 0.5 * steps}
        loss = None if loss is None else float(loss)
        return {"run": arm, "arm": arm, "length": length, "steps": steps, "seed": seed, "final_loss": loss, **accounts}

    baselines = [
        row("baseline", length, seed, CURVE.loss(length * STEPS) + level + noise * random.standard_normal())
        for length in lengths
        for seed, level in enumerate(levels)
    ]
    return baselines + [row(arm, 1.0, seed, loss, 2) for arm, found in losses.items() for seed, loss in enumerate(found)]


def test_the_fit_recovers_a_curve():
    steps = np.array([500, 1000, 2000, 4000])
    found = fit_curve(steps, CURVE.loss(steps))
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(CURVE), rel=1e-4)
    assert found.steps(CURVE.loss(1500.0)) == pytest.approx(1500, rel=1e-6)
    three = fit_curve(steps[:3], CURVE.loss(steps[:3]))
    assert three.loss(steps[:3]) == pytest.approx(CURVE.loss(steps[:3]), abs=1e-9)


def test_the_fit_of_noisy_losses_is_near_the_curve_and_within_bounds():
    random, steps = np.random.default_rng(0), np.repeat([500, 1000, 1500, 2000], 3)
    for _ in range(20):
        found = fit_curve(steps, CURVE.loss(steps) + 0.005 * random.standard_normal(len(steps)))
        assert found.loss([500, 1200, 2000]) == pytest.approx(CURVE.loss([500, 1200, 2000]), abs=0.015)
        assert found.floor >= 0
        assert 0 < found.exponent <= 2


def test_losses_that_do_not_fall_make_no_curve():
    assert fit_curve([500, 1000, 2000], [1.3, 1.3, 1.4]) is None
    rows = make_rows({"tst": [1.3]})
    for row in rows:
        row["final_loss"] = 1.5 + row["length"]
    assert "no speed-up" in equal_loss_sentences(rows)[0]
    assert equal_loss_tables(rows) == []


def test_speed_up_and_costs():
    (arm,) = equal_loss(make_rows({"tst": [CURVE.loss(1400)]})).arms
    assert arm.speed_up == pytest.approx(1.4, rel=1e-4)
    assert not arm.extrapolated
    assert arm.interval is None
    assert arm.gain == pytest.approx(CURVE.loss(1000) - CURVE.loss(1400), abs=1e-6)
    assert (arm.data_tokens, arm.flops, arm.seconds) == (128_000, 1e9, 500)
    costs = (arm.baseline_data_tokens, arm.baseline_flops, arm.baseline_seconds)
    assert costs == pytest.approx((64 * 1400, 1.4e9, 700), rel=1e-4)


def test_seeds_are_paired_by_the_level_of_their_baselines():
    levels, gain = (0.05, -0.02, -0.03), CURVE.loss(1000) - CURVE.loss(1400)
    scatter = (0.002, -0.002, 0.0)
    losses = [CURVE.loss(1000) + level - gain + error for level, error in zip(levels, scatter, strict=True)]
    results = equal_loss(make_rows({"tst": losses}, levels))
    (arm,) = results.arms
    assert results.residual == pytest.approx(0, abs=1e-6)
    assert arm.speed_up == pytest.approx(1.4, rel=1e-3)
    half = 2.920 * 0.002 / math.sqrt(3)
    ends = [results.curve.steps(CURVE.loss(1400) + sign * half) / STEPS for sign in (1, -1)]
    assert arm.interval == pytest.approx(ends, rel=1e-3)


def test_the_interval_covers_the_truth():
    random, covered = np.random.default_rng(1), 0
    for _ in range(100):
        levels = 0.02 * random.standard_normal(4)
        rows = make_rows({"tst": CURVE.loss(1400) + levels}, levels)
        for row in rows:
            row["final_loss"] += 0.003 * random.standard_normal()
        low, high = equal_loss(rows).arms[0].interval
        covered += low <= 1.4 <= high
    assert 0.8 < covered / 100 < 0.98


def test_a_loss_that_no_baseline_reaches():
    rows = make_rows({"tst": [1.1, 1.1]}, (0.0, 0.0))
    (arm,) = equal_loss(rows).arms
    assert (arm.baseline_steps, arm.speed_up, arm.interval) == (None, None, (None, None))
    assert "no baseline reaches its loss of 1.1000 nats, however long" in equal_loss_sentences(rows)[0]
    near = make_rows({"tst": [CURVE.loss(1e6) - 0.004, CURVE.loss(1e6) + 0.004]}, (0.0, 0.0))
    (arm,) = equal_loss(near).arms
    assert arm.interval[0] > 1
    assert arm.interval[1] is None
    assert "at least" in equal_loss_cells(near)[-2]["90 % interval"]


@pytest.mark.parametrize(("steps", "remedy"), [(3000, "a longer one"), (400, "a shorter one")])
def test_outside_of_the_measured_lengths_it_says_so(steps, remedy):
    text = equal_loss_sentences(make_rows({"tst": [CURVE.loss(steps)]}))[0]
    assert f"{steps / STEPS:.2f}×" in text
    assert "EXTRAPOLATED: 500 to 2,000 steps were measured" in text
    assert remedy in text
    assert "EXTRAPOLATED" not in equal_loss_sentences(make_rows({"tst": [CURVE.loss(1400)]}))[0]


def test_one_seed_and_noise_are_said():
    rows = make_rows({"tst": [CURVE.loss(1020)]}, lengths=(0.5, 0.75, 1.0, 1.5, 2.0), noise=0.01)
    text = equal_loss_sentences(rows)[0]
    assert "with one seed the spread is unknown" in text
    assert "within the noise of single runs" in text
    assert "noise" not in equal_loss_sentences(make_rows({"tst": [CURVE.loss(1400)]}))[0]


def test_diverged_runs_are_left_out(tmp_path):
    rows = make_rows({"tst": [CURVE.loss(1400), None], "output-only": [None, None]}, (0.0, 0.0))
    rows[2]["final_loss"] = None
    assert [(arm.name, arm.seeds) for arm in equal_loss(rows).arms] == [("tst", 1)]
    for row in rows:
        row["final_loss"] = None
    assert "too few" in equal_loss_sentences(rows)[0]
    assert write_equal_loss_plot(rows, tmp_path).exists()


@pytest.fixture(scope="module")
def short(recipe):
    """12 steps, 1 of them warm-up, the last 3 decay: the demo's shape."""
    arguments = {**recipe.training.arguments, "eval_steps": 100, "save_steps": 4, "logging_steps": 1}
    return recipe.replace("training", steps=12, decay_ratio=0.25, arguments=arguments)


@pytest.fixture(scope="module")
def compared(short, tmp_path_factory):
    out = tmp_path_factory.mktemp("equal-loss") / "out"
    return out, compare_at_equal_loss(short, out, lengths=[0.5, 1, 2], say=lambda _: None)


def losses_of(results):
    return {row["run"]: row["final_loss"] for row in results["equal_loss"]["rows"]}


def test_rows_results_and_accounts(compared):
    out, results = compared
    with (out / "equal-loss.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [(row["run"], float(row["length"]), int(row["steps"])) for row in table] == [
        ("equal-loss/length-0.5/seed-0", 0.5, 6),
        ("equal-loss/length-1/seed-0", 1.0, 12),
        ("equal-loss/length-2/seed-0", 2.0, 24),
        ("baseline/seed-0", 1.0, 12),
        ("tst/seed-0", 1.0, 12),
    ]
    assert [int(row["positions"]) for row in table] == [128 * int(row["steps"]) for row in table]
    assert results == json.loads((out / "results.json").read_text())
    assert {"curve", "arms"} <= results["equal_loss"].keys()
    shared = json.loads((out / "equal-loss" / "length-2" / "seed-0" / "summary.json").read_text())
    assert shared["switches"] == []


@pytest.mark.parametrize("length", [0.5, 1, 2])
def test_a_baseline_is_the_run_of_its_own_recipe(compared, tmp_path, length):
    out, _ = compared
    directory = out / "equal-loss" / f"length-{length:g}" / "seed-0"
    own = load_recipe(directory / "recipe.toml")
    assert own.schedule().switches == {0.5: [4], 1: [4, 9], 2: [4, 9, 18]}[length]
    assert own.training.arguments["warmup_steps"] == 1
    alone = train(own, tmp_path / "alone")
    branched = json.loads((directory / "summary.json").read_text())
    assert alone["final_loss"] == branched["final_loss"]
    weights = load_file(tmp_path / "alone" / "model" / "model.safetensors")
    for name, value in load_file(directory / "model" / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name
    rates = [json.loads(line).get("learning_rate") for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert rates[-2] < 2e-3  # decayed


def test_finished_baselines_are_not_run_again_and_new_lengths_branch_off(compared, short, monkeypatch):
    out, results = compared
    steps = []
    stock = ScheduledTrainer.training_step

    def counted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(ScheduledTrainer, "training_step", counted)
    said = []
    again = compare_at_equal_loss(short, out, lengths=[0.5, 1, 1.5, 2, 3], say=said.append)
    assert sum("finished already" in line for line in said) == 5
    assert steps == [*range(9, 18), *range(18, 36)]  # 1.5 leaves 1 after 9 steps, 3 leaves 2 after 18
    before = losses_of(results)
    assert {run: loss for run, loss in losses_of(again).items() if run in before} == before


class Killed(Exception):
    pass


@pytest.mark.parametrize(("length", "step"), [("1", 6), ("2", 14)])
def test_killed_baselines_continue_with_the_same_result(compared, short, tmp_path, monkeypatch, length, step):
    stock = ScheduledTrainer.training_step

    def dies(self, *args, **kwargs):
        if f"length-{length}/" in self.args.output_dir and self.state.global_step == step:
            raise Killed
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(ScheduledTrainer, "training_step", dies)
    with pytest.raises(Killed):
        compare_at_equal_loss(short, tmp_path, lengths=[0.5, 1, 2], say=lambda _: None)
    monkeypatch.setattr(ScheduledTrainer, "training_step", stock)
    again = compare_at_equal_loss(short, tmp_path, lengths=[0.5, 1, 2], say=lambda _: None)
    assert losses_of(again) == losses_of(compared[1])


def test_a_run_killed_before_its_fork_was_kept_keeps_it(short, tmp_path):
    own = baseline_recipe(short, 1)
    train(own, tmp_path / "run", forks=[9])
    fork = fork_path(tmp_path / "run", 9)
    fork.rename(tmp_path / "gone")
    (tmp_path / "run" / "checkpoint-12").rename(tmp_path / "later")
    (tmp_path / "run" / "summary.json").unlink()
    train(own, tmp_path / "run", resume=True, forks=[9])
    assert fork.exists()


def test_refuses_what_makes_no_curve(compared, short, tmp_path):
    def refused(recipe, words, lengths=LENGTHS, out=tmp_path / "out"):
        with pytest.raises(InputError, match=words) as error:
            compare_at_equal_loss(recipe, out, lengths=lengths)
        assert "\n" not in str(error.value)

    def changed(**arguments):
        return short.replace("training", arguments={**short.training.arguments, **arguments})

    refused(changed(lr_scheduler_type="cosine"), r"lr_scheduler_type is 'cosine'.*warmup_stable_decay")
    refused(changed(lr_scheduler_kwargs={"num_decay_steps": 3}), r"training\.decay_ratio")
    refused(short.replace("training", decay_ratio=0.0), "decay_ratio is 0")
    refused(short.replace("training", decay_ratio=1.0), "decay_ratio is 1")
    refused(short, "--lengths needs at least 3 different lengths", [1, 2, 2])
    refused(short, "--lengths must be positive", [-1, 1, 2])
    refused(short, "--lengths must be positive", [1, 2, math.nan])
    refused(changed(warmup_steps=6), "6 are warm-up")
    refused(short.replace("superposition", bag_size=1), "nothing to compare")
    assert not (tmp_path / "out").exists()
    refused(changed(learning_rate=1.0), "learning_rate is 1.0 and was 0.003", [0.5, 1, 2], compared[0])


def test_the_command_end_to_end(compared, short, tmp_path, monkeypatch, capsys):
    out, _ = compared
    path = tmp_path / "recipe.toml"
    path.write_text(short.to_toml())

    def command(*options):
        monkeypatch.setattr(sys, "argv", ["superpose", "compare", str(path), "--out", str(out), *options])
        main()

    command("--equal-loss", "--lengths", "0.5,1,2")
    shown = capsys.readouterr().out
    assert "equal-loss speed-up" in shown
    assert "Baselines of 6 to 24 steps" in shown
    assert (out / "equal-loss.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "<h2>Equal loss</h2>" in page
    assert "baseline, 0.5 × the steps" in page
    for options, name in ((["--lengths", "1,2,3"], "--equal-loss"), (["--equal-loss", "--lengths", "1,many"], "--lengths")):
        with pytest.raises(SystemExit) as stopped:
            command(*options)
        error = capsys.readouterr().err
        assert (stopped.value.code, error.count("\n")) == (2, 1)
        assert name in error
