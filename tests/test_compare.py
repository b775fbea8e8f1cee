import csv
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from superpose import InputError
from superpose.experiment.compare import compare
from superpose.experiment.report import write_report
from superpose.experiment.summary import summarise


@pytest.fixture(scope="module")
def short(recipe):
    arguments = {**recipe.training.arguments, "save_strategy": "no", "eval_steps": 3}
    return recipe.replace("training", steps=9, arguments=arguments)


@pytest.fixture(scope="module")
def compared(short, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    return out, compare(short, out, seeds=2)


def test_arms_share_weights_data_and_flops(compared):
    out, results = compared
    assert [(arm["name"], [run["seed"] for run in arm["runs"]]) for arm in results["arms"]] == [
        ("baseline", [0, 1]),
        ("tst", [0, 1]),
    ]
    baseline, tst = (arm["runs"] for arm in results["arms"])
    for plain, superposed in zip(baseline, tst, strict=True):
        assert plain["flops"] == superposed["flops"]
        assert plain["positions"] == superposed["positions"]
        assert superposed["data_tokens"] == 2 * plain["data_tokens"]  # 1 + (s − 1)·r with s = 4, r = 1/3
        assert plain["evaluations"][0]["eval_loss"] == superposed["evaluations"][0]["eval_loss"]  # the same initial weights
    assert baseline[0]["evaluations"][0]["eval_loss"] != baseline[1]["evaluations"][0]["eval_loss"]
    assert results == json.loads((out / "results.json").read_text())
    with (out / "runs.csv").open() as file:
        rows = [(row["arm"], int(row["seed"]), float(row["final_loss"])) for row in csv.DictReader(file)]
    assert rows == [(arm["name"], run["seed"], run["final_loss"]) for arm in results["arms"] for run in arm["runs"]]


def test_finished_arms_are_not_run_again(compared, short):
    out, results = compared
    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    said = []
    again = compare(short, out, arms=["baseline", "tst", "output-only"], seeds=1, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [line.split(": ")[1].split(",")[0] for line in said] == ["finished already", "finished already", "starts"]
    assert again["arms"][1]["runs"][0] == results["arms"][1]["runs"][0]
    assert again["arms"][2]["runs"][0]["data_tokens"] == again["arms"][0]["runs"][0]["data_tokens"]


def test_an_interrupted_arm_continues(short, tmp_path):
    from superpose.experiment import train as module

    saving = short.replace("training", arguments={**short.training.arguments, "save_strategy": "steps", "save_steps": 3})
    whole = compare(saving, tmp_path / "whole", arms=["tst"])
    run = tmp_path / "whole" / "tst" / "seed-0"
    weights = load_file(run / "model" / "model.safetensors")
    (run / "summary.json").unlink()
    for checkpoint in run.glob("checkpoint-*"):
        if module._step_of(checkpoint) > 3:
            checkpoint.rename(tmp_path / checkpoint.name)
    again = compare(saving, tmp_path / "whole", arms=["tst"])
    assert again["arms"][0]["runs"][0]["final_loss"] == whole["arms"][0]["runs"][0]["final_loss"]
    found = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_report_of_real_results(compared):
    out, results = compared
    page = write_report(results, out)
    assert page.parent == out
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "data:image/png;base64," in text
    assert {summary.name for summary in summarise(results)} == {"baseline", "tst"}


def test_another_recipe_in_the_same_directory_is_refused(compared, short):
    out, _ = compared
    with pytest.raises(InputError, match=r"model\.hidden_size is 64 and was 32"):
        compare(short.replace("model", shape={**short.model.shape, "hidden_size": 64}), out)
    with pytest.raises(InputError, match="'tts' is unknown"):
        compare(short, out, arms=["tts"])
    with pytest.raises(InputError, match="seeds"):
        compare(replace(short), out, seeds=0)
