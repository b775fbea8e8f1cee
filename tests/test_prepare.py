"""Preparing a corpus: every kind of source and tokenizer, what is kept, what a killed run leaves, every refusal."""

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from superpose.data import prepare as prepare_module
from superpose.data import sources, tokenizer
from superpose.data.prepare import prepare
from superpose.data.sources import Piece
from superpose.data.store import TokenStore
from superpose.errors import InputError

WORDS = ["the", "bag", "holds", "tökens", "雪", "and", "ends\n", "in", "\t", "<|endoftext|>", "🎈", "é", ""]
TEXTS = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 3 + 5 * i)) + f" {i}" for i in range(12)]


def documents(store: TokenStore) -> list[str]:
    """The texts of a split's documents, in its order, checked to end with the end-of-document token."""
    decoder = Tokenizer.from_file(str(store.tokenizer_file))
    starts = store.document_starts.tolist()
    tokens = [store.read(start, end - start).tolist() for start, end in pairwise(starts)]
    assert all(ids[-1] == store.eod_id and store.eod_id not in ids[:-1] for ids in tokens)
    return [decoder.decode(ids[:-1], skip_special_tokens=False) for ids in tokens]


def all_documents(store: TokenStore) -> list[str]:
    return documents(store) + documents(TokenStore(store.path, "validation"))


def contents(path: Path) -> dict[str, Any]:
    """All that is in a store, but for the time of its making."""
    files: dict[str, Any] = {file.name: file.read_bytes() for file in path.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    return files | manifest | {"created": None}


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "other": 1}) + "\n" for text in texts))
    return path


def word_tokenizer(path: Path, *specials: str) -> Path:
    """A tokenizer.json of a few words, ids as given."""
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(list(specials))
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(path))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "store"


def text_files(folder: Path, suffix: str) -> Path:
    (folder / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / ("deep" if i % 2 else "") / f"{i}{suffix}").write_text(text, newline="")
    return folder


def source_text(folder: Path) -> list[str]:
    text_files(folder, ".txt")
    return [str(file) for file in sorted(folder.rglob("*.txt"))]


def source_glob(folder: Path) -> list[str]:
    return [f"{text_files(folder, '.py')}/**/*.py"]


def source_directory(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "a.md").write_text(TEXTS[0], newline="")
    (folder / "ignored.bin").write_bytes(b"\xff\x00")
    write_jsonl(folder / "b.jsonl", TEXTS[1:])
    return [str(folder)]


def source_json_lines(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "a.jsonl", TEXTS[5:]).read_bytes()))
    write_jsonl(folder / "a.jsonl", TEXTS[:5])
    (folder / "a.jsonl").write_text("\n" + (folder / "a.jsonl").read_text() + "\n\n")
    return [str(folder / "a.jsonl"), str(folder / "b.jsonl.gz")]


def source_parquet(folder: Path) -> list[str]:
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(12)}), folder / "a.parquet", row_group_size=5)
    return [str(folder / "a.parquet")]


def source_saved_dataset(folder: Path) -> list[str]:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)
    return [str(folder)]


def source_saved_splits(folder: Path) -> list[str]:
    DatasetDict(train=Dataset.from_dict({"text": TEXTS}), test=Dataset.from_dict({"text": ["no"]})).save_to_disk(folder)
    return [str(folder)]


SOURCES = [
    source_text,
    source_glob,
    source_directory,
    source_json_lines,
    source_parquet,
    source_saved_dataset,
    source_saved_splits,
]


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_source_keeps_every_document(tmp_path: Path, out: Path, source: Any) -> None:
    store = prepare(source(tmp_path / "source"), out, use_bytes=True)
    assert sorted(all_documents(store)) == sorted(TEXTS)


