import os
import sysconfig
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and again when a kernel is defined

from superpose.data.prepare import prepare
from superpose.experiment.recipe import Recipe

torch.set_num_threads(1)  # tiny matrices, and results that do not depend on the machine's cores


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A prepared directory: the standard library's email and json packages as bytes (half a megabyte of real text)."""
    out = tmp_path_factory.mktemp("data") / "store"
    library = Path(sysconfig.get_paths()["stdlib"])
    prepare([str(library / "email" / "*.py"), str(library / "json" / "*.py")], out, use_bytes=True, validation=0.1)
    return out


@pytest.fixture(scope="session")
def recipe(store):
    """A run of seconds: 24 steps, the switch after 8."""
    return Recipe.from_dict(
        {
            "name": "tiny",
            "model": {
                "architecture": "llama",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            },
            "data": {"path": str(store), "evaluation_tokens": 2048},
            "superposition": {"bag_size": 4, "ratio": 1 / 3},
            "training": {
                "steps": 24,
                "positions": 32,
                "sequences_per_step": 4,
                "learning_rate": 3e-3,
                "eval_steps": 12,
                "save_steps": 4,
                "save_total_limit": 10,
                "logging_steps": 4,
                "bf16": False,
            },
            "sample": {"max_new_tokens": 8},
        }
    )
