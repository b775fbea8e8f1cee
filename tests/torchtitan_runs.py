"""Runs of TorchTitan for tests/test_torchtitan.py: several configurations in one process group on a CPU.

    torchrun --nproc_per_node 2 tests/torchtitan_runs.py runs.json

``runs.json``: a list of ``{"config": function below, "out": folder, "options": [command-line options]}``. Each rank writes what
it logged to ``out/log-<rank>.json``.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torchtitan_on_cpu  # noqa: F401  first: it stands in for what TorchTitan takes at its import
from torch.distributed import destroy_process_group, is_initialized
from torchtitan import trainer as titan
from torchtitan.components.metrics import BaseLogger
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.validate import Validator
from torchtitan.config import ConfigManager, TrainingConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models import llama3, qwen3
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.models.qwen3.config_registry import qwen3_debugmodel
from torchtitan.tools.logging import init_logger

from superpose import Schedule
from superpose.engines.torchtitan import TokenStoreLoader, Trainer, with_superposition
from superpose.engines.torchtitan.models import llama, qwen_moe

POSITIONS = 64
VOCABULARY = 257  # bytes and the end of a document


def _small(config: titan.Trainer.Config) -> titan.Trainer.Config:
    """In float32, four sequences of 64 positions a step, from the token store at $STORE."""
    store = os.environ["STORE"]
    config.hf_assets_path = store
    config.dataloader = TokenStoreLoader.Config(dataset_path=store)
    config.validator = Validator.Config(
        freq=2, steps=4, dataloader=TokenStoreLoader.Config(dataset_path=store, split="validation")
    )
    config.training = TrainingConfig(
        local_batch_size=4,
        global_batch_size=4,
        seq_len=POSITIONS,
        mixed_precision_param="float32",
        disable_cuda_graphs=True,
    )
    config.parallelism.pipeline_parallel_schedule = "1F1B"
    config.metrics.log_freq = 1
    config.debug.seed = 1
    config.debug.enable_structured_logging = False
    return config


def _tiny(model: Any, family: Any = llama3) -> titan.Trainer.Config:
    config = _small(llama3_debugmodel())
    config.model_spec = dataclasses.replace(family.model_registry("debugmodel"), model=model)
    config.loss.loss_fn.global_vocab_size = model.vocab_size
    return config


def _tiny_llama(**shape: Any) -> Any:
    return llama(
        **{
            "dim": 32,
            "layers": 2,
            "heads": 2,
            "kv_heads": 2,
            "hidden": 48,
            "theta": 10_000.0,
            "vocabulary": VOCABULARY,
            **shape,
        }
    )


def debug_llama() -> Trainer.Config:
    """TorchTitan's own debugging model: bags of four for three steps, then three plain ones."""
    return with_superposition(_small(llama3_debugmodel()), Schedule.tst(6, 4, 0.5))


def tiny_llama() -> Trainer.Config:
    return with_superposition(_tiny(_tiny_llama()), Schedule.tst(4, 4, 0.5))


def sum_to_one() -> Trainer.Config:
    schedule = Schedule.tst(4, 4, 0.5, weighting="power-law")
    return with_superposition(_tiny(_tiny_llama()), schedule, sum_to_one=True)


def output_only() -> Trainer.Config:
    return with_superposition(_tiny(_tiny_llama()), Schedule.tst(4, 4, 0.5, mode="output-only", weighting="power-law"))


def qwen() -> Trainer.Config:
    config = _small(qwen3_debugmodel())
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    return with_superposition(config, Schedule.tst(4, 4, 0.5))


def tiny_moe() -> Trainer.Config:
    model = qwen_moe(dim=32, layers=2, heads=2, kv_heads=2, head_dim=16, hidden=16, experts=8, top_k=2, vocabulary=VOCABULARY)
    return with_superposition(_tiny(model, qwen3), Schedule.tst(4, 4, 0.5))


def unbiased_moe() -> Trainer.Config:
    """Without the bias on the router, which the Hugging Face model lacks."""
    config = tiny_moe()
    for layer in config.model_spec.model.layers:
        layer.moe.load_balance_coeff = None
    return config


def no_rope() -> Trainer.Config:
    return with_superposition(_tiny(_tiny_llama(layers=4, no_rope_every=4)), Schedule.tst(4, 4, 0.5))


def deepseek() -> Trainer.Config:
    config = _small(deepseek_v3_debugmodel())
    model = config.model_spec.model
    model.layers = model.layers[:2]
    for layer in model.layers:
        if layer.moe is not None:
            layer.moe.router.score_func = "sigmoid"
    return with_superposition(config, Schedule.tst(4, 4, 0.5))


def from_text() -> Trainer.Config:
    """TorchTitan's own text loader, on the text at $TEXT."""
    config = tiny_llama()
    config.dataloader = HuggingFaceTextDataLoader.Config(dataset="c4_test", dataset_path=os.environ["TEXT"])
    return config


def parity() -> Trainer.Config:
    """The run of the `recipe` in conftest.py, at a constant learning rate and without weight decay."""
    config = _tiny(_tiny_llama(positions=32))
    config.training.seq_len = 32
    config.optimizer = default_adamw(lr=3e-3, weight_decay=0.0)
    config.lr_scheduler = LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0)
    return with_superposition(config, Schedule.tst(24, 4, 1 / 3))


class _Log(BaseLogger):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.rows.append({"step": step, **metrics})


def run(config: str, out: str, options: list[str]) -> None:
    parsed: Any = ConfigManager().parse_args(
        ["--module", "torchtitan_runs", "--config", config, "--dump_folder", out, *options]
    )
    trainer = parsed.build()
    log = trainer.metrics_processor.logger = _Log()
    if parsed.checkpoint.create_seed_checkpoint:
        trainer.checkpointer.save(curr_step=0, last_step=True)
    else:
        trainer.train()
    trainer.close()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"log-{os.environ['RANK']}.json").write_text(json.dumps(log.rows))


if __name__ == "__main__":
    init_logger()
    titan.time.sleep = lambda seconds: None  # the trainer waits two seconds at its end
    for item in json.loads(Path(sys.argv[1]).read_text()):
        start = time.perf_counter()
        run(**item)
        print(f"{item['config']} {' '.join(item['options'])}: {time.perf_counter() - start:.1f} s", flush=True)
    if is_initialized():
        destroy_process_group()
