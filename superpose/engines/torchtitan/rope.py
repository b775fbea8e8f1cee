"""Layers without rotary position embedding among layers with it, as SmolLM3 has them."""

from dataclasses import dataclass

from torch import Tensor
from torchtitan.models.common import ComplexRoPE


class NoRoPE(ComplexRoPE):
    """Leaves queries and keys as they are."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComplexRoPE.Config):
        pass

    def forward(self, query: Tensor, key: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return query, key
