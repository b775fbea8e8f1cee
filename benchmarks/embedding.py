"""The bag mean, forward and backward: the fused gather against the published loop, gather-then-mean and a plain look-up."""

from collections.abc import Callable

import torch
from timing import Figures, Table, in_turn, peak_of_tensors, peak_resident
from torch import Tensor
from torch.nn import functional

from superpose import bag_mean, reference

POSITIONS, WIDTH = 4096, 512
BAG_SIZES, VOCABULARIES = (2, 4, 8, 16), (257, 4096, 50304)

Mean = Callable[[Tensor, Tensor], Tensor]


def gather_then_mean(weight: Tensor, ids: Tensor) -> Tensor:
    return functional.embedding(ids, weight).mean(-2)


def plain_look_up(weight: Tensor, ids: Tensor) -> Tensor:
    return functional.embedding(ids[..., 0], weight)


CANDIDATES: dict[str, Mean] = {
    "superpose": bag_mean,
    "published loop": reference.bag_mean,
    "gather, then mean": gather_then_mean,
    "look-up of one token": plain_look_up,
}


def run(*, quick: bool) -> Figures:
    positions, bag_sizes, seconds = (1024, (2, 16), 0.5) if quick else (POSITIONS, BAG_SIZES, 5)
    vocabularies = VOCABULARIES[:2] if quick else VOCABULARIES
    tables = []
    for vocabulary in vocabularies:
        table = Table(f"bag mean, forward and backward, V = {vocabulary}, {positions} positions, width {WIDTH}, float32")
        for bag_size in bag_sizes:
            shape = (positions, vocabulary, bag_size)
            candidates = {name: prepare(name, *shape) for name in CANDIDATES}
            for name, row in in_turn(f"{table.title}, s = {bag_size}", candidates, seconds).items():
                tensors, resident = peak_of_tensors(candidates[name]), peak_resident(prepare, name, *shape)
                table.rows.append(
                    {"s": bag_size, "embedding": name, **row, "tensors bytes": tensors, "resident bytes": resident}
                )
        tables.append(table)
    return Figures(tables)


def prepare(name: str, positions: int, vocabulary: int, bag_size: int) -> Callable[[], object]:
    """The named mean with its backward pass, on inputs allocated here; it has run once on a small shape."""
    mean = CANDIDATES[name]

    def inputs(positions: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(vocabulary, WIDTH, generator=generator).requires_grad_()
        ids = torch.randint(vocabulary, (1, positions, bag_size), generator=generator)
        return weight, ids, torch.randn(1, positions, WIDTH, generator=generator)

    def call(weight: Tensor, ids: Tensor, gradient: Tensor) -> None:
        mean(weight, ids).backward(gradient)
        weight.grad = None

    call(*inputs(16, 64))
    given = inputs(positions, vocabulary)
    return lambda: call(*given)
