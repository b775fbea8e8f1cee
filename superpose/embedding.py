"""The mean embedding of a bag, without a ``[B, L, s, d]`` tensor in either direction."""

from torch import Tensor
from torch.nn.functional import embedding, embedding_bag


def bag_mean(weight: Tensor, ids: Tensor) -> Tensor:
    """Mean over the bag axis of the embeddings of ``ids``: ``[V, d], [..., s] -> [..., d]`` in the dtype of ``weight``.

    The sum is taken in float32 and cast back (paper, listing 1). The gradient of a row adds up over the bags that hold it,
    and over its repetitions within one. Fast path: torch's ``embedding_bag``, one fused gather. Reference:
    ``superpose.reference.bag_mean``.
    """
    if ids.shape[-1] == 1:
        return embedding(ids.squeeze(-1), weight)
    bags = embedding_bag(ids.flatten(0, -2), weight, mode="mean")
    return bags.unflatten(0, ids.shape[:-1])
