"""The training command's engine against a bare PyTorch loop: same model, data, optimizer, schedule and clipping."""

import math
import tempfile
import time
from pathlib import Path

import torch
from corpus import quietly, write_corpus
from models import SMALL
from timing import Figures, Table, Target, progress, summary
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_wsd_schedule

from superpose import ScheduledTokens, TokenStore, attach
from superpose.data.prepare import prepare
from superpose.experiment.recipe import Recipe
from superpose.experiment.train import build_model, read_metrics, train

ENGINE, WALL, LOOP = "superpose train, its own seconds", "superpose train, wall clock", "bare loop"
LEARNING_RATE, WEIGHT_DECAY, WARM_UP, DECAY = 2e-3, 0.1, 0.05, 0.1
#: Steps between two losses shown.
SHOWN = 10
#: Least steps per second of the engine over those of the loop.
BOUND = 0.97


def run(*, quick: bool) -> Figures:
    steps, rounds = (10, 3) if quick else (100, 9)
    title = f"training {steps} steps, Llama of {SMALL.name}, {SMALL.sequences} × {SMALL.positions} positions, s = 4, r = 0.3"
    seconds: dict[str, list[float]] = {LOOP: [], ENGINE: [], WALL: []}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        write_corpus(work / "corpus.jsonl", int(4e6))
        with quietly():
            prepare([str(work / "corpus.jsonl")], work / "data", use_bytes=True)
        recipe = _recipe(work / "data", steps)
        for index in range(rounds + 1):
            progress(f"{title}, round {index}")
            bare, loss = _bare_loop(recipe)
            start = time.perf_counter()
            with quietly():
                result = train(recipe, work / f"run-{index}")
            wall = time.perf_counter() - start
            if index:  # the first round warms up
                for name, value in ((LOOP, bare), (ENGINE, result["seconds"]), (WALL, wall)):
                    seconds[name].append(value / steps)
        logged = [row["loss"] for row in read_metrics(work / f"run-{rounds}" / "metrics.jsonl") if "loss" in row][-1]
    table = Table(title)
    for name, values in seconds.items():
        row = summary(values, seconds[LOOP])
        table.rows.append({"way": name, **row, "steps/s": 1 / row["median s"]})
    target = Target("steps per second of the engine over the bare loop's", 1 / table.rows[1]["× first"], BOUND, at_least=True)
    notes = ["the wall clock holds building the model, the checksums of the data, one evaluation and saving"]
    if not quick:  # so short a run is still logged step by step after its switch
        notes.append(f"mean training loss of the last {SHOWN} steps: engine {logged:.4f}, loop {loss:.4f}")
    return Figures([table], [target], notes)


def _recipe(data: Path, steps: int) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "benchmark",
            "model": {
                "architecture": "llama",
                "hidden_size": SMALL.width,
                "intermediate_size": 8 * SMALL.width // 3,
                "num_hidden_layers": SMALL.layers,
                "num_attention_heads": SMALL.heads,
                "num_key_value_heads": SMALL.heads,
                "max_position_embeddings": SMALL.positions,
            },
            "data": {"path": str(data), "evaluation_tokens": 2048},
            "superposition": {"bag_size": 4, "ratio": 0.3},
            "training": {
                "steps": steps,
                "positions": SMALL.positions,
                "sequences_per_step": SMALL.sequences,
                "decay_ratio": DECAY,
                "learning_rate": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "warmup_steps": WARM_UP,
                "bf16": False,
                "use_cpu": True,
                "logging_steps": SHOWN,
                "eval_on_start": False,
                "eval_steps": steps,
                "save_strategy": "no",
            },
            "sample": {"prompts": []},
        }
    )


def _bare_loop(recipe: Recipe) -> tuple[float, float]:
    """Train as the recipe says; returns the seconds and the last training loss shown, the mean of `SHOWN` steps."""
    torch.manual_seed(recipe.seed)
    training, store = recipe.training, TokenStore(recipe.data.path)
    model = attach(build_model(recipe.model, store.vocab_size)).train()
    data = ScheduledTokens(
        store, recipe.schedule(), positions=training.positions, sequences_per_step=training.sequences_per_step
    )
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    decay = round(DECAY * training.steps)
    rate = get_wsd_schedule(optimizer, math.ceil(WARM_UP * training.steps), decay, num_training_steps=training.steps)
    start, total, shown = time.perf_counter(), torch.zeros(()), 0.0
    for step, batch in enumerate(DataLoader(data, batch_size=training.sequences_per_step), 1):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        total += loss.detach()
        if step % SHOWN == 0:
            shown = total.item() / SHOWN
            total.zero_()
    return time.perf_counter() - start, shown
