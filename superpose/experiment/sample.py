"""Text from a trained model, with plain transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, set_seed

from superpose.data.store import TokenStore
from superpose.errors import InputError


def store_tokenizer(store: TokenStore) -> PreTrainedTokenizerFast:
    """The tokenizer that a store was prepared with, to be saved beside a model."""
    eod = store.manifest["eod_token"]
    return PreTrainedTokenizerFast(tokenizer_file=str(store.tokenizer_file), eos_token=eod, bos_token=eod)


def load(kind: Any, model: str | Path) -> Any:
    """``kind.from_pretrained(model)``, a directory or a hub id; InputError where there is nothing to load."""
    try:
        return kind.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(f"{model} is not a model that transformers can load: {str(error).splitlines()[0]}") from None


def generate(model: str | Path, prompt: str = "", *, max_new_tokens: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
    """Continue ``prompt`` with a saved model (greedily at temperature 0) and return prompt and continuation.

    A document starts after an end-of-document token, so that is what the prompt is put behind. Stops at the longest sequence
    that the model was built for.
    """
    network, tokenizer = load(AutoModelForCausalLM, model), load(AutoTokenizer, model)
    set_seed(seed)
    longest = getattr(network.config, "max_position_embeddings", None)
    ids = [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    options = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    if longest is not None:
        max_new_tokens = max(1, min(max_new_tokens, longest - len(ids)))
    network.eval()
    with torch.no_grad():
        tokens = network.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **options,
        )
    return str(tokenizer.decode(tokens[0, 1:], skip_special_tokens=True))
