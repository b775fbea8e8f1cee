"""A TorchTitan dataloader over a token store of `superpose prepare`.

The same windows in the same order as `superpose train` reads them: the batch is a function of the step, so a run resumes
exactly, in any stage, also with another number of data-parallel ranks, and two engines can be compared step by step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import TrainingConfig

from superpose.bags import IGNORE_INDEX
from superpose.data.batches import ScheduledTokens
from superpose.data.store import TokenStore
from superpose.engines.torchtitan.section import Documents
from superpose.errors import InputError
from superpose.schedule import Schedule


class TokenStoreLoader(BaseDataLoader):
    """Batches ``input [B, W]``, ``positions [B, W]`` and next-token labels ``[B, W]``, W the window of the step's stage.

    The last label of a window is ignored, as in `superpose train`. With packed documents positions count through the window, so
    attention is causal over all of it in both phases; with separate documents they start anew with each, as TorchTitan's own
    loaders have them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        split: Literal["train", "validation"] = "train"
        """Split of the store at dataset_path. The order follows the schedule in the one and the text in the other."""

        seed: int = 0
        """Of the order of the windows."""

        num_workers: int = 0
        """Processes that read ahead."""

        infinite: bool = True
        """Of the validation split: start again at its end. TorchTitan's validator sets it."""

        schedule: Annotated[Schedule | None, tyro.conf.Suppress] = None
        training: Annotated[TrainingConfig | None, tyro.conf.Suppress] = None
        documents: Annotated[Documents, tyro.conf.Suppress] = "packed"

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        if not config.dataset_path:
            raise InputError("dataloader.dataset_path is missing: give the directory that `superpose prepare` wrote")
        store = TokenStore(config.dataset_path, config.split)
        if config.split == "validation":
            windows = (store.tokens - 1) // seq_len
            schedule, sequences = Schedule.baseline(1), windows
        elif config.schedule is None or config.training is None:
            raise ValueError("the train split needs the trainer of superpose: put the config through with_superposition")
        else:
            schedule, training = config.schedule, config.training
            whole = training.global_batch_size
            sequences = whole if whole > 0 else training.local_batch_size * dp_world_size
        data = ScheduledTokens(store, schedule, positions=seq_len, sequences_per_step=sequences, seed=config.seed)
        self.windows = _RankWindows(data, dp_rank, dp_world_size, local_batch_size, config.documents == "separate")
        self.batch_size, self.ranks, self.workers = local_batch_size, dp_world_size, config.num_workers
        self.infinite = config.infinite and config.split == "validation"
        self.batches = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            rest = range(self.batches * self.batch_size, len(self.windows))
            for inputs, labels in DataLoader(self.windows, self.batch_size, sampler=rest, num_workers=self.workers):
                self.batches += 1
                yield inputs, labels
            if not self.infinite:
                return
            self.batches = 0

    def state_dict(self) -> dict[str, Any]:
        return {"sequences": self.batches * self.batch_size * self.ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches, rest = divmod(state_dict["sequences"], self.batch_size * self.ranks)
        if rest:
            raise InputError(
                f"the checkpoint stands at sequence {state_dict['sequences']}, inside a batch of {self.batch_size} on "
                f"{self.ranks} data-parallel ranks: resume with a batch that divides the step"
            )


class _RankWindows(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """The windows that one data-parallel rank reads, of micro-batches dealt out rank by rank."""

    def __init__(self, data: ScheduledTokens, rank: int, ranks: int, batch_size: int, separate_documents: bool) -> None:
        self.data, self.rank, self.ranks, self.batch_size = data, rank, ranks, batch_size
        self.separate_documents = separate_documents

    def __len__(self) -> int:
        return len(self.data) // (self.ranks * self.batch_size) * self.batch_size

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        batch, row = divmod(index, self.batch_size)
        ids = self.data[(batch * self.ranks + self.rank) * self.batch_size + row]["input_ids"].flatten()
        positions = torch.arange(len(ids))
        if self.separate_documents:
            starts = pad(ids[:-1] == self.data.store.eod_id, (1, 0), value=True)
            positions -= torch.where(starts, positions, 0).cummax(0).values
        return {"input": ids, "positions": positions}, pad(ids[1:], (0, 1), value=IGNORE_INDEX)
