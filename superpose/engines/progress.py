"""Progress of a training run: a bar in a terminal, a line at each evaluation elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from superpose.schedule import Schedule


class ProgressBar(TrainerCallback):
    """Shows step, stage, training loss and validation loss, and says when a stage begins."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("training", total=schedule.steps)
        self.loss = self.validation = float("nan")

    def _stage(self, step: int) -> str:
        stage = self.schedule.stage_at(min(step, self.schedule.steps - 1))
        return f"superposed, bag size {stage.bag_size}" if stage.superposed else "plain"

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step
        description = f"{self._stage(step)} · loss {self.loss:.3f} · validation {self.validation:.3f}"
        self.progress.update(self.task, completed=step, description=description)
        if state.is_world_process_zero and step in self.schedule.changes:
            self._say(f"step {step}: switch to {self._stage(step)}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        self.loss = logs.get("loss", self.loss)
        if "eval_loss" not in logs:
            return
        self.validation = logs["eval_loss"]
        if state.is_world_process_zero:
            self._say(
                f"step {state.global_step:>6} of {self.schedule.steps} · {logs['data_tokens'] / 1e6:.2f}M data tokens · "
                f"validation {self.validation:.4f} nats, {logs['eval_bits_per_byte']:.4f} bits per byte"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.stop()
