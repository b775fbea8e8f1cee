"""Reading a corpus: files, directories, globs and Hugging Face datasets to a stream of pieces of documents.

No file has to fit in memory: a large text arrives as pieces cut at line breaks. A JSON line or a row is held whole.
"""

import codecs
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from superpose.errors import InputError

#: What a directory is searched for. A file named by itself or by a glob may have any suffix, and is one plain-text document.
TEXT_SUFFIXES = (".txt", ".md")
JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz")
PARQUET_SUFFIX = ".parquet"
ARCHIVE_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
DATASET_FILES = ("dataset_dict.json", "state.json")

#: Characters of a piece, about: so large that the cuts do not matter, so small that one batch of them keeps many cores busy.
PIECE = 2**17
PARQUET_ROWS = 1000

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_ALPHABETIC_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Piece(NamedTuple):
    """A part of a document's text; ``last`` says that the document ends with it."""

    text: str
    last: bool


class Corpus:
    """The documents of ``sources``, in the order given; files are found, and missing ones reported, at once.

    field: the field of a JSON line, or the column of a Parquet file or a dataset, that holds the text.
    split, dataset_config: of Hugging Face datasets.
    read: bytes of files (of the hub: characters) read so far.
    replaced: undecodable bytes and lone surrogates replaced by U+FFFD so far.
    """

    def __init__(self, sources: list[str], *, field: str, split: str, dataset_config: str | None) -> None:
        self.field, self.split, self.dataset_config = field, split, dataset_config
        self.read = self.replaced = 0
        self.items = [item for source in sources for item in _resolve(source)]
        if not self.items:
            raise InputError("sources is empty: name files, directories, globs or a Hugging Face dataset")

    @property
    def size(self) -> int | None:
        """Bytes of all files; None where a dataset of the hub is among the sources."""
        if any(isinstance(item, str) for item in self.items):
            return None
        return sum(file.stat().st_size for item in self.items if isinstance(item, Path) for file in _files(item))

    def identity(self) -> list[Any]:
        """What tells this corpus from another: names and sizes of all files, and how they are read."""
        names = [
            [str(file.resolve()), file.stat().st_size] if isinstance(file, Path) else file
            for item in self.items
            for file in (_files(item) if isinstance(item, Path) else [item])
        ]
        return [names, self.field, self.split, self.dataset_config]

    def pieces(self, hub_characters: int | None = None) -> Iterator[Piece]:
        """All documents, piece by piece; of each dataset of the hub no more than ``hub_characters``. Counts start anew."""
        self.read = self.replaced = 0
        for item in self.items:
            if isinstance(item, str):
                pieces, left = self._hub(item), hub_characters
                for piece in pieces:
                    self.read += len(piece.text)
                    yield piece
                    if left is not None and (left := left - len(piece.text)) <= 0:
                        break
                continue
            try:
                yield from self._local(item)
            except (OSError, EOFError, zlib.error) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or error
                raise InputError(f"{item} cannot be read ({reason}): mend it or leave it out") from None

    def _local(self, path: Path) -> Iterator[Piece]:
        if path.is_dir():
            return self._saved_dataset(path)
        if path.name.lower().endswith(JSON_LINES_SUFFIXES):
            return self._json_lines(path)
        if path.name.lower().endswith(PARQUET_SUFFIX):
            return self._parquet(path)
        return self._text(path)

    def _text(self, path: Path) -> Iterator[Piece]:
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        with open(path, "rb") as file:
            data = _block(file)
            while True:
                following = _block(file)
                self.read += len(data)
                yield Piece(self._clean(decoder.decode(data, final=not following)), last=not following)
                if not following:
                    return
                data = following

    def _json_lines(self, path: Path) -> Iterator[Piece]:
        with open(path, "rb") as raw:
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
            before = 0
            for number, line in enumerate(lines, 1):
                # a buffered reader is ahead of its lines; the progress need not be finer than that
                before, grown = raw.tell(), raw.tell() - before
                self.read += grown
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    values = json.loads(line.decode("utf-8", "surrogateescape"))
                except ValueError as error:
                    raise InputError(f"{where}: not valid JSON ({error}); each line must be one JSON object") from None
                if not isinstance(values, dict):
                    raise InputError(f"{where}: not a JSON object; each line must be one, with the text in {self.field!r}")
                yield from self._field_of(values, where)

    def _parquet(self, path: Path) -> Iterator[Piece]:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        size, number = path.stat().st_size, 0
        try:
            with ParquetFile(path) as file:
                if self.field not in file.schema_arrow.names:
                    raise InputError(_missing(str(path), self.field, file.schema_arrow.names))
                for batch in file.iter_batches(PARQUET_ROWS, columns=[self.field]):
                    self.read += size * len(batch) // file.metadata.num_rows
                    for text in batch.column(0).to_pylist():
                        number += 1
                        yield from self._field_of({self.field: text}, f"{path}, row {number}")
        except ArrowException as error:
            raise InputError(f"{path} is not a readable Parquet file ({_first_line(error)}): mend it or leave it out") from None

    def _saved_dataset(self, path: Path) -> Iterator[Piece]:
        from datasets import DatasetDict, load_from_disk

        dataset = load_from_disk(str(path))
        if isinstance(dataset, DatasetDict):
            if self.split not in dataset:
                raise InputError(f"{path} has no split {self.split!r}, it has {', '.join(dataset)}: name one of these")
            dataset = dataset[self.split]
        size = sum(file.stat().st_size for file in _files(path))
        for piece in self._rows(dataset, str(path)):
            self.read += piece.last * size // len(dataset)
            yield piece

    def _hub(self, name: str) -> Iterator[Piece]:
        from datasets import load_dataset

        try:
            dataset = load_dataset(name, self.dataset_config, split=self.split, streaming=True)
        except Exception as error:  # the hub client raises errors of many libraries; all mean that there is nothing to read
            raise InputError(
                f"{name}: no such file or directory, and it cannot be loaded as a Hugging Face dataset ({_first_line(error)})"
            ) from None
        yield from self._rows(dataset, name)

    def _rows(self, dataset: Any, name: str) -> Iterator[Piece]:
        for number, row in enumerate(dataset, 1):
            yield from self._field_of(row, f"{name}, row {number}")

    def _field_of(self, values: dict[str, Any], where: str) -> Iterator[Piece]:
        if self.field not in values:
            raise InputError(_missing(where, self.field, values))
        text = values[self.field]
        if not isinstance(text, str):
            raise InputError(f"{where}: field {self.field!r} is {text!r:.40}, not a string; correct it or name another field")
        yield from _cut(self._clean(text))

    def _clean(self, text: str) -> str:
        """``text`` as UTF-8 can hold it: undecodable bytes were decoded to surrogates, and JSON can spell lone ones."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text, count = _SURROGATE.subn("\ufffd", text)
            self.replaced += count
        return text


def _resolve(source: str) -> list[Path | str]:
    """Files and saved datasets as paths, ids of the hub as strings."""
    path = Path(source)
    if path.is_dir() and any((path / name).is_file() for name in DATASET_FILES):
        return [path]
    if path.is_dir():
        suffixes = (*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES, PARQUET_SUFFIX)
        found = [file for file in sorted(path.rglob("*")) if file.name.lower().endswith(suffixes) and file.is_file()]
        if not found:
            raise InputError(f"{source} has no file in {', '.join(suffixes)}: name other files by a glob, as {source}/**/*.py")
    elif path.exists():
        found = [path]
    elif glob.has_magic(source):
        found = [file for file in map(Path, sorted(glob.glob(source, recursive=True))) if file.is_file()]
        if not found:
            raise InputError(f"{source} matches no file: correct the glob, or quote it so that the shell leaves it alone")
    elif _HUB_ID.fullmatch(source) and not _ALPHABETIC_SUFFIX.search(source):
        return [source]
    else:
        raise InputError(f"{source}: no such file or directory")
    for file in found:
        name = file.name.lower()
        if name.endswith(ARCHIVE_SUFFIXES) and not name.endswith(JSON_LINES_SUFFIXES):
            raise InputError(f"{file} is compressed: unpack it first (only .jsonl.gz is read as it is)")
    return list(found)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _block(file: BinaryIO) -> bytes:
    return file.read(PIECE) + file.readline(PIECE)


def _cut(text: str) -> Iterator[Piece]:
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield Piece(text[start:end], last=False)
        start = end
    yield Piece(text[start:], last=True)


def _missing(where: str, field: str, available: Iterable[str]) -> str:
    return f"{where}: no field {field!r}, only {', '.join(available) or 'an empty object'}; name the field that holds the text"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
