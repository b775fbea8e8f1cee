"""What may be reset at a switch. TST resets nothing; these are the paper's ablations, and patch-level training's convention.

reset-optimizer: the moments of every parameter start anew.
restart-schedule: the learning rate warms up and decays within each stage.
reinitialise: the embedding and the head get new random weights, with new moments.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler

from superpose.errors import InputError

RESETS = ("reset-optimizer", "restart-schedule", "reinitialise")


class AtSwitch(TrainerCallback):
    """Resets the optimizer or the embeddings after the last step of a stage, before that step's checkpoint is saved.

    A resumed run therefore finds it done. ``seed`` is that of the new weights.
    """

    def __init__(self, switches: Collection[int], resets: Collection[str], seed: int) -> None:
        self.switches, self.resets, self.seed = switches, resets, seed

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        if state.global_step not in self.switches:
            return
        model, moments = parts["model"], parts["optimizer"].state
        if "reset-optimizer" in self.resets:
            _zero(moments.values())
        if "reinitialise" in self.resets:
            weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(self.seed + state.global_step)
                for weight in weights:
                    weight.normal_(std=model.config.get_text_config().initializer_range)
            _zero(moments[weight] for weight in weights)


def _zero(states: Any) -> None:
    for state in states:
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def restarted(arguments: TrainingArguments, stages: Sequence[int]) -> Callable[[int], float]:
    """Factor of the learning rate at a step, where the schedule of ``arguments`` starts anew in each of ``stages`` (steps).

    A warm-up given as a share is one of each stage's steps, and so is the decay of WSD. Raises InputError for a schedule
    that is not a function of the step.
    """
    factors: list[Callable[[int], float]] = []
    for steps in stages:
        kwargs: Any = {**(arguments.lr_scheduler_kwargs or {})}  # type: ignore[dict-item]
        if "num_decay_steps" in kwargs:
            kwargs["num_decay_steps"] = round(kwargs["num_decay_steps"] * steps / sum(stages))
        nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        alone = get_scheduler(arguments.lr_scheduler_type, nothing, arguments.get_warmup_steps(steps), steps, kwargs)
        if not hasattr(alone, "lr_lambdas"):
            raise InputError(
                f"training.lr_scheduler_type {arguments.lr_scheduler_type} cannot start anew at a switch: take another"
            )
        factors.append(alone.lr_lambdas[0])

    def factor(step: int) -> float:
        stage = 0
        while stage < len(stages) - 1 and step >= stages[stage]:
            step -= stages[stage]
            stage += 1
        return factors[stage](step)

    return factor
