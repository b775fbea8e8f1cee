"""What the design promises of the package as a whole."""

import ast
import subprocess
import sys
from pathlib import Path

import superpose

ROOT = Path(superpose.__file__).parent
#: From the bottom up: each module may import only what stands before it, or beside it in its own folder.
LAYERS = [
    "errors",
    "bags",
    "embedding",
    "reference",
    "kernels",
    "sharded",
    "loss",
    "schedule",
    "data",
    "models",
    "accounting",
    "engines",
    "experiment",
    "cli",
]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("superpose."):
            yield node.module.split(".")[1]


def test_lower_layers_never_import_upper_ones():
    for path in ROOT.rglob("*.py"):
        layer = path.relative_to(ROOT).with_suffix("").parts[0]
        if layer != "__init__":
            late = [name for name in imported(path) if LAYERS.index(name) > LAYERS.index(layer)]
            assert not late, f"{path.name} imports {late}"


def test_the_library_needs_torch_and_numpy_alone():
    blocked = ["transformers", "accelerate", "datasets", "tokenizers", "tyro", "rich", "matplotlib", "tomli_w", "pyarrow"]
    script = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\nimport superpose; print(len(superpose.__all__))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(superpose.__all__)
