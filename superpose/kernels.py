"""The two element-wise passes over a chunk of logits as Triton kernels, one program a row; `superpose.loss` runs them on CUDA.

The first reads the logits once, for the largest and the sum of exponentials together. The second overwrites them with their
gradient. Both compute in float32 whatever the logits' dtype, so logits stay in the dtype of the product. Reference: the torch
passes of `superpose.loss`; without a GPU they run in Triton's interpreter (``TRITON_INTERPRET=1``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Logits that a program holds at once, and the warps that share them.
BLOCK, WARPS = 4096, 8


def log_sum_exp(logits: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    """``[n, V] -> [n], [n]``, float32: the largest (capped) logit of a row, and Σ_v exp(z_v − largest)."""
    rows, vocabulary = logits.shape
    top, normaliser = logits.new_empty(2, rows, dtype=torch.float32)
    _log_sum_exp[(rows,)](
        logits,
        top,
        normaliser,
        logits.stride(0),
        vocabulary,
        soft_cap or 1.0,
        soft_cap is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return top, normaliser


def overwrite_with_gradient(
    logits: Tensor, top: Tensor, factor: Tensor, targets: Tensor, taken: Tensor, soft_cap: float | None
) -> None:
    """``logits [n, V]`` become ``factor · exp(z − top)`` less ``taken [n, s]`` at ``targets [n, s]``, times the cap's slope.

    ``top [n]`` is the largest of the row, ``factor [n]`` the slope of the loss over its normaliser. A target that comes twice
    takes twice.
    """
    rows, vocabulary = logits.shape
    _overwrite_with_gradient[(rows,)](
        logits,
        top.float().contiguous(),
        factor.float().contiguous(),
        targets.contiguous(),
        taken.float().contiguous(),
        logits.stride(0),
        vocabulary,
        soft_cap or 1.0,
        soft_cap is not None,
        targets.shape[1],
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _log_sum_exp(logits, tops, normalisers, stride, vocabulary, soft_cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    top = -float("inf")
    normaliser = 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
        if CAPPED:
            values = tl.where(columns < vocabulary, soft_cap * _tanh(values / soft_cap), -float("inf"))
        higher = tl.maximum(top, tl.max(values, 0))
        normaliser = normaliser * tl.exp(top - higher) + tl.sum(tl.exp(values - higher), 0)
        top = higher
    tl.store(tops + row, top)
    tl.store(normalisers + row, normaliser)


@triton.jit
def _overwrite_with_gradient(  # type: ignore[no-untyped-def]
    logits,
    tops,
    factors,
    targets,
    taken,
    stride,
    vocabulary,
    soft_cap,
    CAPPED: tl.constexpr,
    BAG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top = tl.load(tops + row)
    factor = tl.load(factors + row)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        values = tl.load(logits + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            bent = _tanh(values / soft_cap)
            values = soft_cap * bent
        gradient = factor * tl.exp(values - top)
        for i in range(BAG):
            target = tl.load(targets + row * BAG + i)
            gradient -= tl.where(columns == target, tl.load(taken + row * BAG + i), 0.0)
        if CAPPED:
            gradient *= 1 - bent * bent
        tl.store(logits + row * stride + columns, gradient.to(logits.dtype.element_ty), mask=inside)
