"""Multi-hot cross-entropy: one log-sum-exp for the whole bag, whatever its size.

For a row of logits z and a bag of targets y_0 … y_{s−1} with weights w, Σ w = 1 (paper, loss):

    mean form        −Σ_i w_i log P(y_i)    =  logsumexp(z) − Σ_i w_i z[y_i]          (the default)
    sum-to-one form  −log Σ_i w_i P(y_i)    =  logsumexp(z) − logsumexp_i(z[y_i] + log w_i)

Both start near ln V and are ordinary cross-entropy for a bag of one. The published sum-to-one form has w_i = 1, so it lies
lower by the constant ln s. An ignored target drops out of its bag, and a row counts with the weight of its valid targets.
The z-loss adds ``z_loss``·logsumexp(z)² to a row, which keeps the logits from drifting (PaLM, arXiv 2204.02311, section 5).

`linear_multi_hot_cross_entropy` takes the hidden states and the head's weight instead of logits and never holds more than a
chunk of rows of them: within a chunk the logits become the probabilities and then their own gradient in place, and the
products for both inputs follow at once. On CUDA the two passes over a chunk are kernels (`superpose.kernels`); a head that
is sharded over the vocabulary exchanges a few numbers a row (`superpose.sharded`). Reference:
``superpose.reference.row_losses``.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from superpose.bags import IGNORE_INDEX

REDUCTIONS = ("mean", "sum", "none")

#: Bytes of float32 logits that the linear form holds at once: each chunk reads and writes the whole gradient of the weight, so
#: rows must be many enough to pay for that.
CPU_CHUNK_BYTES = 64 * 2**20
ACCELERATOR_CHUNK_BYTES = 512 * 2**20

#: Whether the CPU multiplies bfloat16. Else torch emulates it, at down to a hundredth of the speed of float32.
CPU_BFLOAT16: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multi_hot_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    sum_to_one: bool = False,
    z_loss: float = 0.0,
) -> Tensor:
    """Multi-hot cross-entropy of ``logits [..., V]`` against aligned ``targets [..., s]`` (or ``[...]``, a bag of one).

    ``weights [s]`` weigh the positions in the bag (uniform without). ``mean`` divides by the weight of the valid targets,
    ``sum`` adds the rows, ``none`` returns them ``[...]``, each times the weight of its valid targets. Float32 result.
    A bag of one without z-loss is ``torch.nn.functional.cross_entropy`` itself.
    """
    targets, weights = _checked(logits, targets, weights, reduction)
    rows = logits.flatten(0, -2)
    if targets.shape[-1] == 1 and not z_loss:
        loss = cross_entropy(_at_least_float32(rows), targets.flatten(), ignore_index=ignore_index, reduction=reduction)
        return loss.unflatten(0, targets.shape[:-1]) if reduction == "none" else loss
    bags = targets.flatten(0, -2)
    coefficients, row_weight = _target_weights(bags, weights, ignore_index)
    picked = _at_least_float32(rows.gather(-1, bags.where(coefficients > 0, 0)))
    log_sum_exp = torch.logsumexp(_at_least_float32(rows), -1)
    losses = _row_losses(log_sum_exp, picked, coefficients, row_weight, sum_to_one, z_loss)
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
    soft_cap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """`multi_hot_cross_entropy` of ``hidden [..., d] @ weight[V, d]ᵀ``, without the ``[..., V]`` logits.

    ``soft_cap`` c bends the logits to c·tanh(z/c) first, as Gemma 2 does. Memory is a chunk of rows, independent of the number
    of rows and of s. Products run in the dtype of ``hidden``, or in autocast's where that is on (in float32 on a CPU that only
    emulates bfloat16); log-sum-exp and the accumulation of the weight's gradient are in float32. Gradients are computed in the
    forward pass, except for ``reduction="none"``, which computes the logits again in the backward pass.

    A ``weight`` sharded over the vocabulary (a DTensor) takes ``hidden`` as a DTensor on the same mesh, and gives one.
    """
    if hasattr(weight, "device_mesh"):
        from superpose.sharded import local_parts  # torch.distributed.tensor takes a second to import

        parts = local_parts(hidden, weight, targets)
        hidden, weight, targets = parts.hidden, parts.weight, parts.targets
    else:
        parts = None
    targets, weights = _checked(hidden, targets, weights, reduction)
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"hidden has width {hidden.shape[-1]} and weight {weight.shape[-1]}: they must agree")
    rows, bags = hidden.flatten(0, -2), targets.flatten(0, -2)
    options = _Options(
        dtype=_product_dtype(hidden),
        chunk=_rows_per_chunk(parts.most_rows if parts else len(weight), hidden.device),
        ignore_index=ignore_index,
        sum_to_one=sum_to_one,
        soft_cap=soft_cap,
        z_loss=z_loss,
        group=parts.group if parts else "",
        first=parts.first if parts else 0,
    )
    if reduction == "none":
        loss = _linear_rows(rows, weight, bags, weights, *options).unflatten(0, targets.shape[:-1])
    else:
        scale = 1 / _target_weights(bags, weights, ignore_index)[1].sum() if reduction == "mean" else weights.new_ones(())
        gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        loss = _linear_total(rows, weight, bags, weights, scale.expand(len(rows)), gradients, *options)[0]
    return parts.replicated(loss) if parts else loss


class _Options(NamedTuple):
    """What a custom op takes beside its tensors."""

    dtype: torch.dtype
    #: rows of logits at a time
    chunk: int
    ignore_index: int
    sum_to_one: bool
    soft_cap: float | None
    z_loss: float
    #: name of the process group that shares the vocabulary, empty where the weight is whole
    group: str
    #: the first token of this rank's share
    first: int


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


def _row_losses(
    log_sum_exp: Tensor, picked: Tensor, coefficients: Tensor, row_weight: Tensor, sum_to_one: bool, z_loss: float
) -> Tensor:
    """The losses ``[N]`` from the log-sum-exp ``[N]`` of each row and the logits of its targets ``[N, s]``."""
    if sum_to_one:
        valid = row_weight > 0
        mixture = torch.logsumexp(picked + coefficients.where(valid[:, None], 1).log(), -1)
        bag = row_weight * (mixture - row_weight.where(valid, 1).log())
    else:
        bag = (coefficients * picked).sum(-1)
    return row_weight * (log_sum_exp + z_loss * log_sum_exp.square()) - bag


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return torch.float32 if device == "cpu" and dtype == torch.bfloat16 and not CPU_BFLOAT16 else dtype


def _rows_per_chunk(vocabulary: int, device: torch.device) -> int:
    budget = CPU_CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    return max(64, budget // (4 * vocabulary))


def _kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """The module of Triton kernels where they run, else None: the torch path."""
    if device.type != "cuda" or dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return None
    from superpose import kernels

    return kernels


@torch.library.custom_op("superpose::linear_multi_hot_total", mutates_args=())
def _linear_total(
    hidden: Tensor,
    weight: Tensor,
    bags: Tensor,
    weights: Tensor,
    scale: Tensor,
    gradients: bool,
    dtype: torch.dtype,
    chunk: int,
    ignore_index: int,
    sum_to_one: bool,
    soft_cap: float | None,
    z_loss: float,
    group: str,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_j scale_j · loss_j, the losses ``[N]``, and the gradients of the total (empty when not asked for).

    Under a ``group`` the gradient of ``hidden`` is this rank's part of a sum over the ranks.
    """
    count, vocabulary = len(hidden), len(weight)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    losses = torch.empty(count, dtype=accumulate, device=hidden.device)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if gradients else hidden.new_empty(0)
    d_weight = torch.zeros(weight.shape if gradients else 0, dtype=accumulate, device=weight.device)
    head = weight.to(dtype)
    kernels = _kernels(hidden.device, dtype)
    size = max(1, min(count, chunk))
    # one buffer for all chunks: a new one each would exist beside the last, and a CPU would fault in its pages again
    buffer = torch.empty(size, vocabulary, dtype=dtype if kernels else accumulate, device=hidden.device)
    for start in range(0, count, size):
        here = slice(start, min(start + size, count))
        rows = hidden[here].to(dtype)
        share, total = _target_weights(bags[here], weights, ignore_index)
        targets = bags[here].where(share > 0, 0)
        logits = buffer[: len(rows)]
        if dtype == buffer.dtype:
            torch.mm(rows, head.T, out=logits)
        else:
            logits.copy_(rows @ head.T)
        taken = scale[here, None].to(accumulate)
        if group:
            mine = (targets >= first) & (targets < first + vocabulary)
            targets, taken = (targets - first).where(mine, 0), taken * mine
        picked = logits.gather(-1, targets).to(accumulate)
        if soft_cap is not None:
            picked = soft_cap * torch.tanh(picked / soft_cap)
        if kernels:
            top, normaliser = kernels.log_sum_exp(logits, soft_cap)
        else:
            top, normaliser, bend = _exponentials(logits, soft_cap)
        own_top = top
        if group:
            top, normaliser, picked = _over_ranks(top, normaliser, picked * mine, group)
        log_sum_exp = top + normaliser.log()
        losses[here] = _row_losses(log_sum_exp, picked, share, total, sum_to_one, z_loss)
        if not gradients:
            continue
        if sum_to_one:
            share = total[:, None] * torch.softmax(picked + share.where(total[:, None] > 0, 1).log(), -1)
        factor = scale[here] * total * (1 + 2 * z_loss * log_sum_exp) * torch.exp(own_top - top) / normaliser
        taken = taken * share
        if kernels:
            kernels.overwrite_with_gradient(logits, own_top, factor, targets, taken, soft_cap)
        else:
            logits.mul_(factor[:, None]).scatter_add_(-1, targets, -taken)
            if bend is not None:
                logits.mul_(bend)
        slopes = logits.to(dtype)
        d_hidden[here] = slopes @ head
        if dtype == accumulate:
            d_weight.addmm_(slopes.T, rows)
        else:
            d_weight += slopes.T @ rows
    return (losses * scale).sum(), losses, d_hidden, d_weight.to(weight.dtype)


