"""Any transformers causal language model, made to read bags and to learn from them, and made stock again.

`attach` puts classes in front of those of the model, its embedding and its head, which changes these things and no module,
parameter or file:

* ids with a bag axis, ``[batch, positions, bag]``, become the mean of their embeddings and go in as ``inputs_embeds``. The
  embedding's own forward takes the mean, inside the model's: under FSDP2 its weight is whole only there;
* while the model trains, or whenever labels have a bag axis, its head hands the hidden states through and its
  ``loss_function`` gets them with the head's weight: `superpose.loss.linear_multi_hot_cross_entropy`, in both phases and for
  the baseline. The model's own forward stays in charge, so auxiliary losses and linear scalings of the logits are kept. No
  logits are returned then;
* a soft-cap on the logits (Gemma 2) is left to the loss: the config has none while the hidden states pass. A model that bends
  its logits otherwise (a bias) computes them in full, and the loss takes those.

Evaluation with plain labels, ``generate``, the state dict and saved files are the stock model's.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from superpose.bags import IGNORE_INDEX, next_position_targets
from superpose.embedding import bag_mean
from superpose.loss import linear_multi_hot_cross_entropy, multi_hot_cross_entropy

#: The field of a config that caps the logits, which models read at each forward and may find to be None.
SOFT_CAP = "final_logit_softcapping"


def attach(model: Any, *, sum_to_one: bool = False, z_loss: float = 0.0) -> Any:
    """Make a transformers causal language model accept bags. Returns the same model, changed in place.

    ``model(input_ids, labels=labels)`` then takes ids ``[B, L]`` or ``[B, L, s]``, and labels ``[B, L]`` or ``[B, L, s]`` equal
    to the ids; the shift by one position, a token or a bag, happens inside. ``position_weights [s]`` (or ``[B, s]``, all rows
    equal, as a collator stacks them) weigh the targets in a bag. ``sum_to_one`` selects that form of the loss, and ``z_loss``
    is the coefficient of that term, in both phases.
    The loss of a batch is its mean, so micro-batches that are accumulated must hold equally many targets, as windows of a
    token stream do. Raises ValueError for a model without an embedding table and a head.
    """
    if isinstance(model, _Superposed):
        raise ValueError("the model is attached already: detach it first")
    table, head = _input_embedding(model), _head(model)
    _check_embedding(table)
    lean = _takes_lean_loss(model, head)
    model.__class__ = _superposed_class(type(model))
    model._superpose = _State(sum_to_one, z_loss)
    table.__class__ = _bag_embedding_class(type(table))
    if lean:
        head.__class__ = _pass_through_class(type(head))
        head.hands_through = False
        if "forward" in vars(head):
            head.forward = functools.partial(_forward_over_hook, head, head.forward)
    return model


def detach(model: Any) -> Any:
    """Undo `attach`: the same model, of its stock class again."""
    if not isinstance(model, _Superposed):
        raise ValueError("the model is not attached")
    table, head = _input_embedding(model), _head(model)
    if isinstance(head, _PassThrough):
        del head.hands_through
        if "forward" in vars(head):
            head.forward = head.forward.args[1]
        head.__class__ = type(head).__mro__[2]
    table.__class__ = type(table).__mro__[2]
    del model._superpose
    model.__class__ = type(model).__mro__[2]
    return model


@dataclass
class _State:
    """What an attached model holds beside its own attributes; ``weights`` only during a call."""

    sum_to_one: bool
    z_loss: float
    weights: Tensor | None = None
    soft_cap: float | None = None
    active: bool = False
    used: bool = False


class _Superposed:
    """Marks the class that stands in front of an attached model's own."""

    _superpose: _State


class _BagEmbedding:
    """Marks the class that stands in front of an attached embedding's own."""


class _PassThrough:
    """Marks the class that stands in front of an attached head's own."""

    hands_through: bool
    weight: Tensor
    forward: Any


