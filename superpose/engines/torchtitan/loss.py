"""Override of TorchTitan's cross-entropy: plain labels go its own way, labels with a bag axis are a multi-hot target.

`superpose.loss` holds the loss itself. TorchTitan's `ChunkedLossWrapper` stays around it, so there are never more logits than a
chunk's. Under tensor parallelism each rank holds logits of a slice of the vocabulary: the same loss from partial sums.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import local_map
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.config import CompileConfig
from torchtitan.config.override import derive, override
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.distributed.utils import get_spmd_backend

from superpose.bags import IGNORE_INDEX
from superpose.loss import multi_hot_cross_entropy


class MultiHotLoss(CrossEntropyLoss):
    """Labels ``[B, L]``: TorchTitan's loss, to the bit. Labels ``[B, L, s]``: the sum over valid targets, each by its weight.

    ``weights [s]`` are those of the batch at hand, and add up to its number of valid targets; the trainer sets them. The caller
    divides by the number of valid targets of the step, as TorchTitan does.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        sum_to_one: bool = False
        """−log of the mean probability of the targets, instead of the mean of −log probability."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.fn = partial(multi_hot_loss, sum_to_one=config.sum_to_one)
        self._maybe_compile(compile_config)
        self.multi_hot = self.fn
        super().__init__(config, compile_config=compile_config)
        self.weights: Tensor | None = None

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if labels.dim() == 2:
            return super().__call__(pred, labels, global_valid_tokens, **kwargs)
        weights = torch.ones(labels.shape[-1], device=labels.device) if self.weights is None else self.weights
        loss = self.multi_hot(pred, labels, weights, global_vocab_size=self.global_vocab_size)
        if global_valid_tokens is not None:
            with spmd.no_typecheck():
                loss = loss / global_valid_tokens
        return loss, {}


@override(target=CrossEntropyLoss.Config, exact=True, description="multi-hot cross-entropy of a bag")
def multi_hot(config: CrossEntropyLoss.Config, sum_to_one: bool = False) -> MultiHotLoss.Config:
    return derive(config, MultiHotLoss.Config, sum_to_one=sum_to_one)


def multi_hot_loss(
    pred: Tensor, labels: Tensor, weights: Tensor, *, sum_to_one: bool = False, global_vocab_size: int | None = None
) -> Tensor:
    """Sum of the multi-hot cross-entropy of ``pred [B, L, V]`` against ``labels [B, L, s]``, over every way TorchTitan shards.

    ``pred`` may be whole, a DTensor sharded over the vocabulary (its partial_dtensor backend; with labels a DTensor too, its
    full_dtensor backend), or this rank's slice of the vocabulary (its spmd_types backend, with ``global_vocab_size``).
    """
    group: dist.ProcessGroup | None = None
    vocabulary = pred.shape[-1]
    if isinstance(pred, DTensor):
        sharded = any(isinstance(placement, Shard) and placement.dim == pred.ndim - 1 for placement in pred.placements)
        group = pred.device_mesh.get_group("tp") if sharded else None
        local = partial(_local_loss, group=group, vocabulary=vocabulary, sum_to_one=sum_to_one)
        if not isinstance(labels, DTensor):
            return local(pred.to_local(), labels, weights)
        return local_map(
            local,
            out_placements=[
                Partial() if isinstance(placement, Shard) and placement.dim < pred.ndim - 1 else Replicate()
                for placement in pred.placements
            ],
            in_placements=(pred.placements, labels.placements, None),
            in_grad_placements=(pred.placements, labels.placements, None),
            device_mesh=pred.device_mesh,
        )(pred, labels, weights)
    if get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1:
        mesh = current_spmd_mesh()
        assert mesh is not None
        assert global_vocab_size is not None, "tensor parallelism needs loss.global_vocab_size"
        group, vocabulary = mesh.get_group("tp"), global_vocab_size
    return _local_loss(pred, labels, weights, group=group, vocabulary=vocabulary, sum_to_one=sum_to_one)


def _local_loss(
    pred: Tensor, labels: Tensor, weights: Tensor, *, group: dist.ProcessGroup | None, vocabulary: int, sum_to_one: bool
) -> Tensor:
    if group is None:
        options: dict[str, Any] = {"weights": weights, "ignore_index": IGNORE_INDEX, "reduction": "sum"}
        return weights.sum() * multi_hot_cross_entropy(pred, labels, **options, sum_to_one=sum_to_one)
    rows = -(-vocabulary // dist.get_world_size(group))
    return _VocabularyParallel.apply(
        pred.flatten(0, -2).float(), labels.flatten(0, -2), weights, group, dist.get_rank(group) * rows, sum_to_one
    )


class _VocabularyParallel(torch.autograd.Function):
    """The loss of `superpose.loss` where each rank has the logits ``[N, V/tp]`` of a slice of the vocabulary.

    Three reductions over the group: the maximum, the sum of exponentials, and the logits of the targets ``[N, s]``, which one
    rank each holds. The backward pass needs none.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, group: dist.ProcessGroup, start: int, sum_to_one: bool
    ) -> Tensor:
        def reduced(values: Tensor, operation: str) -> Tensor:
            return collectives.wait_tensor(collectives.all_reduce(values, operation, group))

        coefficients = weights * (targets != IGNORE_INDEX)
        row_weight = coefficients.sum(-1)
        local = targets - start
        here = (local >= 0) & (local < logits.shape[-1]) & (coefficients > 0)
        local = local.where(here, 0)
        maximum = reduced(logits.amax(-1), "max")
        exponentials = (logits - maximum[:, None]).exp()
        total = reduced(exponentials.sum(-1), "sum")
        picked = reduced(logits.gather(-1, local).where(here, 0), "sum")
        if sum_to_one:
            shares = (picked + coefficients.log()).softmax(-1).nan_to_num()  # of the targets in the probability of their bag
            mixture = torch.logsumexp(picked + coefficients.log(), -1) - row_weight.log()
            term = (row_weight * mixture).where(row_weight > 0, 0)
            target_gradient = shares * row_weight[:, None]
        else:
            term = (coefficients * picked).sum(-1)
            target_gradient = coefficients
        gradient = exponentials.mul_((row_weight / total)[:, None])
        gradient.scatter_add_(-1, local, -(target_gradient * here))
        ctx.save_for_backward(gradient)
        return (row_weight * (total.log() + maximum) - term).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None, None
