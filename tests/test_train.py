import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from superpose import InputError, Schedule
from superpose.data.prepare import prepare
from superpose.data.store import TokenStore
from superpose.experiment import train as module
from superpose.experiment.evaluate import evaluate
from superpose.experiment.sample import generate
from superpose.experiment.train import read_metrics, train


def weights(run):
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """One run, left as it is: 24 steps, the switch after step 8, a checkpoint every 4."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return recipe, out, train(recipe, out)


def test_summary_and_files(finished):
    _, out, summary = finished
    assert summary["positions"] == 24 * 4 * 32
    assert summary["data_tokens"] == (8 * 4 + 16) * 4 * 32
    assert summary["final_loss"] < 5.3 < 5.55
    assert [switch["step"] for switch in summary["switches"]] == [8]
    assert summary == json.loads((out / "summary.json").read_text())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (out / "model").iterdir()
    }
    assert json.loads((out / "environment.json").read_text())["torch"] == torch.__version__
    assert json.loads((out / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_metrics_account_for_every_logged_step(finished):
    recipe, out, summary = finished
    rows = read_metrics(out / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 12, 24]
    # Every fourth step, and each of the first twenty after the switch.
    assert [row["step"] for row in training] == [4, *range(8, 25)]
    assert {row["bag_size"] for row in training if row["step"] <= 8} == {4}
    assert {row["bag_size"] for row in training if row["step"] > 8} == {1}
    schedule = recipe.schedule()
    for row in training:
        assert row["positions"] == schedule.position_offset(row["step"], 32, 4)
        assert row["data_tokens"] == schedule.token_offset(row["step"], 32, 4)
        ratio = row["data_tokens_per_second"] / row["positions_per_second"]
        assert ratio == pytest.approx(row["bag_size"])  # throughput is not inflated after the switch
    flops = [row["flops"] for row in training]
    assert flops == sorted(flops)
    assert flops[-1] / flops[0] == pytest.approx(24 / 4)  # equal FLOPs a step in both phases
    assert evaluations[0]["eval_loss"] == pytest.approx(5.55, abs=0.1)
    assert evaluations[-1]["eval_bits_per_byte"] == pytest.approx(summary["bits_per_byte"])


@pytest.mark.parametrize("stopped_at", [4, 8, 16])  # before, at and after the switch
def test_resume_gives_the_weights_of_the_uninterrupted_run(finished, tmp_path, stopped_at):
    recipe, whole, _ = finished
    out = tmp_path / "resumed"
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    for checkpoint in out.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > stopped_at:
            shutil.rmtree(checkpoint)
    (out / "checkpoint-20").mkdir()  # what a kill while saving leaves behind
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "lo')
    summary = train(recipe, out, resume=True)
    expected, found = weights(whole), weights(out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rows, whole_rows = read_metrics(out / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_loss" in row] == [row["step"] for row in whole_rows if "eval_loss" in row]
    assert summary["final_loss"] == pytest.approx(whole_rows[-1]["eval_loss"], rel=1e-6)


def test_accumulation_equals_one_large_batch(finished, tmp_path, monkeypatch):
    recipe, whole, _ = finished
    arguments = {**recipe.training.arguments, "per_device_train_batch_size": 1}
    train(recipe.replace("training", arguments=arguments), tmp_path / "run")
    one = [row["loss"] for row in read_metrics(whole / "metrics.jsonl") if "loss" in row]
    four = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert four == pytest.approx(one, rel=1e-4)


def launch(processes, recipe, out, program=("-m", "superpose.cli"), *overrides):
    path = out.with_suffix(".toml")
    path.write_text(recipe.to_toml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command += [*program, "train", str(path), *overrides, "--out", str(out)]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


DATA_PARALLEL = (("-m", "superpose.cli"),)
FSDP2 = ((str(Path(__file__).parent / "fsdp_on_cpu.py"),), "training.fsdp=true")
WRAP = "training.fsdp_config={transformer_layer_cls_to_wrap=['LlamaDecoderLayer']}"


@pytest.mark.parametrize("how", [DATA_PARALLEL, FSDP2, (*FSDP2, WRAP)], ids=["data-parallel", "fsdp2", "fsdp2-layers"])
def test_two_ranks_give_the_losses_of_one(finished, tmp_path, how):
    recipe, whole, summary = finished
    losses = launch(2, recipe, tmp_path / "two", *how)
    assert losses == pytest.approx([row["loss"] for row in read_metrics(whole / "metrics.jsonl") if "loss" in row], rel=1e-4)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["final_loss"] == pytest.approx(summary["final_loss"], rel=1e-4)
    expected, found = weights(whole), weights(tmp_path / "two")
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-4)


def test_validation_is_a_sample_of_the_whole_split(store, monkeypatch):
    monkeypatch.setattr(TokenStore, "read", lambda self, start, count: torch.arange(start, start + count).numpy())
    validation = TokenStore(store, "validation")
    windows = module.validation_windows(validation, 32, 1024)
    assert len(windows) == 32
    starts = [int(window["input_ids"][0]) for window in windows]
    assert starts == [int(windows[index]["input_ids"][0]) for index in range(32)]
    quarters = [start * 4 // validation.tokens for start in starts]
    assert min(quarters.count(quarter) for quarter in range(4)) >= 3
    assert len(module.validation_windows(validation, 32, 10**9)) == (validation.tokens - 1) // 32
    assert len(module.validation_windows(validation, 32, 1)) == 1


def test_evaluate_and_sample_read_the_saved_model(finished, store, monkeypatch):
    _, out, summary = finished
    monkeypatch.setattr(sys.modules[evaluate.__module__], "bfloat16_pays", lambda: False)  # the run was in float32
    found = evaluate(out / "model", store, positions=32, tokens=2048, batch_size=4)
    assert found.loss == pytest.approx(summary["final_loss"], rel=1e-5)
    assert found.bits_per_byte == pytest.approx(summary["bits_per_byte"], rel=1e-5)
    text = generate(out / "model", "import ", max_new_tokens=5, temperature=0)
    assert text.startswith("import ")
    assert len(text) > len("import ")


def test_the_saved_model_needs_no_superpose(finished, tmp_path):
    _, out, _ = finished
    script = (
        "import sys; sys.modules['superpose'] = None\n"  # any import of it fails
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model, tokenizer = (kind.from_pretrained({str(out / 'model')!r}) for kind in (AutoModelForCausalLM, AutoTokenizer))\n"
        "ids = tokenizer('import ', return_tensors='pt')\n"
        "print(type(model).__name__, len(tokenizer.decode(model.generate(**ids, max_new_tokens=5, do_sample=False)[0])))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("LlamaForCausalLM")


def test_a_directory_in_use_or_finished_or_foreign_is_refused(finished, tmp_path):
    recipe, out, _ = finished
    with pytest.raises(InputError, match="holds a run already"):
        train(recipe, out)
    with pytest.raises(InputError, match="finished"):
        train(recipe, out, resume=True)
    with pytest.raises(InputError, match="no run to resume"):
        train(recipe, tmp_path / "new", resume=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("text")
    with pytest.raises(InputError, match="holds no run"):
        train(recipe, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "text"
    with module._claimed(tmp_path / "busy", recipe, False), pytest.raises(InputError, match="in use"):
        train(recipe, tmp_path / "busy")


def test_resuming_with_another_schedule_is_refused(finished, tmp_path):
    recipe, whole, _ = finished
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    with pytest.raises(InputError, match=r"superposition\.bag_size is 2 and was 4"):
        train(recipe.replace("superposition", bag_size=2), out, resume=True)
    with pytest.raises(InputError, match=r"training\.steps is 30 and was 24"):
        train(recipe.replace("training", steps=30), out, resume=True)


def test_resuming_on_other_tokens_is_refused(finished, tmp_path):
    recipe, whole, _ = finished
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    other = tmp_path / "other"
    prepare([str(Path(os.__file__).parent / "json" / "*.py")], other, use_bytes=True, validation=0.2)
    moved = tmp_path / "moved"
    shutil.copytree(recipe.data.path, moved)
    with pytest.raises(InputError, match="holds other tokens"):
        train(recipe.replace("data", path=str(other)), out, resume=True)
    train(recipe.replace("data", path=str(moved)), out, resume=True)


def test_a_vocabulary_smaller_than_the_tokens_is_refused(recipe, tmp_path):
    small = recipe.replace("model", shape={**recipe.model.shape, "vocab_size": 100})
    with pytest.raises(InputError, match=r"model\.vocab_size is 100, but the data's tokenizer has 257"):
        train(small, tmp_path / "run")


def test_a_batch_that_does_not_divide_the_step_is_refused(recipe, tmp_path):
    arguments = {**recipe.training.arguments, "per_device_train_batch_size": 3}
    with pytest.raises(InputError, match="must be a multiple"):
        train(recipe.replace("training", arguments=arguments), tmp_path / "run")


def test_a_diverged_run_stops_and_says_so(recipe, tmp_path):
    arguments = {**recipe.training.arguments, "learning_rate": 1e30, "max_grad_norm": 0.0, "weight_decay": 0.0}
    summary = train(recipe.replace("training", arguments=arguments), tmp_path / "run")
    assert summary["diverged"]
    assert summary["step"] < 24


def test_height_of_a_spike_and_recovery():
    rows = [
        {"step": s, "loss": loss} for s, loss in [(5, 3.0), (10, 2.5), (11, 3.5), (12, 3.9), (13, 3.0), (15, 2.4), (20, 2.0)]
    ]
    switch = module._switch(10, Schedule.tst(20, 4, 0.5), rows)
    assert switch == {
        "step": 10,
        "from_bag_size": 4,
        "to_bag_size": 1,
        "loss_before": 2.5,
        "loss_after": 3.9,
        "height": pytest.approx(1.4),
        "steps_to_recover": 5,
    }
