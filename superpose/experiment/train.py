"""Train a recipe: from the prepared store to a stock model on disk, with its metrics, and resumable at any step.

An output directory holds ``recipe.toml`` (resolved), ``environment.json``, ``metrics.jsonl``, ``checkpoint-*/``, and once the
run has finished ``model/`` (Hugging Face layout) and ``summary.json``.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from superpose.accounting import count_parameters
from superpose.data.batches import ScheduledTokens
from superpose.data.store import TokenStore
from superpose.engines.progress import ProgressBar
from superpose.engines.transformers import CLOSE_STEPS, ScheduledTrainer, bfloat16_pays
from superpose.errors import InputError
from superpose.experiment.recipe import ModelSection, Recipe, TrainingSection, load_recipe
from superpose.experiment.sample import generate, store_tokenizer
from superpose.models import attach
from superpose.schedule import Schedule

#: Fields that may differ between a run and its resumption: they do not touch the weights.
FREE = (
    "eval_",
    "logging_",
    "save_",
    "report_to",
    "run_name",
    "project",
    "disable_tqdm",
    "dataloader_",
    "per_device_",
    "log_",
    "bf16_full_eval",
)


def train(recipe: Recipe, out: str | Path, *, resume: bool = False, forks: Collection[int] = ()) -> dict[str, Any]:
    """Train ``recipe`` into the directory ``out`` and return its summary. Raises InputError for what the user can mend.

    Without ``resume`` the directory must be new or empty; with it, training continues from the last checkpoint that is whole
    (from the start where there is none), bit for bit as if it had not stopped. Runs on as many processes as torchrun or
    accelerate launch started. A checkpoint of each step of ``forks`` stays under ``out/forks``, for `branch`.
    """
    out = Path(out)
    main = is_main_process()
    store = TokenStore(recipe.data.path, verify=recipe.data.verify and main)
    validation = TokenStore(recipe.data.path, "validation", verify=recipe.data.verify and main)
    with _claimed(out, recipe, resume) if main else nullcontext():
        if main and resume:
            _check_data(out, store)
        return _train(recipe, out, store, validation, resume, forks)


def branch(trunk: Path, step: int, recipe: Recipe, out: Path, *, forks: Collection[int] = ()) -> dict[str, Any]:
    """Train ``recipe`` into ``out`` from where the run in ``trunk`` stood after ``step``, and return its summary.

    Both recipes must ask for the same steps until then; the result is that of `train` from the start, bit for bit on a CPU.
    ``step`` was one of the forks of the trunk; ``forks`` are those of the branch. A branch that was interrupted continues.
    """
    if is_main_process() and not (out / "recipe.toml").exists():
        making = out.with_name(out.name + ".part")
        shutil.rmtree(making, ignore_errors=True)
        shutil.copytree(fork_path(trunk, step), making / f"checkpoint-{step}")
        for name in ("metrics.jsonl", "environment.json"):
            shutil.copy(trunk / name, making / name)
        (making / "recipe.toml").write_text(recipe.to_toml())
        making.rename(out)
    while not (out / "recipe.toml").exists():  # the other processes, which may be here first
        time.sleep(0.1)
    return train(recipe, out, resume=True, forks=forks)


def fork_path(trunk: Path, step: int) -> Path:
    """Where `train` keeps the checkpoint of a step that branches start from."""
    return trunk / "forks" / f"checkpoint-{step}"


class _Forks(TrainerCallback):
    """Keeps the checkpoints of some steps, which would be removed after newer ones."""

    def __init__(self, out: Path, steps: Collection[int]) -> None:
        self.out, self.steps = out, steps

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_save(args, state, control)  # a run that was killed between saving and keeping resumes at that step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self.steps:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        fork = fork_path(self.out, state.global_step)
        if state.is_world_process_zero and state.global_step in self.steps and not fork.exists():
            part = fork.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(self.out / f"checkpoint-{state.global_step}", part)
            part.rename(fork)


def _train(
    recipe: Recipe, out: Path, store: TokenStore, validation: TokenStore, resume: bool, forks: Collection[int]
) -> dict[str, Any]:
    set_seed(recipe.seed)
    model = build_model(recipe.model, store.vocab_size)
    attach(model, sum_to_one=recipe.superposition.loss == "sum-to-one")
    training = recipe.training
    data = ScheduledTokens(
        store, recipe.schedule(), positions=training.positions, sequences_per_step=training.sequences_per_step, seed=recipe.seed
    )
    trainer = ScheduledTrainer(
        model,
        training_arguments(recipe, out),
        train_dataset=data,
        eval_dataset=validation_windows(validation, training.positions, recipe.data.evaluation_tokens),
        bytes_per_token=validation.bytes_per_token,
        metrics=out / "metrics.jsonl",
        resets=recipe.superposition.at_switch,
        callbacks=[ProgressBar(data.schedule), _Forks(out, forks)],
    )
    main = trainer.is_world_process_zero()
    if main:
        (out / "recipe.toml").write_text(recipe.to_toml())
        (out / "environment.json").write_text(json.dumps(environment() | {"data": _checksum(store)}, indent=1) + "\n")
    checkpoint = _last_checkpoint(out) if resume else None
    seconds = _rewind(out / "metrics.jsonl", checkpoint, main)
    trainer.restore_accounts(_step_of(checkpoint), seconds)
    trainer.args.eval_on_start = trainer.args.eval_on_start and checkpoint is None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not any("eval_loss" in row and row["step"] == trainer.state.global_step for row in trainer.state.log_history):
        trainer.evaluate()
    trainer.save_model(str(out / "model"))
    summary: dict[str, Any] = {}
    if main:
        tokenizer = store_tokenizer(store)
        tokenizer.save_pretrained(out / "model")
        summary = {"name": recipe.name, "seed": recipe.seed, "diverged": trainer.diverged} | _summarise(out, data)
        if torch.cuda.is_available():
            summary["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        summary["parameters"] = count_parameters(model)["total"]
        if not trainer.diverged:
            length, temperature = recipe.sample.max_new_tokens, recipe.sample.temperature
            summary["samples"] = [
                generate(out / "model", prompt, max_new_tokens=length, temperature=temperature, seed=recipe.seed)
                for prompt in recipe.sample.prompts
            ]
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()
    return summary


def is_main_process() -> bool:
    """Whether this is the process that writes, known before the Trainer has set up the others."""
    return os.environ.get("RANK", "0") == "0"


def build_model(section: ModelSection, vocab_size: int) -> Any:
    """The recipe's model in float32: random weights of its architecture, or those at its path; at least ``vocab_size`` rows."""
    model: Any
    try:
        if section.path:
            model = AutoModelForCausalLM.from_pretrained(section.path, dtype=torch.float32)
        else:
            config = AutoConfig.for_model(str(section.architecture), **{"vocab_size": vocab_size, **section.shape})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"model: {_first_line(error)}") from None
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise InputError(
            f"model.vocab_size is {rows}, but the data's tokenizer has {vocab_size} tokens: leave it out or raise it"
        )
    return model


