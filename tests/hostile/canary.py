"""What hostile files carry: a pickle that makes a file. Where the file appears, a stranger's code has run."""

from pathlib import Path
from typing import Any


class Canary:
    """Unpickled, it makes the file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)
