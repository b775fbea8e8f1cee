"""Multi-hot cross-entropy: one log-sum-exp for the whole bag, whatever its size.

For a row of logits z and a bag of targets y_0 … y_{s−1} with weights w, Σ w = 1 (paper, loss):

    mean form        −Σ_i w_i log P(y_i)    =  logsumexp(z) − Σ_i w_i z[y_i]          (the default)
    sum-to-one form  −log Σ_i w_i P(y_i)    =  logsumexp(z) − logsumexp_i(z[y_i] + log w_i)

Both start near ln V and are ordinary cross-entropy for a bag of one. The published sum-to-one form has w_i = 1, so it lies
lower by the constant ln s. An ignored target drops out of its bag, and a row counts with the weight of its valid targets.

`linear_multi_hot_cross_entropy` takes the hidden states and the head's weight instead of logits and never holds more than a
chunk of rows of them: within a chunk the logits become the probabilities and then their own gradient in place, and the
products for both inputs follow at once. Reference: ``superpose.reference.row_losses``.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from superpose.bags import IGNORE_INDEX

REDUCTIONS = ("mean", "sum", "none")

#: Bytes of float32 logits that the linear form holds at once: each chunk reads and writes the whole gradient of the weight, so
#: rows must be many enough to pay for that.
CPU_CHUNK_BYTES = 64 * 2**20
ACCELERATOR_CHUNK_BYTES = 512 * 2**20


def multi_hot_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    sum_to_one: bool = False,
) -> Tensor:
    """Multi-hot cross-entropy of ``logits [..., V]`` against aligned ``targets [..., s]`` (or ``[...]``, a bag of one).

    ``weights [s]`` weigh the positions in the bag (uniform without). ``mean`` divides by the weight of the valid targets,
    ``sum`` adds the rows, ``none`` returns them ``[...]``, each times the weight of its valid targets. Float32 result.
    A bag of one is ``torch.nn.functional.cross_entropy`` itself.
    """
    targets, weights = _checked(logits, targets, weights, reduction)
    rows = logits.flatten(0, -2)
    if targets.shape[-1] == 1:
        loss = cross_entropy(_at_least_float32(rows), targets.flatten(), ignore_index=ignore_index, reduction=reduction)
        return loss.unflatten(0, targets.shape[:-1]) if reduction == "none" else loss
    bags = targets.flatten(0, -2)
    coefficients, row_weight = _target_weights(bags, weights, ignore_index)
    picked = _at_least_float32(rows.gather(-1, bags.where(coefficients > 0, 0)))
    losses = row_weight * torch.logsumexp(_at_least_float32(rows), -1) - _bag_term(picked, coefficients, row_weight, sum_to_one)
    if reduction == "none":
        return losses.unflatten(0, targets.shape[:-1])
    return losses.sum() / row_weight.sum() if reduction == "mean" else losses.sum()


def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    sum_to_one: bool = False,
) -> Tensor:
    """`multi_hot_cross_entropy` of ``hidden [..., d] @ weight[V, d]ᵀ``, without the ``[..., V]`` logits.

    Memory is a chunk of rows, independent of the number of rows and of s. Products run in the dtype of ``hidden``, or in
    autocast's where that is on; log-sum-exp and the accumulation of the weight's gradient are in float32. Gradients are
    computed in the forward pass, except for ``reduction="none"``, which computes the logits again in the backward pass.
    """
    targets, weights = _checked(hidden, targets, weights, reduction)
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"hidden has width {hidden.shape[-1]} and weight {weight.shape[-1]}: they must agree")
    rows, bags = hidden.flatten(0, -2), targets.flatten(0, -2)
    coefficients, row_weight = _target_weights(bags, weights, ignore_index)
    bags = bags.where(coefficients > 0, 0)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if reduction == "none":
        losses = _linear_rows(rows, weight, bags, coefficients, sum_to_one, dtype)
        return losses.unflatten(0, targets.shape[:-1])
    scale = 1 / row_weight.sum() if reduction == "mean" else row_weight.new_ones(())
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _linear_total(rows, weight, bags, coefficients, scale.expand(len(rows)), sum_to_one, dtype, gradients)[0]


def _checked(rows: Tensor, targets: Tensor, weights: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown: take one of {', '.join(REDUCTIONS)}")
    if targets.shape == rows.shape[:-1]:
        targets = targets.unsqueeze(-1)
    if targets.shape[:-1] != rows.shape[:-1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} do not match {tuple(rows.shape)}: they need the same shape but for the last axis, "
            "which is the bag and may be left out"
        )
    bag_size = targets.shape[-1]
    if weights is None:
        weights = torch.ones(bag_size, device=targets.device)
    if weights.shape != (bag_size,):
        raise ValueError(f"weights {tuple(weights.shape)} do not match a bag of {bag_size}")
    return targets, weights.float() / weights.float().sum()


def _target_weights(bags: Tensor, weights: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """``[N, s], [s] -> [N, s], [N]``: the weight of each target, 0 where ignored, and their sum over the bag."""
    coefficients = weights * (bags != ignore_index)
    return coefficients, coefficients.sum(-1)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _bag_term(picked: Tensor, coefficients: Tensor, row_weight: Tensor, sum_to_one: bool) -> Tensor:
    """What the row's loss subtracts from its weighted log-sum-exp: ``[N, s], [N, s], [N] -> [N]``."""
    if not sum_to_one:
        return (coefficients * picked).sum(-1)
    valid = row_weight > 0
    mixture = torch.logsumexp(picked + coefficients.where(valid[:, None], 1).log(), -1)
    return row_weight * (mixture - row_weight.where(valid, 1).log())


