import csv
import math
import sys

import numpy as np
import pytest

from superpose.cli import main
from superpose.errors import InputError
from superpose.experiment import grid_model, plan
from superpose.experiment.grid_model import Cells, GainModel, cross_validate, grids, parse_count, published_rows, speed_up
from superpose.experiment.plan import Hardware, Run, load_model, make_plan, sentences, settings_table
from superpose.experiment.plan_plots import write_plan_plots

STEP = grid_model.PUBLISHED_POSITIONS_PER_STEP


@pytest.fixture(scope="module")
def published():
    return load_model([], STEP)


@pytest.fixture(scope="module")
def errors(published):
    return {error.grid.name: error for error in cross_validate(published[0])}


def write_sweep(path, gains, params="380000", steps="2000", baseline=1.3):
    """A sweep with the gain of each (bag size, ratio), or None for a diverged run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(grid_model.COLUMNS)
        writer.writerow(["own", params, steps, "uniform", "0.0", 1, baseline])
        for (bag_size, ratio), gain in gains.items():
            writer.writerow(["own", params, steps, "uniform", ratio, bag_size, "" if gain is None else baseline - gain])
    return path


def test_the_published_grids_are_whole():
    sizes = {(grid.name, grid.params, grid.steps, grid.weighting): len(grid.cells) for grid in grids(published_rows())}
    assert sizes == {
        ("table 4", 270e6, 20_000, "uniform"): 15 * 6,
        ("table 5", 270e6, 100_000, "uniform"): 12 * 6,
        ("table 6", 600e6, 20_000, "uniform"): 12 * 6,
        ("table 7", 600e6, 20_000, "power-law"): 12 * 6,
        ("table 1", 3e9, 20_000, "uniform"): 1,
    }


@pytest.mark.parametrize("table", ["table 4", "table 5", "table 6", "table 7"])
def test_errors_on_the_published_grids(errors, table):
    error = errors[table]
    assert error.bag_left_out <= 0.002
    assert error.grid_left_out <= 0.0055
    assert error.covered >= 0.9
    assert error.regret <= 0.002
    assert error.regret_left_out <= 0.002


def test_a_bag_size_left_out_does_not_reach_its_prediction(published):
    """The error is an honest one: whatever the withheld losses are, the prediction is the same."""
    model, _ = published
    here = model.cells.grid == 0
    before = grid_model.bag_left_out(model, here, 7)
    spoilt = GainModel(model.grids)
    spoilt.gain[spoilt.cells.bag_size == 7] = 100.0
    np.testing.assert_array_equal(grid_model.bag_left_out(spoilt, here, 7), before)
    assert abs(before - model.gain[here & (model.cells.bag_size == 7)]).max() < 0.005


def test_the_recommended_setting_of_each_published_run_is_near_its_best(published):
    """Within 0.002 nats of the best that was measured, among all settings and not only those of the table."""
    model, rows = published
    losses = {(row.params, row.steps, row.weighting, row.bag_size, row.ratio): row.loss for row in rows if row.table != "1"}
    for grid in model.grids[:4]:
        made = make_plan(Run(grid.params, grid.steps, weighting=grid.weighting), model, rows)
        key = (grid.params, grid.steps, grid.weighting)
        loss = losses[*key, int(made.cells.bag_size[made.best]), float(made.cells.ratio[made.best])]
        best = min(value for setting, value in losses.items() if setting[:3] == key)
        assert loss - best <= 0.002
        assert made.warnings == ()


def test_prediction_is_the_posterior_of_a_gaussian(published):
    """Against the textbook formula with an explicit inverse."""
    model, _ = published
    known = np.flatnonzero(model.cells.grid == 3)[::5]
    cells = Cells.of(400e6, 6e10, "uniform", [(3, 0.2), (9, 0.5)])
    mean, deviation = model.predict(cells, np.isin(np.arange(len(model.cells)), known))
    a = model.cells[known]
    inverse = np.linalg.inv(grid_model._covariance(a, a) + grid_model._noise(a, a))
    cross = grid_model._covariance(cells, a)
    np.testing.assert_allclose(mean, cross @ inverse @ model.gain[known], rtol=1e-6)
    variance = np.diagonal(grid_model._covariance(cells, cells) - cross @ inverse @ cross.T)
    noise = grid_model.BASELINE_NOISE**2 + grid_model.CELL_NOISE**2
    np.testing.assert_allclose(deviation**2, variance + noise, rtol=1e-5)


def test_speed_up_inverts_the_curve_of_the_baselines():
    """The 3B run: the published baseline needs 36,000 steps for the loss of TST at 20,000."""
    rows = published_rows()
    assert speed_up(0.132, 3e9, 20_000 * STEP, rows) == pytest.approx(1.8, abs=0.25)
    assert speed_up(3.2124 - 3.0921, 270e6, 20_000 * STEP, rows) == pytest.approx(5, rel=1e-3)
    assert speed_up(0.0, 1e9, 1e11, rows) == pytest.approx(1)
    assert speed_up(5.0, 1e9, 1e11, rows) == math.inf


def test_a_run_far_from_the_grids_is_called_a_guess(published):
    made = make_plan(Run(380e3, 2000, positions_per_step=2048), *published)
    assert "EXTRAPOLATES" in made.warnings[0]
    for words in ("380K parameters", "2,000 steps", "4.10M positions"):
        assert words in made.warnings[0]
    assert "guesses" in made.warnings[1]
    low = made.mean[made.best] - grid_model.NINETY * made.deviation[made.best]
    assert low < 0 < made.mean[made.best]
    assert made.cells.bag_size[made.best] == 2


def test_extrapolation_widens_with_distance(published):
    model, _ = published
    deviations = [
        float(model.predict(Cells.of(params, 42e9, "uniform", [(6, 0.3)]))[1][0]) for params in (600e6, 7e9, 70e9, 700e9)
    ]
    assert deviations == sorted(deviations)
    assert deviations[-1] > 5 * deviations[0]


def test_a_sweep_of_ones_own_rules_near_it(published, tmp_path):
    gains = {(2, 0.2): 0.010, (2, 0.4): 0.012, (4, 0.2): -0.05, (4, 0.4): -0.09, (8, 0.2): None}
    sweep = write_sweep(tmp_path / "sweep.csv", gains)
    model, rows = load_model([sweep], 2048)
    made = make_plan(Run(380e3, 2000, positions_per_step=2048), model, rows)
    assert not any("EXTRAPOLATES" in warning for warning in made.warnings)
    assert made.cells.bag_size[made.best] == 2
    assert set(made.cells.bag_size) == {2, 3, 4}  # nothing is recommended beyond what was measured
    assert set(made.cells.ratio) == {0.2, 0.3, 0.4}
    assert settings_table(made).row_count == 3
    for (bag_size, ratio), gain in gains.items():
        if gain is not None:
            index = np.flatnonzero((made.cells.bag_size == bag_size) & (made.cells.ratio == ratio))[0]
            assert made.mean[index] == pytest.approx(gain, abs=0.02)
    # and changes little where the published grids are
    far = make_plan(Run(600e6, 20_000), model, rows)
    alone = make_plan(Run(600e6, 20_000), *published)
    np.testing.assert_allclose(far.mean, alone.mean, atol=0.003)


def test_a_noisy_sweep_is_not_followed_into_its_noise(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.02, (6, 3))
    gains = {(s, r): 0.03 + noise[i, j] for i, s in enumerate((2, 3, 4, 6, 8, 12)) for j, r in enumerate((0.1, 0.3, 0.5))}
    model, _ = load_model([write_sweep(tmp_path / "sweep.csv", gains)], 2048)
    assert model.cells.noise[model.cells.grid == 5].min() >= 8
    assert (model.cells.noise[model.cells.grid < 5] == 1).all()


def with_seeds(path, gains, spread):
    """A sweep of five seeds, whose baselines and cells scatter with the standard deviation ``spread``."""
    random = np.random.default_rng(1)
    lines = []
    for _ in range(5):
        off = random.normal(0, spread)
        noisy = {setting: gain + off + random.normal(0, spread) for setting, gain in gains.items()}
        lines += write_sweep(path, noisy, baseline=1.3 + off).read_text().splitlines()[1:]
    path.write_text("\n".join([",".join(grid_model.COLUMNS), *lines]))
    return path


GAINS = {(2, 0.15): 0.0134, (2, 0.3): 0.0139, (4, 0.15): -0.0756, (4, 0.3): -0.0796}


def test_a_few_cells_that_agree_are_no_proof_of_little_noise(tmp_path):
    """Small runs differ by 0.02 nats from seed to seed; a sweep of one seed that shows none must not promise any."""
    model, rows = load_model([write_sweep(tmp_path / "sweep.csv", GAINS)], 2048)
    made = make_plan(Run(380e3, 2000, positions_per_step=2048), model, rows)
    assert made.cells.bag_size[made.best] == 2
    assert grid_model.NINETY * made.deviation[made.best] > 0.02


@pytest.mark.parametrize(("spread", "low", "high"), [(0.0005, 1, 1.5), (0.006, 2.8, 5.6), (0.03, 14, 28)])
def test_the_scatter_of_seeds_is_the_noise(tmp_path, spread, low, high):
    model, rows = load_model([with_seeds(tmp_path / "sweep.csv", GAINS, spread)], 2048)
    assert low <= model.noise[-1] <= high
    np.testing.assert_allclose(model.cells.noise[model.cells.grid == 5], model.noise[-1] / math.sqrt(5))
    near, far = (make_plan(Run(params, 2000, positions_per_step=2048), model, rows) for params in (500e3, 50e6))
    assert (near.cells.noise == model.noise[-1]).all()
    assert (far.cells.noise == 1).all()


def test_a_baseline_of_another_length_gives_the_slope(tmp_path):
    sweep, run = write_sweep(tmp_path / "sweep.csv", GAINS), Run(380e3, 2000, positions_per_step=2048)
    guessed = make_plan(run, *load_model([sweep], 2048))
    assert "slope of baselines of 270M parameters" in guessed.warnings[0]
    longer = write_sweep(tmp_path / "longer.csv", {}, steps="4000", baseline=1.21)
    made = make_plan(run, *load_model([sweep, longer], 2048))
    assert made.warnings == ()
    # the same curve through both baselines: half of the way in its scale is a known length
    half = (1 + 2**-grid_model.SCALE_EXPONENT) / 2
    assert speed_up(0.045, 380e3, run.positions, load_model([sweep, longer], 2048)[1]) == pytest.approx(
        half ** (-1 / grid_model.SCALE_EXPONENT)
    )
    assert made.speed_up[1] > guessed.speed_up[1]


def test_a_sweep_where_nothing_gains(tmp_path):
    gains = {(s, r): -0.05 * s * r - 0.02 for s in (2, 3, 4, 6, 8, 12, 16) for r in (0.1, 0.3, 0.6)}
    model, rows = load_model([write_sweep(tmp_path / "sweep.csv", gains)], 2048)
    made = make_plan(Run(380e3, 2000, positions_per_step=2048), model, rows)
    assert made.best is None
    assert made.speed_up is None
    assert "train without superposition" in " ".join(sentences(made))


def test_seeds_are_averaged(tmp_path):
    first = write_sweep(tmp_path / "sweep.csv", {(2, 0.3): 0.01}).read_text()
    second = write_sweep(tmp_path / "sweep.csv", {(2, 0.3): 0.03}, baseline=1.4).read_text()
    (tmp_path / "both.csv").write_text(first + second.partition("\n")[2])
    [grid] = grids(grid_model.read_rows(tmp_path / "both.csv", 2048))
    np.testing.assert_allclose(grid.gain, [0.02], atol=1e-12)


@pytest.mark.parametrize("tokens", [300e9, 90e9, 60e9, 47e9])
def test_no_recommended_setting_repeats_data(published, tokens):
    run = Run(600e6, 20_000, tokens=tokens)
    made = make_plan(run, *published)
    assert made.data_tokens[made.best] <= tokens
    fitting = made.mean[made.fits]
    assert made.mean[made.best] >= fitting.max() - 1e-3
    assert ("Data is short" in " ".join(sentences(made))) == (made.data_tokens[made.unlimited] > tokens)


@pytest.mark.parametrize("tokens", [43e9, 20e9])
def test_where_nothing_fits_the_targets_alone_are_superposed(published, tokens):
    made = make_plan(Run(600e6, 20_000, tokens=tokens), *published)
    assert made.best is None
    text = " ".join(sentences(made))
    assert "superposition.mode=output-only" in text
    assert ("go round them 2.10 times" in text) == (tokens == 20e9)


def test_hours_follow_from_flops():
    """The 3B model in table 1: 247 B200-hours for 6 · 3B · 42B FLOPs is 38 % of the peak."""
    flops = 6 * 3e9 * 20_000 * STEP
    assert Hardware("B200", mfu=0.377).hours(flops) == pytest.approx(247, rel=0.01)


@pytest.mark.parametrize(
    ("text", "value"), [("600M", 600e6), ("2.1b", 2.1e9), ("20000", 20_000), (" 1.5K ", 1500), ("3T", 3e12), ("1e6", 1e6)]
)
def test_counts(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "M", "600Q", "-3", "nan", "0", "inf"])
def test_bad_counts(text):
    with pytest.raises(ValueError):  # noqa: PT011
        parse_count(text)


def test_bad_sweeps_are_named(tmp_path):
    sweep = tmp_path / "sweep.csv"
    with pytest.raises(InputError, match="no such sweep"):
        load_model([sweep], 2048)
    sweep.write_text("table,params\n")
    with pytest.raises(InputError, match="no column total_steps"):
        load_model([sweep], 2048)
    write_sweep(sweep, {(2, 0.3): 0.01}, params="10B-A1B")
    with pytest.raises(InputError, match=r"sweep\.csv, line 2 is not a run"):
        load_model([sweep], 2048)
    lines = write_sweep(sweep, {(2, 0.3): 0.01}).read_text().splitlines()
    sweep.write_text("\n".join([lines[0], lines[2]]))
    with pytest.raises(InputError, match="has no baseline"):
        load_model([sweep], 2048)


def test_the_command(monkeypatch, capsys, tmp_path):
    arguments = ["--params", "600M", "--steps", "20K", "--tokens", "60B", "--gpu", "B200", "--gpus", "8", "--price", "4"]
    monkeypatch.setattr(sys, "argv", ["superpose", "plan", *arguments, "--errors", "--out", str(tmp_path)])
    monkeypatch.setenv("COLUMNS", "100")
    main()
    out = capsys.readouterr().out
    assert "Data is short" in out
    assert "superposition.bag_size=5 superposition.ratio=0.1" in out
    assert "table 7: 600M, 20,000, power-law" in out  # not folded at this width
    assert "Cross-validated on 4 grids" in out
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert (tmp_path / "model.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--params", "many"], "--params 'many' is not a number"),
        (["--steps", "0.5"], "--steps '0.5' is not a number of at least 1"),
        (["--gpu", "Z80"], "--gpu 'Z80' is unknown"),
        (["--mfu", "2"], "--mfu must lie in (0, 1]"),
        (["--weighting", "first"], "--weighting 'first' is not in the grids"),
        (["--sweep", "none.csv"], "none.csv: no such sweep"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, change, message):
    monkeypatch.setattr(sys, "argv", ["superpose", "plan", "--params", "600M", "--steps", "20000", *change])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_plots_of_a_plan_without_a_recommendation(published, tmp_path):
    model, rows = published
    made = make_plan(Run(600e6, 20_000, tokens=20e9), model, rows)
    assert [path.name for path in write_plan_plots(made, model, tmp_path)] == ["plan.png", "model.png"]
    assert plan.costs_table(made, Hardware()).columns[1].header == "baseline"
