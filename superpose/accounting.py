"""What a model costs: parameters, and training FLOPs per position."""

from typing import Any

from torch import nn


def count_parameters(model: nn.Module) -> dict[str, int]:
    """``total``; ``embedding`` (input tables that are not also the head); ``active`` (experts by their share per token)."""
    active = sum(_active_sizes(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = {id(module.weight): module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)}
    head = _head_weight(model)
    embedding = sum(size for key, size in tables.items() if key != id(head))
    return {"total": total, "embedding": embedding, "active": active}


def flops_per_position(model: nn.Module, positions: int) -> float:
    """Training FLOPs (forward and backward) of one position in a sequence of ``positions``.

    6 for each parameter that multiplies an activation (the head counted, input tables not, experts by the share used per
    token), plus 12 · layers · heads · head width · positions for attention scores and values, the usual convention, which
    counts the masked half too. Sliding windows and recurrences are not modelled.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - {id(_head_weight(model))}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sizes = _active_sizes(model)
    products = sum(
        sizes[names[id(parameter)]] for parameter in model.parameters() if parameter.dim() >= 2 and id(parameter) not in tables
    )
    config: Any = model.config
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return 6.0 * products + 12.0 * config.num_hidden_layers * heads * width * positions


def _head_weight(model: Any) -> Any:
    head = model.get_output_embeddings()
    return None if head is None else head.weight


def _active_sizes(model: Any) -> dict[str, int]:
    """Size of each parameter by name; of a bank of routed experts, the share that one token uses."""
    config = model.config.get_text_config()
    used = getattr(config, "num_experts_per_tok", None)
    experts = next(
        (n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(config, key, None))), None
    )
    return {
        name: parameter.numel() * used // experts if used and experts and ".experts." in name else parameter.numel()
        for name, parameter in model.named_parameters()
    }