def _rows_per_chunk(vocabulary: int, device: torch.device) -> int:
    budget = CPU_CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    return max(64, budget // (4 * vocabulary))


@torch.library.custom_op("superpose::linear_multi_hot_total", mutates_args=())
def _linear_total(
    hidden: Tensor,
    weight: Tensor,
    bags: Tensor,
    coefficients: Tensor,
    scale: Tensor,
    sum_to_one: bool,
    dtype: torch.dtype,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_j scale_j · loss_j, the losses ``[N]``, and the gradients of the total (empty when not asked for)."""
    count, vocabulary = len(hidden), len(weight)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    losses = torch.empty(count, dtype=accumulate, device=hidden.device)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if gradients else hidden.new_empty(0)
    d_weight = torch.zeros(weight.shape if gradients else 0, dtype=accumulate, device=weight.device)
    head = weight.to(dtype)
    row_weight = coefficients.sum(-1)
    size = max(1, min(count, _rows_per_chunk(vocabulary, hidden.device)))
    # one buffer for all chunks: a new one each would exist beside the last, and a CPU would fault in its pages again
    buffer = torch.empty(size, vocabulary, dtype=accumulate, device=hidden.device)
    for start in range(0, count, size):
        chunk = slice(start, min(start + size, count))
        rows, targets, share, total = hidden[chunk].to(dtype), bags[chunk], coefficients[chunk], row_weight[chunk]
        values = buffer[: len(rows)]
        if dtype == accumulate:
            torch.mm(rows, head.T, out=values)
        else:
            values.copy_(rows @ head.T)
        picked = values.gather(-1, targets)
        top = values.amax(-1, keepdim=True)
        values.sub_(top).exp_()
        normaliser = values.sum(-1)
        log_sum_exp = normaliser.log() + top.squeeze(-1)
        losses[chunk] = total * log_sum_exp - _bag_term(picked, share, total, sum_to_one)
        if not gradients:
            continue
        if sum_to_one:
            share = total[:, None] * torch.softmax(picked + share.where(total[:, None] > 0, 1).log(), -1)
        values.mul_((scale[chunk] * total / normaliser)[:, None])
        values.scatter_add_(-1, targets, -scale[chunk, None] * share.to(accumulate))
        slopes = values.to(dtype)
        d_hidden[chunk] = slopes @ head
        if dtype == accumulate:
            d_weight.addmm_(slopes.T, rows)
        else:
            d_weight += slopes.T @ rows
    return (losses * scale).sum(), losses, d_hidden, d_weight.to(weight.dtype)


@_linear_total.register_fake
def _(hidden, weight, bags, coefficients, scale, sum_to_one, dtype, gradients):  # type: ignore[no-untyped-def]
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    losses = hidden.new_empty(len(hidden), dtype=accumulate)
    if not gradients:
        return losses.sum(), losses, hidden.new_empty(0), weight.new_empty(0)
    return losses.sum(), losses, torch.empty_like(hidden, memory_format=torch.contiguous_format), weight.new_empty(weight.shape)


def _save_gradients(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[2], output[3])
    ctx.mark_non_differentiable(output[1], output[2], output[3])
    ctx.set_materialize_grads(False)  # else the backward pass is handed zeros the size of the weight for these three


def _scale_gradients(ctx, gradient, *_):  # type: ignore[no-untyped-def]
    d_hidden, d_weight = ctx.saved_tensors
    # Elsewhere than on a CPU the question would wait for the device; a subclass stands for a traced tensor without a value.
    if type(gradient) is Tensor and gradient.device.type == "cpu" and gradient == 1:
        return d_hidden, d_weight, None, None, None, None, None, None
    return gradient.to(d_hidden.dtype) * d_hidden, gradient.to(d_weight.dtype) * d_weight, None, None, None, None, None, None


_linear_total.register_autograd(_scale_gradients, setup_context=_save_gradients)


@torch.library.custom_op("superpose::linear_multi_hot_rows", mutates_args=())
def _linear_rows(
    hidden: Tensor, weight: Tensor, bags: Tensor, coefficients: Tensor, sum_to_one: bool, dtype: torch.dtype
) -> Tensor:
    """The losses ``[N]``; the backward pass, which alone knows the gradient of each, computes the logits again."""
    unscaled = torch.ones(len(hidden), device=hidden.device)
    return _linear_total(hidden, weight, bags, coefficients, unscaled, sum_to_one, dtype, False)[1]


@_linear_rows.register_fake
def _(hidden, weight, bags, coefficients, sum_to_one, dtype):  # type: ignore[no-untyped-def]
    return hidden.new_empty(len(hidden), dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.sum_to_one, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _rows_backward(ctx, gradient):  # type: ignore[no-untyped-def]
    hidden, weight, bags, coefficients = ctx.saved_tensors
    _, _, d_hidden, d_weight = _linear_total(hidden, weight, bags, coefficients, gradient, ctx.sum_to_one, ctx.dtype, True)
    return d_hidden, d_weight, None, None, None, None


_linear_rows.register_autograd(_rows_backward, setup_context=_save_inputs)
