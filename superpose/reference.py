"""The published listings as plain loops: slow, obvious, and the oracle that every fast path is tested against.

Restated in our own words from *Efficient Pre-Training with Token Superposition* (arXiv 2605.06546): the superposed input,
the superposed labels, and the multi-hot cross-entropy. The second loss, "sum to one", follows the formula of its text.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def bag_mean(weight: Tensor, ids: Tensor) -> Tensor:
    """Listing 1. Mean of the embeddings of each bag, summed in float32 and cast back: ``[V, d], [B, L, s] -> [B, L, d]``."""
    total = torch.zeros(*ids.shape[:-1], weight.shape[1], dtype=torch.float32)
    for i in range(ids.shape[-1]):
        total = total + weight[ids[..., i]].float()
    return (total / ids.shape[-1]).to(weight.dtype)


def superposed_labels(next_token_labels: Tensor, bag_size: int, ignore_index: int = -100) -> Tensor:
    """Listing 2. Next-token labels ``[B, L·s]`` (shifted by one already) to the targets of each bag, ``[B, L, s]``.

    Shifted left by a further s − 1 and padded, then folded: the last bag of a sequence keeps a single valid target.
    """
    batch, length = next_token_labels.shape
    targets = torch.full((batch, length // bag_size, bag_size), ignore_index, dtype=next_token_labels.dtype)
    for j in range(length // bag_size):
        for i in range(bag_size):
            source = j * bag_size + i + bag_size - 1
            if source < length:
                targets[:, j, i] = next_token_labels[:, source]
    return targets


def multi_hot_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Listing 3. The cross-entropy of each offset in the bag over its own valid rows, then the weighted mean over offsets.

    ``[B, L, V], [B, L, s] -> scalar``. Offset 0 has one valid row more per sequence than the others when the labels come
    from `superposed_labels`.
    """
    bag_size = targets.shape[-1]
    weights = torch.full((bag_size,), 1 / bag_size) if weights is None else weights / weights.sum()
    loss = torch.zeros((), dtype=logits.dtype if logits.dtype == torch.float64 else torch.float32)
    for i in range(bag_size):
        loss = loss + weights[i] * cross_entropy(
            logits.flatten(0, -2).to(loss.dtype), targets[..., i].flatten(), ignore_index=ignore_index
        )
    return loss


def row_losses(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    ignore_index: int = -100,
    sum_to_one: bool = False,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Both losses row by row in float64, with ignored targets anywhere: ``[N, V], [N, s], [s] -> ([N], [N])``.

    Returns the loss of each row times the weight of its valid targets, and that weight. Mean form: −Σ_i w_i log P(y_i).
    Sum-to-one form: −log Σ_i w_i P(y_i). Logits are bent to soft_cap·tanh(z/soft_cap) first, and a row's loss grows by
    z_loss·logsumexp(z)². Defines what ``superpose.loss`` computes.
    """
    weights = weights.double() / weights.double().sum()
    losses, row_weights = [], []
    bent = logits.double() if soft_cap is None else soft_cap * torch.tanh(logits.double() / soft_cap)
    for row, bag in zip(bent, targets, strict=True):
        normaliser = torch.logsumexp(row, 0)
        log_probability = row - normaliser
        valid = [i for i in range(len(bag)) if bag[i] != ignore_index]
        weight = sum((weights[i] for i in valid), torch.zeros((), dtype=torch.float64))
        if not valid:
            loss = row.sum() * 0
        elif sum_to_one:
            mass = torch.stack([weights[i] * log_probability[bag[i]].exp() for i in valid]).sum()
            loss = -weight * torch.log(mass / weight)
        else:
            loss = -torch.stack([weights[i] * log_probability[bag[i]] for i in valid]).sum()
        losses.append(loss + weight * z_loss * normaliser**2)
        row_weights.append(weight)
    return torch.stack(losses), torch.stack(row_weights)
