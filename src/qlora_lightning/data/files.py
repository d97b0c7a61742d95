"""Rows from files: JSON, JSON Lines, CSV, TSV, Parquet and Arrow, single, in folders and zip archives, local or on the hub.

Rows are read one after the other, in little memory. Errors name the file and the line.
"""

import csv
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from zipfile import BadZipFile, ZipFile

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from huggingface_hub.errors import HTTPError

from qlora_lightning.data.hub import HUB, open_url, refusal
from qlora_lightning.data.json_rows import decode, json_lines, json_list
from qlora_lightning.data.rows import Located, Row
from qlora_lightning.data.unpacking import numbered_lines, unpacked
from qlora_lightning.errors import UserError

_MAX_ROW = 4_000_000  # characters; far beyond any model's context, so that only a broken file has more
_MAX_DEPTH = 200  # of lists and objects inside one another
_ROWS_AT_ONCE = 100  # of Parquet and Arrow
_TEXT = (".json", ".jsonl", ".csv", ".tsv")
_BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what the `datasets` library writes beside rows
_KINDS = ".json, .jsonl, .csv, .tsv (each also .gz), .parquet, .arrow, a .zip of such files or a folder of them"


@dataclass(frozen=True)
class _Source:
    """One file of rows, wherever it lies: errors call it ``name``, ``open`` gives its bytes."""

    name: str
    open: Callable[[], IO[bytes]]


def read_rows(path: str | Path, most: int | None = None) -> Iterator[Located]:
    """The rows of a file, of every data file in a .zip or folder (also in folders inside it, sorted by path), or of an hf:// address.

    Data files end in .json, .jsonl, .csv, .tsv (these also gzipped, with .gz after their ending), .parquet or .arrow, a folder's also in
    .zip. Other files of a folder or archive are passed over, and so are hidden ones and the .json files of the `datasets` library that
    hold no rows (dataset_info.json, dataset_infos.json, dataset_dict.json, state.json).

    Args:
        path: ``hf://datasets/OWNER/NAME@REVISION/FILE`` reads from the hub, piece by piece, without keeping the file.
        most: only the first so many rows of each file.

    Yields:
        The place of a row, with its line (.jsonl, .csv, .tsv) or its number from 1 (the others), and its fields.

    Raises:
        UserError: a file is missing, unreadable, of another kind, broken (with its line), or has no rows; a row is no object or has more
            than 4,000,000 characters.
    """
    with _reading(str(path)):
        for source in _sources(str(path)):
            with _reading(source.name):
                yield from _rows(source, most)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number.

    Raises:
        UserError: the file is missing, unreadable, not UTF-8 (with its line), or has nothing but blank lines.
    """
    name, empty = str(path), True
    with _reading(name), Path(path).open("rb") as file:
        for number, line in numbered_lines(name, file):
            text = decode(name, line, number).rstrip("\r\n")
            if text.strip():
                empty = False
                yield number, text
    if empty:
        raise UserError(f"{path}: the file has no lines; give one with at least one line")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what can go wrong with a file into one line. (A zip archive's password is a RuntimeError.)"""
    try:
        yield
    except (OSError, HTTPError, RuntimeError, EOFError, BadZipFile, zlib.error, UnicodeError, pyarrow.ArrowException) as error:
        if name.startswith(HUB) and isinstance(error, (OSError, HTTPError)) and not isinstance(error, gzip.BadGzipFile):
            raise refusal(error, name) from error
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{name}: no such file or folder; give one that exists") from error
        raise UserError(f"{name}: cannot be read ({' '.join(str(error).split())[:160]}); check the file and its ending") from error


def data_files(path: str | Path) -> list[Path]:
    """The file itself, or the data files of a folder in the order in which they are read; links are followed.

    Raises:
        UserError: a folder has none.
    """
    if not Path(path).is_dir():
        return [Path(path)]
    return [Path(path, name) for name in _data_files(str(path), _names_in(Path(path)), (*_READERS, ".zip"))]


