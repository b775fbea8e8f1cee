"""The transformers Trainer (with Accelerate: one process up to multi-node FSDP2) under a schedule.

A stock ``Trainer`` trains an attached model on `ScheduledTokens` as it is. This one adds what an experiment needs around it: it
refuses a batch that does not make up the schedule's step, keeps the accounts (positions, data tokens, FLOPs and seconds
apart), reports evaluation in bits per byte, and logs every step just after a switch.
"""

import json
import math
import time
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from superpose.accounting import flops_per_position
from superpose.data.batches import ScheduledTokens
from superpose.engines.switch import AtSwitch, restarted
from superpose.errors import InputError

#: Steps after a switch whose loss is logged one by one.
CLOSE_STEPS = 20

#: What the Trainer logs and metrics.jsonl leaves out.
NOT_LOGGED = ("epoch", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")

#: Dense bfloat16 peak of a device in FLOP/s, from the vendors' data sheets; the first name found in the device's name counts.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class ScheduledTrainer(Trainer):
    """A Trainer that keeps the accounts of a schedule in ``metrics`` (a JSON-lines file), and in every logger of report_to.

    train_dataset: the `ScheduledTokens` of the run. eval_dataset: plain windows.
    bytes_per_token: of the evaluated text, for bits per byte.
    resets: what starts anew at a switch, of `superpose.engines.switch.RESETS`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: ScheduledTokens,
        eval_dataset: Dataset[dict[str, Tensor]],
        bytes_per_token: float,
        metrics: Path,
        resets: Collection[str] = (),
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.clock = _Clock()
        self.resets, changes = resets, train_dataset.schedule.changes
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[
                _ScheduleCallback(train_dataset, self.clock),
                AtSwitch(changes, resets, args.seed),
                *(callbacks or []),
            ],
        )
        for stock in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        self.data, self.bytes_per_token, self.metrics = train_dataset, bytes_per_token, metrics
        self.diverged = False
        lengths = {stage.positions(train_dataset.positions) for stage in train_dataset.schedule.stages}
        self._flops = {length: flops_per_position(model, length) for length in lengths}
        self._last = (0, 0, 0.0, 0.0)
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if step != train_dataset.sequences_per_step:
            raise InputError(
                f"training.sequences_per_step is {train_dataset.sequences_per_step}, but per_device_train_batch_size × "
                f"gradient_accumulation_steps × processes = {args.train_batch_size} × {args.gradient_accumulation_steps} × "
                f"{args.world_size} = {step}"
            )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.start()
        return super().get_batch_samples(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None and "restart-schedule" in self.resets:
            stages = [end - start for start, end in pairwise([0, *self.data.schedule.changes, num_training_steps])]
            scheduled: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(scheduled, restarted(self.args, stages))
        return super().create_scheduler(num_training_steps, optimizer)

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        batch, length = inputs["input_ids"].shape[:2]
        return int(batch * length * self._flops.get(length, 0))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        step = self.state.global_step
        if "loss" in logs:
            logs |= self._accounts(step) | self._rates(step)
            if not math.isfinite(logs["loss"]):
                self.diverged = self.control.should_training_stop = True
        elif "eval_loss" in logs:
            logs |= self._accounts(step)
            logs["eval_bits_per_byte"] = logs["eval_loss"] / math.log(2) / self.bytes_per_token
        super().log(logs, start_time)
        if self.is_world_process_zero() and ("loss" in logs or "eval_loss" in logs):
            row = {"step": step, **{name: value for name, value in logs.items() if name not in NOT_LOGGED}}
            with self.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _accounts(self, step: int) -> dict[str, float]:
        """Where the run stands after ``step`` optimizer steps; stage and bag size are those of the last one."""
        schedule, size = self.data.schedule, (self.data.positions, self.data.sequences_per_step)
        index = schedule.stage_index(max(0, step - 1))
        return {
            "stage": index,
            "bag_size": schedule.stages[index].bag_size,
            "positions": schedule.position_offset(step, *size),
            "data_tokens": schedule.token_offset(step, *size),
            "flops": schedule.flops_before(step, *size, self._flops.__getitem__),
            "seconds": self.clock.seconds,
        }

    def _rates(self, step: int) -> dict[str, float]:
        """Throughput since the last log."""
        accounts = self._accounts(step)
        now = (accounts["positions"], accounts["data_tokens"], accounts["flops"], accounts["seconds"])
        positions, tokens, flops, seconds = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now  # type: ignore[assignment]
        if seconds <= 0:
            return {}
        rates = {"positions_per_second": positions / seconds, "data_tokens_per_second": tokens / seconds}
        peak = peak_flops()
        if peak:
            rates["mfu"] = flops / seconds / (peak * self.args.world_size)
        return rates

    def restore_accounts(self, step: int, seconds: float) -> None:
        """Continue the accounts of a run resumed at ``step``."""
        self.clock.seconds = seconds
        accounts = self._accounts(step)
        self._last = (accounts["positions"], accounts["data_tokens"], accounts["flops"], seconds)  # type: ignore[assignment]


def peak_flops() -> float | None:
    """bfloat16 peak of the accelerator in FLOP/s, None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def bfloat16_pays() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones; a CPU without the instructions is slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class _Clock:
    """Seconds spent training: from drawing a step's batches to the end of the step, without evaluation and saving."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None


class _ScheduleCallback(TrainerCallback):
    """Asks for logs around a switch, and stops the clock when the Trainer leaves the training loop's own work."""

    def __init__(self, data: ScheduledTokens, clock: _Clock) -> None:
        self.clock = clock
        self.close = {step for switch in data.schedule.changes for step in range(switch, switch + CLOSE_STEPS + 1)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self.close:
            control.should_log = True
        if control.should_log or control.should_evaluate or control.should_save:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            self.clock.stop()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.clock.stop()
