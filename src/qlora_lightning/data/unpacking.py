"""Reading what may be far larger than it looks: text packed by zip or gzip, and lines without an end."""

import io
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from qlora_lightning.errors import UserError

MAX_LINE = 24_000_000  # bytes: 4,000,000 characters, of which JSON may spell each in six (\uXXXX)
_ALWAYS = 1 << 26  # bytes that may come out of anything
_RATIO = 200  # text packs 3 to 20 times smaller, the same line over and over about 100, a bomb 1000


class _Unpacked(io.RawIOBase):
    """Unpacked bytes, as many as the packed ones make likely."""

    def __init__(self, name: str, stream: IO[bytes], packed: Callable[[], int]) -> None:
        self._name, self._stream, self._packed, self._given = name, cast(Any, stream), packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count: int = self._stream.readinto(buffer)
        self._given += count
        if self._given > _ALWAYS and self._given > _RATIO * self._packed():
            raise UserError(
                f"{self._name}: unpacked, a file may be {_RATIO} times as large as packed, and this one is larger; "
                "unpack it yourself if that is right"
            )
        return count


def unpacked(name: str, stream: IO[bytes], packed: Callable[[], int]) -> IO[bytes]:
    """``stream``, whose bytes come out of an archive, with an end to its growth.

    Args:
        name: What errors call it.
        stream: Gives unpacked bytes.
        packed: The packed bytes read so far, or those that there are.

    Raises:
        UserError: reading it gives more than 64 MiB and more than 200 times what was packed.
    """
    return cast(IO[bytes], io.BufferedReader(_Unpacked(name, stream, packed), 1 << 18))


def numbered_lines(name: str, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, from 1, with their ends.

    Raises:
        UserError: one is longer than any row may be.
    """
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise UserError(f"{name}:{number}: a line may hold {MAX_LINE:,} bytes at most, and this one holds more; split or remove it")
        yield number, line
