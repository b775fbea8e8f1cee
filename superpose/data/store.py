"""The token store: one split of a prepared corpus, memory-mapped.

A store is a directory: ``manifest.json``, ``tokenizer.json`` and, for each split, shards of little-endian token ids
(``train-00000.bin`` …) and the document index (``train-documents.npy``). A split is one stream of tokens, each document
followed by the end-of-document token. `superpose.data.prepare` writes it.
"""

import hashlib
import json
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from superpose.errors import InputError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
#: Token types by name, smallest first: the bytes on disk are little endian on every machine.
DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("<u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class StoredFile(TypedDict):
    """A file of a split. ``bytes``: its size; ``tokens``: of a shard, not of the document index."""

    name: str
    tokens: NotRequired[int]
    bytes: int
    sha256: str


class SplitEntry(TypedDict):
    """A split. ``tokens``: end-of-document tokens counted; ``bytes``: of the text in UTF-8; ``files``: shards, then index."""

    tokens: int
    documents: int
    bytes: int
    files: list[StoredFile]


class Manifest(TypedDict):
    """``manifest.json``."""

    format: int
    sources: list[str]
    tokenizer: dict[str, str]
    vocab_size: int
    eod_id: int
    eod_token: str
    dtype: str
    seed: int
    validation: float
    created: str
    version: str
    duplicates: int
    fingerprint: str
    splits: dict[str, SplitEntry]


def dtype_name(vocab_size: int) -> str:
    """The name in `DTYPES` of the smallest type that holds every id below ``vocab_size``."""
    return next(name for name, dtype in DTYPES.items() if vocab_size <= 2 ** (8 * dtype.itemsize))


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.bin"


def documents_name(split: str) -> str:
    return f"{split}-documents.npy"


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store at ``path``; `InputError` where there is none or it is of another format."""
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise InputError(f"{path} is not a token store (it has no {MANIFEST_FILE}): make one with `superpose prepare`")
    try:
        manifest: Manifest = json.loads(file.read_bytes())
        written = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is damaged: it is not the manifest of a token store; prepare the store again") from None
    if written != FORMAT:
        raise InputError(f"{file} has format {written}, this version reads {FORMAT}: prepare the store again")
    return manifest


class TokenStore:
    """One split of a prepared directory, read at any offset.

    path: the directory that `superpose prepare` wrote.
    split: "train" or "validation".
    verify: compare the checksum of every file at once (see `verify`); otherwise only names and sizes are checked.

    ``len`` is the number of tokens, end-of-document tokens included. Files are mapped when first read, and a pickled store (for
    the workers of a DataLoader) carries its path and split alone. Raises `InputError` for what is not a whole store.
    """

    def __init__(self, path: str | Path, split: str = "train", verify: bool = False) -> None:
        self.path, self.split = Path(path), split
        self.manifest = read_manifest(self.path)
        if split not in self.manifest["splits"]:
            available = ", ".join(self.manifest["splits"])
            raise InputError(f"{self.path} has no split {split!r}, it has {available}: take one of these or prepare another")
        entry = self.manifest["splits"][split]
        self.vocab_size, self.eod_id = self.manifest["vocab_size"], self.manifest["eod_id"]
        self.tokens, self.documents, self.bytes = entry["tokens"], entry["documents"], entry["bytes"]
        self.tokenizer_file = self.path / TOKENIZER_FILE
        self._dtype = DTYPES[self.manifest["dtype"]]
        self._files = entry["files"]
        self._shards = [file for file in self._files if "tokens" in file]
        self._shard_starts = list(accumulate((file["tokens"] for file in self._shards), initial=0))
        self._mapped: dict[int, NDArray[Any]] = {}
        self._check_sizes()
        if verify:
            self.verify()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token, end-of-document tokens counted: bits per byte = nats per token / ln 2 / this."""
        return self.bytes / self.tokens

    @cached_property
    def document_starts(self) -> NDArray[np.uint64]:
        """Offsets ``[documents + 1]`` into the split: document i is tokens ``[i]`` to ``[i + 1]``, its end token the last."""
        starts: NDArray[np.uint64] = np.load(self.path / documents_name(self.split), mmap_mode="r")
        return starts

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """``count`` contiguous tokens from offset ``start``, int64 ``[count]``; ValueError where they leave the split."""
        end = start + count
        if start < 0 or count < 0 or end > self.tokens:
            raise ValueError(f"tokens {start} to {end} lie outside of the {self.tokens} of {self.path}, split {self.split}")
        tokens = np.empty(count, np.int64)
        at = start
        while at < end:
            index = bisect_right(self._shard_starts, at) - 1
            stop = min(end, self._shard_starts[index + 1])
            first = self._shard_starts[index]
            tokens[at - start : stop - start] = self._shard(index)[at - first : stop - first]
            at = stop
        return tokens

    def verify(self) -> None:
        """Read every file of the split, and the tokenizer; `InputError` names the first that differs from its checksum."""
        checksums = {file["name"]: file["sha256"] for file in self._files}
        checksums[TOKENIZER_FILE] = self.manifest["tokenizer"]["sha256"]
        for name, expected in checksums.items():
            with open(self.path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise InputError(
                    f"{self.path / name} is corrupted: its checksum differs from the manifest; prepare the store again"
                )

    def __len__(self) -> int:
        return self.tokens

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}, {self.split!r}): {self.tokens:,} tokens, {self.documents:,} documents"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _check_sizes(self) -> None:
        for stored in self._files:
            file = self.path / stored["name"]
            if not file.is_file():
                raise InputError(f"{file} is missing: prepare the store again")
            if file.stat().st_size != stored["bytes"]:
                raise InputError(
                    f"{file} has {file.stat().st_size} bytes where the manifest has {stored['bytes']}: prepare the store again"
                )
        if not self.tokenizer_file.is_file():
            raise InputError(f"{self.tokenizer_file} is missing: prepare the store again")

    def _shard(self, index: int) -> NDArray[Any]:
        if index not in self._mapped:
            self._mapped[index] = np.memmap(self.path / self._shards[index]["name"], self._dtype, mode="r")
        return self._mapped[index]


class ShardWriter:
    """Cuts one stream of bytes into shards of ``shard_tokens`` tokens, and takes their checksums on the way."""

    def __init__(self, work: Path, split: str, itemsize: int, shard_tokens: int) -> None:
        self.work, self.split, self.itemsize, self.capacity = work, split, itemsize, shard_tokens * itemsize
        self.files: list[StoredFile] = []
        self._open()

    def write(self, data: bytes) -> None:
        """Append whole tokens."""
        while data:
            if self.size == self.capacity:
                self._finish()
                self._open()
            part, data = data[: self.capacity - self.size], data[self.capacity - self.size :]
            self.file.write(part)
            self.hash.update(part)
            self.size += len(part)

    def close(self) -> list[StoredFile]:
        """The manifest's entries of the shards."""
        self._finish()
        return self.files

    def _open(self) -> None:
        self.file = (self.work / shard_name(self.split, len(self.files))).open("wb")
        self.hash, self.size = hashlib.sha256(), 0

    def _finish(self) -> None:
        self.file.close()
        name = shard_name(self.split, len(self.files))
        tokens = self.size // self.itemsize
        self.files.append({"name": name, "tokens": tokens, "bytes": self.size, "sha256": self.hash.hexdigest()})