def decay_steps(training: TrainingSection) -> int:
    """Steps at the end of a run over which the learning rate of the WSD schedule decays."""
    return round(training.decay_ratio * training.steps)


def training_arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    """The recipe's `[training]` over our defaults: AdamW β (0.9, 0.95), WSD, clipping at 1, bf16 where it is faster."""
    training = recipe.training
    world = int(os.environ.get("WORLD_SIZE", "1"))
    given = training.arguments
    per_device = given.get("per_device_train_batch_size", max(1, training.sequences_per_step // world))
    accumulation, rest = divmod(training.sequences_per_step, per_device * world)
    if rest or not accumulation:
        raise InputError(
            f"training.sequences_per_step = {training.sequences_per_step} must be a multiple of "
            f"per_device_train_batch_size × processes = {per_device} × {world}"
        )
    wsd = given.get("lr_scheduler_type", "warmup_stable_decay") == "warmup_stable_decay"
    defaults: dict[str, Any] = {
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": decay_steps(training)} if wsd else None,
        "warmup_steps": 0.05,
        "bf16": bfloat16_pays(),
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": max(1, training.steps // 20),
        "eval_on_start": True,
        "per_device_eval_batch_size": per_device,
        "save_steps": max(1, training.steps // 5),
        "save_total_limit": 2,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    derived = {
        "output_dir": str(out),
        "max_steps": training.steps,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": per_device,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "seed": recipe.seed,
    }
    try:
        return TrainingArguments(**{**defaults, **given, **derived})
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training: {_first_line(error)}") from None


def validation_windows(validation: TokenStore, positions: int, limit: int) -> Subset[dict[str, Tensor]]:
    """Plain windows with at most ``limit`` tokens in all, a sample of the whole validation split, the same in every run."""
    windows = max(1, (validation.tokens - 1) // positions)
    split = ScheduledTokens(validation, Schedule.baseline(1), positions=positions, sequences_per_step=windows)
    return Subset(split, range(max(1, min(windows, limit // positions))))


def environment() -> dict[str, Any]:
    """What the run ran on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "superpose": version("superpose"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "accelerate": version("accelerate"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


@contextmanager
def _claimed(out: Path, recipe: Recipe, resume: bool) -> Iterator[None]:
    """Hold the output directory for this run: nobody else writes there, and nothing that lies there is overwritten."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a directory as --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out} is in use by a running training: give another --out") from None
        saved = out / "recipe.toml"
        try:
            _check_claim(out, saved, recipe, resume)
            yield
        finally:
            if not saved.exists():  # refused before it began: leave nothing behind
                (out / ".lock").unlink()
                if not any(out.iterdir()):
                    out.rmdir()


def _check_claim(out: Path, saved: Path, recipe: Recipe, resume: bool) -> None:
    if resume and not saved.exists():
        raise InputError(f"{out} holds no run to resume: start it without --resume")
    if resume and (out / "summary.json").exists():
        raise InputError(f"{out} holds a finished run: there is nothing to resume")
    if resume:
        check_same(load_recipe(saved), recipe, saved)
    elif saved.exists():
        raise InputError(f"{out} holds a run already: continue it with --resume, or give another --out")
    elif any(path.name != ".lock" for path in out.iterdir()):
        raise InputError(f"{out} is not empty and holds no run: give another --out")


def check_same(old: Recipe, new: Recipe, path: Path) -> None:
    """Raise InputError, naming the field, unless both recipes train the same weights; ``path`` is where the old one lies."""
    before, now = _flat(old.as_dict()), _flat(new.as_dict())
    for name in sorted(before.keys() | now.keys()):
        free = name.startswith(("sample.", "data.", "name")) or name.removeprefix("training.").startswith(FREE)
        if before.get(name) != now.get(name) and not free:
            raise InputError(
                f"{name} is {now.get(name)!r} and was {before.get(name)!r} in {path}: a run is resumed with its own recipe; "
                "give another --out for a new one"
            )


def _check_data(out: Path, store: TokenStore) -> None:
    try:
        trained_on = json.loads((out / "environment.json").read_text())["data"]
    except (OSError, ValueError, KeyError):
        return  # killed before it was written, and so before the first step
    if trained_on != _checksum(store):
        raise InputError(
            f"data.path: {store.path} holds other tokens than those {out} was trained on: resume with the same store"
        )


def _checksum(store: TokenStore) -> str:
    return hashlib.sha256(json.dumps(store.manifest["splits"], sort_keys=True).encode()).hexdigest()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the Trainer writes its state last."""
    whole = [path for path in out.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _rewind(metrics: Path, checkpoint: Path | None, main: bool) -> float:
    """Drop what was logged after the checkpoint; return the seconds trained until it."""
    rows = [row for row in read_metrics(metrics) if checkpoint and row["step"] <= _step_of(checkpoint)]
    if main:
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return max((row["seconds"] for row in rows), default=0.0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _summarise(out: Path, data: ScheduledTokens) -> dict[str, Any]:
    rows = read_metrics(out / "metrics.jsonl")
    final = [row for row in rows if "eval_loss" in row][-1]
    return {
        "final_loss": final["eval_loss"],
        "perplexity": math.exp(min(final["eval_loss"], 700)),
        "bits_per_byte": final["eval_bits_per_byte"],
        **{name: final[name] for name in ("step", "positions", "data_tokens", "flops", "seconds")},
        "epochs": data.epochs,
        "switches": [_switch(step, data.schedule, rows) for step in data.schedule.changes],
    }


def _switch(step: int, schedule: Schedule, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A switch: the training loss before it and its highest value just after, and how long until it is as low as before."""
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    before = losses.get(step)
    after = [losses[s] for s in range(step + 1, step + CLOSE_STEPS + 1) if s in losses]
    recovered = next((s for s in sorted(losses) if s > step and before is not None and losses[s] <= before), None)
    index = schedule.stage_index(step)
    return {
        "step": step,
        "from_bag_size": schedule.stages[index - 1].bag_size,
        "to_bag_size": schedule.stages[index].bag_size,
        "loss_before": before,
        "loss_after": max(after, default=None),
        "height": max(after) - before if after and before is not None else None,
        "steps_to_recover": recovered - step if recovered is not None else None,
    }


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
