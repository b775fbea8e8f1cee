"""Prepare a corpus: text to a token store, in two passes that need little memory whatever the size of the corpus.

Pass 1 tokenises the documents in the order of the sources into one file, and notes each document's length and content hash.
Pass 2 drops duplicates, shuffles the documents, divides them into train and validation and copies them into the shards. This
happens in a directory beside the store, which takes the store's name in one step at the end; it needs the space of two stores.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from superpose import __version__
from superpose.data.sources import Corpus, Piece
from superpose.data.store import (
    DTYPES,
    FORMAT,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Manifest,
    ShardWriter,
    SplitEntry,
    StoredFile,
    TokenStore,
    documents_name,
    dtype_name,
    read_manifest,
)
from superpose.data.tokenizer import StoreTokenizer, byte_tokenizer, given_tokenizer, trained_tokenizer
from superpose.errors import InputError

#: Characters tokenised at once; the tokens of one batch are what pass 1 holds in memory.
BATCH = 4 * 2**20
#: Bytes copied at once in pass 2.
COPY = 4 * 2**20
#: Seconds between two reports of the progress, on a terminal and elsewhere.
BAR_SECONDS, LINE_SECONDS = 0.1, 30.0

UNSHUFFLED_FILE = "unshuffled.bin"
DOCUMENTS_FILE = "unshuffled-documents.bin"
LOCK_FILE = "lock"
#: What pass 1 notes of each document: its tokens without the end-of-document token, its bytes in UTF-8, its content hash.
DOCUMENT = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("hash", "<u8")])

Report = Callable[[int, str], None]


def prepare(
    sources: list[str],
    out: Path,
    *,
    tokenizer: str | None = None,
    train_tokenizer: int | None = None,
    use_bytes: bool = False,
    eod_token: str | None = None,
    field: str = "text",
    split: str = "train",
    validation: float = 0.01,
    seed: int = 0,
    shard_tokens: int = 2**27,
    dataset_config: str | None = None,
) -> TokenStore:
    """Tokenise ``sources`` into a store at ``out`` and return its train split.

    sources: text files, .jsonl(.gz), .parquet, directories, globs, saved datasets, or ids of Hugging Face datasets.
    tokenizer: a tokenizer.json, a directory with one, or an id; train_tokenizer: train one of so many entries; use_bytes: none
    needed. Exactly one of the three.
    eod_token: the end-of-document token; by default the tokenizer's own.
    field: the JSON field or the column that holds the text. split, dataset_config: of Hugging Face datasets.
    validation: the least share of the tokens that becomes the validation split, in whole documents; 0 makes none.
    shard_tokens: tokens of a shard.

    A finished store made by the same arguments from the same files (by name and size) is returned as it is. Raises
    `InputError`; then, and on any other exception, ``out`` is as it was.
    """
    out = Path(out)
    if sum((tokenizer is not None, train_tokenizer is not None, use_bytes)) != 1:
        raise InputError("the tokenizer is not decided: give exactly one of --tokenizer, --train-tokenizer and --bytes")
    if not 0 <= validation < 1:
        raise InputError(f"validation must be a share of at least 0 and below 1, got {validation}")
    if shard_tokens < 1:
        raise InputError(f"shard_tokens must be at least 1, got {shard_tokens}")
    corpus = Corpus(sources, field=field, split=split, dataset_config=dataset_config)
    kind = tokenizer and _tokenizer_identity(tokenizer), train_tokenizer, use_bytes, eod_token
    settings = [kind, validation, seed, shard_tokens]
    fingerprint = hashlib.sha256(json.dumps([FORMAT, corpus.identity(), settings]).encode()).hexdigest()
    if _is_finished(out, fingerprint):
        print(f"{out} is up to date: same arguments, same files")
        return TokenStore(out)

    with _work_directory(out) as work:
        if tokenizer is not None:
            chosen = given_tokenizer(tokenizer, eod_token)
        elif train_tokenizer is not None:
            chosen = trained_tokenizer(corpus, train_tokenizer, eod_token)
        else:
            chosen = byte_tokenizer(eod_token)
        dtype = dtype_name(chosen.vocab_size)
        started = time.monotonic()
        _tokenise(corpus, chosen, DTYPES[dtype], work)
        speed = corpus.read / 1e6 / (time.monotonic() - started)
        splits, duplicates = _shuffle(work, chosen, DTYPES[dtype], validation, seed, shard_tokens)
        chosen.tokenizer.save(str(work / TOKENIZER_FILE))
        manifest: Manifest = {
            "format": FORMAT,
            "sources": sources,
            "tokenizer": {"name": chosen.name, "sha256": _sha256(work / TOKENIZER_FILE)},
            "vocab_size": chosen.vocab_size,
            "eod_id": chosen.eod_id,
            "eod_token": chosen.eod_token,
            "dtype": dtype,
            "seed": seed,
            "validation": validation,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "duplicates": duplicates,
            "fingerprint": fingerprint,
            "splits": splits,
        }
        (work / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _publish(work, out)
    store = TokenStore(out)
    _summarise(store, corpus.replaced, speed)
    return store


def _tokenise(corpus: Corpus, tokenizer: StoreTokenizer, dtype: np.dtype, work: Path) -> None:
    """Pass 1: `UNSHUFFLED_FILE` and `DOCUMENTS_FILE`."""
    documents = tokens = size = 0
    content = hashlib.blake2b(digest_size=8)
    with (
        open(work / UNSHUFFLED_FILE, "wb") as tokens_file,
        open(work / DOCUMENTS_FILE, "wb") as documents_file,
        _progress("tokenised", corpus.size) as report,
    ):
        for batch in _batches(corpus):
            records = []
            texts = [piece.text for piece in batch]
            for piece, ids in zip(batch, tokenizer.encode(texts, dtype), strict=True):
                tokens_file.write(ids.tobytes())
                data = piece.text.encode()
                content.update(data)
                tokens, size = tokens + len(ids), size + len(data)
                if piece.last:
                    records.append((tokens, size, int.from_bytes(content.digest())))
                    tokens = size = 0
                    content = hashlib.blake2b(digest_size=8)
            documents_file.write(np.array(records, DOCUMENT).tobytes())
            documents += len(records)
            report(corpus.read, f"{documents:,} documents")


def _batches(corpus: Corpus) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in corpus.pieces():
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _shuffle(
    work: Path, tokenizer: StoreTokenizer, dtype: np.dtype, validation: float, seed: int, shard_tokens: int
) -> tuple[dict[str, SplitEntry], int]:
    """Pass 2: the splits' files. Returns the manifest's entries and the number of duplicates dropped."""
    documents = np.fromfile(work / DOCUMENTS_FILE, DOCUMENT)
    starts = np.cumsum(documents["tokens"]) - documents["tokens"]
    filled = np.flatnonzero(documents["tokens"])
    if not len(filled):
        raise InputError("the sources hold no text: every document is empty")
    unique = filled[np.unique(documents["hash"][filled], return_index=True)[1]]
    order = np.random.default_rng(seed).permutation(np.sort(unique))
    parts = _divide(order, documents["tokens"] + 1, validation)
    splits: dict[str, SplitEntry] = {}
    total = int(documents["tokens"][order].sum()) * dtype.itemsize
    end = np.array(tokenizer.eod_id, dtype).tobytes()
    copied = 0
    with open(work / UNSHUFFLED_FILE, "rb") as unshuffled, _progress("shuffled", total) as report:
        for name, part in parts.items():
            writer = ShardWriter(work, name, dtype.itemsize, shard_tokens)
            for start, length in zip(starts[part].tolist(), documents["tokens"][part].tolist(), strict=True):
                at, stop = start * dtype.itemsize, (start + length) * dtype.itemsize
                while at < stop:
                    # read rather than mapped: pages touched once, at random, would count as memory of this process
                    data = os.pread(unshuffled.fileno(), min(COPY, stop - at), at)
                    writer.write(data)
                    at, copied = at + len(data), copied + len(data)
                    report(copied, name)
                writer.write(end)
            files = writer.close()
            index = np.zeros(len(part) + 1, "<u8")
            np.cumsum(documents["tokens"][part] + 1, out=index[1:])
            splits[name] = {
                "tokens": int(index[-1]),
                "documents": len(part),
                "bytes": int(documents["bytes"][part].sum()),
                "files": [*files, _save_index(work / documents_name(name), index)],
            }
    return splits, len(filled) - len(unique)


def _divide(order: NDArray[np.int64], tokens: NDArray[np.uint64], validation: float) -> dict[str, NDArray[np.int64]]:
    """The shuffled documents ``order`` as splits: validation takes from the front until it holds its share of the tokens."""
    if validation == 0:
        return {"train": order}
    if len(order) == 1:
        raise InputError(
            "the corpus is one document, which train and validation cannot share: add another or give --validation 0"
        )
    held = np.cumsum(tokens[order])
    count = min(int(np.searchsorted(held, validation * held[-1])) + 1, len(order) - 1)
    return {"train": order[count:], "validation": order[:count]}


def _save_index(path: Path, index: NDArray[np.uint64]) -> StoredFile:
    np.save(path, index)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _publish(work: Path, out: Path) -> None:
    (work / UNSHUFFLED_FILE).unlink()
    (work / DOCUMENTS_FILE).unlink()
    for file in [*work.iterdir(), work]:
        _sync(file)
    target = out.resolve()
    os.rename(work, target)
    _sync(target.parent)
    (target / LOCK_FILE).unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer_identity(tokenizer: str) -> list[str]:
    path = Path(tokenizer)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    return [str(file.resolve()), _sha256(file)] if file.is_file() else [tokenizer]


def _is_finished(out: Path, fingerprint: str) -> bool:
    """Whether ``out`` is the store asked for; InputError where it is anything else that must not be overwritten."""
    if os.path.ismount(out):
        raise InputError(f"{out} is a mount point, which a store cannot replace: choose a directory inside it as --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if (out / MANIFEST_FILE).is_file():
        if read_manifest(out)["fingerprint"] == fingerprint:
            return True
        raise InputError(f"{out} is a store made by other arguments or from other files: remove it or choose another --out")
    raise InputError(f"{out} exists and is not an empty directory: remove it or choose another --out")


@contextmanager
def _work_directory(out: Path) -> Iterator[Path]:
    """The empty, locked directory in which ``out`` is made; removed if that fails."""
    target = out.resolve()
    work = target.with_name(f".{target.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}): choose another --out") from None
    with open(work / LOCK_FILE, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a run that ended in between has moved or removed the file that was opened here
            held = os.path.samestat(os.fstat(lock.fileno()), os.stat(work / LOCK_FILE))
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise InputError(f"another prepare is making {out} at the moment: wait for it or choose another --out")
        leftovers = [file for file in work.iterdir() if file.name != LOCK_FILE]
        if leftovers:
            print(f"removing what an interrupted run left in {work}", file=sys.stderr)
        for file in leftovers:
            file.unlink()
        try:
            yield work
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


@contextmanager
def _progress(verb: str, total: int | None) -> Iterator[Report]:
    """Report bytes done and a note on stderr: a bar on a terminal, elsewhere a line now and then."""
    console = Console(stderr=True)
    interval = BAR_SECONDS if console.is_terminal else LINE_SECONDS
    started = shown = time.monotonic()
    columns = (BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(verb, total=total)

        def report(done: int, note: str) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown < interval:
                return
            shown = now
            of = "" if total is None else f" of {total / 1e6:,.0f}"
            line = f"{verb} {done / 1e6:,.0f}{of} MB, {done / 1e6 / (now - started):,.1f} MB/s, {note}"
            if console.is_terminal:
                bar.update(task, completed=done, description=line)
            else:
                print(line, file=sys.stderr)

        yield report


def _summarise(store: TokenStore, replaced: int, speed: float) -> None:
    splits = store.manifest["splits"]
    tokens, documents, size = (sum(entry[key] for entry in splits.values()) for key in ("tokens", "documents", "bytes"))
    print(
        f"{store.path}: {tokens:,} tokens of {store.manifest['tokenizer']['name']} in {documents:,} documents, "
        f"{size / tokens:.2f} bytes per token, {store.manifest['duplicates']:,} duplicates dropped, {speed:.1f} MB/s"
    )
    for name, entry in splits.items():
        print(f"  {name}: {entry['tokens']:,} tokens in {entry['documents']:,} documents")
    if replaced:
        print(f"  {replaced:,} undecodable bytes were replaced by U+FFFD")
