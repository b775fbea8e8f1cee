"""Plain batches, as TorchTitan's dataloaders give them, to a superposed one.

A dataloader's sample is ``input [L]``, ``positions [L]`` (0 where a document starts) and labels ``[L]``, shifted by one token
already. A superposed sequence is made of consecutive samples: s·L tokens, L positions.
"""

import torch
from torch import Tensor

from superpose.bags import IGNORE_INDEX, fold, following_tokens
from superpose.schedule import Stage

#: The part of a dataloader's batch beside its labels.
Inputs = dict[str, Tensor]


def join(batches: list[tuple[Inputs, Tensor]]) -> tuple[Inputs, Tensor]:
    """n consecutive batches ``[B, L]`` as one ``[B, n·L]``, in the order of the stream, with positions continued.

    A loader counts positions from 0 at the start of a sample, also in the middle of a document. At a seam between samples a
    document goes on where the next sample's first token is the last one's label.
    """
    if len(batches) == 1:
        return batches[0]
    rows, length = batches[0][1].shape

    def stream(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).view(rows, len(batches) * length)

    labels = stream([labels for _, labels in batches])
    inputs = {name: stream([inputs[name] for inputs, _ in batches]) for name in batches[0][0]}
    if "positions" in inputs:
        starts = inputs["positions"] == 0
        goes_on = inputs["input"][:, 1:] == labels[:, :-1]
        seam = torch.arange(1, labels.shape[1]) % length == 0
        starts[:, 1:] &= ~(goes_on & seam)
        inputs["positions"] = _since_start(starts)
    return inputs, labels


def superpose(
    inputs: Inputs, labels: Tensor, stage: Stage, *, weights: Tensor | None = None, separate_documents: bool
) -> tuple[Inputs, Tensor]:
    """``input [B, W]`` and next-token labels ``[B, W]`` to bags of ``stage``, where W is its window.

    Returns ``input [B, L, s]`` with labels ``[B, L, s]`` (mode full), ``[B, L, s]`` with ``[B, L]`` (input-only), or ``[B, L]``
    with ``[B, L, s]`` (output-only), and positions ``[B, L]``. Target i of a bag is the label of the bag's last token, i
    places on, as in the paper's listing 2: the last bag has one target, or none where the loader does not read a token beyond
    the window. ``weights [s]`` of the targets in a bag, which are equal without, become its ``position_weights [s]``.

    Packed documents: bags are cut from the stream and attention is causal over all of it. Separate documents: a document is
    cut into bags by itself and its targets end with it; the up to s − 1 tokens that do not fill a bag are only targets, and
    the positions that this leaves over at the end of a row hold token 0, a document of their own without targets.
    """
    extra = inputs.keys() - {"input", "positions"}
    if extra:
        raise ValueError(f"a superposed batch cannot carry {', '.join(sorted(extra))}")
    ids, bag_size = inputs["input"], stage.bag_size
    positions = inputs.get("positions")
    if separate_documents and positions is not None:
        ids, labels, positions = _cut_documents(ids, labels, positions, stage)
    else:
        if stage.target_bag == 1:
            labels = labels[:, bag_size - 1 :: bag_size]
        elif stage.input_bag == 1:
            labels = following_tokens(labels, bag_size)
        else:
            labels = fold(labels[:, bag_size - 1 :], bag_size, pad_value=IGNORE_INDEX)
        if stage.input_bag > 1:
            ids = fold(ids, bag_size)
        if positions is not None:
            positions = torch.arange(ids.shape[1]).expand(ids.shape[:2]).contiguous()
    batch = {"input": ids} if positions is None else {"input": ids, "positions": positions}
    if weights is not None:
        batch["position_weights"] = _balanced(weights, labels)
    return batch, labels


def _cut_documents(ids: Tensor, labels: Tensor, positions: Tensor, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    width = ids.shape[1]
    token = torch.arange(width).expand_as(ids)
    first = token - positions  # of the token's document
    starts = (positions == 0).where(token > 0, True)
    later = torch.where(starts, token, width)[:, 1:]
    end = torch.nn.functional.pad(later, (0, 1), value=width).flip(1).cummin(1).values.flip(1)  # of the token's document
    size = stage.input_bag
    whole = ((token - first) % size == 0) & (token + size <= end)
    bags = torch.where(whole, token, width).sort(1).values[:, : width // size]  # where they begin
    real = bags < width
    at = bags.clamp(max=width - 1)
    inputs = ids.gather(1, (at[..., None] + torch.arange(size)).clamp(max=width - 1).flatten(1)).unflatten(1, (-1, size))
    inputs = inputs.where(real[..., None], 0)
    target = at[..., None] + size - 1 + torch.arange(stage.target_bag)
    valid = real[..., None] & (target < end.gather(1, at)[..., None])
    targets = labels.gather(1, target.clamp(max=width - 1).flatten(1)).view_as(target).where(valid, IGNORE_INDEX)
    left_over = torch.arange(bags.shape[1]) - real.sum(1, keepdim=True)
    bag_positions = torch.where(real, (at - first.gather(1, at)) // size, left_over)
    return (
        inputs if stage.input_bag > 1 else inputs.squeeze(-1),
        targets if stage.target_bag > 1 else targets.squeeze(-1),
        bag_positions,
    )


def _since_start(starts: Tensor) -> Tensor:
    """``[B, W]`` flags of first tokens to the distance of each token from the last one; a row starts one."""
    token = torch.arange(starts.shape[1]).expand_as(starts)
    return token - torch.where(starts, token, 0).cummax(1).values


def _balanced(weights: Tensor, labels: Tensor) -> Tensor:
    """Weights ``[s]`` that add up to the number of valid targets, since TorchTitan divides by that number.

    Every micro-batch of a token stream lacks the same targets, so the loss of a step is the weighted mean over all of them.
    """
    valid = (labels != IGNORE_INDEX).sum((0, 1))
    return weights * valid.sum() / (weights * valid).sum().clamp(min=1e-12)
