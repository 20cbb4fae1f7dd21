"""Data files as rows: JSON lines, JSON, CSV, TSV, Parquet and plain text, each also compressed, read piece by piece.

The standard library reads all but Parquet and .zst, for which there is the extra ``data``. Only .json is held whole.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any

from tailorcli.data.forms import TURNS
from tailorcli.errors import DataError, first_line
from tailorcli.files import ScratchFolder, open_regular, parse_json

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
FORMATS = ".jsonl, .json, .csv, .tsv, .parquet or .txt, each also .gz or .zst"
EXTRA = "pip install 'tailorcli[data]' (in a checkout: pip install '.[data]')"

_MARKS = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # how compressed files begin
_PARQUET = b"PAR1"
_BOM = b"\xef\xbb\xbf"  # of which UTF-8 has no need; it is no text
_MOST_LINE = 1 << 28  # bytes: a line of a text takes some times as much memory
_MOST_JSON = 1 << 30  # bytes of a list in one piece
_PACKED = 1 << 12  # bytes of a .zst at a time: they may stand for tens of thousands of times as many
_MOST_ROWS = 256  # of a table at a time


class PlainText(str):
    """A row of plain text, which is no value of JSON."""


@dataclass(frozen=True)
class DataFile:
    """One file of data: its name in messages, the folder that its paths start from, and how it is read.

    ``kind`` and ``compression`` are suffixes. ``open`` gives its bytes from the beginning, and can be called again.
    """

    name: str
    folder: Path
    kind: str
    compression: str
    open: Callable[[], BufferedReader]


def data_file(path: Path) -> DataFile:
    """A file of the disk by its suffix. Raises DataError for a suffix that is unknown."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = Path(path.stem).suffix if compression else path.suffix
    if kind not in KINDS:
        shown = kind + compression if compression else path.suffix
        raise DataError(f"{path} has the unknown suffix {shown!r}", f"pass a {FORMATS} file")
    return DataFile(str(path), path.parent, kind, compression, lambda: open_regular(path))


def spooled(name: str, stream: IO[bytes], is_ours: Callable[[list[str]], bool]) -> DataFile:
    """What a stream of unknown kind gives, kept in a temporary file: it can be read again.

    Its beginning says what it is; a table of text is one if ``is_ours`` of the columns that its first line names.
    Raises DataError.
    """
    kept = ScratchFolder()  # lives as long as the records that are read from it
    path = kept.path / "data"
    with _reading(name), path.open("wb") as target:
        shutil.copyfileobj(stream, target, 1 << 20)

    def again() -> BufferedReader:
        return open_regular(kept.path / "data")

    with again() as begun:
        mark = begun.read(4)
    compression = next((suffix for start, suffix in _MARKS.items() if mark.startswith(start)), "")
    with _reading(name), _plain(DataFile(name, Path(), "", compression, again)) as plain:
        begin = plain.read(1 << 16).removeprefix(_BOM).lstrip()
    return DataFile(name, Path(), _kind_of(begin, is_ours), compression, again)


def _kind_of(begin: bytes, is_ours: Callable[[list[str]], bool]) -> str:
    if begin.startswith(_PARQUET):
        return ".parquet"
    if begin[:1] in (b"{", b"["):
        return ".jsonl" if begin[:1] == b"{" else ".json"
    first = begin.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    for kind, separator in ((".tsv", "\t"), (".csv", ",")):
        if is_ours([name.strip().strip('"') for name in first.split(separator)]):
            return kind
    return ".txt"


def rows(file: DataFile, whole: bool = False) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and its value: an object, ``PlainText``, or what JSON holds in an object's place.

    With ``whole`` a plain text is one row. Raises DataError with file and line.
    """
    read = {".jsonl": _json_lines, ".json": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet}
    with _reading(file.name):
        yield from _text(file, whole) if file.kind == ".txt" else read[file.kind](file)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """What a system, or a decompressor, says of a file that it cannot read, as one error of the data."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"cannot read {name}: {why}", "check the path, and that the file is whole") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "zstandard":
            raise
        raise DataError(f"cannot read {name}: {first_line(error)}", "check that the file is whole") from error


