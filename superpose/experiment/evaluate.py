"""The plain next-token loss of a saved model on a store's validation split."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from superpose.data.store import TokenStore
from superpose.errors import InputError
from superpose.experiment.sample import load
from superpose.experiment.train import bfloat16_pays, validation_windows


@dataclass(frozen=True)
class Evaluation:
    """``loss`` in nats per token, over ``tokens`` tokens of plain windows of ``positions``."""

    loss: float
    perplexity: float
    bits_per_byte: float
    positions: int
    tokens: int


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    positions: int | None = None,
    tokens: int = 2**24,
    batch_size: int = 8,
    split: str = "validation",
) -> Evaluation:
    """Evaluate the saved model at ``model`` (directory or hub id) on the store at ``data``, with plain transformers.

    ``positions`` defaults to the model's longest sequence, at most 2048. In bfloat16 where that is faster. Raises InputError
    for a model that cannot be loaded, or one whose vocabulary is smaller than the store's.
    """
    store = TokenStore(data, split)
    network = load(AutoModelForCausalLM, model)
    rows = network.get_input_embeddings().weight.shape[0]
    if rows < store.vocab_size:
        raise InputError(f"{model} has a vocabulary of {rows}, but the tokens of {data} go up to {store.vocab_size}")
    positions = positions or min(2048, getattr(network.config, "max_position_embeddings", 2048))
    windows = validation_windows(store, positions, tokens)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            dataloader_pin_memory=torch.cuda.is_available(),
            per_device_eval_batch_size=batch_size,
            report_to="none",
            bf16_full_eval=False,
            bf16=bfloat16_pays(),
            use_cpu=not torch.accelerator.is_available(),
        )
        loss = Trainer(network, arguments, eval_dataset=windows).evaluate()["eval_loss"]
    nats = min(loss, 700.0)
    return Evaluation(loss, math.exp(nats), loss / math.log(2) / store.bytes_per_token, positions, len(windows) * positions)
