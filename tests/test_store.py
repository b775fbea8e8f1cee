"""The token store: reading across shards, what opening checks, checksums, pickling."""

import hashlib
import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from superpose.data.store import MANIFEST_FILE, TokenStore, dtype_name
from superpose.errors import InputError

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 300], [10, 11]]
END = 299
STREAM = np.array([token for document in DOCUMENTS for token in [*document, END]])


def write_store(path: Path, shard_tokens: int = 5) -> Path:
    """A store written without any of the package's code, so that the layout itself is tested."""
    path.mkdir()
    files: list[dict[str, Any]] = []

    def add(name: str, data: bytes, **more: int) -> None:
        (path / name).write_bytes(data)
        files.append({"name": name, **more, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})

    for index, start in enumerate(range(0, len(STREAM), shard_tokens)):
        shard = STREAM[start : start + shard_tokens].astype("<u2")
        add(f"train-{index:05d}.bin", shard.tobytes(), tokens=len(shard))
    np.save(path / "train-documents.npy", np.cumsum([0, *(len(document) + 1 for document in DOCUMENTS)]).astype("<u8"))
    add("train-documents.npy", (path / "train-documents.npy").read_bytes())
    (path / "tokenizer.json").write_text("{}")
    manifest = {
        "format": 1,
        "tokenizer": {"name": "none", "sha256": hashlib.sha256(b"{}").hexdigest()},
        "vocab_size": 301,
        "eod_id": END,
        "dtype": "uint16",
        "splits": {"train": {"tokens": len(STREAM), "documents": len(DOCUMENTS), "bytes": 40, "files": files}},
    }
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store")


def edit_manifest(path: Path, **changes: Any) -> None:
    file = path / MANIFEST_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_attributes(path: Path) -> None:
    store = TokenStore(path)
    assert (store.path, store.split, store.vocab_size, store.eod_id) == (path, "train", 301, END)
    assert (store.tokens, len(store), store.documents, store.bytes) == (16, 16, 4, 40)
    assert store.bytes_per_token == 40 / 16
    assert store.tokenizer_file == path / "tokenizer.json"
    assert store.manifest["dtype"] == "uint16"


def test_every_window_is_the_stream_whatever_shards_it_crosses(path: Path) -> None:
    store = TokenStore(path)
    for start in range(len(STREAM) + 1):
        for count in range(len(STREAM) - start + 1):
            tokens = store.read(start, count)
            assert tokens.dtype == np.int64
            assert tokens.tolist() == STREAM[start : start + count].tolist()


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 17), (16, 1), (3, -1)])
def test_a_window_outside_of_the_split_is_a_value_error(path: Path, start: int, count: int) -> None:
    with pytest.raises(ValueError, match="outside of the 16"):
        TokenStore(path).read(start, count)


def test_what_is_read_can_be_written_to(path: Path) -> None:
    store = TokenStore(path)
    store.read(0, 3)[:] = 0
    assert store.read(0, 3).tolist() == [1, 2, 3]


def test_document_starts_give_the_documents(path: Path) -> None:
    store = TokenStore(path)
    assert store.document_starts.dtype == np.uint64
    starts = store.document_starts.tolist()
    assert len(starts) == store.documents + 1
    found = [store.read(start, end - start).tolist() for start, end in pairwise(starts)]
    assert found == [[*document, END] for document in DOCUMENTS]


def test_a_pickled_store_carries_its_path_and_split_alone(path: Path) -> None:
    store = TokenStore(path)
    store.read(0, 16)
    assert store.document_starts is not None
    assert store.__getstate__() == {"path": path, "split": "train"}
    assert pickle.loads(pickle.dumps(store)).read(2, 9).tolist() == STREAM[2:11].tolist()


@pytest.mark.parametrize(
    ("vocabulary", "name"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (128_256, "uint32")],
)
def test_the_smallest_type_for_the_vocabulary(vocabulary: int, name: str) -> None:
    assert dtype_name(vocabulary) == name


def test_a_truncated_shard_is_named_on_opening(path: Path) -> None:
    shard = path / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"train-00001\.bin has 8 bytes where the manifest has 10"):
        TokenStore(path)


@pytest.mark.parametrize("name", ["train-00002.bin", "train-documents.npy", "tokenizer.json"])
def test_a_missing_file_is_named_on_opening(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing: prepare the store again"):
        TokenStore(path)


@pytest.mark.parametrize("name", ["train-00003.bin", "train-documents.npy", "tokenizer.json"])
def test_a_flipped_bit_is_found_by_verify_alone(path: Path, name: str) -> None:
    TokenStore(path, verify=True)
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    store = TokenStore(path)
    with pytest.raises(
        InputError, match=f"{name} is corrupted: its checksum differs from the manifest; prepare the store again"
    ):
        store.verify()
    with pytest.raises(InputError, match=f"{name} is corrupted"):
        TokenStore(path, verify=True)


def test_what_is_not_a_store(path: Path, tmp_path: Path) -> None:
    for other in (tmp_path, tmp_path / "missing", path / MANIFEST_FILE):
        with pytest.raises(InputError, match=r"is not a token store.*superpose prepare"):
            TokenStore(other)


def test_an_unknown_split_names_those_there_are(path: Path) -> None:
    with pytest.raises(InputError, match="no split 'validation', it has train"):
        TokenStore(path, "validation")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_a_damaged_manifest(path: Path, text: str) -> None:
    (path / MANIFEST_FILE).write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        TokenStore(path)


def test_another_format_is_refused(path: Path) -> None:
    edit_manifest(path, format=2)
    with pytest.raises(InputError, match="has format 2, this version reads 1"):
        TokenStore(path)
