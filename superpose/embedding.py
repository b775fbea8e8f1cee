"""The mean embedding of a bag, without a ``[B, L, s, d]`` tensor in either direction."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag

#: On a CPU the gradient is faster as a product with the counts of each token while the table has at most so many rows for each
#: token of a bag: bytes, in bags of 8 and more. (`benchmarks/embedding.py`)
ROWS_A_TOKEN = 40


def bag_mean(weight: Tensor, ids: Tensor) -> Tensor:
    """Mean over the bag axis of the embeddings of ``ids``: ``[V, d], [..., s] -> [..., d]`` in the dtype of ``weight``.

    The sum is taken in float32 and cast back (paper, listing 1). The gradient of a row adds up over the bags that hold it,
    and over its repetitions within one. Fast path: torch's ``embedding_bag``, one fused gather, whose gradient is added up
    row by row; for a small table on a CPU that is a matrix product. Reference: ``superpose.reference.bag_mean``.
    """
    size = ids.shape[-1]
    if size == 1:
        return embedding(ids.squeeze(-1), weight)
    rows = ids.flatten(0, -2)
    if weight.device.type == "cpu" and len(weight) <= ROWS_A_TOKEN * size:
        bags: Tensor = _SmallTable.apply(weight, rows)
    else:
        bags = embedding_bag(rows, weight, mode="mean")
    return bags.unflatten(0, ids.shape[:-1])


class _SmallTable(torch.autograd.Function):
    """``embedding_bag`` of ``weight [V, d]`` and ``rows [N, s]``, with its gradient as a product of the counts ``[N, V]``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.vocabulary = len(weight)
        return embedding_bag(rows, weight, mode="mean")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        upstream = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        counts = upstream.new_zeros(len(rows), ctx.vocabulary)
        counts.scatter_add_(1, rows, upstream.new_ones(()).expand_as(rows))
        with torch.autocast("cpu", enabled=False):
            return (counts.T @ upstream / rows.shape[1]).to(gradient.dtype), None
