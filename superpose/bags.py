"""Bags: folding token ids, the targets of the next bag, and the weights of the positions inside a bag.

The bag axis is the switch of the whole library. Ids ``[batch, positions]`` are ordinary; ids ``[batch, positions, bag]``
are superposed. Nothing below or above this file asks for the phase: it looks at the shape.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

IGNORE_INDEX = -100

WEIGHTINGS = ("uniform", "power-law", "exponential", "first")

#: C0, a, k of ``C0 + a·d^k``, the paper's fit to the mutual information of DCLM tokens at distance d.
DCLM_FIT = (3.63, 1.35, -1.25)

#: One of `WEIGHTINGS`, or ``(C0, a, k)`` of a fitted ``C0 + a·d^k``.
Weighting = str | tuple[float, float, float]


def fold(ids: Tensor, bag_size: int, pad_value: int | None = None) -> Tensor:
    """Fold ``[..., positions·bag_size]`` into ``[..., positions, bag_size]``: contiguous, non-overlapping bags.

    A last, partial bag is filled with ``pad_value`` (for targets: the ignore index); without one it is an error, because a
    model cannot read a padded bag. Paper, listing 1.
    """
    if bag_size < 1:
        raise ValueError(f"bag_size must be at least 1, got {bag_size}")
    partial = ids.shape[-1] % bag_size
    if partial and pad_value is None:
        raise ValueError(
            f"{ids.shape[-1]} tokens do not fold into bags of {bag_size}: cut the sequence to a multiple, or give pad_value"
        )
    if partial:
        ids = pad(ids, (0, bag_size - partial), value=pad_value)
    return ids.unflatten(-1, (-1, bag_size))


def next_position_targets(labels: Tensor, ignore_index: int = IGNORE_INDEX, *, position_axis: int = 1) -> Tensor:
    """Shift labels by one position along ``position_axis``; the last position is left without a target.

    With labels ``[B, L, s]`` equal to the folded ids this gives each position the whole next bag; with ``[B, L]``, the next
    token. Same shape in and out, aligned with the hidden states, so nothing is sliced off them.
    """
    targets = labels.roll(-1, position_axis)
    targets.select(position_axis, -1).fill_(ignore_index)
    return targets


def following_tokens(ids: Tensor, bag_size: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """``[..., positions]`` to overlapping labels ``[..., positions, bag_size]``: token j and the ``bag_size − 1`` after it.

    After the shift by one position these are the targets of output-only superposition: position j predicts tokens
    j+1 … j+bag_size. What lies beyond the sequence is ignored, as in the padded labels of the paper's listing.
    """
    return pad(ids, (0, bag_size - 1), value=ignore_index).unfold(-1, bag_size, 1)


def position_weights(weighting: Weighting, bag_size: int) -> Tensor:
    """Weights ``[bag_size]`` of the positions in a bag, float32, summing to one (paper, position weights).

    uniform: 1; power-law: 1/i; exponential: exp(−i); first: the first token alone; ``(C0, a, k)``: C0 + a·i^k, with i from 1.
    """
    distance = torch.arange(1, bag_size + 1, dtype=torch.float64)
    if isinstance(weighting, Sequence) and not isinstance(weighting, str):
        constant, scale, exponent = weighting
        weights = constant + scale * distance**exponent
        if not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
            raise ValueError(f"weighting {tuple(weighting)} gives a negative weight within a bag of {bag_size}")
    elif weighting == "uniform":
        weights = torch.ones_like(distance)
    elif weighting == "power-law":
        weights = 1 / distance
    elif weighting == "exponential":
        weights = torch.exp(-distance)
    elif weighting == "first":
        weights = (distance == 1).double()
    else:
        raise ValueError(f"weighting {weighting!r} is unknown: take one of {', '.join(WEIGHTINGS)}, or three numbers C0, a, k")
    return (weights / weights.sum()).float()
