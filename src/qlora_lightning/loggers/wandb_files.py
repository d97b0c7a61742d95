"""The folders that W&B leaves beside a run: what of them is uploaded, and which a later one replaces.

``wandb sync`` appends each folder of a run to what the server has, so rows that are in two folders would be there twice. A resumed start
therefore records the whole history, but for what is uploaded, and the folders of earlier starts are marked so that it passes over them.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made by protobuf

SYNCED = ".synced"
"""Suffix of the file by which ``wandb sync`` knows a .wandb file that it has uploaded. Empty when ``wandb sync`` has made it."""
_BLOCK_BYTES = 32768
_FILE_HEADER_BYTES, _PART_HEADER_BYTES = 7, 7


def rows_uploaded(folder: Path, run_id: str, name: str) -> int:
    """How many rows of a run ``wandb sync`` has uploaded.

    Args:
        folder: W&B's folder of the run, with one folder a start in it.
        run_id: W&B's id of the run.
        name: Under which each row has its number, from 0.
    """
    uploaded = [file for file in _records_of(folder, run_id) if (mark := _mark(file)).is_file() and not mark.read_bytes()]
    return max((_last(file, name) + 1 for file in uploaded), default=0)


def mark_replaced(folder: Path, run_id: str, by: Path) -> None:
    """Have ``wandb sync`` pass over the folders of a run that hold nothing which the folder ``by`` and the server do not."""
    for file in _records_of(folder, run_id):
        if file.parent.resolve() != by.resolve() and not _mark(file).exists():
            _mark(file).write_text(f"not uploaded: {by.name} holds all of it\n", encoding="utf-8")


def _records_of(folder: Path, run_id: str) -> list[Path]:
    return sorted(folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"))


def _mark(file: Path) -> Path:
    return file.with_name(file.name + SYNCED)


def _last(file: Path, name: str) -> int:
    """The highest value of a whole number that the history of a .wandb file has; -1 for none."""
    return max(
        (
            int(json.loads(item.value_json))
            for record in read_records(file)
            for item in record.history.item
            if name in (item.key, "/".join(item.nested_key))
        ),
        default=-1,
    )


def read_records(file: Path) -> Iterator[Record]:
    """The whole records of a .wandb file: a LevelDB log in blocks of 32 KiB after a header of 7 bytes that counts as part of the first.

    What a kill cut off at the end is left out.
    """
    data, position, parts = file.read_bytes(), _FILE_HEADER_BYTES, b""
    while position + _PART_HEADER_BYTES <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _PART_HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _PART_HEADER_BYTES
        parts += data[position : position + length]
        position += length
        if position > len(data):
            return
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""
