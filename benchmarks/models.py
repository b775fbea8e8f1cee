"""The models and the optimizer that the benchmarks train."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """A Llama with untied embedding and head, and the batch it is trained on."""

    name: str
    width: int
    layers: int
    heads: int
    vocabulary: int
    positions: int = 256
    sequences: int = 8

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                intermediate_size=8 * self.width // 3,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=self.positions,
            )
        ).train()

    def ids(self, bag_size: int) -> Tensor:
        """``[sequences, positions]``, or ``[sequences, positions, bag_size]`` above a bag of one."""
        bag = () if bag_size == 1 else (bag_size,)
        return torch.randint(self.vocabulary, (self.sequences, self.positions, *bag))


SMALL = Shape("0.4M parameters", width=96, layers=3, heads=3, vocabulary=257, sequences=16)
MEDIUM = Shape("30M parameters", width=384, layers=12, heads=6, vocabulary=8192, sequences=4)


class Step:
    """One training step of a model: forward, backward, clipping, fused AdamW."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def __call__(self, ids: Tensor) -> None:
        self.model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
