"""The mean embedding of a bag, without a ``[B, L, s, d]`` tensor in either direction."""

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag

#: On a CPU a product with the counts of each token is faster than a gather while the table has at most so many rows for each
#: token of a bag: bytes, in bags of 8 and more. (`benchmarks/embedding.py`)
ROWS_A_TOKEN = 40


def bag_mean(weight: Tensor, ids: Tensor) -> Tensor:
    """Mean over the bag axis of the embeddings of ``ids``: ``[V, d], [..., s] -> [..., d]`` in the dtype of ``weight``.

    The sum is taken in float32 and cast back (paper, listing 1). The gradient of a row adds up over the bags that hold it,
    and over its repetitions within one. Fast path: torch's ``embedding_bag``, one fused gather; for a small table on a CPU,
    where that spends its time adding up the gradient row by row, a matrix product. Reference: ``superpose.reference.bag_mean``.
    """
    size = ids.shape[-1]
    if size == 1:
        return embedding(ids.squeeze(-1), weight)
    rows = ids.flatten(0, -2)
    if weight.device.type == "cpu" and len(weight) <= ROWS_A_TOKEN * size:
        table = weight.to(torch.promote_types(weight.dtype, torch.float32))
        counts = table.new_zeros(len(rows), len(table)).scatter_add_(1, rows, table.new_ones(()).expand_as(rows))
        with torch.autocast("cpu", enabled=False):
            bags = (counts @ table / size).to(weight.dtype)
    else:
        bags = embedding_bag(rows, weight, mode="mean")
    return bags.unflatten(0, ids.shape[:-1])