def _superposed_class(stock: Any) -> Any:
    signature = inspect.signature(stock.forward)
    parameters = [*signature.parameters.values()]
    extra = inspect.Parameter("position_weights", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(at, extra)

    @functools.wraps(stock.forward)
    def forward(self: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        weights = kwargs.pop("position_weights", None)
        labels = kwargs.get("labels")
        if input_ids is not None and input_ids.dim() == 3:
            kwargs["inputs_embeds"] = _bag_embeddings(_input_embedding(self), input_ids)
            input_ids = None
        state, head = self._superpose, _head(self)
        in_bags = labels is not None and labels.dim() == 3
        lean = isinstance(head, _PassThrough) and (in_bags or (self.training and labels is not None))
        if not lean and not in_bags:
            return stock.forward(self, input_ids, *args, **kwargs)
        state.active, state.used = True, False
        state.weights = weights[0] if weights is not None and weights.dim() == 2 else weights
        soft_cap = getattr(self.config, SOFT_CAP, None)
        if lean:
            head.hands_through = True
            if soft_cap is not None:
                state.soft_cap = soft_cap
                setattr(self.config, SOFT_CAP, None)
        try:
            outputs = stock.forward(self, input_ids, *args, **kwargs)
        finally:
            state.active, state.weights, state.soft_cap = False, None, None
            if lean:
                head.hands_through = False
                if soft_cap is not None:
                    setattr(self.config, SOFT_CAP, soft_cap)
        if not state.used:
            raise ValueError(f"{stock.__name__} does not compute its loss with loss_function: superpose cannot replace it")
        return _without_logits(outputs) if lean else outputs

    def loss_function(self: Any) -> Callable[..., Tensor]:
        state = self.__dict__.get("_superpose")
        if state is None or not state.active:
            return stock.loss_function.fget(self)
        return functools.partial(_loss, self)

    vars(forward)["__signature__"] = signature.replace(parameters=parameters)
    members = {
        "forward": forward,
        "loss_function": stock.loss_function.getter(loss_function),
        # The Trainer counts targets as labels[..., 1:], wrong with a bag axis; without loss kwargs it averages micro-batches.
        "accepts_loss_kwargs": False,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
    }
    return type(stock.__name__, (_Superposed, stock), members)


def _bag_embedding_class(stock: Any) -> Any:
    def forward(self: Any, ids: Tensor) -> Tensor:
        if ids.dim() < 3:
            return stock.forward(self, ids)
        embeddings = bag_mean(self.weight, ids)
        scale = getattr(self, "embed_scale", None)  # of a scaled embedding (Gemma 3); linear, so it commutes with the mean
        return embeddings if scale is None else embeddings * torch.as_tensor(scale).to(embeddings)

    return type(stock.__name__, (_BagEmbedding, stock), {"forward": forward, "__module__": stock.__module__})


def _pass_through_class(stock: Any) -> Any:
    def forward(self: Any, hidden: Tensor) -> Tensor:
        return hidden if self.hands_through else stock.forward(self, hidden)

    return type(stock.__name__, (_PassThrough, stock), {"forward": forward, "__module__": stock.__module__})


def _loss(
    model: Any, logits: Tensor, labels: Tensor, vocab_size: int | None = None, *, shift_labels: Tensor | None = None, **_: Any
) -> Tensor:
    """Stands in for ``model.loss_function``: ``logits`` are the hidden states where the head hands them through."""
    state, head = model._superpose, _head(model)
    state.used = True
    targets = next_position_targets(labels) if shift_labels is None else shift_labels
    weights = state.weights if targets.dim() == 3 else None
    options = {
        "weights": weights,
        "ignore_index": IGNORE_INDEX,
        "sum_to_one": state.sum_to_one,
        "z_loss": state.z_loss,
    }
    targets = targets.to(logits.device)
    if not isinstance(head, _PassThrough):
        return multi_hot_cross_entropy(logits, targets, **options)
    if hasattr(head, "unshard"):
        head.unshard()  # a unit of FSDP2 may have been sharded again after its forward
    if not hasattr(head.weight, "device_mesh"):
        return linear_multi_hot_cross_entropy(logits, head.weight, targets, soft_cap=state.soft_cap, **options)
    if "forward" not in vars(head):
        raise ValueError("the head's weight is sharded when the loss needs it: shard the head by itself or with its root")
    # transformers' tensor parallelism: every rank has the same hidden states and a share of the vocabulary
    from torch.distributed.tensor import DTensor, Replicate

    hidden = DTensor.from_local(logits, head.weight.device_mesh, [Replicate()], run_check=False)
    loss: Any = linear_multi_hot_cross_entropy(hidden, head.weight, targets, soft_cap=state.soft_cap, **options)
    return loss.to_local()


def _bag_embeddings(table: Any, ids: Tensor) -> Tensor:
    if "forward" not in vars(table):
        return table(ids)
    # somebody else's forward stands before the class's (tensor parallelism): it looks up, and the mean follows
    embeddings = table(ids)
    return embeddings.mean(-2, dtype=torch.float32).to(embeddings.dtype)


def _forward_over_hook(head: Any, hooked: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """For a head that has a forward of its own (tensor parallelism), which the class's does not reach."""
    return hidden if head.hands_through else hooked(hidden)


def _without_logits(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return (outputs[0], None, *outputs[2:])
    return type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})


def _input_embedding(model: Any) -> Any:
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(table, nn.Embedding):
        raise ValueError(f"{type(model).__name__} has no embedding table that superpose can read: it needs torch.nn.Embedding")
    return table


def _head(model: Any) -> Any:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head: load it as a causal language model")
    return head


def _check_embedding(table: nn.Embedding) -> None:
    if not hasattr(table, "embed_scale") and type(table).forward is not nn.Embedding.forward:
        raise ValueError(f"{type(table).__name__} changes its embeddings in a way that superpose does not know")


def _takes_lean_loss(model: Any, head: nn.Module) -> bool:
    """Whether loss(logits) may be computed from the head's input: the head is a plain product and nothing bends its output."""
    config = model.config.get_text_config()
    bent = any(
        value
        for name, value in config.to_dict().items()
        if "logit" in name and "cap" in name and not name.startswith(("attn", "attention", "conf_attention", "moe", "router"))
        if name != SOFT_CAP or config is not model.config
    )
    plain = type(head).forward is nn.Linear.forward and getattr(head, "bias", None) is None
    return plain and not bent
