"""Preparing a corpus against ``datasets.map`` with the same tokenizer, and reading it back under a schedule."""

import collections
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from corpus import quietly, write_corpus
from timing import Figures, Table, in_turn
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from superpose import Schedule, ScheduledTokens, TokenStore
from superpose.data.prepare import prepare as superpose_prepare

SIZE, QUICK_SIZE, TRAINING_SIZE = 20e6, 1e6, 1e6
ENTRIES = 4096
POSITIONS, SEQUENCES, STEPS = 1024, 8, 200


def run(*, quick: bool) -> Figures:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        write_corpus(work / "sample.jsonl", int(TRAINING_SIZE))
        with quietly():
            sample = superpose_prepare([str(work / "sample.jsonl")], work / "sample", train_tokenizer=ENTRIES)
        size = write_corpus(work / "corpus.jsonl", int(QUICK_SIZE if quick else SIZE))
        preparing, store = _preparing(work, sample.tokenizer_file, size, quick)
        note = "the token counts differ where superpose cuts long documents into pieces before it tokenises"
        return Figures([preparing, _reading(store, quick)], notes=[note])


def _preparing(work: Path, tokenizer: Path, size: int, quick: bool) -> tuple[Table, TokenStore]:
    corpus, tokens = work / "corpus.jsonl", {}

    def ours() -> None:
        shutil.rmtree(work / "store", ignore_errors=True)
        with quietly():
            store = superpose_prepare([str(corpus)], work / "store", tokenizer=str(tokenizer), validation=0)
        tokens["superpose prepare"] = len(store)

    def theirs() -> None:
        shutil.rmtree(work / "cache", ignore_errors=True)
        tokens["datasets.map"] = _with_datasets(corpus, tokenizer, work)

    table = Table(f"preparing {size / 1e6:.0f} MB of JSON lines, byte-level BPE of {ENTRIES} entries")
    for name, row in in_turn(table.title, {"superpose prepare": ours, "datasets.map": theirs}, 5 if quick else 90).items():
        table.rows.append({"way": name, **row, "MB/s": size / 1e6 / row["median s"], "tokens": tokens[name]})
    return table, TokenStore(work / "store")


def _with_datasets(corpus: Path, tokenizer: Path, work: Path) -> int:
    """The same tokens into one file, in the order of the corpus; returns how many."""
    loaded = Tokenizer.from_file(str(tokenizer))
    loaded.encode_special_tokens = True
    end = loaded.get_vocab()["<|endoftext|>"]

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encodings = loaded.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [[*encoding.ids, end] for encoding in encodings]}

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(work / "cache"))
    encoded = rows.map(encode, batched=True, remove_columns=["text"]).with_format("numpy")
    tokens = 0
    with (work / "tokens.bin").open("wb") as file:
        for row in encoded:
            ids = row["ids"].astype(np.uint16)
            file.write(ids.tobytes())
            tokens += len(ids)
    return tokens


def _reading(store: TokenStore, quick: bool) -> Table:
    table = Table(f"reading under a schedule through a DataLoader, {POSITIONS} positions, batches of {SEQUENCES}")
    candidates: dict[str, tuple[int, Callable[[], object]]] = {}
    for bag_size in (1, 8):
        steps = min(20 if quick else STEPS, store.tokens // (POSITIONS * bag_size * SEQUENCES))
        schedule = Schedule.tst(steps, bag_size, 1.0)
        data = ScheduledTokens(store, schedule, positions=POSITIONS, sequences_per_step=SEQUENCES)
        loader = DataLoader(data, batch_size=SEQUENCES)
        # a queue of no length reads the loader to its end
        drain: Callable[[], object] = functools.partial(collections.deque, loader, 0)
        candidates[f"s = {bag_size}"] = schedule.data_tokens(POSITIONS, SEQUENCES), drain
    times = in_turn(table.title, {name: call for name, (_, call) in candidates.items()}, 2 if quick else 15)
    for name, row in times.items():
        table.rows.append({"reading": name, **row, "data tokens/s": round(candidates[name][0] / row["median s"])})
    return table
