"""Texts to measure a model on: a whole file, or one field of each row of a data set, local or on the hub."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from qlora_lightning.data.files import read_rows
from qlora_lightning.data.hub import download
from qlora_lightning.errors import UserError

ROW_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".zip")
"""A file with another ending (or none) is one text."""


def read_texts(path: str | Path, field: str = "text") -> list[str]:
    """The texts of a file that are not blank.

    Args:
        path: A folder or a file of rows (read as ``data.files.read_rows`` does), of which ``field`` holds the text; any other file is one
            text in UTF-8, as it stands. Both may be gzipped.
        field: Unused where the file is one text.

    Raises:
        UserError: the file is missing or unreadable, a row has no such field, or there is nothing but blanks.
    """
    file = Path(path)
    texts = list(_fields(file, field)) if file.is_dir() or _ending(file) in ROW_ENDINGS else [_whole(file)]
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise UserError(f"{path}: a text to measure must have words, this is empty; give a file with text")
    return kept


def hub_file(hub_id: str, file: str, revision: str) -> Path:
    """A file of a data set on the hub, downloaded where this machine has it not.

    Raises:
        UserError: the hub cannot be reached or does not give it.
    """
    return Path(download(hub_id, file, revision, ("", "data")))


def _ending(file: Path) -> str:
    """Lower case, without .gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _fields(file: Path, field: str) -> Iterator[str]:
    for where, row in read_rows(file):
        if not isinstance(text := row.get(field), str):
            found = f"it holds {type(text).__name__}" if field in row else f"found {', '.join(row)}"
            raise UserError(f"{where}: the field {field!r} must hold a text, {found}; name another with --field")
        yield text


def _whole(file: Path) -> str:
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.suffix.lower() == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file or folder; give one that exists") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}:{line}: text must be UTF-8, found byte 0x{error.object[error.start]:02x}; save the file as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error}); check the file and its ending") from error
