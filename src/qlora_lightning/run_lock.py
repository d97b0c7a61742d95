"""One fit a run folder: a lock that the system gives back when the process ends, however it ends."""

import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from qlora_lightning.console import say
from qlora_lightning.errors import UserError

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """Held from the beginning of a fit until ``release`` or the end of this process.

    A lock of the process (``lockf``), not of the open file: loader workers that outlive a killed run for some seconds do not hold it.

    Args:
        root: The run folder.

    Raises:
        UserError: another process holds it; the line says which.
    """

    def __init__(self, root: Path) -> None:
        self._file = (root / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"run folder {root} is in use by {self._holder()}; wait for its end or stop it, "
                "or name another folder with --trainer.default_root_dir"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(f"warning: the file system of {root} has no locks ({error.strerror}): nothing keeps a second fit out of it")
        self._file.truncate(0)
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
        self._file.flush()

    def release(self) -> None:
        """Let the next one in. The file stays: to delete it would let two in."""
        self._file.close()

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
        except ValueError:  # it has not written it yet
            return "another fit that has just begun"
        return f"the fit of process {holder['pid']} on {holder['host']} since {holder['since']}"
