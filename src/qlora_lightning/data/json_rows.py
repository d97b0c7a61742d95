"""JSON as data sets hold it: one list of rows, or a row a line; what is broken is said with file and line."""

import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from qlora_lightning.data.unpacking import numbered_lines
from qlora_lightning.errors import UserError


def decode(name: str, data: bytes, line: int = 1) -> str:
    """UTF-8 text, a byte-order mark dropped; ``line`` is the number of the first line in ``data``."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(f"{name}:{line}: text must be UTF-8, found byte 0x{data[error.start]:02x}; save the file as UTF-8") from error


def json_list(name: str, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """The rows of a file that is one JSON list, or in spite of its name a row a line, with their numbers from 1.

    Raises:
        UserError: it is broken or no list.
    """
    if _JSON_LINES.match(data := file.read()):  # under another name, as several sets are published
        yield from json_lines(name, io.BytesIO(data))
        return
    try:
        yield from enumerate(_elements(name, decode(name, data)), 1)
    except (ValueError, RecursionError) as error:
        raise _broken(name, error, 1) from error


_BLANKS = re.compile(r"[ \t\n\r]*")
_JSON_LINES = re.compile(rb"\s*\{.*\}[ \t]*\r?\n\s*\{")


def _elements(name: str, text: str) -> Iterator[Any]:
    """The elements of the JSON list that ``text`` is, decoded one at a time."""

    def after(position: int) -> int:
        blanks = _BLANKS.match(text, position)
        assert blanks is not None
        return blanks.end()

    position, decoder = after(0), json.JSONDecoder()
    if not text.startswith("[", position):
        kind = type(decoder.raw_decode(text, position)[0]).__name__
        raise UserError(f"{name}: a .json data set must be one list of rows, got {kind}; use .jsonl for one row a line")
    position = after(position + 1)
    more = not text.startswith("]", position)
    while more:
        element, position = decoder.raw_decode(text, position)
        yield element
        position = after(position)
        more = text.startswith(",", position)
        if more:
            position = after(position + 1)
    if not text.startswith("]", position):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    if after(position + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, after(position + 1))


def json_lines(name: str, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """The rows of a file of JSON Lines, with their lines; blank ones are passed over.

    Raises:
        UserError: a line is broken.
    """
    for number, line in numbered_lines(name, file):
        if text := decode(name, line, number).strip():
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise _broken(name, error, number) from error
            yield number, row


def _broken(name: str, error: Exception, line: int) -> UserError:
    if not isinstance(error, json.JSONDecodeError):  # numbers and nesting beyond Python's limits
        return UserError(f"{name}:{line}: broken JSON ({error}); correct the line")
    return UserError(f"{name}:{line + error.lineno - 1}: broken JSON ({error.msg}, column {error.colno}); correct the line")
