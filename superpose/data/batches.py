"""The batch as a pure function of the step: a map-style dataset whose index decides step, stage and window.

Index i belongs to step ``i // sequences_per_step``; the schedule gives the stage and the part of the token stream that it
reads. Nothing depends on workers, ranks, accumulation or on where a run was resumed. Samples must be drawn in order: the
dataset itself mixes the text, because neighbouring windows come from the same document. The token stream is the store in
blocks of the schedule's longest window, in an order that spreads every part of the stream over the whole store; within a stage
the windows are permuted.
"""

import math
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from superpose.bags import fold, following_tokens
from superpose.data.store import TokenStore
from superpose.errors import InputError
from superpose.schedule import Schedule, Stage

#: The fraction of the golden section: its multiples, modulo 1, lie evenly wherever they begin and end.
GOLDEN = (math.sqrt(5) - 1) / 2
#: Windows are permuted among so many, and never across stages.
PERMUTED = 2**16


class ScheduledTokens(Dataset[dict[str, Tensor]]):
    """Windows of a token store as a schedule asks for them.

    Sample: ``input_ids`` and ``labels``, ``[positions]`` or ``[positions, bag]``, labels as transformers has them (equal to the
    ids, the shift happens in the loss), and ``position_weights [bag]`` where they are not uniform.

    store: a `TokenStore`, or the path of a prepared directory (its train split).
    positions: L, the positions of a plain sequence.
    sequences_per_step: sequences of one optimizer step over all ranks and micro-batches.
    seed: of the order of the windows. A stage reads the same tokens, each once, in every order.

    The stream depends on the longest window alone: a part of it is the same text at every ratio and in every seed. A window
    goes over the end of a block where the text read before is no multiple of it (bags of 4 behind bags of 3, say). A run longer
    than the store goes round it again, with a warning, and every epoch is cut into windows at other places.
    """

    def __init__(
        self, store: TokenStore | str | Path, schedule: Schedule, *, positions: int, sequences_per_step: int, seed: int = 0
    ) -> None:
        self.store = store if isinstance(store, TokenStore) else TokenStore(store)
        self.schedule, self.positions, self.sequences_per_step, self.seed = schedule, positions, sequences_per_step, seed
        windows = [stage.window(positions) for stage in schedule.stages]
        if self.store.tokens <= max(windows):
            raise InputError(
                f"{self.store.path}: the {self.store.split} split has {self.store.tokens} tokens, fewer than one window of "
                f"{max(windows)} (positions × bag size): prepare more text, or lower positions or the bag size"
            )
        self.block = max(windows)
        self.blocks = self.store.tokens // self.block
        self.stride = _golden_stride(self.blocks)
        if self.epochs > 1:
            warnings.warn(
                f"the run reads {self.epochs:.2f} epochs of {self.store.path}: "
                f"{schedule.data_tokens(positions, sequences_per_step):,} data tokens from {self.store.tokens:,}",
                stacklevel=2,
            )

    @property
    def epochs(self) -> float:
        """How often the run goes through the store."""
        return self.schedule.data_tokens(self.positions, self.sequences_per_step) / (self.blocks * self.block)

    def __len__(self) -> int:
        return self.schedule.steps * self.sequences_per_step

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self.schedule.stage_index(index // self.sequences_per_step)
        stage, first = self.schedule.stages[number], self.schedule.starts[number]
        window = stage.window(self.positions)
        part, at = divmod(index - first * self.sequences_per_step, PERMUTED)
        left = stage.steps * self.sequences_per_step - part * PERMUTED
        turn = part * PERMUTED + int(_order(self.seed, number, part, min(PERMUTED, left))[at])
        offset = self.schedule.token_offset(first, self.positions, self.sequences_per_step) + turn * window
        sample = _sample(self._read(offset, window), stage)
        weights = stage.position_weights(index // self.sequences_per_step - first)
        return sample if weights is None else {**sample, "position_weights": weights}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        if len({index // self.sequences_per_step for index in indices}) > 1:
            raise InputError(
                "a batch mixes samples of several steps: draw them in order (train_sampling_strategy='sequential' in "
                f"TrainingArguments) in batches that divide sequences_per_step = {self.sequences_per_step}"
            )
        return [self[index] for index in indices]

    def _read(self, offset: int, count: int) -> Tensor:
        """``count`` tokens of the stream. Past its last token the store goes on with its first."""
        pieces = []
        while count:
            block, at = divmod(offset, self.block)
            epoch, place = divmod(block, self.blocks)
            shift = int(self.block * (epoch * GOLDEN % 1))
            start = (place * self.stride % self.blocks * self.block + shift + at) % self.store.tokens
            length = min(count, self.block - at, self.store.tokens - start)
            pieces.append(torch.from_numpy(self.store.read(start, length)))
            offset, count = offset + length, count - length
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _golden_stride(blocks: int) -> int:
    """The step from a block to the next: near the golden section of all, so that any stretch of steps is spread evenly.

    It shares no factor with their number, so that each is visited once.
    """
    stride = round(blocks * GOLDEN)
    while math.gcd(stride, blocks) > 1:
        stride += 1
    return stride


@lru_cache(maxsize=8)
def _order(seed: int, stage: int, part: int, size: int) -> NDArray[np.int64]:
    """A permutation of windows. RandomState, unlike newer generators, promises the same one in every numpy."""
    return np.random.RandomState([seed, stage, part]).permutation(size)


def _sample(tokens: Tensor, stage: Stage) -> dict[str, Tensor]:
    if stage.bag_size == 1:
        return {"input_ids": tokens, "labels": tokens}
    if stage.mode == "output-only":
        return {"input_ids": tokens, "labels": following_tokens(tokens, stage.bag_size)}
    bags = fold(tokens, stage.bag_size)
    return {"input_ids": bags, "labels": bags[:, 0] if stage.mode == "input-only" else bags}
