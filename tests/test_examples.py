import re
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments):
    result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_plain_loop_learns_in_both_phases(store):
    output = run(EXAMPLES / "plain_loop.py", store, "--steps", "100", "--ratio", "0.4")
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", output)]
    assert [line.split(": ")[1].split(" ")[0] for line in output.splitlines()] == ["bag", "bag", "loss", "loss", "loss"]
    assert losses[1] < losses[0] < 5.55
    assert losses[-1] < 3.0  # bytes at their own frequencies alone: 3.3


def test_transformers_trainer_saves_a_stock_model(store, tmp_path):
    output = run(EXAMPLES / "transformers_trainer.py", store, "--steps", "40", "--out", tmp_path / "model")
    losses = [float(loss) for loss in re.findall(r"'loss': '?(\d\.\d+)", output)]
    assert losses[-1] < losses[0] < 5.55
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "model")).__name__ == "LlamaForCausalLM"
