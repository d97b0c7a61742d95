"""Files that must stay as they were while a run reads them: a change ends the run in one line instead of being trained on."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_lightning.data.files import data_files, read_rows
from qlora_lightning.data.rows import Located
from qlora_lightning.errors import UserError

_EVERY = 256  # rows between two looks at the file that they come from


@dataclass(frozen=True)
class FileState:
    """What the file system says of a file at one moment."""

    file: Path
    inode: int
    size: int
    """Bytes."""
    written: int
    """Nanoseconds since 1970."""

    @classmethod
    def of(cls, file: Path) -> "FileState":
        """The state now; raises FileNotFoundError where there is no such file."""
        found = file.stat()
        return cls(file, found.st_ino, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Raises UserError where the file is no longer there, or was written to since."""
        try:
            now = FileState.of(self.file)
        except FileNotFoundError as error:
            raise UserError(f"{self.file} was removed while it was being read; put it back and {_AGAIN}") from error
        if (now.size, now.written) != (self.size, self.written):
            raise UserError(f"{self.file} was {_changed(self, now)} while it was being read; put it back as it was and {_AGAIN}")

    def check_mapped(self) -> None:
        """As ``check``, of a file that is mapped into memory, which may be removed or replaced by another: the mapping keeps its bytes.

        To touch a page behind the end of a file that was cut would end the process by a signal, without a word.
        """
        try:
            now = FileState.of(self.file)
        except FileNotFoundError:
            return
        if now.inode == self.inode and (now.size, now.written) != (self.size, self.written):
            raise UserError(
                f"{self.file}, prepared rows that the run reads, was {_changed(self, now)}; they will be prepared anew: {_AGAIN}"
            )

    def rows(self, most: int | None = None) -> Iterator[Located]:
        """The rows of the file, as ``read_rows``, for as long as it does not change."""
        with unchanged([self]):  # half a row, say, where the file is being written to
            for number, located in enumerate(read_rows(self.file, most)):
                if number % _EVERY == 0:
                    self.check()
                yield located


def states_of(files: Iterable[str | Path]) -> list[FileState]:
    """The states of data files, and of those that folders hold.

    Raises:
        UserError: one cannot be looked at.
    """
    try:
        return [FileState.of(member) for file in files for member in data_files(file)]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check the file") from error


@contextmanager
def unchanged(states: Sequence[FileState]) -> Iterator[None]:
    """Raises UserError where one of the files has changed by the end of this, also in place of an error that the change may have caused."""
    try:
        yield
    except UserError:
        _check_all(states)
        raise
    _check_all(states)


def _check_all(states: Sequence[FileState]) -> None:
    for state in states:
        state.check()


_AGAIN = "start again (a fit goes on with --ckpt_path last)"


def _changed(then: FileState, now: FileState) -> str:
    return f"changed from {then.size:,} to {now.size:,} bytes" if then.size != now.size else "written to"
