"""TorchTitan's metrics with the schedule's accounts: positions and data tokens apart, the stage, its bag size, the switch.

``throughput(tps)`` and ``mfu(%)`` count positions, which is what is computed: a superposed step is not s times as fast.
"""

import time
from dataclasses import dataclass
from typing import Any

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools.logging import logger

from superpose.schedule import Schedule, Stage


class ScheduleMetrics(MetricsProcessor):
    """Logs as often as ``log_freq`` says, and the last step of a stage and the first of the next: the height of the switch."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def follow(self, schedule: Schedule, positions: int, sequences_per_step: int) -> None:
        """Keep the accounts of ``schedule`` for sequences of ``positions``; before the first step."""
        self.schedule, self.size = schedule, (positions, sequences_per_step)
        self.last_logged: int | None = None

    def should_log(self, step: int) -> bool:
        return super().should_log(step) or bool({step, step - 1} & {*self.schedule.switches})

    def say_stage(self, step: int, resumed: bool) -> None:
        """A line where a stage begins; ``step`` counts from 1 as TorchTitan's."""
        if resumed or step == 1 or step - 1 in self.schedule.switches:
            stage = self.schedule.stage_at(step - 1)
            word = "switch to" if step - 1 in self.schedule.switches else "starts with"
            logger.info(f"Step {step} {word} {_describe(stage)}")

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        index = self.schedule.stage_index(step - 1)
        stage = self.schedule.stages[index]
        now = (self.schedule.position_offset(step, *self.size), self.schedule.token_offset(step, *self.size))
        accounts: dict[str, Any] = {
            "tst/stage": index,
            "tst/bag_size": stage.bag_size,
            "tst/switch": int(step - 1 in self.schedule.switches),
            "tst/positions": now[0],
            "tst/data_tokens": now[1],
        }
        if self.last_logged is not None:
            seconds = time.perf_counter() - self.time_last_log
            before = self.schedule.token_offset(self.last_logged, *self.size)
            accounts["tst/data_tokens_per_second"] = (now[1] - before) / seconds
            accounts["time_metrics/end_to_end(s)"] = seconds / (step - self.last_logged)
        self.last_logged = step
        super().log(step, global_avg_loss, global_max_loss, grad_norm, {**(extra_metrics or {}), **accounts})


def _describe(stage: Stage) -> str:
    if not stage.superposed:
        return "plain tokens"
    mode = "" if stage.mode == "full" else f", {stage.mode}"
    return f"superposition, bag size {stage.bag_size}{mode}, {stage.steps} steps"