def test_a_dataset_of_the_hub(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> IterableDataset:
        asked.append((name, config, split, streaming))
        return Dataset.from_dict({"body": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    store = prepare(["owner/name-v1.5"], out, train_tokenizer=300, field="body", split="test", dataset_config="en")
    assert sorted(all_documents(store)) == sorted(TEXTS)
    assert asked == [("owner/name-v1.5", "en", "test", True)] * 2
    assert prepare(["owner/name-v1.5"], tmp_path / "b", use_bytes=True, field="body").manifest["sources"] == ["owner/name-v1.5"]


@pytest.mark.parametrize("kind", [{"use_bytes": True}, {"train_tokenizer": 300}])
def test_the_built_in_tokenizers_round_trip_text_and_load_in_transformers(corpus: Path, out: Path, kind: Any) -> None:
    store = prepare([str(corpus)], out, **kind)
    assert sorted(all_documents(store)) == sorted(TEXTS)
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(store.tokenizer_file))
    assert len(loaded) == store.vocab_size
    assert loaded.convert_ids_to_tokens(store.eod_id) == "<|endoftext|>"
    for text in [*TEXTS, " ,  a . \r\n\n'll ", "\x00\x7f­"]:
        ids = loaded.encode(text.replace("<|endoftext|>", ""), add_special_tokens=False)
        assert loaded.decode(ids) == text.replace("<|endoftext|>", "")


def test_bytes_and_their_tokenizer_give_the_same_ids() -> None:
    made = tokenizer.byte_tokenizer()
    texts = [*TEXTS, "".join(map(chr, range(0x800))), "", "\U0010ffff\ufffd\ufeff"]
    for text, fast in zip(texts, made.encode(texts, np.dtype("<u2")), strict=True):
        assert fast.tolist() == list(text.encode()) == made.tokenizer.encode(text, add_special_tokens=False).ids
        assert made.tokenizer.decode(fast.tolist()) == text
    assert (made.vocab_size, made.eod_id) == (257, 256)


def test_a_trained_tokenizer_keeps_to_its_size_and_is_deterministic(tmp_path: Path, corpus: Path) -> None:
    stores = [prepare([str(corpus)], tmp_path / name, train_tokenizer=512) for name in ("a", "b")]
    assert 257 < stores[0].vocab_size <= 512
    assert contents(stores[0].path) == contents(stores[1].path)
    assert stores[0].bytes_per_token > 1
    assert prepare([str(corpus)], tmp_path / "least", train_tokenizer=257).vocab_size == 257


def test_the_sample_of_a_tokenizer_is_even_and_bounded() -> None:
    kept = tokenizer.even_sample((Piece(f"{i:04d}", True) for i in range(1000)), 500)
    assert 250 < 4 * len(kept) <= 500
    assert len({int(b) - int(a) for a, b in pairwise(kept)}) == 1
    assert int(kept[-1]) > 980


def test_a_given_tokenizer_is_stored_without_its_truncation(tmp_path: Path) -> None:
    file = word_tokenizer(tmp_path / "words.json", "</s>")
    (tmp_path / "x.txt").write_text("a b c a </s>")
    store = prepare([str(tmp_path / "x.txt")], tmp_path / "out", tokenizer=str(file), validation=0)
    assert store.read(0, len(store)).tolist() == [1, 2, 3, 1, 0, 0, 0, store.eod_id]
    assert (store.eod_id, store.vocab_size, store.manifest["dtype"]) == (4, 5, "uint8")
    assert Tokenizer.from_file(str(store.tokenizer_file)).truncation is None


@pytest.mark.parametrize("written", ["<end>", {"content": "<end>"}])
def test_a_directory_s_configuration_names_the_end_of_document_token(tmp_path: Path, written: Any) -> None:
    word_tokenizer(tmp_path / "tokenizer.json", "</s>", "<end>")
    assert tokenizer.given_tokenizer(str(tmp_path)).eod_token == "</s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": written}))
    assert tokenizer.given_tokenizer(str(tmp_path)).eod_token == "<end>"
    assert tokenizer.given_tokenizer(str(tmp_path), "b").eod_id == 2


def test_a_tokenizer_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(word_tokenizer(tmp_path / "t.json", "<end>")), eos_token="<end>")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", {"owner/name": loaded}.__getitem__)
    assert tokenizer.given_tokenizer("owner/name").eod_token == "<end>"
    with pytest.raises(
        InputError, match=r"^owner/missing is neither a tokenizer\.json, nor .* nor an id that transformers loads"
    ):
        tokenizer.given_tokenizer("owner/missing")