@contextmanager
def _plain(file: DataFile) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed as they are read. Raises DataError without the extra that it takes."""
    with file.open() as raw:
        if file.compression == ".gz":
            with gzip.open(raw) as stream:
                yield stream  # type: ignore[misc]
        elif file.compression == ".zst":
            try:
                import zstandard
            except ImportError as error:
                raise DataError(f"{file.name} takes zstandard, which is not installed", EXTRA) from error
            with BufferedReader(_Frames(raw, zstandard.ZstdDecompressor())) as unpacked:
                yield unpacked
        else:
            yield raw


class _Frames(RawIOBase):
    """The bytes of the frames of a .zst, one behind the other; a frame that is not whole raises EOFError.

    The reader of zstandard itself takes such a frame for the end.
    """

    def __init__(self, raw: IO[bytes], decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._raw.read(_PACKED)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _lines(file: DataFile) -> Iterator[tuple[int, str]]:
    r"""The lines of a text with their numbers from 1, each with the line end that it has; \\n alone ends one."""
    position = 0
    with _plain(file) as stream:
        for number in range(1, 1 << 62):
            line = stream.readline(_MOST_LINE)
            if not line:
                return
            if len(line) == _MOST_LINE and not line.endswith(b"\n"):
                raise DataError(f"{file.name}:{number} has more than {_MOST_LINE:,} bytes", "split it into records")
            if number == 1 and line.startswith(_PARQUET + b"\x15"):  # where its first column begins
                raise DataError(f"{file.name} is a Parquet file", "name it .parquet")
            yield number, _decoded(line.removeprefix(_BOM) if number == 1 else line, position, file)
            position += len(line)


def _decoded(line: bytes, position: int, file: DataFile) -> str:
    """Text of bytes that stand at ``position`` of a file. Raises DataError that says which byte is none."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = next((suffix for mark, suffix in _MARKS.items() if position == 0 and line.startswith(mark)), None)
        if found is not None:
            raise DataError(f"{file.name} is compressed", f"name it {Path(file.name).name}{found}") from error
        what = f"{file.name} is not UTF-8 text (byte {position + error.start})"
        raise DataError(what, f"pass a {FORMATS} file") from error


def _text(file: DataFile, whole: bool) -> Iterator[tuple[str, PlainText]]:
    if whole:
        text = "".join(line.replace("\r\n", "\n").replace("\r", "\n") for _, line in _lines(file))
        if text.strip():
            yield f"{file.name}:1", PlainText(text)
        return
    yield from ((where, PlainText(line)) for where, line in _plain_lines(file))


def _plain_lines(file: DataFile) -> Iterator[tuple[str, str]]:
    r"""The lines that hold something, with \\r\\n and \\r as line ends, too."""
    number = 0
    for _, line in _lines(file):
        for part in line.replace("\r\n", "\n").removesuffix("\n").replace("\r", "\n").split("\n"):
            number += 1
            if part.strip():
                yield f"{file.name}:{number}", part


def _json_lines(file: DataFile) -> Iterator[tuple[str, Any]]:
    for where, line in _plain_lines(file):
        try:
            yield where, _with_fields(parse_json(line))
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}", "one JSON object a line") from error