def _exponentials(logits: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In place, the (capped) logits ``[n, V]`` less their largest to the power of e; that largest ``[n]``, their sum ``[n]``,
    and where capped the derivative of the cap ``[n, V]``."""
    bend = None
    if soft_cap is not None:
        logits.div_(soft_cap).tanh_()
        bend = 1 - logits.square()
        logits.mul_(soft_cap)
    top = logits.amax(-1)
    return top, logits.sub_(top[:, None]).exp_().sum(-1), bend


def _over_ranks(top: Tensor, normaliser: Tensor, picked: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the whole vocabulary, from each rank's share of it; a target's logit is zero but on the rank that has it."""
    own = torch.cat([top[:, None], normaliser[:, None], picked], -1)
    process_group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    gathered = [torch.empty_like(own) for _ in range(process_group.size())]
    dist.all_gather(gathered, own, process_group)
    parts = torch.stack(gathered)
    tops = parts[..., 0]
    top = tops.amax(0)
    return top, (parts[..., 1] * torch.exp(tops - top)).sum(0), parts[..., 2:].sum(0)


@_linear_total.register_fake
def _(hidden, weight, bags, weights, scale, gradients, dtype, *_):  # type: ignore[no-untyped-def]
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
    if not (type(gradient) is Tensor and gradient.device.type == "cpu" and gradient == 1):
        d_hidden, d_weight = gradient.to(d_hidden.dtype) * d_hidden, gradient.to(d_weight.dtype) * d_weight
    return (d_hidden, d_weight, *[None] * 12)


_linear_total.register_autograd(_scale_gradients, setup_context=_save_gradients)


@torch.library.custom_op("superpose::linear_multi_hot_rows", mutates_args=())
def _linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bags: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    chunk: int,
    ignore_index: int,
    sum_to_one: bool,
    soft_cap: float | None,
    z_loss: float,
    group: str,
    first: int,
) -> Tensor:
    """The losses ``[N]``; the backward pass, which alone knows the gradient of each, computes the logits again."""
    options = _Options(dtype, chunk, ignore_index, sum_to_one, soft_cap, z_loss, group, first)
    unscaled = torch.ones(len(hidden), device=hidden.device)
    return _linear_total(hidden, weight, bags, weights, unscaled, False, *options)[1]


@_linear_rows.register_fake
def _(hidden, weight, bags, weights, dtype, *_):  # type: ignore[no-untyped-def]
    return hidden.new_empty(len(hidden), dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4])


def _rows_backward(ctx, gradient):  # type: ignore[no-untyped-def]
    _, _, d_hidden, d_weight = _linear_total(*ctx.saved_tensors, gradient, True, *ctx.options)
    return (d_hidden, d_weight, *[None] * 10)


_linear_rows.register_autograd(_rows_backward, setup_context=_save_inputs)