@pytest.mark.parametrize(("entries", "dtype"), [(100, "uint8"), (300, "uint16"), (70_000, "uint32")])
def test_the_type_on_disk_follows_the_vocabulary(tmp_path: Path, corpus: Path, entries: int, dtype: str) -> None:
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(entries - 1)} | {"</s>": entries - 1}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "t.json"))
    store = prepare([str(corpus)], tmp_path / "out", tokenizer=str(tmp_path / "t.json"))
    assert store.manifest["dtype"] == dtype
    size = {"uint8": 1, "uint16": 2, "uint32": 4}[dtype]
    assert (store.path / "train-00000.bin").stat().st_size == size * len(store)
    assert store.read(len(store) - 1, 1).tolist() == [entries - 1]


def test_the_seed_decides_the_order_and_nothing_else_does(tmp_path: Path, corpus: Path) -> None:
    a, again, b = (
        prepare([str(corpus)], tmp_path / name, use_bytes=True, seed=seed) for name, seed in (("a", 1), ("c", 1), ("b", 2))
    )
    assert contents(a.path) == contents(again.path)
    assert all_documents(a) != all_documents(b)
    assert sorted(all_documents(a)) == sorted(all_documents(b))
    assert all_documents(a) != TEXTS


def test_shards_cut_the_same_stream(tmp_path: Path, corpus: Path) -> None:
    whole = prepare([str(corpus)], tmp_path / "a", use_bytes=True)
    cut = prepare([str(corpus)], tmp_path / "b", use_bytes=True, shard_tokens=100)
    cut.verify()
    assert len(list(cut.path.glob("train-*.bin"))) == -(-len(whole) // 100)
    assert cut.read(0, len(cut)).tolist() == whole.read(0, len(whole)).tolist()
    assert all_documents(cut) == all_documents(whole)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_validation_is_disjoint_and_holds_its_share(corpus: Path, out: Path, share: float) -> None:
    train = prepare([str(corpus)], out, use_bytes=True, validation=share)
    held = TokenStore(out, "validation")
    assert train.documents >= 1
    assert held.documents >= 1
    assert not set(documents(train)) & set(documents(held))
    assert len(held) >= share * (len(held) + len(train)) or train.documents == 1
    last = len(documents(held)[-1].encode()) + 1
    assert held.documents == 1 or len(held) - last < share * (len(held) + len(train))


def test_no_validation(corpus: Path, out: Path) -> None:
    assert prepare([str(corpus)], out, use_bytes=True, validation=0).documents == len(TEXTS)
    with pytest.raises(InputError, match="no split 'validation'"):
        TokenStore(out, "validation")


def test_duplicates_and_empty_documents_are_dropped(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", *TEXTS, TEXTS[3], "", TEXTS[3] + " "])
    (tmp_path / "b.txt").write_text(TEXTS[5], newline="")
    (tmp_path / "c.txt").touch()
    store = prepare([str(tmp_path)], out, use_bytes=True)
    assert sorted(all_documents(store)) == sorted([*TEXTS, TEXTS[3] + " "])
    assert store.manifest["duplicates"] == 2
    assert "2 duplicates dropped" in capsys.readouterr().out


def test_large_documents_go_in_pieces(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 50)
    monkeypatch.setattr(prepare_module, "BATCH", 120)
    monkeypatch.setattr(prepare_module, "COPY", 7)
    texts = ["雪\n" * 100, "é" * 333, "one line\r\n" * 20, "x" * 50, TEXTS[11] * 3]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text, newline="")
    write_jsonl(tmp_path / "a.jsonl", texts)
    read = sources.Corpus([str(tmp_path)], field="text", split="train", dataset_config=None)
    pieces = list(read.pieces())
    assert sum(piece.last for piece in pieces) == 10
    assert all(len(piece.text.encode()) <= 200 for piece in pieces)
    assert read.read == read.size
    store = prepare([str(tmp_path)], out, use_bytes=True)
    assert sorted(all_documents(store)) == sorted(texts)
    assert store.manifest["duplicates"] == 5


def test_undecodable_text_is_replaced_and_counted(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xef\xbf\xbd \xff")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xe9 \\ud83c\\udf88 \\ud83c"}\n')
    store = prepare([str(tmp_path)], out, use_bytes=True)
    assert sorted(all_documents(store)) == ["caf\ufffd \ufffd \ufffd", "\ufffd 🎈 \ufffd"]
    assert "4 undecodable bytes" in capsys.readouterr().out


def test_the_manifest_and_the_counts(corpus: Path, out: Path) -> None:
    store = prepare([str(corpus)], out, use_bytes=True, seed=3)
    size = sum(len(text.encode()) for text in TEXTS)
    splits = store.manifest["splits"]
    assert sum(entry["bytes"] for entry in splits.values()) == size
    assert sum(entry["tokens"] for entry in splits.values()) == size + len(TEXTS)
    assert sum(entry["documents"] for entry in splits.values()) == len(TEXTS)
    assert (store.manifest["seed"], store.manifest["eod_token"], store.manifest["dtype"]) == (3, "<|endoftext|>", "uint16")
    named = {file["name"] for entry in splits.values() for file in entry["files"]}
    assert {file.name for file in out.iterdir()} == named | {"manifest.json", "tokenizer.json"}
    for split in splits:
        TokenStore(out, split, verify=True)


def test_a_finished_store_is_up_to_date(corpus: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare([str(corpus)], out, use_bytes=True)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    capsys.readouterr()
    assert prepare([str(corpus)], out, use_bytes=True).documents == TokenStore(out).documents
    assert "up to date" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in out.iterdir()}
    changes: dict[str, Any]
    for changes in ({"seed": 1}, {"validation": 0.2}, {"shard_tokens": 9}, {"use_bytes": False, "train_tokenizer": 300}):
        with pytest.raises(InputError, match="other arguments or from other files: remove it or choose another --out"):
            prepare([str(corpus)], out, **({"use_bytes": True} | changes))
    corpus.write_text(corpus.read_text() + '{"text": "more"}\n')
    with pytest.raises(InputError, match="other arguments or from other files"):
        prepare([str(corpus)], out, use_bytes=True)


def test_an_empty_directory_is_filled_and_anything_else_is_left_alone(corpus: Path, out: Path) -> None:
    out.mkdir()
    prepare([str(corpus)], out, use_bytes=True)
    other = out.with_name("other")
    other.mkdir()
    (other / "mine").write_text("kept")
    for target in (other, other / "mine"):
        with pytest.raises(InputError, match="exists and is not an empty directory"):
            prepare([str(corpus)], target, use_bytes=True)
    assert (other / "mine").read_text() == "kept"
    with pytest.raises(InputError, match="cannot be made"):
        prepare([str(corpus)], other / "mine" / "below", use_bytes=True)


def stop_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "BATCH", 100)
    monkeypatch.setattr(tokenizer.StoreTokenizer, "encode", encode)