def _json(file: DataFile) -> Iterator[tuple[str, Any]]:
    """The objects of a list; a file that has an object a line is read as .jsonl."""
    with _plain(file) as stream:
        content = stream.read(_MOST_JSON + 1)
    if len(content) > _MOST_JSON:
        raise DataError(f"{file.name} has more than {_MOST_JSON:,} bytes in one list", "use .jsonl: an object a line")
    text = _decoded(content.removeprefix(_BOM), 0, file)
    try:
        values = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _json_lines(file)
            return
        raise DataError(f"{file.name} is not JSON: {error}", "a list of objects, or use .jsonl") from error
    except ValueError as error:
        raise DataError(f"{file.name} is not JSON: {error}", "a list of objects, or use .jsonl") from error
    if not isinstance(values, list):
        what = f"{file.name} holds a {type(values).__name__}, expected a list of objects"
        raise DataError(what, "a list of objects, or use .jsonl")
    yield from ((f"{file.name}, record {number}", _with_fields(value)) for number, value in enumerate(values))


def _table(file: DataFile) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a .csv or .tsv by the names in its first line; a quoted field may hold line ends."""
    separator = "," if file.kind == ".csv" else "\t"
    reader = csv.reader((line for _, line in _lines(file)), delimiter=separator, strict=True)
    hint = f"the first line names the columns, separated by {'commas' if separator == ',' else 'tabs'}"
    header: list[str] = []
    while True:
        where = f"{file.name}:{reader.line_num + 1}"
        try:
            row = _next_row(reader)
        except csv.Error as error:
            raise DataError(f"{where} is no row of a table: {error}", hint) from error
        if row is None:
            return
        if not row:
            continue
        if not header:
            header = _header(file, row, hint)
            continue
        if len(row) != len(header):
            what = f"{where} has {len(row)} fields, expected {len(header)} as in the first line"
            raise DataError(what, f'{hint}; a field that holds one stands in quotes ("...")')
        yield where, dict(zip(header, row, strict=True))


def _next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """The next row, which may hold longer texts than the module allows by itself; None at the end."""
    before = csv.field_size_limit(_MOST_LINE)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _header(file: DataFile, row: list[str], hint: str) -> list[str]:
    names = [name.strip() for name in row]
    if len(set(names)) < len(names):
        raise DataError(f"{file.name}: its first line names a column twice", hint)
    if len(names) == 1 and any(mark in names[0] for mark in ";\t,"):
        raise DataError(f"{file.name}: its first line has no column but {names[0]!r}", hint)
    return names


def _parquet(file: DataFile) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file.name} takes pyarrow, which is not installed", EXTRA) from error
    number = 0
    with _seekable(file) as stream:
        try:
            opened = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)  # else all is held
            for batch in opened.iter_batches(batch_size=_MOST_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    yield f"{file.name}, record {number}", without_nulls(row)
                    number += 1
        except Exception as error:  # whatever pyarrow raises, for sizes that no memory has as well
            what = f"cannot read {file.name} behind record {number}: {first_line(error)}"
            raise DataError(what, "check that it is a whole Parquet file") from error


@contextmanager
def _seekable(file: DataFile) -> Iterator[IO[bytes]]:
    """The bytes of a file that is read from its end: a compressed one is unpacked into a temporary file."""
    with _plain(file) as stream:
        if not file.compression:
            yield stream
            return
        with tempfile.TemporaryFile() as kept:
            shutil.copyfileobj(stream, kept, 1 << 20)
            kept.seek(0)
            yield kept


# One form of record or another goes without.
_OPTIONAL = {"text", "messages", *TURNS, "images", "image", "audio", "tools"}


def _with_fields(value: Any) -> Any:
    """A row of JSON without fields that are null, as tables are exported; one of nulls alone stays as it is."""
    if not isinstance(value, dict) or all(entry is None for entry in value.values()):
        return value
    return {key: entry for key, entry in value.items() if entry is not None or key not in _OPTIONAL}


def without_nulls(value: Any) -> Any:
    """A table's value without the fields that a row does not have: a table holds null there."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Source:
    """Data as rows, which can be read again: where each stands, its value, and the folder that its paths start from.

    ``digest`` gives a hash of its bytes. ``files`` counts them.
    """

    name: str
    read: Callable[[], Iterator[tuple[str, Any, Path]]]
    digest: Callable[[], str]
    files: int = 1
