"""TorchTitan's trainer under a schedule, and the function that puts a schedule on one of its configurations.

What differs from the trainer it inherits from: batches are folded into bags as the step's stage says (``seq_len`` stays the
number of positions), embedding and loss are overridden by TorchTitan's own mechanism, and the metrics know the schedule.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan import trainer as titan
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config.override import derive
from torchtitan.models.common.embedding import Embedding
from torchtitan.tools.logging import logger

from superpose.engines.torchtitan.batch import Inputs, join, superpose
from superpose.engines.torchtitan.export import write_hf_config
from superpose.engines.torchtitan.loss import MultiHotLoss
from superpose.engines.torchtitan.metrics import ScheduleMetrics
from superpose.engines.torchtitan.section import Documents, Superposition
from superpose.engines.torchtitan.store import TokenStoreLoader
from superpose.errors import InputError
from superpose.schedule import Schedule

EMBEDDING = "superpose.engines.torchtitan.embedding.bag_embedding"
LOSS = "superpose.engines.torchtitan.loss.multi_hot"


class Trainer(titan.Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(titan.Trainer.Config):
        tst: Superposition = field(default_factory=Superposition)
        """Token-superposition training."""

        def __post_init__(self) -> None:
            bags = any(stage.superposed for stage in self.tst.schedule(self.training.steps).stages)
            if bags and not self.training.disable_cuda_graphs:
                logger.warning("CUDA graphs are disabled: they fix the shape of the input, which changes at the switch")
                self.training.disable_cuda_graphs = True
            titan.Trainer.Config.__post_init__(self)

    config: Config
    ntokens_seen: int

    def __init__(self, config: Config) -> None:
        self.schedule = config.tst.schedule(config.training.steps)
        self.separate_documents = config.tst.documents == "separate"
        _check(config, self.schedule)
        overrides = [EMBEDDING, (LOSS, {"sum_to_one": config.tst.loss == "sum-to-one"})]
        config.override = dataclasses.replace(config.override, imports=[*config.override.imports, *overrides])
        config.metrics = derive(config.metrics, ScheduleMetrics.Config)
        config.dataloader = self._informed(config.dataloader, config)
        config.validator = dataclasses.replace(config.validator, dataloader=self._informed(config.validator.dataloader, config))
        super().__init__(config)
        loss = getattr(self.loss_fn, "loss_fn", self.loss_fn)
        assert isinstance(loss, MultiHotLoss)
        self.multi_hot_loss = loss
        assert isinstance(self.metrics_processor, ScheduleMetrics)
        self.metrics_processor.follow(self.schedule, config.training.seq_len, self._sequences_per_step())
        self.resumed = False

    def _informed(self, loader: Any, config: Config) -> Any:
        if not isinstance(loader, TokenStoreLoader.Config):
            return loader
        return dataclasses.replace(loader, schedule=self.schedule, training=config.training, documents=config.tst.documents)

    def _sequences_per_step(self) -> int:
        ranks = self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard
        return self.config.training.local_batch_size * self.gradient_accumulation_steps * ranks

    def batch_generator(self, data_iterable: Iterable[tuple[Inputs, Tensor]]) -> Iterator[tuple[Inputs, Tensor]]:
        """Batches of the step at hand: as many plain ones as its window is long, folded into one."""
        plain = super().batch_generator(data_iterable)
        while True:
            stage = self.schedule.stage_at(self.step - 1)
            window = stage.window(self.config.training.seq_len)
            batches = [next(plain)]
            while len(batches) * batches[0][1].shape[1] < window:
                batches.append(next(plain))
            inputs, labels = join(batches)
            read = labels.numel()
            if stage.superposed:
                weights = self.schedule.position_weights_at(self.step - 1)
                inputs, labels = superpose(inputs, labels, stage, weights=weights, separate_documents=self.separate_documents)
            # Throughput is in positions: take out what the plain batches counted beyond them.
            self.metrics_processor.ntokens_since_last_log += inputs["input"].shape[:2].numel() - read
            yield inputs, labels

    def post_dataloading_process(self, input_dict: Inputs, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        before, read, targets = self.ntokens_seen, input_dict["input"].numel(), labels.numel()
        processed = super().post_dataloading_process(input_dict, labels)
        # n_tokens_seen is in data tokens, whatever the number of targets.
        self.ntokens_seen = before + (self.ntokens_seen - before) * read // targets
        return processed

    def forward_backward_step(
        self, *, input_dict: Inputs | list[Inputs], labels: Tensor | list[Tensor], global_valid_tokens: Tensor
    ) -> Tensor:
        for batch in input_dict if isinstance(input_dict, list) else [input_dict]:
            self.multi_hot_loss.weights = batch.pop("position_weights", None)
        return super().forward_backward_step(input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens)

    def train_step(self, data_iterator: Iterator[tuple[Inputs, Tensor]]) -> None:
        self.metrics_processor.say_stage(self.step, self.resumed)
        self.resumed = False
        super().train_step(data_iterator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.resumed = True

    def train(self) -> None:
        super().train()
        saving = self.config.checkpoint
        if saving.enable and saving.last_save_in_hf and torch.distributed.get_rank() == 0:
            folder = Path(self.config.dump_folder) / saving.folder / f"step-{self.step}"
            if folder.is_dir():
                write_hf_config(self.model_config, folder, Path(self.config.hf_assets_path))


def with_superposition(
    config: titan.Trainer.Config, schedule: Schedule, *, sum_to_one: bool = False, documents: Documents = "packed"
) -> Trainer.Config:
    """A TorchTitan configuration that trains under ``schedule``, and for its number of steps; ``config`` itself is left alone.

    config: of TorchTitan's own llama3, qwen3, qwen3-MoE or deepseek-v3, or one built like them.
    sum_to_one, documents: see `Superposition`. The command line can change the fields of ``--tst`` afterwards.
    Raises InputError where the loss or the trainer is not one that superposition knows.
    """
    if type(config) not in (titan.Trainer.Config, Trainer.Config):
        raise InputError(f"{type(config).__qualname__} is of another trainer: superpose knows torchtitan.trainer.Trainer")
    superposed = derive(
        config,
        Trainer.Config,
        training=dataclasses.replace(config.training, steps=schedule.steps),
        tst=Superposition.of(schedule, sum_to_one=sum_to_one, documents=documents),
    )
    _check(superposed, schedule)
    return superposed


def _check(config: Trainer.Config, schedule: Schedule) -> None:
    found = config.loss.traverse(CrossEntropyLoss.Config)
    if not any(type(loss) is CrossEntropyLoss.Config for _, loss, _, _ in found):
        raise InputError(
            f"loss is {type(config.loss).__qualname__}: superpose needs CrossEntropyLoss, alone or in ChunkedLossWrapper "
            "(multi-token prediction is not supported)"
        )
    assert config.model_spec is not None
    if type(getattr(config.model_spec.model, "tok_embeddings", None)) is not Embedding.Config:
        raise InputError(f"{config.model_spec.name} has no token embedding that superpose can read")
    if type(config.metrics) not in (MetricsProcessor.Config, ScheduleMetrics.Config):
        raise InputError(f"metrics is {type(config.metrics).__qualname__}: superpose needs TorchTitan's MetricsProcessor")
    positions = config.training.seq_len
    for stage in schedule.stages:
        try:
            window = stage.window(positions)
        except ValueError as error:
            raise InputError(f"training.seq_len: {error}") from None
        if window % positions and not isinstance(config.dataloader, TokenStoreLoader.Config):
            raise InputError(
                f"a stage reads windows of {window} tokens, which batches of training.seq_len = {positions} do not make up: "
                "read a store of `superpose prepare` (TokenStoreLoader)"
            )