def stop_shuffling(monkeypatch: pytest.MonkeyPatch) -> None:
    def close(_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(prepare_module.ShardWriter, "close", close)


def stop_publishing(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.rename", rename)


@pytest.mark.parametrize("stop", [stop_tokenising, stop_shuffling, stop_publishing])
def test_a_run_that_fails_leaves_nothing(corpus: Path, out: Path, stop: Any) -> None:
    expected = contents(prepare([str(corpus)], out.with_name("whole"), use_bytes=True).path)
    before = set(out.parent.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        stop(patch)
        with pytest.raises((KeyboardInterrupt, OSError)):
            prepare([str(corpus)], out, use_bytes=True)
    assert set(out.parent.iterdir()) == before
    assert contents(prepare([str(corpus)], out, use_bytes=True).path) == expected


KILLED_RUN = """
import sys, time
from pathlib import Path
from superpose.data import prepare as module
from superpose.data.tokenizer import StoreTokenizer

def hang(*arguments):
    print("here", flush=True)
    time.sleep(60)

module.BATCH = 100
if sys.argv[3] == "tokenising":
    module.np.array = hang
else:
    module.ShardWriter.close = hang
module.prepare([sys.argv[1]], Path(sys.argv[2]), use_bytes=True)
"""


@pytest.mark.parametrize("moment", ["tokenising", "shuffling"])
def test_a_killed_run_is_redone(corpus: Path, out: Path, moment: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = contents(prepare([str(corpus)], out.with_name("whole"), use_bytes=True).path)
    command = [sys.executable, "-c", KILLED_RUN, str(corpus), str(out), moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "here\n"
        with pytest.raises(InputError, match="another prepare is making"):
            prepare([str(corpus)], out, use_bytes=True)
        run.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert out.with_name(".store.partial").exists()
    assert contents(prepare([str(corpus)], out, use_bytes=True).path) == expected
    assert "removing what an interrupted run left" in capsys.readouterr().err
    assert not out.with_name(".store.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of --tokenizer, --train-tokenizer and --bytes"),
        ({"use_bytes": True, "train_tokenizer": 300}, "exactly one of"),
        ({"train_tokenizer": 256}, "train_tokenizer must be at least 257"),
        ({"use_bytes": True, "validation": 1.0}, "validation must be a share"),
        ({"use_bytes": True, "validation": -0.1}, "validation must be a share"),
        ({"use_bytes": True, "shard_tokens": 0}, "shard_tokens must be at least 1"),
        ({"use_bytes": True, "eod_token": "<end>"}, "--eod-token '<end>' is not a token of bytes"),
        ({"use_bytes": True, "field": "body"}, "line 1: no field 'body', only text, other; name the field"),
        ({"use_bytes": True, "field": "other"}, "line 1: field 'other' is 1, not a string"),
    ],
)
def test_bad_arguments(corpus: Path, out: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare([str(corpus)], out, **arguments)
    assert os.listdir(out.parent) == ["corpus.jsonl"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.txt", None, "missing.txt: no such file or directory$"),
        ("*.py", None, "matches no file: correct the glob"),
        (".", None, "has no file in .txt, .md, .jsonl, .jsonl.gz, .parquet"),
        ("a.txt", b"", "the sources hold no text"),
        ("a.jsonl", b"", "the sources hold no text"),
        ("a.txt", b"one", "the corpus is one document"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b"3\n", "line 1: not a JSON object"),
        ("a.jsonl", b'{"text": null}\n', "line 1: field 'text' is None, not a string"),
        ("a.jsonl", b"{}\n", "line 1: no field 'text', only an empty object"),
        ("a.jsonl.gz", b"{}\n", r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-12], r"a\.jsonl\.gz cannot be read"),
        ("a.txt.gz", b"", "a.txt.gz is compressed: unpack it first"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a readable Parquet file"),
    ],
)
def test_bad_sources(tmp_path: Path, out: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        prepare([str(tmp_path / name)], out, use_bytes=True)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not out.with_name(".store.partial").exists()


def test_more_bad_sources(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *_: Any, **__: Any) -> None:
        raise ConnectionError(f"cannot reach {name}\nat length")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    DatasetDict(train=Dataset.from_dict({"text": TEXTS})).save_to_disk(tmp_path / "saved")
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        ([], {}, "sources is empty"),
        (["owner/name"], {}, r"^owner/name: no such file or directory, and .* \(cannot reach owner/name\)$"),
        ([str(tmp_path / "a.parquet")], {}, "row 2: field 'text' is None"),
        ([str(tmp_path / "a.parquet")], {"field": "body"}, "no field 'body', only text, n"),
        ([str(tmp_path / "saved")], {"split": "test"}, "no split 'test', it has train"),
        ([str(tmp_path / "saved")], {"field": "body"}, "row 1: no field 'body', only text"),
    ]
    for named, arguments, message in cases:
        with pytest.raises(InputError, match=message):
            prepare(named, out, use_bytes=True, **arguments)


@pytest.mark.parametrize("data", [b"{}", b"no JSON", b"\xff"])
def test_an_invalid_tokenizer_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer\.json of the tokenizers library"):
            tokenizer.given_tokenizer(str(name))


def test_bad_tokenizers(tmp_path: Path) -> None:
    file = word_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="names no end-of-document token: name one of its tokens with --eod-token"):
        tokenizer.given_tokenizer(str(file))
    with pytest.raises(InputError, match="'z' is not a token of"):
        tokenizer.given_tokenizer(str(file), "z")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is not"):
        tokenizer.given_tokenizer(str(tmp_path))


def test_a_run_at_the_same_time_is_refused(corpus: Path, out: Path) -> None:
    work = out.with_name(".store.partial")
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another prepare is making .* wait for it or choose another --out"):
            prepare([str(corpus)], out, use_bytes=True)
    assert prepare([str(corpus)], out, use_bytes=True).documents


def test_progress_is_plain_lines_where_stderr_is_no_terminal(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_module, "LINE_SECONDS", -1.0)
    monkeypatch.setattr(time, "monotonic", iter(range(1000)).__next__)
    prepare([str(corpus)], out, use_bytes=True)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("tokenised 0 of 0 MB") and line.endswith("12 documents") for line in lines)
    assert "\x1b" not in "".join(lines)
