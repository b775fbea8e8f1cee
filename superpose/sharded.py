"""A head sharded over the vocabulary (tensor parallelism): each rank has the logits of its own tokens and never the others'.

Of a row the ranks exchange the largest logit, the sum of exponentials, and the logits of its targets; the gradient of the
hidden states is a sum over the ranks, and that of the weight stays where the weight is.
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


class Parts(NamedTuple):
    """What one rank computes with; all local tensors."""

    #: [..., d], the same rows on every rank
    hidden: Tensor
    #: [rows of this rank, d]
    weight: Tensor
    targets: Tensor
    mesh: Any
    #: the first token of this rank's share
    first: int
    #: rows of the largest share, the same number on every rank
    most_rows: int

    @property
    def group(self) -> str:
        return self.mesh.get_group().group_name

    def replicated(self, loss: Tensor) -> DTensor:
        return DTensor.from_local(loss, self.mesh, [Replicate()], run_check=False)


def local_parts(hidden: Tensor, weight: Tensor, targets: Tensor) -> Parts:
    """This rank's parts of ``hidden [..., d]`` and ``weight [V, d]``, DTensors on a mesh of one dimension.

    The weight has the placement ``Shard(0)``. ``targets`` are the whole ones, or a DTensor. Hidden states sharded otherwise
    (sequence parallelism) are gathered.
    """
    assert isinstance(weight, DTensor)
    mesh = weight.device_mesh
    if weight.placements != (Shard(0),):
        raise ValueError(
            f"the head's weight has placements {weight.placements}: the loss takes Shard(0) on a mesh of one dimension"
        )
    if not isinstance(hidden, DTensor):
        # Rows of one rank and rows shared by all look alike here, and taking one for the other gives wrong gradients unnoticed.
        raise ValueError(
            "the head's weight is a DTensor and hidden is not: under tensor parallelism pass "
            "DTensor.from_local(hidden, mesh, [Replicate()]); under FSDP2 call the loss inside the root's forward, or "
            "unshard() the head before it"
        )
    if hidden.device_mesh != mesh:
        raise ValueError("hidden and the head's weight lie on different meshes")
    vocabulary, ranks = weight.shape[0], mesh.size()
    most_rows = -(-vocabulary // ranks)
    if most_rows * (ranks - 1) >= vocabulary:
        raise ValueError(f"a vocabulary of {vocabulary} leaves a rank of {ranks} without a token")
    if isinstance(targets, DTensor):
        targets = targets.full_tensor()
    return Parts(
        hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()]),
        weight.to_local(),
        targets,
        mesh,
        mesh.get_local_rank() * most_rows,
        most_rows,
    )