def _names_in(folder: Path) -> Iterator[str]:
    """Every file below a folder, relative to it. A link back to a folder that it lies in is not followed."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not Path(place).resolve().is_relative_to(Path(place, name).resolve())]
        yield from (str(Path(place, name).relative_to(folder)) for name in names)


def _sources(path: str) -> Iterator[_Source]:
    if not path.startswith(HUB) and Path(path).is_dir():
        for member in data_files(path):
            yield from _sources(str(member))
        return
    whole = _Source(path, partial(_open, path))
    if _ending(path) != ".zip":
        yield whole
        return
    with whole.open() as file, ZipFile(file) as archive:
        for name in _data_files(path, archive.namelist(), tuple(_READERS)):
            yield _Source(f"{path}/{name}", partial(_open_member, archive, name, f"{path}/{name}"))


def _open(path: str) -> IO[bytes]:
    return open_url(path) if path.startswith(HUB) else Path(path).open("rb")


def _open_member(archive: ZipFile, name: str, source: str) -> IO[bytes]:
    """Nothing is unpacked onto the disk, so that a name may say what it likes."""
    member = archive.open(name)
    if _ending(name) not in _TEXT:
        return member
    return unpacked(source, member, lambda: archive.getinfo(name).compress_size)


def _data_files(path: str, names: Iterable[str], endings: tuple[str, ...]) -> list[str]:
    """Which of the files in a folder or archive hold rows, sorted."""
    found = sorted(name for name in names if _ending(name) in endings and not _passed_over(PurePosixPath(name)))
    if not found:
        raise UserError(f"{path}: no data file is in it; put in at least one that is {_KINDS}")
    return found


def _passed_over(name: PurePosixPath) -> bool:
    return name.name in _BESIDE or any(part.startswith((".", "__MACOSX")) for part in name.parts)


def _rows(source: _Source, most: int | None) -> Iterator[Located]:
    number = 0
    with source.open() as file:
        reader = _READERS.get(_ending(source.name))
        if reader is None:
            raise UserError(f"{source.name}: a data set must be {_KINDS}; convert it to one of these")
        data = (
            unpacked(source.name, cast(IO[bytes], gzip.GzipFile(fileobj=file)), file.tell) if source.name.lower().endswith(".gz") else file
        )
        for number, row in islice(reader(source.name, data), most):
            where = place(source.name, number)
            _check(row, where)
            yield where, row
    if number == 0:
        raise UserError(f"{source.name}: the file has no rows; give one with at least one row")


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with named fields, got {type(row).__name__}; correct the row")
    try:
        count = _characters(row, _MAX_DEPTH)
    except RecursionError:
        raise UserError(f"{where}: a row may hold lists and objects {_MAX_DEPTH} deep at most; flatten or remove the row") from None
    if count > _MAX_ROW:
        raise UserError(f"{where}: a row may hold {_MAX_ROW:,} characters at most, got {count:,}; split or remove the row")


def _characters(value: Any, depth: int) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return 0
    if depth == 0:
        raise RecursionError
    return sum(_characters(one, depth - 1) for one in value)


def place(path: str | Path, number: int) -> str:
    """How errors name a row: ``file:line`` for kinds of a line a row, else ``file: row n``."""
    return f"{path}:{number}" if _ending(str(path)) in (".jsonl", ".csv", ".tsv") else f"{path}: row {number}"


def _ending(path: str) -> str:
    """The ending that tells the kind of file, lower case and without .gz (which only text takes: the others are compressed inside)."""
    name, dot, ending = path.rpartition("/")[2].lower().rpartition(".")
    if ending != "gz":
        return dot + ending if dot else ""
    inner = "." + name.rpartition(".")[2]
    return inner if inner in _TEXT else f"{inner}.gz"


def _separated(name: str, file: IO[bytes], delimiter: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(_MAX_ROW)  # Python's own limit of 131072 is shorter than some answers
    rows = csv.DictReader(_lines(name, file), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise UserError(f"{name}:{rows.line_num}: the row must have as many fields as the header; correct its separators or quotes")
            yield rows.line_num, row
    except csv.Error as error:
        # line_num is where the last good row ended
        raise UserError(f"{name}:{rows.line_num + 1}: broken CSV ({error}); correct the quotes of this row or split it") from error


def _lines(name: str, file: IO[bytes]) -> Iterator[str]:
    for number, line in numbered_lines(name, file):
        yield from io.StringIO(decode(name, line, number), newline="")  # a lone \r ends a line too


def _parquet(name: str, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    with pyarrow.parquet.ParquetFile(file) as table:
        yield from _records(table.iter_batches(batch_size=_ROWS_AT_ONCE))


def _arrow(name: str, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    whole = file.read(6) == b"ARROW1"  # the file form; the `datasets` library writes the stream form
    file.seek(0)
    if not whole:
        with pyarrow.ipc.open_stream(file) as stream:
            yield from _records(stream)
        return
    with pyarrow.ipc.open_file(file) as table:
        yield from _records(table.get_batch(number) for number in range(table.num_record_batches))


def _records(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[tuple[int, Row]]:
    parts = (batch.slice(start, _ROWS_AT_ONCE) for batch in batches for start in range(0, batch.num_rows, _ROWS_AT_ONCE))
    try:
        yield from enumerate((row for part in parts for row in part.to_pylist()), 1)
    except (ValueError, OverflowError) as error:  # a time, say, that Python has no value for
        raise pyarrow.ArrowInvalid(str(error)) from error


_READERS: dict[str, Callable[[str, Any], Iterator[tuple[int, Any]]]] = {
    ".json": json_list,
    ".jsonl": json_lines,
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
