"""The tokenizer of a store: a given one, one trained on the corpus, or plain bytes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from superpose.data.sources import Corpus, Piece
from superpose.data.store import TOKENIZER_FILE
from superpose.errors import InputError

#: The end-of-document token of the two built-in kinds, and the first looked for in others.
END_OF_TEXT = "<|endoftext|>"
COMMON_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")

#: Characters a tokenizer is trained on, at most.
SAMPLE = 100_000_000
#: Characters read of a dataset of the hub to choose these from: it is downloaded a second time for tokenising.
HUB_SAMPLE = 10 * SAMPLE
BYTES = 256


@dataclass(frozen=True)
class StoreTokenizer:
    """A tokenizer and its end-of-document token. ``plain_bytes``: ids below 256 are bytes, encoded without the tokenizer."""

    name: str
    tokenizer: Tokenizer
    eod_token: str
    plain_bytes: bool = False

    @property
    def eod_id(self) -> int:
        return self.tokenizer.get_vocab()[self.eod_token]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, which is more than the number of entries where ids were left out."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def encode(self, texts: list[str], dtype: np.dtype) -> list[NDArray]:
        """The tokens of each text, without special tokens: their names, where a text spells them, are text like any other."""
        if self.plain_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(dtype) for text in texts]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype) for encoding in encodings]


def given_tokenizer(name: str, eod_token: str | None = None) -> StoreTokenizer:
    """A ``tokenizer.json``, a directory that holds one, or an id that transformers loads; InputError where it is none."""
    path, end = Path(name), None
    if path.is_dir() and (path / TOKENIZER_FILE).is_file():
        tokenizer, end = _from_file(path / TOKENIZER_FILE), _configured_end(path / "tokenizer_config.json")
    elif path.is_file():
        tokenizer = _from_file(path)
    else:
        tokenizer, end = _from_transformers(name)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab()
    if eod_token is None:
        eod_token = next((token for token in (end, *COMMON_ENDS) if token in vocabulary), None)
    if eod_token is None:
        raise InputError(f"{name} names no end-of-document token: name one of its tokens with --eod-token")
    return _finished(StoreTokenizer(name, tokenizer, eod_token))


def trained_tokenizer(corpus: Corpus, entries: int, eod_token: str | None = None) -> StoreTokenizer:
    """A byte-level BPE of at most ``entries`` entries, trained on an even sample of ``corpus``; deterministic."""
    if entries <= BYTES:
        raise InputError(f"train_tokenizer must be at least {BYTES + 1}, the bytes and the end of a document, got {entries}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(even_sample(corpus.pieces(hub_characters=HUB_SAMPLE), SAMPLE), trainer)
    return _finished(StoreTokenizer(f"byte-level BPE, {entries} entries", tokenizer, eod_token or END_OF_TEXT))


def byte_tokenizer(eod_token: str | None = None) -> StoreTokenizer:
    """Ids 0 … 255 are the bytes of UTF-8, 256 ends a document. The tokenizer gives the ids that `encode` does."""
    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in enumerate(_byte_characters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _finished(StoreTokenizer("bytes", tokenizer, eod_token or END_OF_TEXT, plain_bytes=True))


def even_sample(pieces: Iterable[Piece], characters: int) -> list[str]:
    """At most ``characters`` of text as every n-th piece, n a power of two found on the way."""
    kept: list[str] = []
    total, stride = 0, 1
    for index, piece in enumerate(pieces):
        if index % stride:
            continue
        kept.append(piece.text)
        total += len(piece.text)
        while total > characters and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            total = sum(map(len, kept))
    return kept


def _finished(tokenizer: StoreTokenizer) -> StoreTokenizer:
    if tokenizer.tokenizer.token_to_id(tokenizer.eod_token) is None:
        raise InputError(f"--eod-token {tokenizer.eod_token!r} is not a token of {tokenizer.name}: name one in its vocabulary")
    # not part of tokenizer.json: a document that spells the end-of-document token must not end there
    tokenizer.tokenizer.encode_special_tokens = True
    return tokenizer


def _from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path} is not a tokenizer.json of the tokenizers library ({error})") from None


def _from_transformers(name: str) -> tuple[Tokenizer, str | None]:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name)
        tokenizer: Tokenizer = loaded.backend_tokenizer
    except Exception as error:  # of the hub client, of transformers, or an AttributeError of a tokenizer written in Python
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name} is neither a tokenizer.json, nor a directory with one, nor an id that transformers loads ({reason})"
        ) from None
    return tokenizer, loaded.eos_token


def _configured_end(path: Path) -> str | None:
    """The ``eos_token`` of a ``tokenizer_config.json``: a string, or an object with its ``content``."""
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_bytes()).get("eos_token")
    except (ValueError, AttributeError):
        raise InputError(f"{path} is not a tokenizer_config.json: mend it or remove it") from None
    return token["content"] if isinstance(token, dict) else token


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself where printable, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES)]
