"""Override of TorchTitan's embedding: plain ids go its own way, ids with a bag axis become the mean of their embeddings."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import embedding_bag
from torchtitan.config.override import derive, override
from torchtitan.models.common.embedding import Embedding

from superpose.embedding import bag_mean


class BagEmbedding(Embedding):
    """``[B, L] -> [B, L, d]`` as TorchTitan's, and ``[B, L, s] -> [B, L, d]``: the mean over the bag, summed in float32.

    Under tensor parallelism a rank holds a slice of the vocabulary and gives its share of each mean; the sharding that the
    configuration declares adds the shares up, as it does for plain ids.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            return super().forward(input)
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        if self.tp_group is None:
            return bag_mean(weight, input)
        rows = -(-self.num_embeddings // dist.get_world_size(self.tp_group))
        local = input - dist.get_rank(self.tp_group) * rows
        here = (local >= 0) & (local < weight.shape[0])
        bags = embedding_bag(
            local.where(here, 0).flatten(0, -2), weight, mode="sum", per_sample_weights=here.flatten(0, -2).to(weight.dtype)
        )
        return bags.unflatten(0, input.shape[:-1]) / input.shape[-1]


@override(target=Embedding.Config, exact=True, description="mean of the embeddings of a bag")
def bag_embedding(config: Embedding.Config) -> BagEmbedding.Config:
    return derive(config, BagEmbedding.Config)
