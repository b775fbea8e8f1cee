import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from superpose.cli import main


def superpose(*arguments, cwd=None):
    command = [sys.executable, "-m", "superpose.cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def files(recipe, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "good.toml").write_text(recipe.to_toml())
    (folder / "empty").mkdir()
    (folder / "nothing.txt").write_text("")
    (folder / "short.txt").write_text("a few words\n")
    (folder / "bad.json").write_text("{")
    (folder / "text.txt").write_text("some text. " * 50)
    corrupt = folder / "corrupt"
    corrupt.mkdir()
    for file in store.iterdir():
        (corrupt / file.name).write_bytes(file.read_bytes())
    shard = bytearray((corrupt / "train-00000.bin").read_bytes())
    shard[1000] ^= 1
    (corrupt / "train-00000.bin").write_bytes(shard)
    used = folder / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("text")
    return folder


BAD = {
    "missing file": (["prepare", "none.txt", "--bytes", "--out", "o"], "none.txt"),
    "empty corpus": (["prepare", "nothing.txt", "--bytes", "--out", "o"], "the sources hold no text"),
    "directory without text": (["prepare", "empty", "--bytes", "--out", "o"], "empty"),
    "unreadable tokenizer": (["prepare", "text.txt", "--tokenizer", "bad.json", "--out", "o"], "bad.json"),
    "no tokenizer": (["prepare", "text.txt", "--out", "o"], "--tokenizer"),
    "output in use by something else": (["prepare", "text.txt", "--bytes", "--out", "used"], "used"),
    "missing recipe": (["train", "none.toml", "--out", "o"], "none.toml"),
    "unknown field": (["train", "good.toml", "superposition.bagsize=3", "--out", "o"], "did you mean bag_size?"),
    "ratio": (["train", "good.toml", "superposition.ratio=1.5", "--out", "o"], "ratio must lie in [0, 1]"),
    "bag size": (["train", "good.toml", "superposition.bag_size=0", "--out", "o"], "bag_size"),
    "no store": (["train", "good.toml", "data.path=empty", "--out", "o"], "superpose prepare"),
    "corrupted shard": (["train", "good.toml", "data.path=corrupt", "--out", "o"], "train-00000.bin is corrupted"),
    "vocabulary": (["train", "good.toml", "model.vocab_size=99", "--out", "o"], "model.vocab_size is 99"),
    "window": (["train", "good.toml", "training.positions=1048576", "--out", "o"], "fewer than one window"),
    "batch": (["train", "good.toml", "training.per_device_train_batch_size=3", "--out", "o"], "must be a multiple"),
    "output in use": (["train", "good.toml", "--out", "used"], "used is not empty"),
    "nothing to resume": (["train", "good.toml", "--out", "o", "--resume"], "no run to resume"),
    "unknown arm": (["compare", "good.toml", "--arms", "baseline,tts", "--out", "o"], "'tts' is unknown"),
    "nothing to compare": (["compare", "good.toml", "superposition.bag_size=1", "--out", "o"], "nothing to compare"),
    "no model": (["evaluate", "./empty", "--data", "corrupt"], "empty is not a model"),
    "no model to sample": (["sample", "./empty"], "empty is not a model"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(files, arguments, message, monkeypatch, capfd):
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "argv", ["superpose", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capfd.readouterr().err
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("superpose: ")
    assert message in lines[0]
    assert not (files / "o").exists()
    assert [path.name for path in (files / "used").iterdir()] == ["thesis.txt"]


def test_bad_input_from_the_shell(files):
    result = superpose("train", "none.toml", cwd=files)
    assert (result.returncode, result.stderr) == (2, "superpose: none.toml: no such recipe\n")


def test_a_second_training_in_the_same_directory_is_refused(files, recipe):
    slow = [sys.executable, "-m", "superpose.cli", "train", "good.toml", "training.steps=100000", "--out", "busy"]
    with subprocess.Popen(slow, cwd=files, stderr=subprocess.PIPE, text=True) as first:
        try:
            assert any("step " in line for line in first.stderr)  # its first evaluation: it trains
            result = superpose("train", "good.toml", "--out", "busy", "--resume", cwd=files)
        finally:
            first.kill()
    assert result.returncode == 2
    assert "in use by a running training" in result.stderr


def test_prepare_train_evaluate_sample(files):
    source = Path(os.__file__).parent / "json" / "*.py"
    assert (
        superpose("prepare", source, "--train-tokenizer", "300", "--validation", "0.2", "--out", "d", cwd=files).returncode == 0
    )
    small = ["training.steps=8", "training.eval_steps=8", "training.report_to=tensorboard"]
    trained = superpose("train", "good.toml", "data.path=d", *small, "--out", "run", cwd=files)
    assert trained.returncode == 0, trained.stderr
    assert "bits per byte after 8 steps" in trained.stdout
    assert AutoModelForCausalLM.from_pretrained(files / "run" / "model").config.vocab_size == 300
    assert list((files / "run").rglob("events.out.tfevents*"))
    evaluated = superpose("evaluate", "run/model", "--data", "d", "--positions", "32", cwd=files)
    assert "bits per byte" in evaluated.stdout
    assert superpose("sample", "run/model", "--prompt", "def ", "--max-new-tokens", "5", cwd=files).stdout.startswith("def ")
