"""Configurations for ``--module superpose.engines.torchtitan --config …``: the paper's four models, and small ones to try.

Each model has its baseline under its plain name and TST under the name with ``_tst``. The paper's recipe (arXiv 2605.06546):
AdamW (0.9, 0.95), 2,000 warm-up steps, constant, decay over the last 10 %; Llama 3 tokenizer, untied. Shapes, and what the
paper does not publish (sequence length 2048, weight decay 0.1, clipping at 1, the shape of the mixture of experts), are those
of ``recipes/``. They read the store that `superpose prepare` made at ``data/dclm``. Batch per device and parallelism are yours
to set.
"""

import dataclasses
from types import ModuleType

from torchtitan import trainer as titan
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.validate import Validator
from torchtitan.config import TrainingConfig
from torchtitan.models import llama3, qwen3
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.models.qwen3.config_registry import qwen3_moe_debug

from superpose.engines.torchtitan.models import POSITIONS, llama, qwen_moe
from superpose.engines.torchtitan.store import TokenStoreLoader
from superpose.engines.torchtitan.trainer import Trainer, with_superposition
from superpose.schedule import Schedule

DATA = "data/dclm"
DEBUG_DATA = "data/code"


def llama3_270m() -> Trainer.Config:
    """The shape of SmolLM2-135M."""
    return _llama3_270m(Schedule.baseline(20_000))


def llama3_270m_tst() -> Trainer.Config:
    return _llama3_270m(Schedule.tst(20_000, 6, 0.3))


def llama3_600m() -> Trainer.Config:
    """The shape of SmolLM2-360M."""
    return _llama3_600m(Schedule.baseline(20_000))


def llama3_600m_tst() -> Trainer.Config:
    return _llama3_600m(Schedule.tst(20_000, 6, 0.3))


def llama3_3b() -> Trainer.Config:
    """The shape of SmolLM3-3B: every fourth layer goes without RoPE."""
    return _llama3_3b(Schedule.baseline(20_000))


def llama3_3b_tst() -> Trainer.Config:
    return _llama3_3b(Schedule.tst(20_000, 6, 0.3))


def qwen3_10b_a1b() -> Trainer.Config:
    """Qwen3-MoE of 10.4B parameters, 1.03B active; the paper's baseline took 125,000 steps."""
    return _qwen3_10b_a1b(Schedule.baseline(125_000))


def qwen3_10b_a1b_tst() -> Trainer.Config:
    return _qwen3_10b_a1b(Schedule.tst(50_000, 16, 0.25))


def llama3_debugmodel_tst() -> Trainer.Config:
    """TorchTitan's own debugging model: ten steps, the first half in bags of four."""
    return with_superposition(_debug(llama3_debugmodel()), Schedule.tst(10, 4, 0.5))


def qwen3_moe_debug_tst() -> Trainer.Config:
    return with_superposition(_debug(qwen3_moe_debug()), Schedule.tst(10, 4, 0.5))


def _debug(config: titan.Trainer.Config) -> titan.Trainer.Config:
    """On a small store, because TorchTitan's package does not bring its test data; short enough for a CPU."""
    store = TokenStoreLoader.Config(dataset_path=DEBUG_DATA)
    return dataclasses.replace(
        config,
        hf_assets_path=DEBUG_DATA,
        dataloader=store,
        validator=Validator.Config(freq=5, steps=2, dataloader=dataclasses.replace(store, split="validation")),
        training=dataclasses.replace(config.training, local_batch_size=4, seq_len=256),
        parallelism=dataclasses.replace(config.parallelism, pipeline_parallel_schedule="1F1B"),
    )


def _llama3_270m(schedule: Schedule) -> Trainer.Config:
    model = llama(dim=576, layers=30, heads=9, kv_heads=3, hidden=1536, theta=100_000.0)
    return with_superposition(_recipe(llama3, "270m", model, learning_rate=2e-3), schedule)


def _llama3_600m(schedule: Schedule) -> Trainer.Config:
    model = llama(dim=960, layers=32, heads=15, kv_heads=5, hidden=2560, theta=100_000.0)
    return with_superposition(_recipe(llama3, "600m", model, learning_rate=1e-3), schedule)


def _llama3_3b(schedule: Schedule) -> Trainer.Config:
    model = llama(dim=2048, layers=36, heads=16, kv_heads=4, hidden=11008, theta=2_000_000.0, no_rope_every=4)
    return with_superposition(_recipe(llama3, "3b", model, learning_rate=2e-4), schedule)


def _qwen3_10b_a1b(schedule: Schedule) -> Trainer.Config:
    model = qwen_moe(dim=2048, layers=16, heads=16, kv_heads=4, head_dim=128, hidden=768, experts=128, top_k=8)
    return with_superposition(_recipe(qwen3, "10b_a1b", model, learning_rate=3e-4, sequences=4096), schedule)


def _recipe(
    family: ModuleType, flavor: str, model: Decoder.Config, *, learning_rate: float, sequences: int = 1024
) -> titan.Trainer.Config:
    """The paper's recipe, with ``sequences`` of 2,048 positions a step: 2M, or 8M for the mixture of experts."""
    store = TokenStoreLoader.Config(dataset_path=DATA, num_workers=2)
    return titan.Trainer.Config(
        hf_assets_path=DATA,
        model_spec=dataclasses.replace(family.model_registry("debugmodel"), flavor=flavor, model=model),
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=model.vocab_size)),
        optimizer=default_adamw(lr=learning_rate),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2000, decay_ratio=0.1),
        training=TrainingConfig(local_batch_size=8, global_batch_size=sequences, seq_len=POSITIONS),
        dataloader=store,
        validator=Validator.Config(freq=500, steps=20, dataloader=dataclasses.replace(store, split="validation")),
        checkpoint=CheckpointManager.Config(interval=1000, last_save_model_only=False),
    )
