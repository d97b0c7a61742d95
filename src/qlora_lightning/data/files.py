"""Rows from files: JSON, JSON Lines, CSV and Parquet, local or from the hub. Errors name the file and the line."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.errors import UserError

Row = dict[str, Any]
_MAX_CSV_FIELD = 2**31 - 1  # characters; Python's own limit of 131072 is shorter than some answers


def read_rows(path: str | Path) -> Iterator[tuple[int, Row]]:
    """The rows of a .json, .jsonl, .csv or .parquet file; the first three also gzipped, with .gz after their ending.

    Yields:
        The line on which the row stands (.jsonl, .csv) or its number from 1 (.json, .parquet), and its fields.

    Raises:
        UserError: the file is missing, unreadable, of another kind, broken (with its line), or has no rows.
    """
    path = Path(path)
    reader = _READERS.get(_ending(path))
    if reader is None:
        raise UserError(f"{path}: a data set must be .json, .jsonl, .csv (each also .gz) or .parquet; convert it to one of these")
    number = 0
    with _reading(path):
        for number, row in reader(path):
            if not isinstance(row, dict):
                raise UserError(
                    f"{place(path, number)}: a row must be an object with named fields, got {type(row).__name__}; correct the row"
                )
            yield number, row
    if number == 0:
        raise UserError(f"{path}: the file has no rows; give one with at least one row")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number.

    Raises:
        UserError: the file is missing, unreadable, not UTF-8 (with its line), or has nothing but blank lines.
    """
    path, empty = Path(path), True
    with _reading(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode(path, line, number).rstrip("\r\n")
            if text.strip():
                empty = False
                yield number, text
    if empty:
        raise UserError(f"{path}: the file has no lines; give one with at least one line")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what can go wrong with a file into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give one that exists") from error
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:160]}); check the file and its ending") from error


def place(path: str | Path, number: int) -> str:
    """How errors name a row: ``file:line`` for kinds of a line a row, else ``file: row n``."""
    return f"{path}:{number}" if _ending(Path(path)) in (".jsonl", ".csv") else f"{path}: row {number}"


def _ending(path: Path) -> str:
    """The ending that tells the kind of file, lower case and without .gz (which Parquet, compressed inside, does not take)."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if endings[-1:] == [".gz"]:
        return endings[0] if endings[0] != ".parquet" else ".parquet.gz"
    return endings[-1] if endings else ""


def _bytes(path: Path) -> io.BufferedIOBase | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _decode(path: Path, data: bytes, line: int = 1) -> str:
    """UTF-8 text, a byte-order mark dropped; ``line`` is the number of the first line in ``data``."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: text must be UTF-8, found byte 0x{data[error.start]:02x}; save the file as UTF-8") from error


def _parse(path: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise UserError(f"{path}:{line}: broken JSON ({error.msg}, column {error.colno}); correct the line") from error


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    with _bytes(path) as file:
        rows = _parse(path, _decode(path, file.read()))
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json data set must be one list of rows, got {type(rows).__name__}; use .jsonl for one row a line")
    yield from enumerate(rows, 1)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with _bytes(path) as file:
        for number, line in enumerate(file, 1):
            if text := _decode(path, line, number).strip():
                yield number, _parse(path, text, number)


def _csv(path: Path) -> Iterator[tuple[int, Row]]:
    with _bytes(path) as file:
        text = io.StringIO(_decode(path, file.read()), newline="")
    csv.field_size_limit(_MAX_CSV_FIELD)
    rows = csv.DictReader(text, strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise UserError(f"{path}:{rows.line_num}: the row must have as many fields as the header; correct its commas or quotes")
            yield rows.line_num, row
    except csv.Error as error:
        # line_num is where the last good row ended
        raise UserError(f"{path}:{rows.line_num + 1}: broken CSV ({error}); correct the quotes of this row") from error


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}


def fetch(spec: DatasetSpec) -> tuple[Path, Path | None]:
    """The local files of a data set, training and validation; downloads what the hub holds and this machine does not.

    Raises:
        UserError: a local file does not exist, the hub cannot be reached, or does not give the file.
    """
    train = _local(spec.path, "data.dataset.path") if spec.path is not None else _download(spec, spec.hub_file or "")
    if spec.validation_path is not None:
        return train, _local(spec.validation_path, "data.dataset.validation_path")
    return train, _download(spec, spec.validation_hub_file) if spec.validation_hub_file else None


def _local(path: str, option: str) -> Path:
    """Checked here, where it is still known which option named the file."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file; correct {option} (relative paths count from the YAML that names them)")
    return Path(path)


def _download(spec: DatasetSpec, file: str) -> Path:
    assert spec.hub_id is not None
    name = f"{file} of the hub data set {spec.hub_id}"
    try:
        return Path(hf_hub_download(spec.hub_id, file, repo_type="dataset", revision=spec.revision))
    except GatedRepoError as error:
        raise UserError(f"{name} is gated; accept its terms on the hub and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {spec.revision}; correct data.dataset.revision") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no data set {spec.hub_id}, or not for you; correct data.dataset.hub_id or log in") from error
    except RemoteEntryNotFoundError as error:
        raise UserError(f"there is no {name} at revision {spec.revision}; correct data.dataset.hub_file") from error
    except HFValidationError as error:
        raise UserError(f"data.dataset.hub_id must look like owner/name, got {spec.hub_id!r}; correct it") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{name} is not on this machine and the hub cannot be reached (HF_HUB_OFFLINE is set or there is no connection); "
            "go online or give a local copy with --data.dataset.path"
        ) from error
    except OSError as error:
        raise UserError(f"{name} cannot be fetched ({' '.join(str(error).split())[:160]}); check the connection and the disk") from error
