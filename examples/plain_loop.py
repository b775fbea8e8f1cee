"""Token superposition in a plain PyTorch loop, on a model of your own. Three lines differ from ordinary training.

superpose prepare 'src/**/*.py' --bytes --out data
python examples/plain_loop.py data
"""

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import superpose as sp


class Decoder(nn.Module):
    """A small causal transformer that starts at embeddings and ends at hidden states; the head is a weight [V, d]."""

    def __init__(self, vocab_size: int, positions: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.places = nn.Parameter(0.02 * torch.randn(positions, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, embedded: Tensor) -> Tensor:
        length = embedded.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.layers(embedded + self.places[:length], mask=mask, is_causal=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="directory made by superpose prepare")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.3)
    arguments = parser.parse_args()
    positions, sequences = 64, 16
    torch.manual_seed(0)
    store = sp.TokenStore(arguments.data)
    model = Decoder(store.vocab_size, positions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))

    schedule = sp.Schedule.tst(arguments.steps, arguments.bag_size, arguments.ratio)
    data = sp.ScheduledTokens(store, schedule, positions=positions, sequences_per_step=sequences)  # 1: windows of L·s tokens
    for step, batch in enumerate(DataLoader(data, batch_size=sequences), 1):
        ids, targets = batch["input_ids"], sp.next_position_targets(batch["labels"])
        bags = ids if ids.dim() == 3 else ids.unsqueeze(-1)  # a plain token is a bag of one
        hidden = model(sp.bag_mean(model.embedding.weight, bags))  # 2: bags in
        loss = sp.linear_multi_hot_cross_entropy(hidden, model.head.weight, targets)  # 3: the whole next bag out
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == schedule.steps:
            kind = "bag loss" if ids.dim() == 3 else "loss"
            print(f"step {step}: {kind} {loss.item():.3f}")


if __name__ == "__main__":
    main()
